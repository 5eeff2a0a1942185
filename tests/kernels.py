"""Heads, users and items of every shape that the kernel's tests go through."""

from __future__ import annotations

from itertools import product

import numpy as np

from kernel import engine
from kernel.engine import Finder, Index, Table, open_index, open_table
from kernel.head import HeadKind, HeadSpec
from kernel.record import Dtype, RecordLayout

KINDS: tuple[HeadKind, ...] = ("maxsim", "cross_attention")
HEADS, DIMS, COUNTS = (1, 2, 3, 4, 8), (8, 12, 32, 64, 100), (0, 1, 15, 16, 17, 33)
SHAPES = [*product(HEADS, HEADS, DIMS), (5, 7, 20), (32, 16, 32), (32, 1, 256), (1, 16, 256)]
NATIVE = [level for level in engine.levels() if level != engine.NUMPY]


def head_of(kind: HeadKind, shape: tuple[int, int, int], *, bias: bool = False, scale: float = 2.5) -> HeadSpec:
    user_heads, item_heads, dim = shape
    return HeadSpec(kind=kind, user_heads=user_heads, item_heads=item_heads, dim=dim, scale=scale, item_bias=bias)


def made(head: HeadSpec, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A user record (user size,) and item records (count, item size) as towers make them."""
    rng = np.random.default_rng([seed, head.user_heads, head.item_heads, head.dim])
    return _side(head, rng, 1, head.user_heads, head.user_size)[0], _side(
        head, rng, count, head.item_heads, head.item_size
    )


def _side(head: HeadSpec, rng: np.random.Generator, count: int, heads: int, size: int) -> np.ndarray:
    records = rng.standard_normal((count, size)).astype(np.float32)
    parts = size // (heads * head.dim)
    matrices = records[:, : parts * heads * head.dim].reshape(count, parts, heads, head.dim)
    if head.kind == "maxsim":
        matrices[:] = matrices / np.linalg.norm(matrices, axis=-1, keepdims=True)
    else:
        matrices[:, 2] = 1 / (1 + np.exp(-matrices[:, 2]))
    return records


def index_of(keys: np.ndarray) -> Finder:
    """An index over integer ids (n,)."""
    unsigned = keys.astype(np.int64).view(np.uint64)
    return open_index(Index(engine.build_index(unsigned), len(unsigned)))


def table_of(head: HeadSpec, dtype: Dtype, items: np.ndarray, keys: np.ndarray | None = None) -> Table:
    """A table at the selected level; ids are row numbers where no keys are given."""
    layout = RecordLayout(head, dtype)
    return open_table(layout, engine.pack(layout, items), index_of(np.arange(len(items)) if keys is None else keys))
