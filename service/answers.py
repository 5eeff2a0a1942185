"""From the octets of a body to the octets of an answer, stage by stage, without HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import msgspec
import numpy as np
import orjson
from msgspec import UNSET, Struct, UnsetType
from numpy.typing import NDArray

from kernel.ids import Texts
from kernel.items import items_json
from service.admission import Permit
from service.errors import RequestError
from service.live import Serving
from service.ranker import Ranker, Ranking
from service.telemetry import StageClock
from service.wire import RankRequest

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"

Rank = RankRequest[Any, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A body to send, and what telemetry counts."""

    body: bytes
    release: str
    rankings: Sequence[Ranking]
    media_type: str = JSON
    requests: Sequence[Rank] = ()  # of the rankings, unless they were retrieved: a shadow scores them, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one request may ask for."""

    max_candidates: int
    max_batch: int


Answerer = Callable[[Permit, Serving, bytes, Limits, StageClock], Answer]


def answer_rank(permit: Permit, serving: Serving, body: bytes, limits: Limits, clock: StageClock) -> Answer:
    """`POST /v1/rank`. Raises RequestError; DeadlineExceeded when the caller's time is over before scoring."""
    request = serving.current.decoders.rank(body)
    ranking = rank(permit, serving, request, limits, clock)
    answer = Answer(encode_ranking(ranking), ranking.release, [ranking], requests=[request])
    clock.lap("respond")
    return answer


def rank(permit: Permit, serving: Serving, request: Rank, limits: Limits, clock: StageClock) -> Ranking:
    """The ranking that a decoded request asks for, whatever form it came in."""
    check_candidates(request, limits, "")
    clock.lap("decode")
    permit.check_deadline(request.deadline_ms)
    return serving.of(request.user_id).rank(request, clock, permit.ends_ns(request.deadline_ms))


def answer_batch(permit: Permit, serving: Serving, body: bytes, limits: Limits, clock: StageClock) -> Answer:
    """`POST /v1/rank:batch`: all are answered, or the first wrong one is named. The shortest deadline counts."""
    requests = serving.current.decoders.batch(body).requests
    if len(requests) > limits.max_batch:
        raise RequestError(
            f"requests has {len(requests)} entries, this service takes {limits.max_batch}",
            field="requests",
            remedy="send several batches, or raise RANKTOWER_MAX_BATCH",
        )
    for number, request in enumerate(requests):
        check_candidates(request, limits, f"requests[{number}].")
    clock.lap("decode")
    deadline_ms = min((r.deadline_ms for r in requests if r.deadline_ms is not None), default=None)
    permit.check_deadline(deadline_ms)
    rankings = _rank_batch(serving, requests, clock, permit.ends_ns(deadline_ms))
    release = serving.current.release
    answer = Answer(encode_batch(release, rankings), release, rankings, requests=requests)
    clock.lap("respond")
    return answer


def _rank_batch(serving: Serving, requests: list[Rank], clock: StageClock, deadline_ns: int) -> list[Ranking]:
    """Each by its own user's release, in one call of the kernel for each of them."""
    if not serving.canaries:
        return serving.current.rank_batch(requests, clock, deadline_ns)
    shares: dict[Ranker, list[int]] = {}
    for number, request in enumerate(requests):
        shares.setdefault(serving.of(request.user_id), []).append(number)
    rankings: dict[int, Ranking] = {}
    for ranker, numbers in shares.items():
        share = ranker.rank_batch([requests[number] for number in numbers], clock, deadline_ns, numbers)
        rankings |= zip(numbers, share, strict=True)
    return [rankings[number] for number in range(len(requests))]


def answer_retrieve(permit: Permit, serving: Serving, body: bytes, limits: Limits, clock: StageClock) -> Answer:
    """`POST /v1/retrieve`. Raises RetrievalOff where no index is loaded; a canary without one leaves its share."""
    request = serving.current.decoders.retrieve(body)
    clock.lap("decode")
    permit.check_deadline(request.deadline_ms)
    ranker = serving.of(request.user_id)
    ranking = (serving.current if ranker.index is None else ranker).retrieve(request, clock)
    answer = Answer(encode_ranking(ranking), ranking.release, [ranking])
    clock.lap("respond")
    return answer


def check_candidates(request: Rank, limits: Limits, place: str) -> None:
    """Raise RequestError where there are too many."""
    if len(request.candidates) > limits.max_candidates:
        raise RequestError(
            f"{place}candidates has {len(request.candidates)} entries, this service takes {limits.max_candidates}",
            field=f"{place}candidates",
            remedy="send several requests, or raise RANKTOWER_MAX_CANDIDATES",
        )


# --- encoding --------------------------------------------------------------------------------------------------------

QUOTE, COMMA = ord('"'), ord(",")
PLAIN = np.ones(256, bool)  # octets that JSON text holds as they are
PLAIN[:32] = PLAIN[QUOTE] = PLAIN[ord("\\")] = False


class _Item(Struct, gc=False):
    """`schema.RankedItem`, where the kernel does not write it: with text ids, explanations, or no extension."""

    id: Any
    score: float | None
    probability: float | UnsetType | None
    position: int | UnsetType
    explanation: dict[str, Any] | UnsetType


_encode_items = msgspec.json.Encoder().encode


def encode_ranking(ranking: Ranking, more: dict[str, Any] | None = None) -> bytes:
    """The body of `schema.RankAnswer`, and what else it says."""
    return orjson.dumps(_document(ranking) | (more or {}), option=orjson.OPT_SERIALIZE_NUMPY)


def encode_batch(release: str, rankings: Sequence[Ranking]) -> bytes:
    """The body of `schema.BatchAnswer`."""
    document = {"release": release, "rankings": [_document(ranking) for ranking in rankings]}
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def counts_of(ranking: Ranking) -> dict[str, int]:
    """`schema.Counts`."""
    return {"candidates": ranking.candidates, "scored": ranking.scored, "returned": len(ranking.kept)}


def json_ids(ids: Any) -> Any:
    """Ids in a form that orjson takes: an array or a list as it is, texts as the JSON that they are together."""
    return orjson.Fragment(_json_texts(ids)) if isinstance(ids, Texts) else ids


def _document(ranking: Ranking) -> dict[str, Any]:
    return {
        "release": ranking.release,
        "watermark": ranking.watermark,
        "user_known": ranking.user_known,
        "items": orjson.Fragment(_items_json(ranking)),
        "missing": json_ids(ranking.missing),
        "counts": counts_of(ranking),
    }


def _items_json(ranking: Ranking) -> bytes:
    if not isinstance(ranking.kept, Texts) and ranking.explanation is None:
        text = items_json(ranking.kept, ranking.scores, ranking.probabilities, ranking.positions)
        if text is not None:
            return text
    return _encode_items(_items(ranking))


def _items(ranking: Ranking) -> list[_Item]:
    probabilities, positions, explanations = ranking.probabilities, ranking.positions, ranking.explanation
    told = map(_explained, *(_short(part) for part in explanations)) if explanations else ()
    endless: Iterator[Any] = chain(told, repeat(UNSET))  # known items come first
    return list(
        map(
            _Item,
            ranking.ids,
            _short(ranking.scores),
            repeat(UNSET) if probabilities is None else _short(probabilities),
            repeat(UNSET) if positions is None else positions.tolist(),
            endless,
        )
    )


def _explained(item_heads: list[int], similarities: list[float]) -> dict[str, Any]:
    return {"item_heads": item_heads, "similarities": similarities}


def _short(values: NDArray[Any]) -> list[Any]:
    """Python's numbers with the shortest decimals that read back as the same float32, None for NaN."""
    numbers: list[Any] = orjson.loads(orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY))
    return numbers


def _json_texts(texts: Texts) -> bytes:
    """The JSON list of texts. One gather and one scatter for all, unless one holds what JSON escapes."""
    if not len(texts):
        return b"[]"
    sizes = texts.sizes
    ends = np.cumsum(sizes + 3)  # of each with its quotes and its comma, after the bracket
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    octets = texts.data[np.repeat(texts.starts, sizes) + within]
    if not PLAIN[octets].all():
        return orjson.dumps(texts.tolist())
    out = np.full(int(ends[-1]) + 1, QUOTE, np.uint8)
    out[np.repeat(ends - sizes - 1, sizes) + within] = octets
    out[ends] = COMMA
    out[0], out[-1] = ord("["), ord("]")
    return out.tobytes()
