"""The kernel's other operations beside what one would write: lookup, top-k, whole rankings, batches, packing.

All at the size of the bars. Answers are compared before anything is timed, as those of the scores are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import scoring
from benchmarks.client import AnswerError
from benchmarks.mapped import Catalogue, Pool, Users, draw_items
from benchmarks.rounds import Entry, in_rounds
from kernel import engine, record, reference
from kernel.head import HeadKind
from kernel.record import DTYPES, Dtype, RecordLayout

TOGETHER = 8  # users of a batch
PACKED = 2_000  # records of one call
TOP_POOL = 256  # lists of scores

Row = dict[str, Any]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all operations are measured on."""

    catalogues: Mapping[HeadKind, Catalogue]  # of one shape and size
    ids: Pool
    rows: Pool
    count: int  # candidates
    budget_s: float  # for each operation

    @property
    def maxsim(self) -> Catalogue:
        return self.catalogues["maxsim"]


def measured(ground: Ground, kind: str, entries: Sequence[Entry], **more: Any) -> list[Row]:
    """Rows of one operation."""
    found = ground.maxsim
    same = {"kind": kind, "shape": found.shape, "items": len(found), "candidates": ground.count, **more}
    times = in_rounds(entries, ground.budget_s)
    return [{**same, **entry.fields, **time.row()} for entry, time in zip(entries, times, strict=True)]


def _fields(contestant: str, dtype: str | None = None, level: str | None = None) -> Row:
    return {"contestant": contestant, "dtype": dtype, "level": level}


def _must(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise AnswerError(f"{name} answers wrongly: {what}; its times say nothing")


# --- lookup ----------------------------------------------------------------------------------------------------------


def lookup_entries(ground: Ground) -> tuple[Entry, Entry, Entry, Entry]:
    """Ours, searchsorted alone, searchsorted as a lookup, a dict. Raises AnswerError where rows are not the ids'."""
    found, native = ground.maxsim, ground.maxsim.table("int8", engine.levels()[-1])
    order = np.argsort(found.ids)
    rising = found.ids[order]
    places = dict(zip(found.ids.tolist(), range(len(found)), strict=True))

    def whole(ids: Ids) -> NDArray[Any]:
        at = np.minimum(np.searchsorted(rising, ids), len(rising) - 1)
        return np.where(rising[at] == ids, order[at], -1)

    calls: dict[str, Callable[[Ids], Any]] = {
        "ours": native.lookup,
        "np.searchsorted, place alone": lambda ids: np.searchsorted(rising, ids),
        "np.searchsorted, unknown ids found out": whole,
        "dict": lambda ids: np.array([places.get(id_, -1) for id_ in ids.tolist()], np.int32),
    }
    asked = ground.ids.next(ground.count)
    for name, call in calls.items():
        rows = np.asarray(call(asked))
        _must(np.array_equal((rising if "alone" in name else found.ids)[rows], asked), name, "rows of other ids")
    unknown = found.ids[:1] * 0 - 1  # ids are above 0
    for name in ("ours", "np.searchsorted, unknown ids found out", "dict"):
        _must(int(calls[name](unknown)[0]) == -1, name, "an unknown id has a row")

    def draw() -> tuple[Ids]:
        return (ground.ids.next(ground.count),)

    first, second, third, fourth = (Entry(fields=_fields(name), call=call, draw=draw) for name, call in calls.items())
    return first, second, third, fourth


def lookup(ground: Ground) -> list[Row]:
    return measured(ground, "lookup", lookup_entries(ground))


# --- top-k -----------------------------------------------------------------------------------------------------------


def _by_partition(scores: NDArray[Any], k: int) -> NDArray[Any]:
    k = min(k, len(scores))
    kept = np.argpartition(scores, len(scores) - k)[len(scores) - k :]
    best: NDArray[Any] = kept[np.argsort(-scores[kept])]
    return best


def top_k(ground: Ground) -> list[Row]:
    """Of random scores: the best 100."""
    scores = Pool(np.random.default_rng(8).standard_normal(TOP_POOL * ground.count, np.float32))
    calls: dict[str, Callable[[NDArray[Any]], Any]] = {
        "ours": lambda values: engine.top_k(values, scoring.KEPT),
        "np.argpartition, sorted": lambda values: _by_partition(values, scoring.KEPT),
        "np.argsort": lambda values: np.argsort(-values)[: scoring.KEPT],
    }
    asked = scores.next(ground.count)
    expected = -np.sort(-asked)[: scoring.KEPT]
    for name, call in calls.items():
        _must(np.array_equal(asked[call(asked)], expected), name, "not the best, in order")
    entries = [
        Entry(fields=_fields(name), call=call, draw=lambda: (scores.next(ground.count),))
        for name, call in calls.items()
    ]
    return measured(ground, "top_k", entries)


# --- a whole ranking -------------------------------------------------------------------------------------------------


def rank(ground: Ground) -> list[Row]:
    """Ids in, the best 100 out."""
    rows = []
    for kind, found in ground.catalogues.items():
        questions = list(_questions(ground, found))
        entries = [_rank_entry(ground, found, questions, *ranker) for ranker in _rankers(found)]
        rows += measured(ground, "rank", entries, head=kind)
    return rows


def _questions(ground: Ground, found: Catalogue) -> Iterator[tuple[NDArray[np.float32], Ids, NDArray[np.int32]]]:
    """User records and lists, and the places of the best in each."""
    users, order = Users(found.head), np.argsort(found.ids)
    for _ in range(scoring.CHECKED_USERS):
        user, ids = users.next(), ground.ids.next(ground.count)
        records = found.records(order[np.searchsorted(found.ids, ids, sorter=order)])
        scores = reference.score_oracle(found.head, user, records)
        yield user, ids, reference.top_k(scores.astype(np.float32), scoring.KEPT)


Rank = Callable[[NDArray[np.float32], Ids], NDArray[Any]]  # positions, best first


def _rankers(found: Catalogue) -> Iterator[tuple[str, Dtype, str | None, Rank]]:
    best, worst = engine.levels()[-1], engine.NUMPY
    for dtype in found.snapshots:
        for level in dict.fromkeys((best, worst)):
            yield scoring.OURS, dtype, level, _our_rank(found, dtype, level)
    order = np.argsort(found.ids)
    rising = found.ids[order]
    for rival in scoring.rivals(found, ("NumPy", "maxsim-cpu"), {}):

        def whole(user: NDArray[np.float32], ids: Ids, score: scoring.Score = rival.score) -> NDArray[Any]:
            return _by_partition(score(user, order[np.searchsorted(rising, ids)]), scoring.KEPT)

        yield f"searchsorted, {rival.contestant}, argpartition", "f32", None, whole


def _our_rank(found: Catalogue, dtype: Dtype, level: str) -> Rank:
    table = found.table(dtype, level)
    return lambda user, ids: table.rank(user, ids, scoring.KEPT).positions


def _rank_entry(
    ground: Ground, found: Catalogue, questions: Sequence[Any], name: str, dtype: Dtype, level: str | None, call: Rank
) -> Entry:
    """Raises AnswerError unless the best are the reference's."""
    shares = [len(np.intersect1d(call(user, ids), best)) / len(best) for user, ids, best in questions]
    scoring.judge(name, dtype, 0.0, float(np.mean(shares)))
    users = Users(found.head)
    return Entry(
        fields=_fields(name, dtype, level), call=call, draw=lambda: (users.next(), ground.ids.next(ground.count))
    )


# --- batches ---------------------------------------------------------------------------------------------------------


def batch(ground: Ground) -> list[Row]:
    """Eight users at once, over one list and over a list each, beside eight calls. Times are of all eight."""
    return [row for kind, found in ground.catalogues.items() for row in _batch(ground, kind, found)]


def _batch(ground: Ground, kind: HeadKind, found: Catalogue) -> list[Row]:
    table, users, ks = found.table("int8", engine.levels()[-1]), Users(found.head), [scoring.KEPT] * TOGETHER

    def one_list() -> tuple[Any, ...]:
        return users.several(TOGETHER), [ground.ids.next(ground.count)] * TOGETHER, ks

    def a_list_each() -> tuple[Any, ...]:
        return users.several(TOGETHER), [ground.ids.next(ground.count) for _ in range(TOGETHER)], ks

    def singly(records: NDArray[np.float32], lists: list[Ids], ks: list[int]) -> list[Any]:
        return [table.rank(*one) for one in zip(records, lists, ks, strict=True)]

    asked = one_list()
    for together, alone in zip(table.rank_batch(*asked), singly(*asked), strict=True):
        _must(np.array_equal(together.positions, alone.positions), "rank_batch", "not as one by one")
    ways: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
        "users at once, one list": (table.rank_batch, one_list),
        "users at once, a list each": (table.rank_batch, a_list_each),
        "calls, one list": (singly, one_list),
    }
    entries = [
        Entry(fields=_fields(f"{TOGETHER} {name}", "int8", table.level), call=call, draw=draw)
        for name, (call, draw) in ways.items()
    ]
    return measured(ground, "batch", entries, head=kind)


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(ground: Ground) -> list[Row]:
    """Records to rows of the table, native and in NumPy; `candidates` is how many a call packs."""
    return [row for kind, found in ground.catalogues.items() for row in _pack(ground, kind, found)]


def _pack(ground: Ground, kind: HeadKind, found: Catalogue) -> list[Row]:
    _, records = next(draw_items(found.head, PACKED))
    entries = []
    for dtype in DTYPES:
        layout = RecordLayout(found.head, dtype)
        _must(np.array_equal(engine.pack(layout, records), record.pack(layout, records)), "pack", "other octets")
        for level, call in (("native", engine.pack), (engine.NUMPY, record.pack)):
            entries.append(
                Entry(fields=_fields(scoring.OURS, dtype, level), call=partial(call, layout), draw=lambda: (records,))
            )
    rows = measured(ground, "pack", entries, head=kind, candidates=PACKED)
    return [{**row, "items_per_s": PACKED / row["median_us"] * 1e6} for row in rows]


def all_rows(ground: Ground) -> list[Row]:
    """Rows of every operation."""
    return [row for operation in (lookup, top_k, rank, batch, pack) for row in operation(ground)]
