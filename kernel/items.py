"""The items of an answer: their probabilities, and all of them as JSON (see kernel/cpp/json_items.h)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernel.engine import native


def items_json(
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
    probabilities: NDArray[np.float32] | None,
    positions: NDArray[np.int32] | None,
) -> bytes | None:
    """A JSON array of an object for each item, (k,) each; NaN becomes null. None without the extension."""
    if native is None:
        return None
    text: bytes = native.items_json(ids, scores, probabilities, positions)
    return text


def probabilities(scores: NDArray[np.float32], a: float, b: float) -> NDArray[np.float32]:
    """sigmoid(a * score + b), (k,) float32; NaN stays NaN. NumPy takes 16 us of a request for 100, in eight steps."""
    if native is None:
        return (0.5 * (1 + np.tanh(0.5 * (a * scores.astype(np.float64) + b)))).astype(np.float32)
    found: NDArray[np.float32] = native.probabilities(scores, a, b)
    return found
