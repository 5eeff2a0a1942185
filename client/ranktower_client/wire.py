"""What goes over the wire and what comes back, as values; both clients share it and neither parses anything itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

import httpx
import numpy as np
import numpy.typing as npt

from ranktower_client.errors import BadAnswer, BadRequest

Ids = Sequence[int] | Sequence[str] | npt.NDArray[Any]
Missing = Literal["last", "drop", "error"]

INT64_MAX = 2**63 - 1


class Asker(TypedDict, total=False):
    """What any question may say about who asks. None is not sent: the service's default holds."""

    user_id: int | str | None  # a known id fills in fields and history from the published user table
    user: Mapping[str, Any] | None  # fields by name, each in place of what the table holds
    context: Mapping[str, Any] | None  # fields of this request by name
    history: Ids | None  # ids of past items, oldest first
    top_k: int | None
    explain: bool | None
    deadline_ms: int | None  # the service gives up when scoring has not begun that long after arrival


class RankOptions(Asker, total=False):
    """What a ranking takes beside its candidates."""

    on_missing: Missing | None  # unknown items: `last` (default), `drop`, `error`


class RetrieveOptions(Asker, total=False):
    """What a retrieval takes."""

    per_head: int | None  # items that each user head brings


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One question of a batch: the arguments of `rank` as a value."""

    candidates: Ids  # ids of one type
    user_id: int | str | None = None
    user: Mapping[str, Any] | None = None
    context: Mapping[str, Any] | None = None
    history: Ids | None = None
    top_k: int | None = None
    explain: bool | None = None
    deadline_ms: int | None = None
    on_missing: Missing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The best candidates, best first. Arrays are read-only; row i of each speaks of the same item."""

    ids: npt.NDArray[Any]  # (k,) int64, or object holding str
    scores: npt.NDArray[np.float32]  # (k,), never increasing; then NaN for items that the release does not know
    probabilities: npt.NDArray[np.float32] | None  # (k,), NaN as in scores; None when the release is not calibrated
    positions: npt.NDArray[np.int32]  # (k,) into the candidates that were sent; -1 when retrieved
    missing: npt.NDArray[Any]  # (m,) ids that the release does not know, in the order sent
    release: str
    watermark: int  # position of the last change to the items that the answer knows
    user_known: bool | None  # whether the user table knows the user_id; None where none was sent
    timings: Mapping[str, float] = field(default_factory=dict)  # milliseconds by stage, from Server-Timing
    explanations: tuple[Mapping[str, Any] | None, ...] = ()  # (k,) item_heads, similarities; empty unless asked for

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What serves now; `document` holds all that the service says about it."""

    id: str
    bundle: str
    snapshot: str
    items: int
    users: int
    retrieval: bool
    document: Mapping[str, Any]


def rank_body(candidates: Ids, options: RankOptions) -> bytes:
    """The JSON body of one question. Raises BadRequest before anything is sent when it cannot be one."""
    return _json(_sent({"candidates": candidates, **options}))


def rest_body(options: RankOptions) -> bytes:
    """The same without candidates, for bodies that hold them elsewhere."""
    return _json(_sent(dict(options)))


def batch_body(queries: Sequence[Query]) -> bytes:
    """The JSON body of several questions."""
    options = ({part.name: getattr(query, part.name) for part in fields(query)} for query in queries)
    return _json({"requests": [_sent(each) for each in options]})


def retrieve_body(options: RetrieveOptions) -> bytes:
    """The JSON body of a question without candidates."""
    return _json(_sent(dict(options)))


def ranking_of(answer: httpx.Response) -> Ranking:
    """The answer to one question. Raises BadAnswer when the document is not one."""
    return _ranking(document_of(answer), timings_of(answer.headers.get("server-timing")))


def rankings_of(answer: httpx.Response, count: int) -> list[Ranking]:
    """The answers to `count` questions, in their order; all carry the timings of the whole request."""
    timings = timings_of(answer.headers.get("server-timing"))
    documents = document_of(answer).get("rankings")
    if not isinstance(documents, list) or len(documents) != count:
        raise BadAnswer(f"{answer.url} was asked {count} questions and did not send {count} rankings")
    return [_ranking(document, timings) for document in documents]


def release_of(answer: httpx.Response) -> Release:
    """The release that an answer of `GET /v1/release` describes."""
    document = document_of(answer)
    try:
        return Release(
            id=document["release"],
            bundle=document["bundle"],
            snapshot=document["snapshot"],
            items=document["items"],
            users=document["users"],
            retrieval=document["retrieval"],
            document=document,
        )
    except KeyError as error:
        raise BadAnswer(f"{answer.url} describes a release without {error}", status=answer.status_code) from error


def document_of(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer."""
    try:
        document = json.loads(answer.content)
    except ValueError as error:
        raise BadAnswer(f"{answer.url} sent no JSON: {error}", status=answer.status_code) from error
    if not isinstance(document, dict):
        raise BadAnswer(f"{answer.url} sent {type(document).__name__}, not an object", status=answer.status_code)
    return document


def timings_of(header: str | None) -> dict[str, float]:
    """Milliseconds by name from a Server-Timing header: `score;dur=0.31, topk;dur=0.02`; none without dur."""
    timings = {}
    for metric in (header or "").split(","):
        name, *parameters = (part.strip() for part in metric.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if name and key.strip().lower() == "dur":
                timings[name] = _number(value.strip().strip('"'))
    return {name: value for name, value in timings.items() if value is not None}


def ids_of(values: Ids, name: str) -> list[Any]:
    """Ids as JSON takes them. Raises BadRequest for an array of anything but int64 or strings in one dimension."""
    if isinstance(values, (str, bytes)):
        raise BadRequest(f"{name} is one {type(values).__name__}", field=name, remedy="send a list or array of ids")
    if not isinstance(values, np.ndarray):
        return list(values)
    if values.ndim != 1:
        raise BadRequest(f"{name} has shape {values.shape}", field=name, remedy="send one dimension")
    if values.dtype.kind not in "iuUO":
        raise BadRequest(f"{name} has dtype {values.dtype}", field=name, remedy="send integers or strings")
    if values.dtype.kind == "u" and int(values.max(initial=0)) > INT64_MAX:
        raise BadRequest(f"{name} holds {values.max()}, over int64", field=name, remedy="ids are int64 or strings")
    return list(values.tolist())


def _sent(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a question that were given, ids as JSON takes them."""
    given = {name: value for name, value in options.items() if value is not None}
    return given | {name: ids_of(given[name], name) for name in ("candidates", "history") if name in given}


def _json(document: dict[str, Any]) -> bytes:
    try:
        return json.dumps(document, separators=(",", ":"), allow_nan=False, default=_plain, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise BadRequest(f"the request is not JSON: {error}", remedy="send numbers, strings, lists; no NaN") from error


def _plain(value: object) -> object:
    """NumPy values and mappings inside a query, as JSON knows them."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} {value!r}")


def _ranking(document: Mapping[str, Any], timings: Mapping[str, float]) -> Ranking:
    try:
        items = document["items"]
        explanations = tuple(item.get("explanation") for item in items)
        return Ranking(
            ids=_id_array([item["id"] for item in items]),
            scores=_floats([item["score"] for item in items]),
            probabilities=_floats([item.get("probability") for item in items]) if _any(items, "probability") else None,
            positions=_sealed(np.array([_position(item) for item in items], np.int32)),
            missing=_id_array(document["missing"]),
            release=document["release"],
            watermark=document.get("watermark", 0),
            user_known=document["user_known"],
            timings=timings,
            explanations=explanations if _any(items, "explanation") else (),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadAnswer(f"the answer is not a ranking: {type(error).__name__} {error}") from error


def _any(items: list[dict[str, Any]], name: str) -> bool:
    return any(item.get(name) is not None for item in items)


def _floats(values: list[float | None]) -> npt.NDArray[np.float32]:
    return _sealed(np.array([np.nan if value is None else value for value in values], np.float32))


def _position(item: Mapping[str, Any]) -> int:
    position = item.get("position")
    return -1 if position is None else int(position)


def _id_array(ids: list[Any]) -> npt.NDArray[Any]:
    """int64 where every id is a number, else object: NumPy's own guess would turn long strings into fixed widths."""
    whole = all(isinstance(value, int) for value in ids)
    return _sealed(np.array(ids, np.int64 if whole else object))


def _sealed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
