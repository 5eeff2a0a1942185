"""The items of an answer as JSON: see kernel/cpp/json_items.h."""

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
