"""The shape of a scoring head and of the records it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

HeadKind = Literal["maxsim", "cross_attention", "onnx"]
Scorer = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]  # user, items -> scores

USER_PARTS: dict[str, int] = {"maxsim": 1, "cross_attention": 5, "onnx": 1}  # E | E V G A B | whatever the graph reads
ITEM_PARTS: dict[str, int] = {"maxsim": 1, "cross_attention": 3, "onnx": 1}  # E | E V G | whatever the graph reads


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """How one user record and one item record become a score.

    A user record is `USER_PARTS` matrices (user_heads, dim), flat; an item record is `ITEM_PARTS` matrices
    (item_heads, dim), flat, and one float for the item's bias when `item_bias` is set. No kernel scores `onnx`, which
    has a graph of its own; its records are user_heads and item_heads floats, dim 1.
    """

    kind: HeadKind
    user_heads: int
    item_heads: int
    dim: int
    scale: float  # 1/tau
    item_bias: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("maxsim", "cross_attention", "onnx"):
            raise ValueError(f"head kind is {self.kind!r}: use maxsim, cross_attention or onnx")
        for name in ("user_heads", "item_heads", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"head {name} is {getattr(self, name)}: it must be at least 1")

    @property
    def user_size(self) -> int:
        """Floats of one user record."""
        return USER_PARTS[self.kind] * self.user_heads * self.dim

    @property
    def item_size(self) -> int:
        """Floats of one item record."""
        return ITEM_PARTS[self.kind] * self.item_heads * self.dim + self.item_bias

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HeadSpec:
        return cls(**value)
