"""A replica on a real Redis: it follows releases, outlives the server, and finds it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.store import ReleaseStore, open_store
from tests.redis_server import RedisServer, running_redis
from tests.services import Running, running
from tests.tiny_releases import TinyRelease, publish, tiny_release


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return tiny_release(tmp_path_factory.mktemp("first"), seed=1)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def store(redis: RedisServer) -> Iterator[ReleaseStore]:
    store = open_store(redis.url)
    yield store
    store.close()


def answered(service: Running, release: str) -> None:
    answer = service.post("/v1/rank", {"user_id": 4, "candidates": [100, 101]}).json()
    assert (answer["release"], answer["user_known"]) == (release, True)


def test_a_replica_needs_nothing_but_a_url(store: ReleaseStore, first: TinyRelease, tmp_path: Path) -> None:
    one, cache = publish(first, store), tmp_path / "cache"
    with running(open_store(store.url), cache_dir=cache) as service:
        service.until_ready()
        answered(service, one)
        two = publish(tiny_release(tmp_path / "2", seed=2), store)
        service.until(lambda standing: standing.ranker is not None and standing.ranker.release == two)
        answered(service, two)
        three = publish(tiny_release(tmp_path / "3", seed=3), store)
        service.until(lambda standing: standing.ranker is not None and standing.ranker.release == three)
        answered(service, three)
        assert {path.name for path in cache.glob("*/2*")} == {two, three}
        store.rollback()
        service.until(lambda standing: standing.ranker is not None and standing.ranker.release == two)
        answered(service, two)


def test_a_replica_forgets_users_that_were_deleted(store: ReleaseStore, first: TinyRelease, tmp_path: Path) -> None:
    publish(first, store)
    with running(open_store(store.url), cache_dir=tmp_path / "cache") as service:
        service.until(lambda standing: standing.users is not None)
        assert list((tmp_path / "cache").rglob("users.snap"))
        store.delete_users(first.spec.id)
        service.until(lambda standing: standing.users is None)
        assert not list((tmp_path / "cache").rglob("users.snap"))


def test_a_replica_outlives_its_redis_and_finds_it_again(
    redis: RedisServer, store: ReleaseStore, first: TinyRelease, tmp_path: Path
) -> None:
    one = publish(first, store)
    with running(open_store(store.url), cache_dir=tmp_path / "cache") as service:
        service.until_ready()
        redis.kill()
        service.until(lambda standing: not standing.reachable)
        answered(service, one)
        state = service.http.get("/readyz").json()
        assert (state["ready"], state["store"]["reachable"]) == (True, False)
        assert state["store"]["failure"]
        assert redis.start()
        service.until(lambda standing: standing.reachable)
        answered(service, one)  # the server came back empty: what is served is not taken away
        two = publish(tiny_release(tmp_path / "2", seed=2), store)
        service.until(lambda standing: standing.ranker is not None and standing.ranker.release == two)
        answered(service, two)
