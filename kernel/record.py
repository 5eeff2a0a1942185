"""Packed item records in NumPy: the same bytes as kernel/cpp/record.h defines and pack.cpp writes.

E and G of a head lie in quads ([dims/4][heads][4]), V head after head; int8 adds a scale for each head, f16, above or
equal max|v| / 127; the bias is f32 at the end. Heads are padded to a power of two by repeating the last one, dimensions
by zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from kernel.errors import KernelError, RecordError
from kernel.head import ITEM_PARTS, HeadSpec

Dtype = Literal["f32", "f16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
WIDTHS: dict[Dtype, int] = {"f32": 4, "f16": 2, "int8": 1}
MAX_USER_HEADS, MAX_ITEM_HEADS, MAX_DIM, MAX_INT8_DIM = 32, 16, 1024, 256
STRIDE_UNIT = 16  # octets
PACK_ROWS = 65_536  # rows whose intermediates are in memory at a time


class _Part(NamedTuple):
    at: int  # octets from the start of a record
    in_quads: bool


@dataclass(frozen=True)
class RecordLayout:
    """Where everything of one item record lies."""

    form: ClassVar[Literal["quads"]] = "quads"
    head: HeadSpec
    dtype: Dtype

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise KernelError(f"dtype is {self.dtype!r}: use {', '.join(DTYPES)}")
        if self.head.kind == "onnx":
            raise KernelError("a head of kind onnx has no records that a kernel scores: it runs its own graph")
        most_dim = MAX_INT8_DIM if self.dtype == "int8" else MAX_DIM
        for name, most in (("user_heads", MAX_USER_HEADS), ("item_heads", MAX_ITEM_HEADS), ("dim", most_dim)):
            if getattr(self.head, name) > most:
                raise KernelError(f"{name} is {getattr(self.head, name)}: {self.dtype} records take at most {most}")

    @cached_property
    def heads(self) -> int:
        return 1 << (self.head.item_heads - 1).bit_length()

    @cached_property
    def dims(self) -> int:
        """Dimensions of a head in quads."""
        return _up(self.head.dim, max(4, 16 // self.heads))

    @cached_property
    def plain(self) -> int:
        """Dimensions of a head that lies whole."""
        return _up(self.head.dim, 16)

    @cached_property
    def parts(self) -> tuple[_Part, ...]:
        """E, or E, V and G."""
        width = WIDTHS[self.dtype] * self.heads
        v_at = width * self.dims
        g_at = v_at + width * self.plain
        return (_Part(0, True), _Part(v_at, False), _Part(g_at, True))[: ITEM_PARTS[self.head.kind]]

    @cached_property
    def scales_at(self) -> int:
        part = self.parts[-1]
        return part.at + WIDTHS[self.dtype] * self.heads * (self.dims if part.in_quads else self.plain)

    @cached_property
    def bias_at(self) -> int:
        scales = 2 * len(self.parts) * self.heads if self.dtype == "int8" else 0
        return _up(self.scales_at + scales, 4)

    @cached_property
    def size(self) -> int:
        """Octets that are read of a record."""
        return self.bias_at + 4 * self.head.item_bias

    @cached_property
    def stride(self) -> int:
        """Octets from a record to the next."""
        return _up(self.size, STRIDE_UNIT)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def pack(layout: RecordLayout, records: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows (n, stride) of item records (n, item_size). Raises RecordError naming the first that cannot be held."""
    rows = np.zeros((len(records), layout.stride), np.uint8)
    for start in range(0, len(records), PACK_ROWS):
        part = records[start : start + PACK_ROWS]
        fits = _pack(layout, part, rows[start : start + PACK_ROWS])
        if not fits.all():
            raise RecordError(start + int(np.argmin(fits)), layout.dtype)
    return rows


def _pack(layout: RecordLayout, records: NDArray[np.float32], rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Fill rows (n, stride); returns which records (n,) they can hold."""
    n, hi, d, h = len(records), layout.head.item_heads, layout.head.dim, layout.heads
    fits: Any = np.isfinite(records).all(axis=1)
    source = np.where(fits[:, None], records, 0)
    for number, part in enumerate(layout.parts):
        values = source[:, number * hi * d : (number + 1) * hi * d].reshape(n, hi, d)
        values = values[:, np.minimum(np.arange(h), hi - 1)]
        numbers, scales, held = _numbers(values, layout.dtype)
        fits = fits & held
        _matrix(layout, rows, part)[:] = _shaped(layout, numbers, part.in_quads)
        if scales is not None:
            at = layout.scales_at + 2 * number * h
            rows[:, at : at + 2 * h] = np.ascontiguousarray(scales).view(np.uint8)
    if layout.head.item_bias:
        rows[:, layout.bias_at : layout.bias_at + 4] = np.ascontiguousarray(source[:, -1:]).view(np.uint8)
    return np.asarray(fits, np.bool_)


def _numbers(values: NDArray[np.float32], dtype: Dtype) -> tuple[NDArray[Any], NDArray[np.float16] | None, Any]:
    """Values (n, heads, dim) as stored, the scales (n, heads) of int8, and which records (n,) can be held."""
    if dtype == "f32":
        return values, None, True
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if dtype == "f16":
            halves = values.astype(np.float16)
            return halves, None, np.isfinite(halves).all(axis=(1, 2))
        wanted = np.abs(values).max(axis=2) / np.float32(127)
        scales = wanted.astype(np.float16)
        scales = np.where(scales < wanted, np.nextafter(scales, np.float16(np.inf)), scales)
        step = scales.astype(np.float32)[..., None]
        held = np.isfinite(scales).all(axis=1)
        numbers = np.where((step > 0) & np.isfinite(step), np.rint(values / step), 0)
        return np.clip(numbers, -127, 127).astype(np.int8), scales, held


def _shaped(layout: RecordLayout, numbers: NDArray[Any], in_quads: bool) -> NDArray[Any]:
    """(n, heads, dim) as the record has it: (n, dims/4, heads, 4) or (n, heads, plain)."""
    n, h, d = numbers.shape
    if not in_quads:
        return np.pad(numbers, ((0, 0), (0, 0), (0, layout.plain - d)))
    padded = np.pad(numbers, ((0, 0), (0, 0), (0, layout.dims - d)))
    return padded.reshape(n, h, layout.dims // 4, 4).transpose(0, 2, 1, 3)


def _matrix(layout: RecordLayout, rows: NDArray[np.uint8], part: _Part) -> NDArray[Any]:
    """A view of one part of all rows: (n, dims/4, heads, 4) or (n, heads, plain)."""
    shape = (layout.dims // 4, layout.heads, 4) if part.in_quads else (layout.heads, layout.plain)
    kind: Any = {"f32": np.float32, "f16": np.float16, "int8": np.int8}[layout.dtype]
    octets = WIDTHS[layout.dtype] * int(np.prod(shape))
    view: NDArray[Any] = rows[:, part.at : part.at + octets].view(kind)
    return view.reshape(len(rows), *shape)  # splits an axis: no copy


def unpack(layout: RecordLayout, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Records (n, item_size) of rows (n, stride)."""
    n, hi, d = len(rows), layout.head.item_heads, layout.head.dim
    rows = np.ascontiguousarray(rows)
    records = np.empty((n, layout.head.item_size), np.float32)
    for number, part in enumerate(layout.parts):
        matrix = _matrix(layout, rows, part)
        if part.in_quads:
            matrix = matrix.transpose(0, 2, 1, 3).reshape(n, layout.heads, layout.dims)
        values = matrix[:, :hi, :d].astype(np.float32)
        if layout.dtype == "int8":
            at = layout.scales_at + 2 * number * layout.heads
            scales = np.ascontiguousarray(rows[:, at : at + 2 * hi]).view(np.float16)
            values = values * scales.astype(np.float32)[..., None]
        records[:, number * hi * d : (number + 1) * hi * d] = values.reshape(n, hi * d)
    if layout.head.item_bias:
        records[:, -1:] = np.ascontiguousarray(rows[:, layout.bias_at : layout.bias_at + 4]).view(np.float32)
    return records
