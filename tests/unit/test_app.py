"""The service over HTTP: answers, headers, and every refusal as a problem document."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cache.file_store import FileStore
from kernel import engine
from service.ranker import Ranker
from service.schema import BatchAnswer, RankAnswer, Ready, ReleaseAnswer, Sample
from service.telemetry import STAGES
from tests.services import TIMEOUT_S, Running, running, running_release
from tests.tiny_releases import TinyRelease, publish, tiny_release, write_users

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return tiny_release(tmp_path_factory.mktemp("made"), calibration={"a": 0.1, "b": 0.0}, index="flat")


@pytest.fixture(scope="module")
def service(made: TinyRelease, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = {"max_candidates": 100, "max_batch": 3, "max_body_bytes": 20_000}
    with running_release(made, tmp_path_factory.mktemp("store"), retrieval=True, **limits) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Running) -> httpx.Client:
    return service.http


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of a refusal, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert {*document} >= {"type", "title", "status", "detail", "instance", "field", "remedy"}
    assert document["type"].startswith("urn:ranktower:problem:")
    assert document["remedy"]
    return document


# --- answers


def test_rank_answers_with_the_best_items_first(client: httpx.Client, made: TinyRelease) -> None:
    response = client.post("/v1/rank", json={"user_id": 4, "candidates": [9, *made.item_ids[:9]], "top_k": 10})
    answer = response.json()
    assert response.status_code == 200
    assert [*answer] == ["release", "watermark", "user_known", "items", "missing", "counts"]
    assert answer["user_known"] is True
    assert answer["missing"] == [9]
    assert answer["counts"] == {"candidates": 10, "scored": 9, "returned": 10}
    scores = [item["score"] for item in answer["items"]]
    assert scores[:9] == sorted(scores[:9], reverse=True)
    assert answer["items"][9] == {"id": 9, "score": None, "probability": None, "position": 0}
    assert {*answer["items"][0]} == {"id", "score", "probability", "position"}


def test_every_answer_names_its_release_and_its_stages(client: httpx.Client) -> None:
    response = client.post("/v1/rank", json={"candidates": [100]})
    assert response.headers["x-ranktower-release"] == response.json()["release"]
    timings = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert tuple(timings) == STAGES
    assert all(float(milliseconds) >= 0 for milliseconds in timings.values())


def test_explanations_come_with_each_known_item(client: httpx.Client, made: TinyRelease) -> None:
    items = client.post("/v1/rank", json={"candidates": [9, 100], "explain": True}).json()["items"]
    assert len(items[0]["explanation"]["item_heads"]) == made.head.user_heads
    assert len(items[0]["explanation"]["similarities"]) == made.head.user_heads
    assert "explanation" not in items[1]


def test_batch_answers_in_the_order_of_its_requests(client: httpx.Client) -> None:
    bodies = [{"user_id": 4, "candidates": [100, 101]}, {"candidates": []}]
    answer = client.post("/v1/rank:batch", json={"requests": bodies}).json()
    assert answer["rankings"] == [client.post("/v1/rank", json=body).json() for body in bodies]
    assert answer["release"] == answer["rankings"][0]["release"]
    assert client.post("/v1/rank:batch", json={"requests": []}).json()["rankings"] == []


def test_retrieve_needs_no_candidates(client: httpx.Client) -> None:
    answer = client.post("/v1/retrieve", json={"user_id": 4, "top_k": 3}).json()
    assert len(answer["items"]) == 3
    assert "position" not in answer["items"][0]


def test_a_request_too_long_for_the_event_loop_gets_the_same_answer(
    made: TinyRelease, tmp_path: Path, client: httpx.Client
) -> None:
    body = {"user_id": 4, "candidates": made.item_ids}
    with running_release(made, tmp_path, inline_ms=0.0) as pooled:
        assert pooled.post("/v1/rank", body).json() == client.post("/v1/rank", json=body).json()


def test_release_and_sample_tell_what_is_served(client: httpx.Client, made: TinyRelease) -> None:
    release = client.get("/v1/release").json()
    assert release["items"] == len(made.item_ids)
    sample = client.get("/v1/sample", params={"items": 5, "users": 2, "seed": 7}).json()
    assert sample["release"] == release["release"]
    assert len({*sample["items"]} & {*made.item_ids}) == 5
    assert len({*sample["users"]} & {*made.user_ids}) == 2


def test_string_ids_work_alike(tmp_path: Path) -> None:
    with running_release(tiny_release(tmp_path / "made", ids="string"), tmp_path / "store") as service:
        answer = service.post("/v1/rank", {"user_id": "user-3", "candidates": ["item-1", "item-ü"]}).json()
        assert answer["user_known"] is True
        assert answer["missing"] == ["item-ü"]
        assert problem(service.post("/v1/rank", {"candidates": ["item-1", 2]}), 422)["field"] == "candidates[1]"


# --- refusals


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "field"),
    [
        ("/v1/rank", b'{"candidates":["x"]}', JSON, 422, "candidates[0]"),
        ("/v1/rank", b'{"candidates":[100],"user":{"agee":1}}', JSON, 422, "user.agee"),
        ("/v1/rank", b'{"candidates":[9],"on_missing":"error"}', JSON, 422, "candidates[0]"),
        ("/v1/rank", b'{"candidates":[' + b"1," * 100 + b"1]}", JSON, 422, "candidates"),
        ("/v1/rank", b"", JSON, 422, None),
        ("/v1/rank", b"{", JSON, 422, None),
        ("/v1/rank", b"\xff", JSON, 422, None),
        ("/v1/rank", b"[" * 10_000, JSON, 422, None),
        ("/v1/rank", b'{"candidates":[' + b" " * 30_000 + b"]}", JSON, 413, None),
        ("/v1/rank", b"{}", {}, 415, "Content-Type"),
        ("/v1/rank", b"{}", {"Content-Type": "text/plain"}, 415, "Content-Type"),
        ("/v1/rank", b"{}", {"Content-Type": "application/json; charset=latin-1"}, 415, "Content-Type"),
        ("/v1/rank", b"{}", {**JSON, "Content-Encoding": "gzip"}, 415, "Content-Encoding"),
        (
            "/v1/rank:batch",
            b'{"requests":[{"candidates":[]},{"candidates":[true]}]}',
            JSON,
            422,
            "requests[1].candidates[0]",
        ),
        (
            "/v1/rank:batch",
            b'{"requests":[' + b'{"candidates":[]},' * 3 + b'{"candidates":[]}]}',
            JSON,
            422,
            "requests",
        ),
        ("/v1/retrieve", b'{"candidates":[1]}', JSON, 422, "candidates"),
        ("/v1/retrieve", b'{"per_head":0}', JSON, 422, "per_head"),
        ("/v1/nothing", b"{}", JSON, 404, None),
        ("/v1/rank/", b"{}", JSON, 404, None),
        ("/livez", b"{}", JSON, 405, None),
    ],
)
def test_a_wrong_request_is_a_problem_that_names_the_field(
    client: httpx.Client, path: str, content: bytes, headers: dict[str, str], status: int, field: str | None
) -> None:
    document = problem(client.post(path, content=content, headers=headers), status)
    assert document["field"] == field
    assert document["instance"] == path


def test_a_body_that_does_not_say_how_long_it_is_is_cut_off(client: httpx.Client) -> None:
    parts = iter([b'{"candidates":['] + [b" " * 5_000] * 10)
    problem(client.post("/v1/rank", content=parts, headers=JSON), 413)


@pytest.mark.parametrize(
    "value", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_json_may_say_that_it_is_utf_8(client: httpx.Client, value: str) -> None:
    assert client.post("/v1/rank", content=b'{"candidates":[]}', headers={"Content-Type": value}).status_code == 200


@pytest.mark.parametrize("query", ["items=-1", "items=x", "users=1e9", "seed=-1", f"items={10**30}", "items=100001"])
def test_a_wrong_query_is_a_problem(client: httpx.Client, query: str) -> None:
    assert problem(client.get(f"/v1/sample?{query}"), 422)["field"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/%ff%ed%a0%80", {}),
        ("/" + "x" * 5_000, {}),
        ("/v1/rank", {"Host": "["}),
        ("/v1/rank", {"Content-Type": "\xe9"}),
    ],
)
def test_odd_paths_and_headers_are_problems(client: httpx.Client, path: str, headers: dict[str, str]) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    response = client.post(path, content=b"{}", headers=encoded)
    assert len(problem(response, response.status_code)["detail"]) < 500
    assert response.status_code in (404, 415)


def test_a_body_may_say_that_it_is_not_encoded(client: httpx.Client) -> None:
    headers = {**JSON, "Content-Encoding": "identity"}
    assert client.post("/v1/rank", content=b'{"candidates":[]}', headers=headers).status_code == 200


def test_a_number_is_no_truth_value(client: httpx.Client) -> None:
    document = problem(client.post("/v1/rank", json={"candidates": [], "user": {"age": True}}), 422)
    assert document["field"] == "user.age"
    assert "expected a number, got True" in document["detail"]


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_may_ask_for_the_head_only(client: httpx.Client, path: str) -> None:
    response = client.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert {*client.post(path).headers["allow"].split(", ")} == {"GET", "HEAD"}


def test_the_page_of_the_documentation_has_our_name(client: httpx.Client) -> None:
    assert "<title>RankTower" in client.get("/docs").text


def test_a_method_that_is_not_taken_names_those_that_are(client: httpx.Client) -> None:
    response = client.get("/v1/rank")
    assert response.headers["allow"] == "POST"
    assert problem(response, 405)["remedy"] == "use POST"


def test_retrieval_that_is_off_conflicts(made: TinyRelease, tmp_path: Path) -> None:
    with running_release(made, tmp_path) as service:
        assert "--retrieval" in problem(service.post("/v1/retrieve", {}), 409)["remedy"]


def test_a_full_queue_says_when_to_come_again(made: TinyRelease, tmp_path: Path) -> None:
    """One request works in the pool and is held there, one waits for its slot, the third finds the queue full."""
    with running_release(made, tmp_path, inline_ms=0.0, pool_threads=1, max_in_flight=1, max_queue=1) as service:
        held = threading.Event()
        service.service.pool.submit(held.wait, TIMEOUT_S)
        with ThreadPoolExecutor(8) as callers:
            asked = [callers.submit(service.post, "/v1/rank", {"candidates": [100]}) for _ in range(8)]
            refused = [future.result() for future in islice(as_completed(asked, TIMEOUT_S), 6)]
            held.set()
            answers = [future.result() for future in asked]
    assert [answer.status_code for answer in refused] == [429] * 6
    assert {answer.status_code for answer in answers} == {200, 429}
    assert refused[0].headers["retry-after"] == "1"
    assert "RANKTOWER_MAX_QUEUE" in problem(refused[0], 429)["remedy"]


def test_a_deadline_that_passed_in_the_queue_is_a_problem(made: TinyRelease, tmp_path: Path) -> None:
    with running_release(made, tmp_path, inline_ms=0.0, pool_threads=1) as service:
        service.service.pool.submit(threading.Event().wait, 0.05)
        document = problem(service.post("/v1/rank", {"candidates": [100], "deadline_ms": 1}), 504)
        assert document["field"] == "deadline_ms"


def test_a_defect_is_a_problem_that_says_nothing_of_itself(
    service: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranker, "rank", lambda *given: 1 / 0)
    response = client.post("/v1/rank", json={"candidates": []})
    assert "division" not in json.dumps(problem(response, 500))
    assert response.headers["connection"] == "close"
    monkeypatch.undo()
    assert client.post("/v1/rank", json={"candidates": []}).status_code == 200


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.floats(allow_nan=False), st.text(max_size=4)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
FIELDS = {
    "user_id": st.one_of(st.integers(0, 20), values),
    "user": st.one_of(
        st.dictionaries(st.sampled_from(["user_id", "age", "tastes", "agee"]), values, max_size=3), values
    ),
    "context": st.one_of(st.dictionaries(st.sampled_from(["device", "hour"]), values, max_size=2), values),
    "history": st.one_of(st.lists(st.integers(95, 110), max_size=6), values),
    "candidates": st.one_of(st.lists(st.integers(95, 110), max_size=6), values),
    "top_k": st.one_of(st.integers(0, 9), values),
    "on_missing": st.one_of(st.sampled_from(["last", "drop", "error"]), values),
    "explain": st.booleans(),
    "per_head": st.one_of(st.integers(1, 9), values),
}
documents = st.one_of(st.fixed_dictionaries({}, optional=FIELDS), values)
bodies = st.one_of(documents.map(lambda document: json.dumps(document).encode()), st.binary(max_size=40))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["/v1/rank", "/v1/retrieve"]), bodies)
def test_no_body_makes_the_service_fail(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers=JSON)
    if response.status_code != 200:
        problem(response, 422)


@settings(max_examples=40, deadline=None)
@given(st.lists(documents, max_size=4))
def test_no_batch_makes_the_service_fail(client: httpx.Client, requests: list[Any]) -> None:
    response = client.post("/v1/rank:batch", content=json.dumps({"requests": requests}), headers=JSON)
    if response.status_code != 200:
        problem(response, 422)


# --- state


def test_a_service_without_a_release_lives_but_is_not_ready(made: TinyRelease, tmp_path: Path) -> None:
    store = FileStore(f"file://{tmp_path}")
    with running(store) as service:
        assert service.http.get("/livez").json() == {"alive": True}
        document = problem(service.http.get("/readyz"), 503)
        assert document["ready"] is False
        assert document["release"] is None
        service.until(lambda standing: standing.contact_s is not None)
        details = [
            problem(service.http.get("/readyz"), 503)["detail"],
            problem(service.post("/v1/rank", {"candidates": []}), 503)["detail"],
        ]
        assert details == [f"no release is loaded: {store.url} holds no current release yet"] * 2
        assert service.http.head("/readyz").status_code == 503
        problem(service.http.get("/v1/release"), 503)
        release = publish(made, store)
        service.until_ready()
        assert service.http.get("/readyz").json()["release"] == release


def test_a_service_without_a_release_says_where_it_listens_and_why_it_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.app")
    with running(FileStore(f"file://{tmp_path}")):
        pass
    said = [message for message in caplog.messages if message.startswith("listening on http://")]
    assert len(said) == 1
    assert said[0].endswith(f"waiting: file://{tmp_path} holds no current release yet")


def test_a_release_without_an_index_is_told_where_retrieval_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "service.app")
    with running_release(tiny_release(tmp_path / "made"), tmp_path / "store", retrieval=True) as service:
        state = service.http.get("/readyz").json()
        problem(service.post("/v1/retrieve", {}), 409)
    assert (state["ready"], state["retrieval"]) == (True, False)
    assert [message for message in caplog.messages if f"release {state['release']} has no index" in message]


def test_readyz_tells_release_kernel_and_store(client: httpx.Client, service: Running) -> None:
    state = client.get("/readyz").json()
    assert state["ready"] is True
    assert state["kernel"] == engine.level()
    assert state["retrieval"] is True
    assert state["users"]
    assert state["store"]["url"] == service.service.store.url
    assert state["store"]["reachable"] is True
    assert state["store"]["failure"] is None
    assert 0 <= state["store"]["staleness_s"] < TIMEOUT_S
    assert state["changes"] == {"watermark": 0, "items": 0, "behind_s": 0.0, "dead": 0}


def test_a_new_release_and_new_users_are_taken_over_while_serving(tmp_path: Path) -> None:
    first, second = tiny_release(tmp_path / "1", seed=1), tiny_release(tmp_path / "2", seed=2)
    with running_release(first, tmp_path / "store") as service:
        body = {"user_id": 4, "candidates": first.item_ids}
        before = service.post("/v1/rank", body).json()
        release = publish(second, service.service.store, users=False)
        service.until(lambda standing: standing.ranker is not None and standing.ranker.release == release)
        after = service.post("/v1/rank", body).json()
        assert after["release"] == release != before["release"]
        assert after["items"] != before["items"]
        users = write_users(tmp_path / "users.snap", second.spec, second.user_ids, second.item_ids, age=60.0)
        version = service.service.store.publish_users(users)
        service.until(lambda standing: standing.users == version)
        assert service.post("/v1/rank", body).json()["items"] != after["items"]


def test_a_service_on_its_way_out_is_unready_but_answers(made: TinyRelease, tmp_path: Path) -> None:
    with running_release(made, tmp_path) as service:
        service.service.draining = True
        assert "going away" in problem(service.http.get("/readyz"), 503)["detail"]
        assert service.post("/v1/rank", {"candidates": [100]}).status_code == 200


def test_metrics_count_requests_by_route_and_status(made: TinyRelease, tmp_path: Path) -> None:
    with running_release(made, tmp_path) as service:
        service.post("/v1/rank", {"user_id": 999, "candidates": [100, 9]})
        service.post("/v1/rank", {"candidates": ["x"]})
        service.http.get("/whatever")
        text = service.http.get("/metrics").text
    release = service.service.refresher.ranker()
    for line in (
        'ranktower_requests_total{route="/v1/rank",status="200"} 1.0',
        'ranktower_requests_total{route="/v1/rank",status="422"} 1.0',
        'ranktower_requests_total{route="unknown",status="404"} 1.0',
        'ranktower_stage_seconds_count{stage="score"} 1.0',
        "ranktower_candidates_sum 2.0",
        "ranktower_missing_items_total 1.0",
        "ranktower_unknown_users_total 1.0",
        f'ranktower_release_info{{bundle="{release.bundle.id}",release="{release.release}"}} 1.0',
        "ranktower_refresh_failures_total 0.0",
        "ranktower_staleness_seconds ",
        "ranktower_changes_behind_seconds 0.0",
    ):
        assert line in text


def test_the_service_starts_where_torch_is_not_installed() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'lightgbm', 'polars', 'onnx', 'onnxscript')))"
    script = f"{blocked}; import service.run, service.cli; service.run.create_app(service.run.Settings())"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_an_answer_is_the_document_that_the_schema_describes(client: httpx.Client) -> None:
    body = {"user_id": 4, "candidates": [9, 100], "explain": True}
    asked: dict[type[BaseModel], httpx.Response] = {
        RankAnswer: client.post("/v1/rank", json=body),
        BatchAnswer: client.post("/v1/rank:batch", json={"requests": [body]}),
        ReleaseAnswer: client.get("/v1/release"),
        Sample: client.get("/v1/sample"),
        Ready: client.get("/readyz"),
    }
    for model, response in asked.items():
        read = model.model_validate_json(response.content)
        assert read.model_dump(exclude_unset=True) == response.json()
