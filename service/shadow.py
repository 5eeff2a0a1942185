"""A shadow scores what was answered, off the path, and says how far its order is from the one that was sent.

Work waits in a short queue and is dropped where that is full: one thread takes it, and answers never wait for it but
for Python's own lock, which encoding a user and comparing two orders hold for some 200 us.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kernel.ids import Ids
from model.errors import RankTowerError
from service.answers import Answer
from service.live import Serving
from service.ranker import Ranker, Ranking
from service.telemetry import Telemetry
from service.wire import RankRequest

DEPTH = 64  # rankings that wait: 10 MB of candidates at the very most
OVERLAP_AT = (10, 50, 100)

log = logging.getLogger(__name__)

Rank = RankRequest[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How the shadow's order stands to the one that was answered."""

    overlap: Mapping[int, float]  # k -> share of the answer's best k that are among the shadow's; only where it has k
    correlation: float | None  # Spearman's, of the answered items that both know; None for fewer than two
    missing: int  # candidates that only the shadow does not know


def compare(live: Ranking, shadow: Ranking) -> Comparison:
    """`shadow` holds all candidates that it knows, best first; `live` as many of its best as were asked for."""
    assert live.positions is not None
    assert shadow.positions is not None
    answered = live.positions[~np.isnan(live.scores)]
    sizes = {k: min(k, live.scored) for k in OVERLAP_AT}
    best = {k: np.isin(answered[:size], shadow.positions[:size]) for k, size in sizes.items() if size <= len(answered)}
    return Comparison(
        overlap={k: float(found.mean()) for k, found in best.items() if len(found)},
        correlation=_spearman(answered, shadow.positions, live.candidates),
        missing=_more(shadow.missing, live.missing),
    )


def _spearman(ours: NDArray[np.int32], theirs: NDArray[np.int32], candidates: int) -> float | None:
    """Correlation of the ranks of two lists of positions below `candidates`, over what both hold. No ties: the order
    of the request has decided them in either list."""
    ranks = np.full(candidates, -1, np.int64)
    ranks[theirs] = np.arange(len(theirs))
    common = ranks[ours]
    common = common[common >= 0]
    n = len(common)
    if n < 2:
        return None
    apart = np.argsort(np.argsort(common)) - np.arange(n)
    return 1.0 - 6.0 * float((apart**2).sum()) / (n * (n * n - 1.0))


def _more(ours: Ids, theirs: Ids) -> int:
    if not len(ours):
        return 0
    known = set(theirs.tolist())
    return sum(each not in known for each in ours.tolist())


class _Work(NamedTuple):
    ranker: Ranker
    request: Rank
    answered: Ranking


class ShadowScorer:
    """The queue and the thread of one process, started by the first work."""

    def __init__(self, telemetry: Telemetry, depth: int = DEPTH) -> None:
        self._telemetry = telemetry
        self._queue: queue.Queue[_Work | None] = queue.Queue(depth)
        self._thread: threading.Thread | None = None
        self._draw = random.Random().random
        self._warned: str | None = None  # the release whose failure is in the log

    def offer(self, serving: Serving, answer: Answer) -> None:
        """Take the share of the answer's rankings that the shadow shall score; never waits."""
        if serving.shadow is None:
            return
        for request, ranking in zip(answer.requests, answer.rankings, strict=False):  # none for what was retrieved
            if serving.share < 1.0 and self._draw() >= serving.share:
                continue
            try:
                self._queue.put_nowait(_Work(serving.shadow, request, ranking))
            except queue.Full:
                self._telemetry.shadow_dropped.inc()
        if self._thread is None and not self._queue.empty():
            self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread after the ranking that it is at; what waits is dropped."""
        if self._thread is None:
            return
        while True:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                self._take_one()
            else:
                break
        self._thread.join()
        self._thread = None

    def _take_one(self) -> None:
        try:
            self._queue.get_nowait()
        except queue.Empty:
            return

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                self._score(work)
            except Exception as error:  # whatever it is, it is the shadow's: nobody was answered with it
                self._telemetry.shadow_failures.inc()
                self._warn(work.ranker.release, error)

    def _score(self, work: _Work) -> None:
        answered = work.answered
        if answered.scored < answered.candidates - len(answered.missing):
            return  # cut off by its deadline: its order is not what its release says
        started_s = perf_counter()
        request = msgspec.structs.replace(
            work.request, top_k=answered.candidates, deadline_ms=None, explain=None, on_missing="drop"
        )
        ranking = work.ranker.rank(request)
        self._telemetry.observe_shadow(
            ranking.release, answered.release, compare(answered, ranking), perf_counter() - started_s
        )

    def _warn(self, release: str, error: Exception) -> None:
        """Once a release: it may be every request."""
        if self._warned == release:
            return
        self._warned = release
        if isinstance(error, RankTowerError):
            log.warning("the shadow %s cannot answer what was asked, this being the first: %s", release, error)
        else:
            log.exception("the shadow %s failed", release)
