"""Records of a head that has its own graph: they come back as they were, or are refused with the row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kernel.errors import KernelError, RecordError
from kernel.head import HeadSpec
from kernel.plain import PLAIN_DTYPES, PlainLayout, item_layout, pack, unpack
from kernel.record import Dtype, RecordLayout

HEAD = HeadSpec(kind="onnx", user_heads=3, item_heads=17, dim=1, scale=1.0)
RECORDS = np.random.default_rng(0).normal(size=(33, 17)).astype(np.float32)


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
@pytest.mark.parametrize("count", [0, 1, 33])
def test_records_come_back(dtype: Dtype, count: int) -> None:
    layout = PlainLayout(HEAD, dtype)
    rows = pack(layout, RECORDS[:count])
    assert rows.shape == (count, 128 if dtype == "f32" else 64)
    found = unpack(layout, rows)
    kept = RECORDS[:count].astype(np.float16 if dtype == "f16" else np.float32).astype(np.float32)
    np.testing.assert_array_equal(found, kept)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert not rows[:, layout.size :].any(), "what pads a row is part of a file's hash"


@pytest.mark.parametrize(("dtype", "bad"), [("f32", np.nan), ("f32", np.inf), ("f16", -np.inf), ("f16", 1e5)])
def test_a_record_that_cannot_be_held_is_named(dtype: Dtype, bad: float) -> None:
    records = RECORDS.copy()
    records[7, 16] = records[9, 0] = bad
    with pytest.raises(RecordError) as caught:
        pack(PlainLayout(HEAD, dtype), records)
    assert caught.value.row == 7


def test_eight_bits_are_refused_with_what_to_use() -> None:
    with pytest.raises(KernelError, match=r"'int8', but the graph of a head of kind onnx .*: use auto, f32 or f16"):
        item_layout(HEAD, "int8")


def test_the_head_decides_on_the_layout() -> None:
    packed = item_layout(replace(HEAD, kind="maxsim", item_heads=2, dim=8), "int8")
    assert isinstance(packed, RecordLayout)
    assert (packed.form, item_layout(HEAD, "f16").form) == ("quads", "plain")
