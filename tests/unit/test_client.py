"""The client against scripted transports: what it sends, what it reads, what it raises, when it tries again."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from ranktower_client import (
    AsyncRankTower,
    BadAnswer,
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    Query,
    RankTower,
    RankTowerError,
    Unavailable,
)
from ranktower_client.arrow import MEDIA_TYPE, rank_body
from ranktower_client.errors import retry_after_s
from ranktower_client.retries import Course, RetryPolicy
from ranktower_client.wire import timings_of

URL = "http://service.test"
ITEM = {"id": 7, "score": 1.5, "position": 1}
RANKING = {"release": "r1", "user_known": True, "items": [ITEM], "missing": [], "counts": {}}
PROBLEM = {
    "title": "Request refused",
    "detail": "top_k is -1",
    "field": "top_k",
    "remedy": "send an integer from 0 on",
}


class Script(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers the n-th request with the n-th entry, the last one for ever; an entry may be an error to raise."""

    def __init__(self, *entries: httpx.Response | httpx.HTTPError) -> None:
        self.entries = list(entries)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        entry = self.entries.pop(0) if len(self.entries) > 1 else self.entries[0]
        if isinstance(entry, httpx.HTTPError):
            raise entry
        return httpx.Response(entry.status_code, headers=entry.headers, content=entry.content)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


def answer(document: object = RANKING, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(
        status, headers={name.replace("_", "-"): value for name, value in headers.items()}, json=document
    )


def client(*entries: httpx.Response | httpx.HTTPError, **options: Any) -> tuple[RankTower, Script]:
    script = Script(*entries)
    return RankTower(URL, transport=script, **options), script


def test_only_what_is_given_is_sent() -> None:
    tower, script = client(answer())
    tower.rank([1, 2], user_id=3, context={"hour": np.int64(4)}, history=np.array([5]), top_k=1, on_missing="drop")
    assert script.requests[0].url == f"{URL}/v1/rank"
    assert script.requests[0].headers["content-type"] == "application/json"
    assert script.bodies == [
        {"candidates": [1, 2], "user_id": 3, "context": {"hour": 4}, "history": [5], "top_k": 1, "on_missing": "drop"}
    ]


@pytest.mark.parametrize(
    "candidates",
    [
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        np.array([1, 2], np.uint64),
        np.array([1, 2, 9], np.int32)[:2],
        [np.int64(1), np.int64(2)],
    ],
)
def test_lists_and_arrays_of_candidates_are_sent_alike(candidates: Any) -> None:
    tower, script = client(answer())
    tower.rank(candidates)
    assert script.bodies == [{"candidates": [1, 2]}]


@pytest.mark.parametrize("candidates", [np.array(["a", "ü"]), np.array(["a", "ü"], object), ["a", "ü"]])
def test_string_ids_are_sent_as_they_are(candidates: Any) -> None:
    tower, script = client(answer())
    tower.rank(candidates)
    assert script.bodies == [{"candidates": ["a", "ü"]}]


@pytest.mark.parametrize(
    ("candidates", "fault"),
    [
        (np.zeros((2, 2), int), "shape"),
        (np.array([1.0]), "float64"),
        (np.array([True]), "bool"),
        (np.array([2**63], np.uint64), "int64"),
        ("abc", "one str"),
        ([object()], "not JSON"),
        ([float("nan")], "not JSON"),
        (["\ud800"], "not JSON"),
    ],
)
def test_candidates_that_cannot_be_ids_are_refused_before_anything_is_sent(candidates: Any, fault: str) -> None:
    tower, script = client(answer())
    with pytest.raises(BadRequest, match=fault) as caught:
        tower.rank(candidates)
    assert caught.value.remedy
    assert script.requests == []


def test_a_ranking_holds_read_only_arrays_and_the_stage_times() -> None:
    items = [
        {
            "id": 7,
            "score": 2.0,
            "probability": 0.5,
            "position": 1,
            "explanation": {"item_heads": [0], "similarities": [0.9]},
        },
        {"id": 9, "score": None, "position": 0},
    ]
    tower, _ = client(
        answer({**RANKING, "items": items, "missing": [9]}, server_timing="queue;dur=0.004, score;dur=0.25")
    )
    ranking = tower.rank([9, 7], explain=True)
    assert [array.dtype.name for array in (ranking.ids, ranking.scores, ranking.positions)] == [
        "int64",
        "float32",
        "int32",
    ]
    assert ranking.ids.tolist() == [7, 9]
    assert np.array_equal(ranking.scores, np.array([2.0, np.nan], np.float32), equal_nan=True)
    assert ranking.probabilities is not None
    assert np.array_equal(ranking.probabilities, np.array([0.5, np.nan], np.float32), equal_nan=True)
    assert ranking.positions.tolist() == [1, 0]
    assert ranking.missing.tolist() == [9]
    assert ranking.timings == {"queue": 0.004, "score": 0.25}
    assert ranking.explanations == ({"item_heads": [0], "similarities": [0.9]}, None)
    assert len(ranking) == 2
    with pytest.raises(ValueError, match="read-only"):
        ranking.scores[0] = 0.0


def test_string_ids_come_back_whole() -> None:
    items = [{**ITEM, "id": "a"}, {**ITEM, "id": "a much longer id"}]
    tower, _ = client(answer({**RANKING, "items": items}))
    assert tower.rank(["a", "a much longer id"]).ids.tolist() == ["a", "a much longer id"]


def test_an_empty_ranking_is_a_ranking() -> None:
    tower, _ = client(answer({**RANKING, "items": []}))
    ranking = tower.rank([], top_k=0)
    assert len(ranking) == 0
    assert ranking.probabilities is None


def test_a_batch_answers_in_the_order_of_its_queries() -> None:
    rankings = [{**RANKING, "items": [{**ITEM, "id": one}]} for one in (4, 5)]
    tower, script = client(answer({"release": "r1", "rankings": rankings}))
    first, second = tower.rank_batch([Query(candidates=[4], user_id=1), Query(candidates=np.array([5]))])
    assert script.requests[0].url == f"{URL}/v1/rank:batch"
    assert script.bodies == [{"requests": [{"candidates": [4], "user_id": 1}, {"candidates": [5]}]}]
    assert (first.ids.tolist(), second.ids.tolist()) == ([4], [5])


def test_a_batch_answer_of_another_length_is_refused() -> None:
    tower, _ = client(answer({"release": "r1", "rankings": []}))
    with pytest.raises(BadAnswer, match="asked 1 questions"):
        tower.rank_batch([Query(candidates=[1])])


def test_retrieved_items_have_no_position() -> None:
    tower, script = client(answer({**RANKING, "items": [{"id": 7, "score": 1.0}]}))
    assert tower.retrieve(user_id=1, per_head=50).positions.tolist() == [-1]
    assert script.requests[0].url == f"{URL}/v1/retrieve"
    assert script.bodies == [{"user_id": 1, "per_head": 50}]


def test_release_says_what_serves() -> None:
    document = {
        "release": "r1",
        "bundle": "b",
        "snapshot": "s",
        "items": 3,
        "users": 2,
        "retrieval": True,
        "kernel": "numpy",
    }
    tower, script = client(answer(document))
    release = tower.release()
    assert script.requests[0].url == f"{URL}/v1/release"
    assert (release.id, release.items, release.retrieval) == ("r1", 3, True)
    assert release.document["kernel"] == "numpy"


@pytest.mark.parametrize("entry", [answer(PROBLEM, 503), httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
def test_a_service_that_is_down_is_not_ready_and_is_asked_once(entry: httpx.Response | httpx.HTTPError) -> None:
    tower, script = client(entry)
    assert tower.ready() is False
    assert len(script.requests) == 1


def test_a_service_that_answers_is_ready() -> None:
    tower, _ = client(answer({"ready": True}))
    assert tower.ready() is True


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (413, BadRequest),
        (422, BadRequest),
        (404, BadRequest),
        (500, BadAnswer),
        (302, BadAnswer),
        (504, DeadlineExceeded),
    ],
)
def test_a_problem_becomes_a_typed_error_and_is_final(status: int, kind: type[RankTowerError]) -> None:
    tower, script = client(answer(PROBLEM, status))
    with pytest.raises(kind, match=f"{status} Request refused: top_k is -1: send an integer") as caught:
        tower.rank([1])
    assert (caught.value.status, caught.value.field) == (status, "top_k")
    assert caught.value.remedy == "send an integer from 0 on"
    assert caught.value.problem == PROBLEM
    assert len(script.requests) == 1


def test_an_error_without_a_document_still_has_its_type() -> None:
    tower, _ = client(httpx.Response(502, content=b"<html>"))
    with pytest.raises(BadAnswer, match="502 Bad Gateway"):
        tower.rank([1])


@pytest.mark.parametrize(
    "entry",
    [
        httpx.Response(200, content=b"{"),
        httpx.Response(200, content=b"\xff"),
        answer([]),
        answer({}),
        answer({**RANKING, "items": [3]}),
    ],
)
def test_an_answer_that_is_no_ranking_is_named_so(entry: httpx.Response) -> None:
    tower, _ = client(entry)
    with pytest.raises(BadAnswer):
        tower.rank([1])


@pytest.mark.parametrize(
    "trouble",
    [
        answer(PROBLEM, 429, retry_after="0"),
        answer(PROBLEM, 503, retry_after="0"),
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("cut"),
    ],
)
def test_passing_trouble_is_tried_again(trouble: httpx.Response | httpx.HTTPError) -> None:
    tower, script = client(trouble, trouble, answer())
    assert tower.rank([1]).release == "r1"
    assert len(script.requests) == 3
    assert script.bodies[0] == script.bodies[2]


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [(answer(PROBLEM, 429), Overloaded), (answer(PROBLEM, 503), Unavailable), (httpx.ConnectError("x"), Unavailable)],
)
def test_lasting_trouble_is_raised_after_the_retries(
    trouble: httpx.Response | httpx.HTTPError, kind: type[RankTowerError]
) -> None:
    tower, script = client(trouble, retries=1)
    with pytest.raises(kind):
        tower.rank([1])
    assert len(script.requests) == 2


def test_a_retry_after_beyond_the_deadline_is_raised_at_once() -> None:
    tower, script = client(answer(PROBLEM, 429, retry_after="30"), timeout_s=1.0)
    with pytest.raises(Overloaded) as caught:
        tower.rank([1])
    assert caught.value.retry_after_s == 30.0
    assert len(script.requests) == 1


def test_the_deadline_covers_all_attempts() -> None:
    now = iter([0.0, 0.5, 1.5])
    course = Course(RetryPolicy(), 1.0, clock=lambda: next(now))
    assert course.left_s() == 0.5
    with pytest.raises(DeadlineExceeded, match="1 s"):
        course.left_s()


@pytest.mark.parametrize(
    ("attempt", "after_s", "jitter", "pause_s"),
    [(0, None, 0.5, 0.01), (2, None, 0.5, 0.04), (20, None, 1.0, 1.0), (5, 3.0, 0.5, 3.01), (0, 0.0, 0.0, 0.0)],
)
def test_pauses_grow_with_jitter_and_never_undercut_retry_after(
    attempt: int, after_s: float | None, jitter: float, pause_s: float
) -> None:
    assert RetryPolicy().pause_s(attempt, after_s, jitter) == pytest.approx(pause_s)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2", 2.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("Mon, 02 Nov 2026 10:00:05 GMT", 5.0),
        ("Mon, 02 Nov 2026 09:00:00 -0000", 0.0),
        ("soon", None),
        ("nan", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_read_in_both_forms(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, datetime(2026, 11, 2, 10, tzinfo=UTC)) == seconds


@pytest.mark.parametrize(
    ("header", "timings"),
    [
        ("score;dur=0.25", {"score": 0.25}),
        ('a;desc="x";dur=1, b , c;dur=no', {"a": 1.0}),
        ("", {}),
        (None, {}),
    ],
)
def test_server_timing_is_read_leniently(header: str | None, timings: dict[str, float]) -> None:
    assert timings_of(header) == timings


def test_a_url_without_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        RankTower("localhost:8080")


ASYNC_CALLS: dict[str, Callable[[AsyncRankTower], Any]] = {
    "rank": lambda tower: tower.rank([1], user_id=2),
    "rank_batch": lambda tower: tower.rank_batch([Query(candidates=[1])]),
    "retrieve": lambda tower: tower.retrieve(user_id=2),
    "release": lambda tower: tower.release(),
    "ready": lambda tower: tower.ready(),
}
SYNC_CALLS: dict[str, Callable[[RankTower], Any]] = {
    "rank": lambda tower: tower.rank([1], user_id=2),
    "rank_batch": lambda tower: tower.rank_batch([Query(candidates=[1])]),
    "retrieve": lambda tower: tower.retrieve(user_id=2),
    "release": lambda tower: tower.release(),
    "ready": lambda tower: tower.ready(),
}
EVERYTHING = {
    **RANKING,
    "rankings": [RANKING],
    "bundle": "b",
    "snapshot": "s",
    "items": [ITEM],
    "users": 1,
    "retrieval": False,
}


@pytest.mark.parametrize("name", SYNC_CALLS)
def test_both_clients_send_and_answer_the_same(name: str) -> None:
    async def awaited(script: Script) -> Any:
        async with AsyncRankTower(URL, transport=script) as tower:
            return await ASYNC_CALLS[name](tower)

    sync_script, async_script = Script(answer(EVERYTHING)), Script(answer(EVERYTHING))
    with RankTower(URL, transport=sync_script) as tower:
        blocked = SYNC_CALLS[name](tower)
    assert repr(asyncio.run(awaited(async_script))) == repr(blocked)
    sent = [
        [(each.method, each.url, each.content) for each in script.requests] for script in (sync_script, async_script)
    ]
    assert sent[0] == sent[1]


def test_the_async_client_tries_again_too() -> None:
    script = Script(answer(PROBLEM, 429, retry_after="0"), answer())

    async def ask() -> str:
        async with AsyncRankTower(URL, transport=script) as tower:
            return (await tower.rank([1])).release

    assert asyncio.run(ask()) == "r1"
    assert len(script.requests) == 2


def test_an_awaited_call_ends_at_its_deadline() -> None:
    class Silent(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

    async def ask() -> None:
        async with AsyncRankTower(URL, transport=Silent(), timeout_s=0.05) as tower:
            await tower.rank([1])

    with pytest.raises(DeadlineExceeded):
        asyncio.run(ask())


# --- Arrow


@pytest.mark.parametrize(
    ("candidates", "kind"),
    [
        ([3, 1], pa.int64()),
        (np.array([3, 1], np.uint32), pa.int64()),
        (np.array([[3, 1]])[0, ::-1], pa.int64()),
        (["a", "ü"], pa.string()),
        (np.array(["a", "ü"]), pa.string()),
        (np.array(["a"], object), pa.string()),
        ([], pa.null()),
    ],
)
def test_arrow_bodies_hold_the_candidates_in_a_column(candidates: Any, kind: pa.DataType) -> None:
    table = pa.ipc.open_stream(rank_body(candidates, {"user_id": 3, "context": {"hour": np.int64(4)}})).read_all()
    assert table["candidates"].type == kind
    assert table["candidates"].to_pylist() == list(candidates)
    assert json.loads(table.schema.metadata[b"request"]) == {"user_id": 3, "context": {"hour": 4}}


@pytest.mark.parametrize(
    "candidates",
    ["a", [1, "a"], [1.5], [None], [True], [2**63], np.array([2**63], np.uint64), np.array([[1]]), np.array([1.5])],
)
def test_what_is_no_column_of_ids_is_refused_before_it_is_sent(candidates: Any) -> None:
    tower, script = client(answer(), arrow=True)
    with pytest.raises(BadRequest):
        tower.rank(candidates)
    assert script.requests == []


@pytest.mark.parametrize("content", [b"", b"{}", pa.ipc.new_stream])
def test_an_answer_that_is_no_stream_is_a_bad_answer(content: Any) -> None:
    if not isinstance(content, bytes):
        sink = pa.BufferOutputStream()
        content(sink, pa.schema([("id", pa.int64())])).close()
        content = sink.getvalue().to_pybytes()
    tower, script = client(httpx.Response(200, content=content), arrow=True)
    with pytest.raises(BadAnswer):
        tower.rank([1])
    assert script.requests[0].headers["content-type"] == script.requests[0].headers["accept"] == MEDIA_TYPE


def test_a_refusal_of_a_stream_is_read_as_any_other() -> None:
    tower, _ = client(answer(PROBLEM, 422), arrow=True)
    with pytest.raises(BadRequest, match="top_k is -1"):
        tower.rank([1])


def test_arrow_needs_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ranktower_client.arrow", None)
    with pytest.raises(ImportError, match=r"pip install 'ranktower-client\[arrow\]'"):
        RankTower(URL, arrow=True)
    assert RankTower(URL).url == URL
