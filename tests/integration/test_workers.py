"""Several real processes: one refresher asks the store for all workers; what ends is started again, nothing is left."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cache.store import ReleaseStore, open_store
from tests.processes import READY, TIMEOUT_S, Server, asked, eventually, rank, server
from tests.redis_server import running_redis, silent
from tests.tiny_releases import TinyRelease, publish, tiny_release

SOON_S = 10.0  # minutes were the case
REFRESHER = re.compile(r"process (\d+) is the refresher")


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[TinyRelease]:
    return [tiny_release(tmp_path_factory.mktemp("made") / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return open_store(f"file://{tmp_path}/store")


@contextmanager
def workers(store: ReleaseStore, tmp_path: Path, *flags: str) -> Iterator[tuple[Server, str, int]]:
    """Two workers that serve the store's release: the server, its URL, the pid of the refresher."""
    given = ("--workers", "2", "--cache-dir", str(tmp_path / "cache"), "--refresh-s", "0.2", "--drain-s", "0.1")
    with server(store.url, *given, *flags) as running:
        refresher = int(running.read_until(REFRESHER)[1])
        urls = {running.read_until(READY)[1] for _ in range(2)}
        assert len(urls) == 1
        yield running, urls.pop(), refresher


def state(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/readyz", timeout=TIMEOUT_S).json()
    return found


def copies(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").glob("*/2*")}


def swapped(running: Server, release: str) -> None:
    """Both workers have taken it over."""
    for _ in range(2):
        running.read_until(f"now serving release {release}")


def more(answers: list[httpx.Response]) -> None:
    """Wait for some."""
    count = len(answers) + 5
    eventually(lambda: len(answers) > count)


def follow(store: ReleaseStore, running: Server, url: str, releases: list[TinyRelease], first: str) -> list[str]:
    """Publish the others while requests are answered; the names of all."""
    names = [first]
    with asked(url) as answers:
        for made in releases[1:]:
            names.append(publish(made, store))
            swapped(running, names[-1])
            more(answers)
    assert [*dict.fromkeys(answer.json()["release"] for answer in answers)] == names
    return names


def test_a_release_is_swapped_while_both_workers_answer(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    first = publish(releases[0], store)
    with workers(store, tmp_path) as (running, url, refresher):
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, refresher) == min(own + 10, 19)
        follow(store, running, url, releases, first)
        store.delete_users(releases[0].spec.id)
        swapped(running, ".*, 0 users")
        assert rank(url).json()["user_known"] is False
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(TIMEOUT_S) in (0, -signal.SIGTERM)
        running.until_nothing_is_left()
        assert not [*running.temporary.glob("ranktower-*")]


def test_one_process_fetches_from_redis_and_workers_outlive_it(releases: list[TinyRelease], tmp_path: Path) -> None:
    with running_redis() as redis:
        store = open_store(redis.url)
        first = publish(releases[0], store)
        with workers(store, tmp_path) as (running, url, refresher):
            names = follow(store, running, url, releases, first)
            assert copies(tmp_path) == {*names[1:]}
            redis.kill()
            eventually(lambda: state(url)["store"]["reachable"] is False)
            with asked(url, broken=1) as answers:  # the one that the worker may be at
                killed = worker_of(running, refresher)
                os.kill(killed, signal.SIGKILL)
                running.read_until(rf"worker {killed} ended with -9: another was started \(killed")
                assert running.read_until(READY)[2] == names[-1]  # from what lies here, without the store
                more(answers)
            assert state(url)["store"]["failure"].startswith(redis.url)
            assert redis.start()
            swapped(running, publish(releases[0], store))
            assert served(url) == {first}
            running.process.send_signal(signal.SIGINT)
            running.process.wait(TIMEOUT_S)
            running.until_nothing_is_left()
        store.close()


def test_a_redis_that_is_silent_is_told_by_readyz_metrics_and_admin_calls(
    releases: list[TinyRelease], tmp_path: Path
) -> None:
    with running_redis() as redis:
        store = open_store(redis.url)
        publish(releases[0], store)
        with workers(store, tmp_path, "--admin-token", "secret") as (_, url, _):
            eventually(lambda: state(url)["store"]["reachable"])
            with silent(redis):
                headers = {"Authorization": "Bearer secret"}
                answer = httpx.get(f"{url}/admin/releases", headers=headers, timeout=2 * SOON_S)
                assert answer.status_code == 503
                assert "it does not answer in time" in answer.text
                eventually(lambda: not state(url)["store"]["reachable"])
                eventually(lambda: min(state(url)["changes"]["behind_s"], state(url)["store"]["staleness_s"]) > 2.0)
                assert state(url)["store"]["staleness_s"] < 2 * SOON_S
                assert rank(url).status_code == 200
            eventually(lambda: state(url)["changes"]["behind_s"] == 0.0)
        store.close()


def served(url: str) -> set[str]:
    """Releases that serve, according to the metrics of all workers."""
    text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
    return {*re.findall(r'ranktower_release_info{.*release="(.*?)".*} 1\.0', text)}


def worker_of(running: Server, refresher: int) -> int:
    """The pid of a worker."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if parent == running.process.pid and "spawn_main" in command and int(folder.name) != refresher:
            return int(folder.name)
    raise AssertionError("no worker")


def test_a_refresher_that_dies_is_missed_and_replaced(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    publish(releases[0], store)
    with workers(store, tmp_path) as (running, url, refresher):
        with asked(url):
            os.kill(refresher, signal.SIGKILL)
            running.read_until("the refresher has ended")
            eventually(lambda: not state(url)["store"]["reachable"])
            lost = state(url)
            assert lost["ready"] is True
            assert lost["store"]["staleness_s"] > 0
            assert "the refresher has ended" in lost["store"]["failure"]
            second = publish(releases[1], store)
            swapped(running, second)
            eventually(lambda: state(url)["store"]["reachable"])
        assert refresher != int(REFRESHER.findall("".join(running.lines))[-1])
        text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
        assert 'ranktower_requests_total{route="/v1/rank",status="200"}' in text
        assert "ranktower_refresh_failures_total 0.0" not in text


def test_nothing_outlives_a_supervisor_that_is_killed(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    publish(releases[0], store)
    with workers(store, tmp_path) as (running, url, _):
        assert rank(url).status_code == 200
        running.process.kill()
        running.until_nothing_is_left()
        with pytest.raises(httpx.ConnectError):
            rank(url)


def test_workers_answer_before_there_is_a_release(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    with server(store.url, "--workers", "2", "--refresh-s", "0.2", "--drain-s", "0") as running:
        url = running.read_until(r"listening on (\S+); waiting: .* holds no current release yet")[1]
        running.read_until("listening on")
        assert httpx.get(f"{url}/readyz", timeout=TIMEOUT_S).status_code == 503
        first = publish(releases[0], store)
        assert {running.read_until(READY)[2] for _ in range(2)} == {first}
        assert rank(url).json()["release"] == first
