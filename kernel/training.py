"""Scores of whole lists for training, and their gradients, in native code: plain float32 records, no scale.

    users (b, user size) f32, items (m, item size) f32, chosen (b, n) int64: rows of items
    scores (b, n) f32: sum_p max_q of the similarity, see kernel/reference.py; biases (b, n) f32, or (0, 0) without

What is here is fast, not needed: training has the same formulas in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernel import engine
from kernel.head import HeadSpec

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


def available() -> bool:
    """Whether the selected level is native."""
    return engine.native is not None and engine.level() != engine.NUMPY


def score_lists(head: HeadSpec, users: Floats, items: Floats, chosen: Rows, threads: int) -> tuple[Floats, Floats]:
    """Scores and biases. Raises ValueError where an array does not fit the head or an index leads out of items."""
    scores = np.empty(chosen.shape, np.float32)
    biases = np.empty(chosen.shape if head.item_bias else (0, 0), np.float32)
    _native(head).score(users, items, chosen, threads, scores, biases)
    return scores, biases


def differentiate_lists(
    head: HeadSpec,
    users: Floats,
    items: Floats,
    chosen: Rows,
    of_scores: Floats,
    of_biases: Floats,
    threads: int,
) -> tuple[Floats, Floats]:
    """From the gradients of scores and biases to those of users and items.

    Bit for bit the same for the same number of threads. Equal best heads share a gradient evenly, as torch's amax.
    """
    of_users, of_items = np.empty_like(users), np.empty_like(items)
    _native(head).differentiate(users, items, chosen, threads, of_scores, of_biases, of_users, of_items)
    return of_users, of_items


def _native(head: HeadSpec) -> Any:
    assert engine.native is not None
    return engine.native.ListsHead(
        head.kind, head.user_heads, head.item_heads, head.dim, head.item_bias, engine.level()
    )
