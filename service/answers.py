"""From the octets of a body to the octets of an answer, stage by stage, without HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from service.admission import Permit
from service.errors import RequestError
from service.ranker import Ranker, Ranking
from service.telemetry import StageClock
from service.wire import RankRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """A body to send, and what telemetry counts."""

    body: bytes
    release: str
    rankings: Sequence[Ranking]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one request may ask for."""

    max_candidates: int
    max_batch: int


Answerer = Callable[[Permit, Ranker, bytes, Limits, StageClock], Answer]


def answer_rank(permit: Permit, ranker: Ranker, body: bytes, limits: Limits, clock: StageClock) -> Answer:
    """`POST /v1/rank`. Raises RequestError; DeadlineExceeded when the caller's time is over before scoring."""
    request = ranker.decoders.rank(body)
    _check_candidates(request, limits, "")
    clock.lap("decode")
    permit.check_deadline(request.deadline_ms)
    ranking = ranker.rank(request, clock)
    answer = Answer(encode_ranking(ranking), ranker.release, [ranking])
    clock.lap("respond")
    return answer


def answer_batch(permit: Permit, ranker: Ranker, body: bytes, limits: Limits, clock: StageClock) -> Answer:
    """`POST /v1/rank:batch`: all are answered, or the first wrong one is named. The shortest deadline counts."""
    requests = ranker.decoders.batch(body).requests
    if len(requests) > limits.max_batch:
        raise RequestError(
            f"requests has {len(requests)} entries, this service takes {limits.max_batch}",
            field="requests",
            remedy="send several batches, or raise RANKTOWER_MAX_BATCH",
        )
    for number, request in enumerate(requests):
        _check_candidates(request, limits, f"requests[{number}].")
    clock.lap("decode")
    permit.check_deadline(min((r.deadline_ms for r in requests if r.deadline_ms is not None), default=None))
    rankings = ranker.rank_batch(requests, clock)
    answer = Answer(encode_batch(ranker.release, rankings), ranker.release, rankings)
    clock.lap("respond")
    return answer


def answer_retrieve(permit: Permit, ranker: Ranker, body: bytes, limits: Limits, clock: StageClock) -> Answer:
    """`POST /v1/retrieve`. Raises RetrievalOff where no index is loaded."""
    request = ranker.decoders.retrieve(body)
    clock.lap("decode")
    permit.check_deadline(request.deadline_ms)
    ranking = ranker.retrieve(request, clock)
    answer = Answer(encode_ranking(ranking), ranker.release, [ranking])
    clock.lap("respond")
    return answer


def _check_candidates(request: RankRequest[Any, Any], limits: Limits, place: str) -> None:
    if len(request.candidates) > limits.max_candidates:
        raise RequestError(
            f"{place}candidates has {len(request.candidates)} entries, this service takes {limits.max_candidates}",
            field=f"{place}candidates",
            remedy="send several requests, or raise RANKTOWER_MAX_CANDIDATES",
        )


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_ranking(ranking: Ranking) -> bytes:
    """The body of `schema.RankAnswer`."""
    return orjson.dumps(_document(ranking), option=orjson.OPT_SERIALIZE_NUMPY)


def encode_batch(release: str, rankings: Sequence[Ranking]) -> bytes:
    """The body of `schema.BatchAnswer`."""
    document = {"release": release, "rankings": [_document(ranking) for ranking in rankings]}
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _document(ranking: Ranking) -> dict[str, Any]:
    return {
        "release": ranking.release,
        "user_known": ranking.user_known,
        "items": _items(ranking),
        "missing": ranking.missing,
        "counts": {
            "candidates": ranking.candidates,
            "scored": ranking.candidates - len(ranking.missing),
            "returned": len(ranking.ids),
        },
    }


def _items(ranking: Ranking) -> list[dict[str, Any]]:
    """One mapping for each item of the answer. orjson writes float32 in its shortest form and NaN as null."""
    items: list[dict[str, Any]] = [
        {"id": id_, "score": score} for id_, score in zip(ranking.ids, list(ranking.scores), strict=True)
    ]
    if ranking.probabilities is not None:
        for item, probability in zip(items, list(ranking.probabilities), strict=True):
            item["probability"] = probability
    if ranking.positions is not None:
        for item, position in zip(items, ranking.positions.tolist(), strict=True):
            item["position"] = position
    if ranking.explanation is not None:
        for item, chosen, similar in zip(items, *ranking.explanation, strict=False):  # known items come first
            item["explanation"] = {"item_heads": chosen, "similarities": similar}
    return items
