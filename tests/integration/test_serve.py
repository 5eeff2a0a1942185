"""The real process: one worker and several, from start to SIGTERM."""

from __future__ import annotations

import signal
from typing import Any

import httpx
import pytest

from cache.file_store import FileStore
from tests.processes import READY, TIMEOUT_S, server
from tests.tiny_releases import publish, tiny_release


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    folder = tmp_path_factory.mktemp("serve")
    store = FileStore(f"file://{folder}/store")
    publish(tiny_release(folder / "made"), store)
    return store


def test_serve_says_where_it_is_ready_and_sigterm_drains_it(store: FileStore) -> None:
    with server(store.url, "--drain-s", "0.5") as running:
        url = running.read_until(READY)[1]
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
            assert http.get("/readyz").json()["ready"] is True
            running.process.send_signal(signal.SIGTERM)
            running.read_until("draining")
            assert http.get("/readyz").status_code == 503
            assert http.post("/v1/rank", json={"candidates": [100]}).status_code == 200
        assert running.process.wait(TIMEOUT_S) in (0, -signal.SIGTERM)


def test_several_workers_answer_on_one_port_with_the_same_scores(store: FileStore) -> None:
    with server(store.url, "--workers", "2", "--drain-s", "0") as running:
        url = running.read_until(READY)[1]
        assert running.read_until(READY)[1] == url
        body: dict[str, Any] = {"user_id": 4, "candidates": [100, 101]}
        answers = [httpx.post(f"{url}/v1/rank", json=body, timeout=TIMEOUT_S).json() for _ in range(6)]
        assert all(answer == answers[0] for answer in answers)
        text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
        assert 'ranktower_requests_total{route="/v1/rank",status="200"} 6.0' in text
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(TIMEOUT_S) in (0, -signal.SIGTERM)
