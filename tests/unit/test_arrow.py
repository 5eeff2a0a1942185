"""Arrow bodies: equal to the JSON bodies that say the same, and every wrong stream a refusal that names the remedy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from time import perf_counter_ns
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel import candidates
from service import arrow
from service.admission import Permit
from service.answers import ARROW, Limits, answer_rank
from service.errors import MalformedBody, RequestError, UnsupportedBody
from service.live import Serving
from service.ranker import Ranker, Ranking
from service.telemetry import StageClock
from tests.services import Running, running_release
from tests.tiny_releases import TinyRelease, tiny_release

LIMITS = Limits(max_candidates=200, max_batch=2)
CALIBRATION = {"a": 0.1, "b": -1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return tiny_release(tmp_path_factory.mktemp("int"), calibration=CALIBRATION)


@pytest.fixture(scope="module")
def ranker(made: TinyRelease) -> Ranker:
    return Ranker.open(made.folder, made.users)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    made = tiny_release(tmp_path_factory.mktemp("string"), ids="string")
    return Ranker.open(made.folder, made.users)


@pytest.fixture(scope="module")
def service(made: TinyRelease, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_release(made, tmp_path_factory.mktemp("store"), max_candidates=100) as service:
        yield service


def stream(
    *columns: pa.Array, names: Any = ("candidates",), request: Any = None, batches: int = 1, **write: Any
) -> bytes:
    metadata = None if request is None else {"request": request if isinstance(request, bytes) else json.dumps(request)}
    schema = pa.schema([pa.field(n, c.type) for n, c in zip(names, columns, strict=True)], metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(**write)) as writer:
        for _ in range(batches):
            writer.write_batch(pa.record_batch(list(columns), schema=schema))
    octets: bytes = sink.getvalue().to_pybytes()
    return octets


def asked(ranker: Ranker, body: bytes, *, takes: bool = True, sends: bool = True) -> bytes:
    answer = arrow.answerer(takes=takes, sends=sends)
    return answer(Permit(perf_counter_ns()), Serving(ranker), body, LIMITS, StageClock()).body


def asked_in_json(ranker: Ranker, document: Any) -> dict[str, Any]:
    body = answer_rank(Permit(perf_counter_ns()), Serving(ranker), orjson.dumps(document), LIMITS, StageClock()).body
    answer: dict[str, Any] = orjson.loads(body)
    return answer


def as_json(answer: bytes) -> dict[str, Any]:
    """An answer in Arrow as the document that it stands for."""
    table = pa.ipc.open_stream(answer).read_all()
    said = {name.decode(): json.loads(value) for name, value in table.schema.metadata.items()}
    return {**said, "items": table.to_pylist()}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for item in expected["items"]:
        explanation = item.pop("explanation", None)
        item |= explanation or {}
    floats = ("score", "probability", "similarities")
    for one, other in zip(found["items"], expected["items"], strict=True):
        assert {n: v for n, v in one.items() if n not in floats and v is not None} == {
            n: v for n, v in other.items() if n not in floats
        }
        for name in floats:
            assert one.get(name) == (None if other.get(name) is None else pytest.approx(other[name], rel=1e-6))
    assert {**found, "items": None} == {**expected, "items": None}


REQUESTS: list[dict[str, Any]] = [
    {},
    {"user_id": 4, "context": {"hour": 3}, "top_k": 3},
    {"user": {"age": 30}, "history": [100, 101], "explain": True},
    {"user_id": 77, "on_missing": "drop", "top_k": 10},
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_stream_is_answered_as_the_json_body_that_says_the_same(ranker: Ranker, request_: dict[str, Any]) -> None:
    ids = [100, 9, 105, 105, 2**40]
    expected = asked_in_json(ranker, {**request_, "candidates": ids})
    body = stream(pa.array(ids), request=request_)
    assert orjson.loads(asked(ranker, body, sends=False)) == expected
    same(as_json(asked(ranker, body)), expected)
    same(as_json(asked(ranker, orjson.dumps({**request_, "candidates": ids}), takes=False)), expected)


@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8()])
@settings(max_examples=50, deadline=None)
@given(
    ids=st.lists(st.one_of(st.sampled_from(["item-1", "item-59", ""]), st.text(max_size=5))), start=st.integers(0, 3)
)
def test_texts_lie_where_they_were_sent(texts: Ranker, kind: Any, ids: list[str], start: int) -> None:
    sliced = pa.array([*["x"] * start, *ids], kind)[start:]
    found = asked(texts, stream(sliced, request={"user_id": "user-3"}))
    same(as_json(found), asked_in_json(texts, {"user_id": "user-3", "candidates": ids}))
    assert arrow.read_request(texts, stream(sliced)).candidates.tolist() == ids  # type: ignore[attr-defined]


def test_candidates_are_not_copied(ranker: Ranker) -> None:
    body = stream(pa.array(np.arange(5000)))
    found: Any = arrow.read_request(ranker, body).candidates
    lies_at, whole = found.ctypes.data, np.frombuffer(body, np.uint8)
    assert whole.ctypes.data <= lies_at <= whole.ctypes.data + len(body) - found.nbytes


@pytest.mark.skipif(candidates.native is None, reason="the extension was not built")
def test_plain_streams_are_read_and_written_without_pyarrow(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    body = stream(pa.array([105, 100, 101]), request={"user_id": 4, "top_k": 2})
    by_pyarrow = asked(ranker, body)
    monkeypatch.setattr(arrow, "_write_any", None)
    monkeypatch.setattr(arrow, "_open", None)
    by_template = asked(ranker, body)
    assert pa.ipc.open_stream(by_template).schema.equals(pa.ipc.open_stream(by_pyarrow).schema, check_metadata=False)
    same(as_json(by_template), as_json(by_pyarrow))


@pytest.mark.parametrize("known", [True, False, None])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kept", [1, 2, 3, 8])
def test_a_template_says_what_pyarrow_writes(known: bool | None, calibrated: bool, kept: int) -> None:
    scores = np.linspace(2, -1, kept, dtype=np.float32)
    ranking = Ranking(
        release="20260101T000000000-abc",
        watermark=2**62,
        user_known=known,
        candidates=12_345,
        scored=12_345,
        missing=np.empty(0, np.int64),
        kept=np.arange(kept) - 2**62,
        positions=np.arange(kept, dtype=np.int32),
        scores=scores,
        probabilities=scores / 4 if calibrated else None,
        explanation=None,
    )
    found = arrow._write_plain(ranking)
    assert found is not None
    same(as_json(found), as_json(arrow._write_any(ranking, "int")))
    pa.ipc.open_stream(found).read_all().validate(full=True)


def test_the_columns_of_an_answer_have_the_documented_types(ranker: Ranker, texts: Ranker) -> None:
    answer = pa.ipc.open_stream(asked(ranker, stream(pa.array([100, 9]), request={"explain": True}))).read_all()
    assert {field.name: str(field.type) for field in answer.schema} == {
        "id": "int64",
        "score": "float",
        "probability": "float",
        "position": "int32",
        "item_heads": "list<item: int32>",
        "similarities": "list<item: float>",
    }
    assert [answer[name].null_count for name in answer.column_names] == [0, 1, 1, 0, 1, 1]
    for body in (stream(pa.array([])), stream(pa.array([], pa.utf8())), stream(pa.array([], pa.utf8()), batches=0)):
        empty = pa.ipc.open_stream(asked(texts, body)).read_all()
        assert (empty.num_rows, str(empty.schema.field("id").type)) == (0, "string")
        assert as_json(asked(texts, body))["counts"] == {"candidates": 0, "scored": 0, "returned": 0}


INTS = pa.array([1, 2])


@pytest.mark.parametrize(
    ("body", "kind", "field", "detail", "remedy"),
    [
        (b"", MalformedBody, None, "not an Arrow IPC stream", "one schema and one record batch"),
        (b'{"candidates":[1]}', MalformedBody, None, "not an Arrow IPC stream", "new_stream"),
        (stream(INTS)[:-20], MalformedBody, None, "not an Arrow IPC stream", "new_stream"),
        (stream(INTS) + b"more", MalformedBody, None, "4 octets follow its end", "new_stream"),
        (stream(INTS, batches=2), RequestError, "candidates", "more than one record batch", "combine the chunks"),
        (stream(INTS, batches=9), RequestError, "candidates", "more than one record batch", "combine the chunks"),
        (stream(INTS, compression="zstd"), UnsupportedBody, "candidates", "compressed", "uncompressed"),
        (stream(INTS, compression="lz4"), UnsupportedBody, "candidates", "compressed", "uncompressed"),
        (stream(INTS, names=["ids"]), RequestError, "candidates", "the columns are ids", "one column, candidates"),
        (stream(names=[]), RequestError, "candidates", "the columns are none", "one column, candidates"),
        (stream(INTS, INTS, names=["candidates", "user"]), RequestError, "candidates", "candidates, user", "metadata"),
        (stream(INTS, INTS, names=["candidates"] * 2), RequestError, "candidates", "candidates, candidates", "one"),
        (stream(INTS.cast(pa.int32())), RequestError, "candidates", "a column of int32", "send int64"),
        (stream(pa.array(["a"])), RequestError, "candidates", "a column of string", "send int64"),
        (stream(pa.array(["a"]).dictionary_encode()), RequestError, "candidates", "dictionary", "send int64"),
        (stream(pa.array([[1]])), RequestError, "candidates", "a column of list", "send int64"),
        (stream(pa.array([1, 2, None, None])), RequestError, "candidates[2]", "is null (2 are)", "leave nulls out"),
        (stream(pa.array([None, 1, None, 4])[1:]), RequestError, "candidates[1]", "is null (1 are)", "leave nulls"),
        (stream(pa.array([None])), RequestError, "candidates[0]", "is null (1 are)", "leave nulls"),
        (stream(pa.nulls(10**7)), RequestError, "candidates[0]", "is null (10000000 are)", "leave nulls"),
        (stream(INTS, request=b"{"), MalformedBody, "request", "`request` in the schema's metadata", "JSON"),
        (stream(INTS, request=b""), MalformedBody, "request", "`request` in the schema's metadata is empty", "JSON"),
        (stream(INTS, request=[]), RequestError, "request", "`request` in the schema's metadata is []", "JSON object"),
        (stream(INTS, request={"candidates": [1]}), RequestError, "candidates", "is not a field", "use one of"),
        (stream(INTS, request={"top_k": -1}), RequestError, "top_k", "top_k is -1", "from 0 on"),
        (stream(INTS, request={"user": {"agee": 1}}), RequestError, "user.agee", "is not a field", "did you mean age"),
        (stream(INTS, request={"on_missing": "error"}), RequestError, "candidates[0]", "is 1, unknown", "publish"),
        (stream(pa.array(range(201))), RequestError, "candidates", "has 201 entries", "RANKTOWER_MAX_CANDIDATES"),
    ],
)
def test_a_wrong_stream_is_refused_by_name(
    ranker: Ranker, body: bytes, kind: Any, field: str | None, detail: str, remedy: str
) -> None:
    with pytest.raises(RequestError) as caught:
        asked(ranker, body)
    assert type(caught.value) is kind
    assert caught.value.field == field
    assert detail in caught.value.detail
    assert remedy in caught.value.remedy


def test_a_batch_compressed_in_the_old_way_is_refused(ranker: Ranker) -> None:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([INTS], names=["candidates"])
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    with pytest.raises(UnsupportedBody, match="compressed"):
        asked(ranker, sink.getvalue().to_pybytes())


def test_a_text_is_as_long_as_its_characters(texts: Ranker) -> None:
    assert as_json(asked(texts, stream(pa.array(["ü" * 1024]))))["missing"] == ["ü" * 1024]
    with pytest.raises(RequestError, match=r"candidates\[1\] has 1025 characters"):
        asked(texts, stream(pa.array(["a", "ü" * 1025])))


def test_text_that_is_no_utf8_is_refused(texts: Ranker) -> None:
    broken = stream(pa.array(["item-1", "abcdefgh"])).replace(b"abcdefgh", b"abc\xff\xfeefg")
    with pytest.raises(MalformedBody, match="UTF8"):
        asked(texts, broken)


@pytest.mark.parametrize("ids", ["int", "string"])
@settings(max_examples=400, deadline=None)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=3),
    end=st.one_of(st.just(1.0), st.floats(0, 1)),
    count=st.integers(0, 20),
)
def test_no_damage_makes_more_than_a_refusal(
    ranker: Ranker, texts: Ranker, ids: str, changes: Any, end: float, count: int
) -> None:
    column = pa.array(range(count), pa.int64()) if ids == "int" else pa.array([f"item-{k}" for k in range(count)])
    body = bytearray(stream(column, request={"user": {"age": 3}}))
    for place, octets in changes:
        at = int(place * len(body))
        body[at : at + len(octets)] = octets
    with contextlib.suppress(RequestError):
        asked(ranker if ids == "int" else texts, bytes(body[: int(end * len(body))]))


# --- over HTTP


@pytest.mark.parametrize(
    ("sent", "accept", "received"),
    [
        ("arrow", "*/*", "arrow"),
        ("arrow", ARROW, "arrow"),
        ("arrow", "application/json", "json"),
        ("json", "*/*", "json"),
        ("json", ARROW, "arrow"),
        ("json", "application/json", "json"),
    ],
)
def test_an_answer_has_the_form_of_the_body_unless_another_is_asked(
    service: Running, sent: str, accept: str, received: str
) -> None:
    ids, types = [100, 9], {"arrow": ARROW, "json": "application/json"}
    body = stream(pa.array(ids)) if sent == "arrow" else orjson.dumps({"candidates": ids})
    response = service.http.post("/v1/rank", content=body, headers={"Content-Type": types[sent], "Accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, types[received])
    found = as_json(response.content) if received == "arrow" else response.json()
    assert found["release"] == response.headers["x-ranktower-release"]
    assert [item["id"] for item in found["items"]] == ids


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/rank", b"garbage", 422, "malformed-body"),
        ("/v1/rank", stream(INTS, batches=2), 422, "invalid-request"),
        ("/v1/rank", stream(INTS, compression="zstd"), 415, "unsupported-body"),
        ("/v1/rank", stream(pa.array(range(101))), 422, "invalid-request"),
        ("/v1/rank:batch", stream(INTS), 415, "unsupported-body"),
        ("/v1/retrieve", stream(INTS), 415, "unsupported-body"),
    ],
)
def test_every_refusal_is_a_problem_in_json(service: Running, path: str, body: bytes, status: int, kind: str) -> None:
    response = service.http.post(path, content=body, headers={"Content-Type": ARROW, "Accept": ARROW})
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert response.json()["type"] == f"urn:ranktower:problem:{kind}"
