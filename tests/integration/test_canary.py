"""Canaries and shadows in real processes: two workers under load, every answer right for the release that it names."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cache.rollout import SLOTS, Change
from cache.store import ReleaseStore, open_store
from service.live import slot_of
from service.ranker import Ranker
from service.wire import RankRequest
from tests.processes import READY, TIMEOUT_S, Server, eventually, server
from tests.redis_server import running_redis
from tests.tiny_releases import USERS_COUNT, TinyRelease, publish, tiny_release

TOKEN = "secret"
CANDIDATES = [*range(100, 160)]
ARCS = 20
# Users of the table, and one unknown to it in each twentieth of the slots: where a canary begins follows its name, and
# no start may leave it, or the current release, without any of them.
STRANGERS = {slot_of(user) * ARCS // SLOTS: user for user in range(2000, 1000, -1)}
USERS = [*range(1, USERS_COUNT + 1), *STRANGERS.values()]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[TinyRelease]:
    return [tiny_release(tmp_path_factory.mktemp("made") / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture(params=["file", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ReleaseStore]:
    if request.param == "file":
        yield open_store(f"file://{tmp_path}/store")
        return
    with running_redis() as redis:
        yield open_store(redis.url)


@dataclass
class Load:
    """Users who ask without pause, each time on a connection of their own, so that any worker may answer."""

    url: str
    expected: dict[str, dict[int, dict[int, np.float32]]]  # by release, by user: the scores by item
    releases: dict[int, list[str]] = field(default_factory=dict)  # that answered, by user, in their order
    wrong: list[str] = field(default_factory=list)
    count: int = 0

    def ask(self, user: int) -> None:
        self.count += 1
        try:
            answer = httpx.post(
                f"{self.url}/v1/rank", json={"user_id": user, "candidates": CANDIDATES}, timeout=TIMEOUT_S
            )
        except httpx.HTTPError as error:
            self.wrong.append(repr(error))
            return
        document = answer.json()
        if answer.status_code != 200:
            self.wrong.append(answer.text)
            return
        scores = {item["id"]: np.float32(item["score"]) for item in document["items"]}
        if scores != self.expected[document["release"]][user]:
            self.wrong.append(f"user {user}: not the scores of {document['release']}")
        if answer.headers["X-RankTower-Release"] != document["release"]:
            self.wrong.append(f"the header names {answer.headers['X-RankTower-Release']}")
        self.releases.setdefault(user, []).append(document["release"])

    def seen(self) -> dict[int, str]:
        """Who answered whom last."""
        return {user: names[-1] for user, names in self.releases.items()}

    def until(self, releases: set[str]) -> None:
        """All users have been answered again, by these releases alone, and by each of them."""
        before = {user: len(names) for user, names in self.releases.items()}

        def settled() -> bool:
            again = all(len(names) >= before.get(user, 0) + 2 for user, names in self.releases.items())
            return again and len(self.releases) == len(USERS) and {*self.seen().values()} == releases

        eventually(settled)


@contextmanager
def loaded(load: Load) -> Iterator[Load]:
    stopping = threading.Event()

    def run(users: Any) -> None:
        for user in cycle(users):
            if stopping.is_set():
                return
            load.ask(user)

    threads = [threading.Thread(target=run, args=(USERS[part::2],)) for part in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stopping.set()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert load.wrong == []


@contextmanager
def workers(store: ReleaseStore, tmp_path: Path) -> Iterator[tuple[Server, str]]:
    flags = ("--workers", "2", "--cache-dir", str(tmp_path / "cache"), "--refresh-s", "0.2", "--drain-s", "0.1")
    with server(store.url, *flags, "--admin-token", TOKEN) as running:
        urls = {running.read_until(READY)[1] for _ in range(2)}
        yield running, urls.pop()


def scores(made: TinyRelease) -> dict[int, dict[int, np.float32]]:
    ranker = Ranker.open(made.folder, made.users)
    found = {}
    for user in USERS:
        ranking = ranker.rank(RankRequest[Any, Any](candidates=CANDIDATES, user_id=user))
        found[user] = dict(zip(ranking.ids, ranking.scores, strict=True))
    return found


def admin(url: str, verb: str, **body: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {TOKEN}", "X-RankTower-Caller": "alice"}
    answer = httpx.post(f"{url}/admin/releases/{verb}", json=body, headers=headers, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def test_a_canary_is_tried_out_promoted_and_taken_back_under_load(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    a, b, c = (publish(made, store, activate=made is releases[0]) for made in releases)
    expected = {name: scores(made) for name, made in zip((a, b, c), releases, strict=True)}
    with workers(store, tmp_path) as (running, url), loaded(Load(url, expected)) as load:
        load.until({a})
        store.change(Change(verb="canary", release=b, share=0.4))
        load.until({a, b})
        small = {user for user, release in load.seen().items() if release == b}
        admin(url, "canary", release=b, weight=0.8)
        running.read_until(f"canary {b} answers 80 %")
        running.read_until(f"canary {b} answers 80 %")
        load.until({a, b})
        assert {user for user, release in load.seen().items() if release == b} > small
        store.change(Change(verb="abort"))
        load.until({a})
        store.change(Change(verb="canary", release=c, share=0.5))
        load.until({a, c})
        trying = {user for user, release in load.seen().items() if release == c}
        before = {user: len(load.releases[user]) for user in trying}
        admin(url, "promote")
        load.until({c})
        for user in trying:  # who met it already never left it
            assert {*load.releases[user][before[user] :]} == {c}
        store.rollback()
        load.until({a})
        text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
        assert f'ranktower_release_rankings_total{{release="{b}"}}' in text
    assert load.count > 100
    assert [each.verb for each in store.audit()] == [
        *("activate", "canary", "canary", "abort", "canary", "promote", "rollback")
    ]


def test_a_shadow_agrees_with_itself_and_less_with_another(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    a, b, _ = (publish(made, store, activate=made is releases[0]) for made in releases)
    expected = {name: scores(made) for name, made in zip((a, b), releases, strict=False)}

    def found(url: str) -> dict[str, Any]:
        shadow = httpx.get(f"{url}/v1/release", timeout=TIMEOUT_S).json()["rollout"]["shadow"]
        compared = [each for each in (shadow or {}).get("compared", []) if each["rankings"] > 30]
        return {"release": shadow["release"], **compared[0]} if compared else {}

    with workers(store, tmp_path) as (running, url), loaded(Load(url, expected)) as load:
        store.change(Change(verb="shadow", release=a, share=1.0))
        eventually(lambda: found(url) != {})
        same = found(url)
        assert (same["release"], same["against"]) == (a, a)
        assert same["overlap@10"]["mean"] == same["overlap@50"]["mean"] == same["rank_correlation"]["mean"] == 1.0
        admin(url, "shadow", release=b, share=1.0)
        eventually(lambda: found(url).get("release") == b)
        other = found(url)
        assert other["against"] == a
        assert other["overlap@10"]["mean"] < 0.9
        assert other["rank_correlation"]["mean"] < 0.9
        load.until({a})
        admin(url, "abort")
        load.until({a})
    assert "Traceback" not in "".join(running.lines)
