"""One shard of a catalogue: ranks its own items, with the bundle that the gatherer names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.store import open_store
from kernel.ids import Ids, Texts
from model.features import IdType
from service.answers import Rank
from service.errors import NotReady, ServiceError
from service.ranker import Ranker, Ranking
from service.refresh import Refresher, Standing
from service.settings import Settings
from service.wire import RetrieveRequest

LOAD_WITHIN_S = 30.0  # a replica that starts answers with its release from the first request on, where it can be had


class Held(NamedTuple):
    """A bundle that a shard can answer with."""

    bundle: str
    user_ids: IdType
    item_ids: IdType


@dataclass(frozen=True, slots=True)
class Part:
    """What a shard has of an answer."""

    ranking: Ranking  # without ids unless it was retrieved: who asks has them
    missing: NDArray[np.int32]  # (m,) positions, in the list that was sent, of items that are unknown


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a shard has no part, as a value: an error loses its keyword arguments on its way between processes."""

    error: type[ServiceError]
    detail: str
    field: str | None
    remedy: str


Outcome = Part | Refusal


class ShardReplica:
    """Answers from the release of one shard's store, and follows it.

    The release before, where it has another bundle, stays at hand for a gatherer whose other shards are there still.
    """

    def __init__(self, settings: Settings) -> None:
        """settings.store: of the shard."""
        settings.choose_kernel()
        self._pool = ThreadPoolExecutor(settings.pool_threads, thread_name_prefix="rank")
        self._refresher = Refresher(
            open_store(settings.store),
            settings.cache_dir,
            retrieval=settings.retrieval,
            refresh_s=settings.refresh_s,
            huge_pages=settings.huge_pages,
        )
        self._latest: Ranker | None = None
        self._before: Ranker | None = None
        self._refresher.start()
        self._refresher.wait_until(_is_settled, LOAD_WITHIN_S)

    async def held(self) -> list[Held]:
        """What this replica can answer with, the current bundle first."""
        types = ((each.bundle.id, each.spec) for each in self._rankers().values())
        return [Held(bundle, spec.user_id_type, spec.item_id_type) for bundle, spec in types]

    async def rank(self, bundle: str, request: Rank, within_ms: float) -> Outcome:
        """Rank candidates of this shard; on_missing must be drop. Scoring ends after so many milliseconds."""
        ends_ns = monotonic_ns() + int(within_ms * 1e6)

        def work(ranker: Ranker) -> Part:
            ranking = ranker.rank(request, deadline_ns=ends_ns)
            seen = ranking.scored + len(ranking.missing)
            ids: Any = request.candidates
            unknown = np.flatnonzero(ranker.table.lookup(ids[:seen]) < 0) if len(ranking.missing) else ()
            return Part(replace(ranking, kept=NO_IDS, missing=NO_IDS), np.asarray(unknown, np.int32))

        return await self._answer(bundle, work)

    async def retrieve(self, bundle: str, request: RetrieveRequest[Any, Any], within_ms: float) -> Outcome:
        """The best items of this shard. A search that has begun goes on."""

        def work(ranker: Ranker) -> Part:
            ranking = ranker.retrieve(request)
            return Part(replace(ranking, kept=packed(ranking.kept)), np.empty(0, np.int32))

        return await self._answer(bundle, work)

    def close(self) -> None:
        self._refresher.stop()
        self._pool.shutdown()

    async def _answer(self, bundle: str, work: Callable[[Ranker], Part]) -> Outcome:
        ranker = self._rankers().get(bundle)
        if ranker is None:
            return Refusal(NotReady, f"bundle {bundle} is not at hand here", None, "ask for one that is")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, ranker)
        except ServiceError as error:
            return Refusal(type(error), error.detail, error.field, error.remedy)

    def _rankers(self) -> dict[str, Ranker]:
        """By bundle, the current one first, then those of the rollout, then the one before."""
        serving = self._refresher.standing.serving
        if serving is None:
            return {}
        if self._latest is not None and self._latest.bundle.id != serving.current.bundle.id:
            self._before = self._latest
        self._latest = serving.current  # as of this look: `before` has the updates that came while it was current
        found: dict[str, Ranker] = {}
        for ranker in (serving.current, *serving.beside.values(), *([self._before] if self._before else [])):
            found.setdefault(ranker.bundle.id, ranker)
        return found


NO_IDS: Ids = np.empty(0, np.int64)


def packed(ids: Ids) -> Ids:
    """The same in a buffer of their own: a few texts of a body must not take all of it with them."""
    if not isinstance(ids, Texts):
        return ids
    starts = np.cumsum(ids.sizes) - ids.sizes
    within = np.arange(int(ids.sizes.sum())) - np.repeat(starts, ids.sizes)
    return Texts(ids.data[np.repeat(ids.starts, ids.sizes) + within], starts, ids.sizes)


def _is_settled(standing: Standing) -> bool:
    """Whether a release is loaded, or waiting longer may not help."""
    return standing.ranker is not None or standing.failures > 0 or (standing.reachable and standing.current is None)
