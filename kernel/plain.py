"""Item records as a head's own graph reads them: their floats in a row, f32 or f16, padded with zeros to the stride."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kernel.errors import KernelError, RecordError
from kernel.head import HeadSpec
from kernel.record import WIDTHS, Dtype, RecordLayout

PLAIN_DTYPES: tuple[Dtype, ...] = ("f32", "f16")
STRIDE_UNIT = 64  # octets, a cache line


@dataclass(frozen=True)
class PlainLayout:
    """Where the floats of one item record lie."""

    form: ClassVar[Literal["plain"]] = "plain"
    head: HeadSpec
    dtype: Dtype

    def __post_init__(self) -> None:
        if self.dtype not in PLAIN_DTYPES:
            raise KernelError(
                f"dtype is {self.dtype!r}, but the graph of a head of kind {self.head.kind} reads plain floats: "
                f"use auto, {' or '.join(PLAIN_DTYPES)}"
            )

    @property
    def size(self) -> int:
        """Octets that are read of a record."""
        return WIDTHS[self.dtype] * self.head.item_size

    @property
    def stride(self) -> int:
        """Octets from a record to the next."""
        return -(-self.size // STRIDE_UNIT) * STRIDE_UNIT

    def numbers(self, rows: NDArray[np.uint8]) -> NDArray[np.floating]:
        """A view (n, item_size) of the floats of rows (n, stride)."""
        view: NDArray[np.floating] = rows[:, : self.size].view(np.float16 if self.dtype == "f16" else np.float32)
        return view


ItemLayout = RecordLayout | PlainLayout


def item_layout(head: HeadSpec, dtype: Dtype) -> ItemLayout:
    """How the items of this head are stored. Raises KernelError for a head or a type that cannot be."""
    return PlainLayout(head, dtype) if head.kind == "onnx" else RecordLayout(head, dtype)


def pack(layout: PlainLayout, records: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows (n, stride) of item records (n, item_size). Raises RecordError naming the first that cannot be held."""
    rows = np.zeros((len(records), layout.stride), np.uint8)
    with np.errstate(over="ignore"):  # what f16 cannot hold becomes infinity
        layout.numbers(rows)[:] = records
    fits = np.isfinite(layout.numbers(rows)).all(axis=1)
    if not fits.all():
        raise RecordError(int(np.argmin(fits)), layout.dtype)
    return rows


def unpack(layout: PlainLayout, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Records (n, item_size) of rows (n, stride)."""
    return np.ascontiguousarray(layout.numbers(rows), np.float32)
