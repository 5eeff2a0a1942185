"""Those who score candidates whose rows are known: gathered, checked against the float64 reference, and timed.

Ours take rows as int32, which is what the lookup returns; rivals as int64, which is what NumPy, torch and FAISS index
by, converted before the clock starts. The gather floor reads an octet of every cache line that a score needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.checks import TOLERANCE
from benchmarks.client import AnswerError
from benchmarks.mapped import Catalogue, Pool, Users, available_bytes, vectors_bytes
from benchmarks.rivals import scorers
from benchmarks.rivals.scorers import AbsentError
from benchmarks.rounds import Entry
from kernel import engine, reference
from kernel.record import Dtype

OURS, FLOOR = "ours", "gather floor"
CHECKED_USERS, CHECKED_ROWS = 4, 5_000
LEAST_OVERLAP = 0.97  # of the best 100 by int8 records with those of the reference
KEPT = 100

Score = Callable[[NDArray[np.float32], NDArray[Any]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """One who scores: a user record (user size,) and rows (n,) to scores (n,)."""

    contestant: str
    dtype: Dtype
    level: str | None
    score: Score
    rows: type[np.int32] | type[np.int64] = np.int32

    @property
    def fields(self) -> dict[str, Any]:
        return {"contestant": self.contestant, "dtype": self.dtype, "level": self.level}

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.contestant, self.dtype, self.level) if part)


def ours(found: Catalogue, dtypes: Sequence[Dtype], levels: Sequence[str]) -> Iterator[Scorer]:
    for dtype in dtypes:
        for level in levels:
            score = found.table(dtype, level).score
            yield Scorer(contestant=OURS, dtype=dtype, level=level, score=score)


def floors(found: Catalogue, dtypes: Sequence[Dtype]) -> Iterator[Scorer]:
    """At the best level; none where nothing is native."""
    for dtype in dtypes:
        table = found.table(dtype, engine.levels()[-1])
        touch: Callable[[NDArray[Any]], int] | None = getattr(table, "touch", None)
        if touch is not None:
            yield Scorer(contestant=FLOOR, dtype=dtype, level=None, score=_ignoring_user(touch))


def _ignoring_user(touch: Callable[[NDArray[Any]], int]) -> Score:
    return lambda user, rows: touch(rows)


def rivals(found: Catalogue, names: Sequence[str], absent: dict[str, str]) -> Iterator[Scorer]:
    """Those that are installed and fit; why the others are not here goes to `absent`."""
    for name in names:
        if found.head.kind != "maxsim" and name in scorers.MAXSIM_ONLY:
            continue
        copies = scorers.COPIES.get(name, 1) - 1
        if found.vectors is None or copies * vectors_bytes(found.head, len(found)) > available_bytes() // 2:
            absent[f"{name}, {found.head.kind} {found.shape}, {len(found):,} items"] = "n/a: memory does not hold it"
            continue
        try:
            score = scorers.make(name, found.head, found.vectors)
        except AbsentError as error:
            absent[name] = str(error)
            continue
        yield Scorer(contestant=name, dtype="f32", level=None, score=score, rows=np.int64)


def check(found: Catalogue, contestants: Sequence[Scorer]) -> None:
    """Raises AnswerError naming the first that scores otherwise than the float64 reference over unrounded vectors."""
    rng, users = np.random.default_rng(7), Users(found.head)
    count = min(CHECKED_ROWS, len(found))
    kept = min(KEPT, count // 2)
    questions = []
    for _ in range(CHECKED_USERS):
        user, rows = users.next(), rng.choice(len(found), count, replace=False)
        questions.append((user, rows, reference.score_oracle(found.head, user, found.records(rows))))
    for contestant in contestants:
        gaps, overlaps = [], []
        for user, rows, expected in questions:
            scores = np.asarray(contestant.score(user, rows.astype(contestant.rows)), np.float64)
            if scores.shape != expected.shape:
                raise AnswerError(f"{contestant.name} answers wrongly: {scores.shape} scores, not {expected.shape}")
            gaps.append(float(np.abs(scores - expected).max()))
            overlaps.append(overlap(scores, expected, kept))
        judge(contestant.name, contestant.dtype, max(gaps) / found.head.user_heads, float(np.mean(overlaps)))


def judge(name: str, dtype: Dtype, gap: float, share: float) -> None:
    """Raises AnswerError where a score a user head is too far off, or too few of the best are found."""
    if not gap <= TOLERANCE[dtype]:  # NaN is too far, too
        raise AnswerError(
            f"{name} answers wrongly: a score is {gap:.2g} a head off the reference (allowed {TOLERANCE[dtype]:g}); "
            "its times say nothing"
        )
    if share < LEAST_OVERLAP:
        raise AnswerError(
            f"{name} answers wrongly: of the best {KEPT} it has {share:.3f} (at least {LEAST_OVERLAP:g}); "
            "its times say nothing"
        )


def overlap(scores: NDArray[Any], expected: NDArray[Any], kept: int) -> float:
    """Share of the best `kept` by the reference that are among the best by these scores."""
    best = (set(np.argsort(-values, kind="stable")[:kept].tolist()) for values in (scores, expected))
    return len(set.intersection(*best)) / max(kept, 1)


def entry(scorer: Scorer, rows: Pool, users: Users, count: int) -> Entry:
    """To be timed: every call has another user and other rows."""

    def draw() -> tuple[Any, ...]:
        return users.next(), rows.next(count).astype(scorer.rows, copy=False)

    return Entry(fields=scorer.fields, call=scorer.score, draw=draw)
