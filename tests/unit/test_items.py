"""Items as JSON: what any reader makes of it is what the arrays hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kernel import items
from kernel.engine import native
from kernel.items import items_json

needs_native = pytest.mark.skipif(native is None, reason="the extension was not built")


@pytest.mark.parametrize("numpy", [False, True])
@given(arrays(np.float32, st.integers(0, 20)), st.floats(-10, 10), st.floats(-10, 10))
def test_probabilities_are_sigmoids(numpy: bool, scores: np.ndarray, a: float, b: float) -> None:
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        if numpy:
            patch.setattr(items, "native", None)
        found = items.probabilities(scores, a, b)
        logits = a * scores.astype(np.float64) + b
        expected = np.where(logits < 0, np.exp(logits) / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


@needs_native
@given(arrays(np.float32, st.integers(0, 20)), st.booleans(), st.booleans())
def test_every_number_reads_back(scores: np.ndarray, probable: bool, placed: bool) -> None:
    count = len(scores)
    ids = np.random.default_rng(count).integers(-(2**63), 2**63 - 1, count)
    positions = np.arange(count, dtype=np.int32)[::-1].copy()
    text = items_json(ids, scores, scores if probable else None, positions if placed else None)
    assert text is not None
    found = json.loads(text)
    assert [item["id"] for item in found] == ids.tolist()
    for name, wanted in (("score", True), ("probability", probable)):
        read = [item.get(name, "absent") for item in found]
        if wanted:
            back = np.array([np.nan if value is None else value for value in read], np.float32)
            np.testing.assert_array_equal(back, np.where(np.isfinite(scores), scores, np.nan).astype(np.float32))
            assert all(isinstance(value, float | None) for value in read)
        else:
            assert set(read) <= {"absent"}
    assert [item.get("position") for item in found] == (positions.tolist() if placed else [None] * count)


@needs_native
def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        items_json(np.arange(3), np.zeros(2, np.float32), None, None)
