"""The referee: every contestant's ranking must be the float64 reference's over the values that this contestant stores.

Near ties may change places: a score may differ from the reference by a tolerance that depends on how values are stored.
Anything beyond voids the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.client import AnswerError
from benchmarks.made import Made
from kernel.reference import score_oracle
from model.features import HISTORY

TOLERANCE = {"f32": 1e-4, "f16": 1e-3, "int8": 5e-2}  # int8 also rounds the user; scores lie within +-10

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a contestant holds: the records (b, item size) of catalogue rows (b,), and how exactly it computes."""

    records: Callable[[Rows], NDArray[Any]]
    tolerance: float


class Item(NamedTuple):
    """One item of an answer."""

    id: Any
    score: float
    position: int


def json_items(answer: bytes) -> list[Item]:
    """The items of a JSON answer."""
    return [Item(item["id"], item["score"], item["position"]) for item in orjson.loads(answer)["items"]]


def drawn(made: Made, dtype: str) -> Callable[[Rows], NDArray[Any]]:
    """The records that rivals load, rounded to a dtype."""
    vectors = np.load(made.vectors(), mmap_mode="r", allow_pickle=False)
    return lambda rows: np.asarray(vectors[rows]).astype(dtype)


class Referee:
    """Knows the catalogue and the users of one made release."""

    def __init__(self, made: Made) -> None:
        self._head, self._spec = made.bundle.head, made.bundle.spec
        self._tower = made.bundle.user_tower()
        self._order = np.argsort(made.ids)
        self._ids = made.ids[self._order]

    def check(self, name: str, body: bytes, items: Sequence[Item], stored: Stored) -> None:
        """Raise AnswerError unless these are the best items of the request, in order, with their scores."""
        request = orjson.loads(body)
        candidates, expected = request["candidates"], self._scores(request, stored)
        positions = np.array([item.position for item in items], np.int64)
        scores = np.array([item.score for item in items], np.float64)
        size = min(request["top_k"], len(candidates))
        _must(len(items) == size, name, f"{len(items)} items, not {size}")
        _must(len(np.unique(positions)) == size, name, "an item comes twice")
        _must(
            all(candidates[item.position] == item.id for item in items), name, "an item is not where its position says"
        )
        gap = float(np.abs(scores - expected[positions]).max(initial=0.0))
        _must(gap <= stored.tolerance, name, f"a score is {gap:.2g} off the reference (allowed {stored.tolerance:g})")
        _must(bool((np.diff(scores) <= 0).all()), name, "scores rise")
        left = np.delete(expected, positions)
        lead = float(left.max(initial=-np.inf) - expected[positions].min(initial=np.inf))
        _must(lead <= 2 * stored.tolerance, name, f"an item that was left out scores {lead:.2g} more than one kept")

    def _scores(self, request: dict[str, Any], stored: Stored) -> NDArray[np.float64]:
        """(n,) float64 of the request's candidates."""
        row = {**request["user"], **request["context"], HISTORY: request["history"]}
        record = self._tower.run(self._spec.encode_row("user", row)[None])[0]
        wanted = np.array(request["candidates"], self._ids.dtype)
        rows = self._order[np.searchsorted(self._ids, wanted)]
        return score_oracle(self._head, record.astype(np.float64), stored.records(rows).astype(np.float64))


def _must(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise AnswerError(f"{name} answers wrongly: {what}; its times say nothing")
