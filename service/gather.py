"""Ask every shard that has some of the candidates, at once, and merge what comes in time into one answer.

All scores of an answer are of one bundle: those of different bundles do not compare. The gatherer names the bundle when
it asks, and takes the one that most shards can answer with; shards keep the one before, so that they may be swapped one
after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from cache.shards import shards_of
from kernel.ids import Ids, Texts
from service.admission import Permit
from service.answers import Limits, Rank, check_candidates, encode_ranking
from service.errors import DeadlineExceeded, NotReady, RequestError
from service.ranker import Explanation, Ranking, unknown_items
from service.shard import NO_IDS, Held, Outcome, Part, packed
from service.telemetry import StageClock
from service.wire import RetrieveRequest, decoders

LOOK_S = 0.5  # between two looks at what a shard holds
LOOK_WITHIN_S = 1.0
SHARE = 0.8  # of the time that is left, for shards to score in: the rest is for the way back and merging

log = logging.getLogger(__name__)


class Shard(Protocol):
    """`service.shard.ShardReplica`, or a way to some of them."""

    async def held(self) -> list[Held]: ...
    async def rank(self, bundle: str, request: Rank, within_ms: float) -> Outcome: ...
    async def retrieve(self, bundle: str, request: RetrieveRequest[Any, Any], within_ms: float) -> Outcome: ...


@dataclass(frozen=True, slots=True)
class Gathered:
    """Of each shard that was asked, its part, or why there is none; by number."""

    bundle: str
    parts: Mapping[int, Part]
    failures: Mapping[int, str]
    places: Mapping[int, NDArray[np.int32]]  # of its candidates in the caller's list; empty where none were sent


class Gatherer:
    """Answers as a service over the whole catalogue would."""

    def __init__(self, shards: Sequence[Shard], *, deadline_ms: int, partial: bool, limits: Limits) -> None:
        """deadline_ms: of requests without one; partial: whether an answer may lack shards."""
        self._shards, self._deadline_ms, self._partial, self._limits = shards, deadline_ms, partial, limits
        self.held: list[Sequence[Held]] = [()] * len(shards)  # by shard; nothing of one that does not answer

    # --- what shards hold

    async def watch(self) -> None:
        """Follow what the shards hold, for ever."""
        await asyncio.gather(*(self._watch(number) for number in range(len(self._shards))))

    async def look(self, number: int) -> None:
        """Ask a shard what it holds; one that does not say so in time gets no requests until it does."""
        try:
            held: Sequence[Held] = await asyncio.wait_for(self._shards[number].held(), LOOK_WITHIN_S)
        except Exception as error:  # whatever Ray raises
            if self.held[number]:
                log.warning("shard %d is asked no more until it answers again: %r", number, error)
            held = ()
        if held and not self.held[number]:
            log.info("shard %d answers, with bundle %s", number, held[0].bundle)
        self.held[number] = held

    async def _watch(self, number: int) -> None:
        while True:
            await self.look(number)
            await asyncio.sleep(LOOK_S)

    # --- answers

    async def rank(self, body: bytes, permit: Permit, clock: StageClock) -> tuple[bytes, str]:
        """The body of `POST /v1/rank`, and its bundle. Raises RequestError; NotReady where too little is left."""
        held = self._bundle()
        request = decoders(held.user_ids, held.item_ids).rank(body)
        check_candidates(request, self._limits, "")
        ids: Any = request.candidates
        places = split(ids, len(self._shards)) or {self._any(held): np.empty(0, np.int32)}  # the user is checked, too
        clock.lap("decode")
        requests = {
            number: msgspec.structs.replace(request, candidates=packed(ids[at]), on_missing="drop", deadline_ms=None)
            for number, at in places.items()
        }
        gathered = await self._ask("rank", held, requests, places, request, permit)
        clock.lap("score")
        ranking = merge_ranked(gathered, ids, request)
        return self._encode(gathered, ranking, clock)

    async def retrieve(self, body: bytes, permit: Permit, clock: StageClock) -> tuple[bytes, str]:
        """The body of `POST /v1/retrieve`, in the same way: every shard searches."""
        held = self._bundle()
        request = decoders(held.user_ids, held.item_ids).retrieve(body)
        clock.lap("decode")
        places = dict.fromkeys(range(len(self._shards)), np.empty(0, np.int32))
        alike = msgspec.structs.replace(request, deadline_ms=None)
        gathered = await self._ask("retrieve", held, dict.fromkeys(places, alike), places, request, permit)
        clock.lap("score")
        return self._encode(gathered, merge_retrieved(gathered, request.k), clock)

    def _encode(self, gathered: Gathered, ranking: Ranking, clock: StageClock) -> tuple[bytes, str]:
        clock.lap("topk")
        short = ranking.scored + len(ranking.missing) < ranking.candidates
        body = encode_ranking(ranking, {"partial": bool(gathered.failures) or short, "shards": told(gathered)})
        clock.lap("respond")
        return body, gathered.bundle

    def _bundle(self) -> Held:
        held = choose_bundle(self.held)
        if held is None:
            raise NotReady(f"none of {len(self._shards)} shards answers", remedy="publish and activate every shard")
        return held

    def _any(self, bundle: Held) -> int:
        return next(number for number, held in enumerate(self.held) if bundle in held)

    async def _ask(
        self,
        verb: str,
        held: Held,
        requests: Mapping[int, Any],
        places: Mapping[int, NDArray[np.int32]],
        request: Rank | RetrieveRequest[Any, Any],
        permit: Permit,
    ) -> Gathered:
        """Ask shards by number, and wait no longer than the caller does."""
        permit.check_deadline(request.deadline_ms)
        given_ms = self._deadline_ms if request.deadline_ms is None else request.deadline_ms
        left_ms = max(1.0, permit.left_ms(given_ms))
        tasks = {
            number: asyncio.ensure_future(getattr(self._shards[number], verb)(held.bundle, part, SHARE * left_ms))
            for number, part in requests.items()
            if held in self.held[number]
        }
        if tasks:
            await asyncio.wait(tasks.values(), timeout=left_ms / 1e3)
        parts, failures = {}, {}
        for number in requests:
            outcome = self._outcome(number, tasks.get(number), given_ms)
            if isinstance(outcome, Part):
                parts[number] = outcome
            else:
                failures[number] = outcome
        if failures and (not parts or not self._partial):
            if request.deadline_ms is not None and all(why.startswith(LATE) for why in failures.values()):
                raise DeadlineExceeded(
                    f"deadline_ms is {request.deadline_ms}: {_sentence(failures)}",
                    field="deadline_ms",
                    remedy="allow more time, send fewer candidates, or add replicas",
                )
            raise NotReady(_sentence(failures), remedy="try again soon; see /readyz for how the shards are")
        return Gathered(held.bundle, parts, failures, places)

    def _outcome(self, number: int, task: asyncio.Future[Outcome] | None, given_ms: int) -> Part | str:
        """The part of a shard, or why there is none. Raises what is wrong with the request itself."""
        if task is None:
            return "has another bundle" if self.held[number] else "does not answer"
        if not task.done():
            task.cancel()
            return f"{LATE} {given_ms} ms"
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            log.warning("shard %d failed, and is asked no more until it answers again: %r", number, error)
            self.held[number] = ()
            return "failed"
        outcome = task.result()
        if isinstance(outcome, Part):
            return outcome
        if issubclass(outcome.error, RequestError):
            raise outcome.error(outcome.detail, field=outcome.field, remedy=outcome.remedy)
        return outcome.detail


LATE = "did not answer within"


def _sentence(failures: Mapping[int, str]) -> str:
    return "; ".join(f"shard {number} {why}" for number, why in failures.items())


# --- pure ------------------------------------------------------------------------------------------------------------


def choose_bundle(held: Sequence[Sequence[Held]]) -> Held | None:
    """The bundle that most shards can answer with; among such, the one that is current on most. Always the same one."""
    can = Counter(each for shard in held for each in shard)
    current = Counter(shard[0] for shard in held if shard)
    return max(can, key=lambda each: (can[each], current[each], each), default=None)


def split(ids: Ids, count: int) -> dict[int, NDArray[np.int32]]:
    """Positions of the candidates of each shard that has any, in the caller's order."""
    shards = shards_of(ids, count)
    return {int(number): np.flatnonzero(shards == number).astype(np.int32) for number in np.unique(shards)}


def merge_ranked(gathered: Gathered, ids: Ids, request: Rank) -> Ranking:
    """As `Ranker.rank` has it: the known by score, ties in the caller's order, then what has none in that order."""
    parts, places = gathered.parts, gathered.places
    positions, missing, unscored = [], [], [places[number] for number in gathered.failures]
    for number, part in parts.items():
        known = int(np.count_nonzero(~np.isnan(part.ranking.scores)))
        assert part.ranking.positions is not None
        positions.append(places[number][part.ranking.positions[:known]])
        missing.append(places[number][part.missing])
        unscored.append(places[number][part.ranking.scored + len(part.missing) :])
    unknown = np.sort(np.concatenate(missing))
    if len(unknown) and request.on_missing == "error":
        raise unknown_items(ids, unknown, "", f"bundle {gathered.bundle}")
    known_positions = np.concatenate(positions)
    order = np.lexsort((known_positions, -_joined(parts, "scores", positions)))[: request.k]
    rest = unscored if request.on_missing == "drop" else [unknown, *unscored]
    last = np.sort(np.concatenate([np.empty(0, np.int32), *rest]))[: request.k - len(order)]
    kept = np.concatenate([known_positions[order], last])
    return _ranking(gathered, order, positions, len(last), positions=kept, kept=ids[kept], missing=ids[unknown])


def merge_retrieved(gathered: Gathered, k: int) -> Ranking:
    """As `Ranker.retrieve` has it; ties by the number of the shard."""
    parts = gathered.parts
    found = [part.ranking.kept for part in parts.values()]
    order = np.argsort(-_joined(parts, "scores", found), kind="stable")[:k]
    ids: Ids
    if isinstance(found[0], Texts):
        ids = Texts.of([text for each in found for text in each.tolist()])
    else:
        ids = np.concatenate([np.asarray(each) for each in found])
    return _ranking(gathered, order, found, 0, positions=None, kept=ids[order], missing=NO_IDS)


def _ranking(gathered: Gathered, order: NDArray[np.int64], known: Sequence[Any], unscored: int, **own: Any) -> Ranking:
    """known: by part, as many entries as it has scored items, which are in `order`; unscored: how many follow them."""
    rankings = [part.ranking for part in gathered.parts.values()]
    lost = sum(len(gathered.places[number]) for number in gathered.failures)
    nothing = np.full(unscored, np.nan, np.float32)
    calibrated = rankings[0].probabilities is not None
    explanations = [r.explanation for r in rankings if r.explanation is not None]
    return Ranking(
        release=gathered.bundle,
        watermark=min(ranking.watermark for ranking in rankings),
        user_known=rankings[0].user_known,
        candidates=sum(ranking.candidates for ranking in rankings) + lost,
        scored=sum(ranking.scored for ranking in rankings),
        scores=np.concatenate([_joined(gathered.parts, "scores", known)[order], nothing]),
        probabilities=np.concatenate([_joined(gathered.parts, "probabilities", known)[order], nothing])
        if calibrated
        else None,
        explanation=Explanation(*(np.concatenate(side)[order] for side in zip(*explanations, strict=True)))
        if explanations
        else None,
        **own,
    )


def _joined(parts: Mapping[int, Part], name: str, known: Sequence[Any]) -> NDArray[np.float32]:
    """A column of all parts, of their scored items."""
    columns = [getattr(part.ranking, name)[: len(each)] for part, each in zip(parts.values(), known, strict=True)]
    joined: NDArray[np.float32] = np.concatenate(columns)
    return joined


def told(gathered: Gathered) -> list[dict[str, Any]]:
    """`schema.ShardState` of each shard that was asked."""
    states = []
    for number, at in gathered.places.items():
        part = gathered.parts.get(number)
        ranking = None if part is None else part.ranking
        states.append(
            {
                "shard": number,
                "release": None if ranking is None else ranking.release,
                "watermark": None if ranking is None else ranking.watermark,
                "candidates": len(at) if ranking is None else ranking.candidates,
                "scored": 0 if ranking is None else ranking.scored,
                "failure": gathered.failures.get(number),
            }
        )
    return states
