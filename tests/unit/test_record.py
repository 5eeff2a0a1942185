"""Packing: the same bytes from NumPy and from the native kernel, and as much of the numbers as the dtype can hold."""

from __future__ import annotations

import numpy as np
import pytest

from kernel import engine, record
from kernel.errors import KernelError, RecordError
from kernel.head import HeadKind
from kernel.record import DTYPES, Dtype, RecordLayout
from tests.kernels import KINDS, NATIVE, SHAPES, head_of, made


@pytest.mark.skipif(not NATIVE, reason="the extension was not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_native_write_the_same_bytes(kind: HeadKind, dtype: Dtype) -> None:
    assert engine.native is not None
    for shape in SHAPES:
        layout = RecordLayout(head_of(kind, shape, bias=shape[2] % 8 == 0), dtype)
        _, items = made(layout.head, 9)
        items *= 10.0 ** np.random.default_rng(1).uniform(-9, 4, (9, 1)).astype(np.float32)
        rows = engine.pack(layout, items)
        np.testing.assert_array_equal(rows, record.pack(layout, items), err_msg=str(shape))
        head = layout.head
        native = engine.native.make_shape(kind, dtype, *shape, head.item_bias, head.scale)
        assert (layout.stride, layout.scales_at, layout.bias_at, layout.heads) == (
            *(native.stride, native.scales_at, native.bias_at, native.heads),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_comes_back(kind: HeadKind) -> None:
    for shape in SHAPES[::7]:
        head = head_of(kind, shape, bias=True)
        _, items = made(head, 5)
        back = {
            dtype: record.unpack(RecordLayout(head, dtype), record.pack(RecordLayout(head, dtype), items))
            for dtype in DTYPES
        }
        np.testing.assert_array_equal(back["f32"], items)
        np.testing.assert_array_equal(back["f16"][:, :-1], items[:, :-1].astype(np.float16).astype(np.float32))
        for dtype in DTYPES:
            np.testing.assert_array_equal(back[dtype][:, -1], items[:, -1])
        heads = items[:, :-1].reshape(5, -1, head.dim)
        step = np.abs(heads).max(axis=2, keepdims=True) / 127 * 1.001 + 2.0**-24
        assert (np.abs(back["int8"][:, :-1].reshape(heads.shape) - heads) <= step / 2 * 1.001).all()


def test_a_head_of_zeros_stays_zero() -> None:
    layout = RecordLayout(head_of("maxsim", (1, 2, 8)), "int8")
    assert not record.unpack(layout, engine.pack(layout, np.zeros((3, 16), np.float32))).any()


@pytest.mark.parametrize("pack", [engine.pack, record.pack])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [("f32", np.nan), ("f32", np.inf), ("f16", 7e4), ("f16", -np.inf), ("int8", 1e7), ("int8", np.nan)],
)
def test_what_a_dtype_cannot_hold_is_refused_with_its_row(pack: object, dtype: Dtype, value: float) -> None:
    layout = RecordLayout(head_of("cross_attention", (2, 3, 8), bias=True), dtype)
    _, items = made(layout.head, 6)
    items[4, 70] = value
    with pytest.raises(RecordError, match="record 4") as caught:
        pack(layout, items)  # type: ignore[operator]
    assert caught.value.row == 4


@pytest.mark.parametrize(
    ("shape", "dtype", "named"),
    [
        ((33, 1, 8), "f32", "user_heads is 33"),
        ((1, 17, 8), "f32", "item_heads is 17"),
        ((1, 1, 257), "int8", "dim is 257"),
    ],
)
def test_a_head_that_no_kernel_takes_is_refused(shape: tuple[int, int, int], dtype: Dtype, named: str) -> None:
    with pytest.raises(KernelError, match=named):
        RecordLayout(head_of("maxsim", shape), dtype)
    with pytest.raises(KernelError, match="dtype is 'f64'"):
        RecordLayout(head_of("maxsim", (1, 1, 8)), "f64")  # type: ignore[arg-type]


def test_an_int8_record_of_four_heads_of_32_is_144_octets() -> None:
    assert RecordLayout(head_of("maxsim", (4, 4, 32), bias=True), "int8").stride == 144
    assert RecordLayout(head_of("cross_attention", (4, 4, 32)), "f16").stride == 768
