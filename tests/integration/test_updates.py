"""From `ranktower update` to an answer, by real processes: what a replica says equals a release published in full."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.changes import CHANGES
from cache.store import open_store
from tests.catalogues import MAXSIM, Shop, open_shop
from tests.graphs import write_bundle
from tests.processes import READY, ROOT, TIMEOUT_S, eventually, server
from tests.redis_server import RedisServer, cluster_url, running_cluster, running_redis
from tests.updates import with_id, with_price, write

COMMAND = (sys.executable, "-m", "service.cli")
NEW = (1, 2, 3)
RETRIEVAL: dict[str, Any] = {"user": {}, "top_k": 1000, "per_head": 1000}
ASKED = 12  # times, each on a connection of its own: two workers answer none of them with a chance of 1 : 2,048


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=150)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[RedisServer]]:
    with running_cluster() as servers:
        yield servers


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of the kind that a test is given, of one server where it is given none."""
    kind = getattr(request, "param", "redis")
    if kind == "file":
        return f"file://{tmp_path}/store"
    if kind == "redis":
        return f"{request.getfixturevalue('redis').url}?prefix={tmp_path.name}"
    return f"{cluster_url(request.getfixturevalue('cluster'))}?prefix={tmp_path.name}"


# --- the verbs


def run(*arguments: object) -> str:
    """What a verb says, in a process of its own."""
    whole = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def publish(bundle: Path, items: Path, url: str, home: Path, *more: object) -> str:
    """The name of the release that is current then."""
    places = ("--work", home / "work", "--cache", home / "publisher")
    run(
        "publish",
        "--bundle",
        bundle,
        "--items",
        items,
        "--store",
        url,
        "--index",
        "flat",
        "--dtype",
        "f16",
        *places,
        *more,
    )
    current = open_store(url).current()
    assert current is not None
    return current


def update(url: str, home: Path, *more: object) -> int:
    """The position behind what was appended."""
    run("update", "--store", url, "--cache", home / "updater", *more)
    return end(url)


def end(url: str) -> int:
    store = open_store(url)
    last = store.log(CHANGES).last()
    store.close()
    return last


@contextmanager
def replica(url: str, cache: Path, workers: int = 1) -> Iterator[str]:
    """The address of one whose workers are all ready."""
    flags = ("--cache-dir", str(cache), "--refresh-s", "0.2", "--retrieval", "--workers", str(workers))
    with server(url, *flags) as running:
        yield {running.read_until(READY)[1] for _ in range(workers)}.pop()


@contextmanager
def following(url: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """`ranktower update --follow`, ended by SIGTERM."""
    whole = [*COMMAND, "update", "--follow", "--store", url, "--cache", str(home / "follower")]
    process = subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said


# --- the answers


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{url}{path}", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def knows(url: str, release: str, watermark: int) -> bool:
    """Whether all answers, whichever worker gives them, name both."""
    body = {"candidates": [1], "user": {}}
    answers = (post(url, "/v1/rank", body) for _ in range(ASKED))
    return all((answer["release"], answer["watermark"]) == (release, watermark) for answer in answers)


def scores(answer: dict[str, Any]) -> dict[Any, float]:
    return {item["id"]: item["score"] for item in answer["items"]}


def found(url: str, shop: Shop) -> tuple[dict[Any, float], dict[Any, float]]:
    """Scores by item, ranked and retrieved: of every item there is."""
    return scores(post(url, "/v1/rank", ranking(shop))), scores(post(url, "/v1/retrieve", RETRIEVAL))


def ranking(shop: Shop) -> dict[str, Any]:
    """Of every item, also of those that come later."""
    ids = [*pq.read_table(shop.items)["item_id"].to_pylist(), *NEW]
    return {"candidates": ids, "top_k": len(ids), "on_missing": "drop", "user": {}}


def in_full(shop: Shop, items: pa.Table, home: Path) -> tuple[dict[Any, float], dict[Any, float]]:
    """The same of a release published with all these rows."""
    home.mkdir(exist_ok=True)
    place = f"file://{home}/full"
    publish(shop.bundle, write(home / "full.parquet", items), place, home)
    with replica(place, home / "full-cache") as url:
        return found(url, shop)


def equal(url: str, shop: Shop, wanted: tuple[dict[Any, float], dict[Any, float]]) -> None:
    for got, full in zip(found(url, shop), wanted, strict=True):
        assert got.keys() == full.keys()
        np.testing.assert_array_equal([got[item] for item in full], [*full.values()])


@dataclass(frozen=True)
class Updated:
    """Two changed items, a new one, and two that are gone."""

    changes: Path
    gone: list[int]
    items: pa.Table  # all there are then
    full: tuple[dict[Any, float], dict[Any, float]]  # what a release published with these says


@pytest.fixture(scope="module")
def updated(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Updated:
    home = tmp_path_factory.mktemp("updated")
    table = pq.read_table(shop.items)
    dear = with_price(table, [3, 17], 1e6)
    new = with_id(dear.slice(3, 1), NEW[0])
    changes = pa.concat_tables([dear.slice(3, 1), dear.slice(17, 1), new])
    kept = [row for row in range(len(table)) if row not in (5, 9)]
    gone = table["item_id"].take([5, 9]).to_pylist()
    items = pa.concat_tables([dear.take(kept), new])
    return Updated(write(home / "changes.parquet", changes), gone, items, in_full(shop, items, home))


# --- the line


@pytest.mark.parametrize(
    ("url", "workers"), [("file", 1), ("file", 2), ("redis", 1), ("redis", 2), ("cluster", 2)], indirect=["url"]
)
def test_an_update_reaches_every_answer(shop: Shop, updated: Updated, url: str, tmp_path: Path, workers: int) -> None:
    release = publish(shop.bundle, shop.items, url, tmp_path)
    with replica(url, tmp_path / "cache", workers) as address:
        assert knows(address, release, 0)
        before = found(address, shop)
        last = update(url, tmp_path, "--items", updated.changes)
        eventually(lambda: knows(address, release, last))
        ranked, retrieved = found(address, shop)
        assert ranked.keys() == retrieved.keys() == before[0].keys() | {NEW[0]}
        assert {item for item in before[0] if ranked[item] != before[0][item]} == changed(updated) - {NEW[0]}
        last = update(url, tmp_path, "--delete-ids", ",".join(map(str, updated.gone)))
        eventually(lambda: knows(address, release, last))
        equal(address, shop, updated.full)


def changed(updated: Updated) -> set[int]:
    return {*pq.read_table(updated.changes)["item_id"].to_pylist()}


def test_a_replica_that_comes_late_knows_it_with_its_first_answer(
    shop: Shop, updated: Updated, url: str, tmp_path: Path
) -> None:
    release = publish(shop.bundle, shop.items, url, tmp_path)
    update(url, tmp_path, "--items", updated.changes)
    last = update(url, tmp_path, "--delete-ids", ",".join(map(str, updated.gone)))
    for workers in (1, 2):
        with replica(url, tmp_path / str(workers), workers) as address:
            assert knows(address, release, last)
            equal(address, shop, updated.full)


def test_a_new_bundle_and_a_new_snapshot_know_what_came_behind_their_watermark(
    shop: Shop, updated: Updated, url: str, tmp_path: Path
) -> None:
    """Also while they are swapped: no answer goes back to what was changed or deleted."""
    first = publish(shop.bundle, shop.items, url, tmp_path)
    with replica(url, tmp_path / "cache", workers=2) as address:
        update(url, tmp_path, "--items", updated.changes)
        last = update(url, tmp_path, "--delete-ids", ",".join(map(str, updated.gone)))
        eventually(lambda: knows(address, first, last))
        other = replace(shop, bundle=write_bundle(tmp_path / "other", shop.spec, MAXSIM, seed=7))
        releases = [first]
        for bundle in (other.bundle, shop.bundle):
            with asking(address, updated.gone) as answers:
                releases.append(publish(bundle, shop.items, url, tmp_path, "--watermark", 0))
                eventually(lambda: knows(address, releases[-1], last))
            assert {answer["watermark"] for answer in answers} == {last}
            assert {answer["release"] for answer in answers} == {*releases[-2:]}
            assert all(answer["missing"] == updated.gone for answer in answers)
            wanted = updated.full if bundle == shop.bundle else in_full(other, updated.items, tmp_path / "other-full")
            equal(address, shop, wanted)


@contextmanager
def asking(address: str, candidates: list[int]) -> Iterator[list[dict[str, Any]]]:
    """Rankings of these without pause."""
    answers: list[dict[str, Any]] = []
    stopping = threading.Event()

    def ask() -> None:
        while not stopping.is_set():
            answers.append(post(address, "/v1/rank", {"candidates": candidates, "user": {}}))

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        try:
            yield answers
        finally:
            stopping.set()
        asked.result()


def test_a_replica_and_an_updater_that_were_cut_off_catch_up(shop: Shop, updated: Updated, tmp_path: Path) -> None:
    """The updater is killed and another started; Redis is gone for a while and comes back with what it had."""
    with running_redis("--appendonly", "yes", "--appendfsync", "always") as redis:
        url = redis.url
        release = publish(shop.bundle, shop.items, url, tmp_path)
        with replica(url, tmp_path / "cache") as address, following(url, tmp_path):
            last = update(url, tmp_path, "--no-embed", "--items", updated.changes)
            eventually(lambda: knows(address, release, last))
            redis.kill()
            eventually(lambda: not httpx.get(f"{address}/readyz").json()["store"]["reachable"])
            assert knows(address, release, last)
            assert redis.start()
            last = update(url, tmp_path, "--no-embed", "--delete-ids", ",".join(map(str, updated.gone)))
            eventually(lambda: knows(address, release, last))
            equal(address, shop, updated.full)
