"""Four shards on a real Ray Serve: the answers of one service; shards that die, hang and come back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install '.[ray]'", exc_type=ImportError)
import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.processes import python, server
from loadtest.serving import free_port
from service.errors import SettingsError
from service.ray_serve import APP, application, run
from service.settings import GatherSettings
from tests.catalogues import open_shop
from tests.cuts import COUNT, ITEMS, Cut, alone, same
from tests.processes import eventually

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
TIMEOUT_S = 60.0
HOME = "127.0.0.2"  # Ray takes 127.0.0.1 for the address that others know the machine by
NODE = {"object_store_memory": 100 << 20, "node_ip_address": HOME}


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cut]:
    cut = Cut(tmp_path_factory.mktemp("cut"))
    yield cut
    cut.close()


@pytest.fixture(scope="module")
def http(cut: Cut) -> Iterator[httpx.Client]:
    port = free_port()
    settings = GatherSettings(
        **cut.settings(0).model_dump(exclude={"store", "port", "max_candidates"}),
        **{"store": cut.url, "port": port, "shards": COUNT, "deadline_ms": 20_000, "max_candidates": 80_000},
    )
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 2, "include_dashboard": False})
    try:
        ray.init(cluster.address, _node_ip_address=HOME, log_to_driver=False, logging_level="warning")
        serve.start(http_options={"host": settings.host, "port": port})
        serve.run(application(settings), name=APP)
        with httpx.Client(base_url=settings.url, timeout=TIMEOUT_S) as http:
            yield http
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def whole(http: httpx.Client) -> httpx.Client:
    """Once all shards answer."""
    eventually(lambda: all(shard["bundles"] for shard in http.get("/readyz").json()["shards"]))
    return http


def pid_of(number: int) -> int:
    """The process of a shard's replica."""
    alive = ray._private.state.actors(actor_state_name="ALIVE").values()
    return int(next(actor["Pid"] for actor in alive if f"#shard-{number}#" in actor["Name"]))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("body", [{}, {"top_k": 1000, "explain": True}, {"top_k": 7, "on_missing": "drop"}])
def test_the_answer_is_that_of_one_service(whole: httpx.Client, cut: Cut, body: dict[str, Any]) -> None:
    body = body | {"candidates": [-5, *cut.ids, -7, *cut.ids[:50]]}
    answer = whole.post("/v1/rank", json=body)
    assert answer.status_code == 200
    assert same(answer.json(), alone(cut.whole, body))
    assert answer.json()["partial"] is False
    assert answer.headers["x-ranktower-release"] == answer.json()["release"] == cut.whole.bundle.id
    assert "score;dur=" in answer.headers["server-timing"]


def test_many_candidates_go_through_rays_shared_memory(whole: httpx.Client, cut: Cut) -> None:
    """Where arrays cannot be written to."""
    body = {"candidates": (cut.ids * 267)[:80_000], "top_k": 10}  # 160 kB and more a shard
    assert same(whole.post("/v1/rank", json=body).json(), alone(cut.whole, body))


def test_retrieval_is_that_of_one_service(whole: httpx.Client, cut: Cut) -> None:
    body = {"per_head": 2 * ITEMS, "top_k": 50}
    assert same(whole.post("/v1/retrieve", json=body).json(), alone(cut.whole, body, "retrieve"))


@pytest.mark.parametrize(
    ("path", "content", "status", "field"),
    [
        ("/v1/rank", b"{", 422, None),
        ("/v1/rank", b'{"candidates": ["x"]}', 422, "candidates[0]"),
        ("/v1/rank", b'{"candidates": [], "user": {"shoe": 1}}', 422, "user.shoe"),
        ("/v1/rank", b'{"candidates": [5000, -5], "on_missing": "error"}', 422, "candidates[1]"),
        ("/v1/rank", b" " * (9 << 20), 413, None),
        ("/v1/retrieve", b'{"per_head": 0}', 422, "per_head"),
        ("/v1/nothing", b"{}", 404, None),
        ("/livez", b"{}", 405, None),
    ],
)
def test_what_is_wrong_is_refused_as_one_service_does(
    whole: httpx.Client, path: str, content: bytes, status: int, field: str | None
) -> None:
    answer = whole.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.json()["status"], answer.json()["field"]) == (status, field)
    assert answer.json()["remedy"]


def test_another_type_of_body_is_refused(whole: httpx.Client) -> None:
    answer = whole.post("/v1/rank", content=b"{}", headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["field"]) == (415, "Content-Type")


def test_a_shard_that_dies_is_missing_until_ray_serve_has_healed_it(whole: httpx.Client, cut: Cut) -> None:
    killed, pid = 2, pid_of(2)
    body: dict[str, Any] = {"candidates": cut.ids, "top_k": ITEMS, "deadline_ms": 500}
    os.kill(pid, signal.SIGKILL)
    found = whole.post("/v1/rank", json=body).json()  # with a longer deadline it would wait for the new replica
    lost = [item for item in cut.ids if cut.shard_of(item) == killed]
    assert found["partial"] is True
    assert [shard["shard"] for shard in found["shards"] if shard["failure"]] == [killed]
    assert {item["id"] for item in found["items"] if item["score"] is None} == {*lost}
    assert found["counts"]["scored"] == ITEMS - len(lost)
    rest = [item for item in cut.ids if item not in lost]
    wanted = alone(cut.whole, body | {"candidates": rest})["items"]
    assert [(f["id"], f["score"]) for f in found["items"][: len(rest)]] == [(w["id"], w["score"]) for w in wanted]
    eventually(lambda: whole.post("/v1/rank", json=body).json()["partial"] is False)
    del body["deadline_ms"]
    assert same(whole.post("/v1/rank", json=body).json(), alone(cut.whole, body))
    assert pid_of(killed) != pid


def test_a_shard_that_hangs_does_not_hold_up_the_answer(whole: httpx.Client, cut: Cut) -> None:
    body = {"candidates": cut.ids, "top_k": ITEMS, "deadline_ms": 700}
    with stopped(pid_of(1)):
        begun = monotonic()
        found = whole.post("/v1/rank", json=body).json()
        spent_s = monotonic() - begun
    assert found["partial"] is True
    assert [s["failure"] for s in found["shards"] if s["shard"] == 1] == ["did not answer within 700 ms"]
    assert 0.7 <= spent_s < 15.0  # not the 20 s that requests get without a deadline
    eventually(lambda: whole.post("/v1/rank", json=body).json()["partial"] is False)


def test_the_command_serves_until_it_is_told_to_stop(cut: Cut) -> None:
    """In a Ray of its own, beside that of the other tests."""
    port, body = free_port(), {"candidates": cut.ids, "top_k": 10}
    flags = ["--store", cut.url, "--shards", str(COUNT), "--no-partial", "--port", str(port)]
    with server([*python("service.cli", "gather"), *flags], port, None, ready=b"/readyz"):
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/rank", json=body, timeout=TIMEOUT_S)
    assert same(answer.json(), alone(cut.whole, body))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/livez")


def test_what_runs_on_a_cluster_already_is_left_alone(whole: httpx.Client, cut: Cut) -> None:
    settings = GatherSettings(store=cut.url, port=free_port())
    with pytest.raises(SettingsError, match="runs an application ranktower already"):
        run(settings)
    assert whole.post("/v1/rank", json={"candidates": cut.ids}).status_code == 200


def test_shards_are_swapped_one_after_the_other(whole: httpx.Client, cut: Cut, tmp_path: Path) -> None:
    """No answer mixes bundles, and none lacks a shard. The last test: it leaves another bundle."""
    other = open_shop(tmp_path / "other", items=ITEMS, seed=1)
    body, seen = {"candidates": cut.ids, "top_k": ITEMS}, []
    old = alone(cut.whole, body)["items"]

    def at(number: int) -> list[str]:
        bundles: list[str] = whole.get("/readyz").json()["shards"][number]["bundles"]
        return bundles

    for number in range(COUNT):
        cut.publish(number, other, "second")
        eventually(lambda number=number: len(at(number)) == 2)  # type: ignore[misc]
        seen.append(whole.post("/v1/rank", json=body).json())
    assert all(answer["partial"] is False for answer in seen)
    assert all(answer["items"] == old for answer in seen[:-1])
    assert all(answer["release"] == cut.whole.bundle.id for answer in seen[:-1])
    assert seen[-1]["release"] != cut.whole.bundle.id
    assert seen[-1]["items"] != old
