"""A publisher of 20,000 items that dies anywhere: readers have the old release or the new, and the next one completes.

Here it dies at every few of its writes and at some random moments; RANKTOWER_TEST_KILLS=all takes every write and 200
moments (minutes).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from redis import Redis

from cache.release import read_release, verify_release
from cache.store import open_store
from kernel.head import HeadSpec
from tests.catalogues import Shop, open_shop
from tests.killing import Publishers, publishers
from tests.redis_server import eventually, running_redis

ALL = os.environ.get("RANKTOWER_TEST_KILLS") == "all"
POINTS, MOMENTS = 10, 200 if ALL else 5  # of a store
HEAD = HeadSpec(kind="maxsim", user_heads=4, item_heads=4, dim=32, scale=5.0)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=20_000, head=HEAD)


@dataclass
class Line:
    """A store, and the one publisher that feeds it."""

    url: str
    work: Path
    publishers: Publishers
    arguments: tuple[str, ...]
    admin: Redis | None
    copied: bool = False  # chunk by chunk into a folder

    def publish(self, event: int | None = None, seconds: float | None = None) -> dict[str, Any]:
        answer = self.publishers.run(*self.arguments, event=event, seconds=seconds)
        if self.admin is not None:
            admin = self.admin
            assert eventually(lambda: admin.info("clients")["connected_clients"] == 1)  # what was sent has arrived
            for lease in admin.scan_iter("{ranktower}:publishing:*"):  # as after half a minute
                admin.delete(lease)
        return answer

    def whole(self) -> list[str]:
        """All releases that a reader sees, each fetched anew and verified; the current one first."""
        store = open_store(self.url)
        with TemporaryDirectory(dir=self.work) as cache:
            infos = store.list()
            for info in infos:
                assert info.damage is None
                assert verify_release(store.fetch(info.id, Path(cache))).count == 20_000
        store.close()
        return [info.id for info in sorted(infos, key=lambda info: not info.current)]

    def chunks(self, release: str) -> int:
        store = open_store(self.url)
        with TemporaryDirectory(dir=self.work) as cache:
            found = len(list(read_release(store.fetch(release, Path(cache))).chunks()))
        store.close()
        return found

    def orphans(self) -> list[str]:
        """What is there beside one whole release, after pruning."""
        store = open_store(self.url)
        store.prune(1)
        (kept,) = (info.id for info in store.list())
        store.close()
        left = [str(path) for path in (self.work / "build").glob("release-*")]
        if self.admin is not None:
            names = {key.decode() for key in self.admin.scan_iter("*")}
            own = {"{ranktower}:releases", "{ranktower}:current", "{ranktower}:previous", "{ranktower}:audit"}
            own |= {"ranktower:check", "{ranktower}:check"}  # gone after a second
            return left + sorted(name for name in names - own if not name.startswith(f"ranktower:release:{kept}:"))
        folder = Path(self.url.removeprefix("file://"))
        left += [str(path) for path in (folder / "tmp").iterdir()]
        known = {"current", "audit", "releases", "users", "tmp", ".lock"}
        return left + [path.name for path in folder.iterdir() if path.name not in known]


@pytest.fixture(params=["linked", "copied", "redis"])
def line(request: pytest.FixtureRequest, shop: Shop, tmp_path: Path) -> Iterator[Line]:
    """A folder on the disk of what was built, or on another; Redis."""
    made = ("publish", "--bundle", str(shop.bundle), "--items", str(shop.items), "--dtype", "int8", "--workers", "1")
    places = ("--work", str(tmp_path / "build"), "--cache", str(tmp_path / "cache"))
    copied = request.param == "copied"
    with publishers(tmp_path, copied=copied) as forked:
        if request.param != "redis":
            url = f"file://{tmp_path}/store"
            yield Line(url, tmp_path, forked, (*made, *places, "--store", url), None, copied=copied)
            return
        with running_redis() as server, server.client() as admin:
            yield Line(server.url, tmp_path, forked, (*made, *places, "--store", server.url), admin)


def die_and_complete(line: Line, old: str, event: int | None = None, seconds: float | None = None) -> str:
    """Kill one publisher and let another finish; returns what is current then. A moment may come after its end."""
    assert line.publish(event, seconds)["killed"] or event is None
    seen = line.whole()
    assert len(seen) in (1, 2)  # the old one, and the new one once it is whole
    assert old in seen
    line.publish()
    current = line.whole()[0]
    assert current != old
    assert line.orphans() == []
    return current


def test_a_publisher_dies_at_its_writes(line: Line) -> None:
    line.publish()
    kinds = line.publish()["events"]
    old = line.whole()[0]
    chunks = line.chunks(old)
    assert chunks > 3
    assert kinds["fsync"] > 0
    assert kinds["file"] > 20
    assert kinds.get("chunk", 0) == (chunks if line.copied else 0)
    if line.admin is not None:
        assert kinds["command"] > 4 * chunks  # each is looked for, sent, and read back, the lease renewed beside it
    assert line.orphans() == []
    events = sum(kinds.values())
    for event in range(1, events + 1, 1 if ALL else max(1, events // POINTS)):
        old = die_and_complete(line, old, event=event)


def test_a_publisher_dies_at_random_moments(line: Line) -> None:
    line.publish()
    seconds = line.publish()["seconds"]
    old = line.whole()[0]
    assert line.orphans() == []
    for share in np.random.default_rng(5).uniform(0, 1, MOMENTS).tolist():
        old = die_and_complete(line, old, seconds=max(share * seconds, 1e-3))
