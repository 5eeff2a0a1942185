"""What every release store must do, on a folder and on real Redis of every kind; then what only one of them can."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from redis import Redis

from cache.changes import Newer, records_log
from cache.durable import sharing
from cache.errors import RolloutRefused, StoreError, UnknownRelease
from cache.file_store import FileStore
from cache.overlay import Overlay
from cache.redis_client import Clients, read_url
from cache.redis_store import RedisStore
from cache.release import (
    CHUNK_BYTES,
    ITEMS,
    RELEASE,
    created_at,
    read_chunk,
    read_release,
    sha256,
    verify_release,
)
from cache.rollout import NOTHING, Change, Live, Shadow, this_user, weights
from cache.snapshot import Snapshot
from cache.store import ReleaseStore, open_store
from cache.watermarks import trim_changes
from model.bundle import open_bundle
from tests.changed import embedded, happened
from tests.redis_server import (
    Certificates,
    RedisServer,
    cluster_url,
    eventually,
    has_tls,
    redis_server,
    running_cluster,
    running_redis,
    running_sentinel,
    write_certificates,
)
from tests.releases import SPEC_ID, write_release, write_users
from tests.tiny_releases import publish, tiny_release

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "pa%2Fss%40w%3Ard"  # as it is written in a URL
LEASE_S = 0.2  # of the publishers that are killed here


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def cluster() -> Iterator[list[RedisServer]]:
    with running_cluster() as servers:
        yield servers


@pytest.fixture(scope="session")
def cluster_store(cluster: list[RedisServer]) -> str:
    return cluster_url(cluster[:1])


@pytest.fixture(scope="session")
def sentinel_store() -> Iterator[str]:
    with running_sentinel() as watched:
        yield watched.url


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if not has_tls():
        pytest.skip("this redis-server has no TLS: install Debian's package redis-server, for example")
    return write_certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="session")
def tls_server(certificates: Certificates) -> Iterator[RedisServer]:
    with running_redis(*certificates.options()) as server:
        yield server


@pytest.fixture(scope="session")
def tls_store(tls_server: RedisServer, certificates: Certificates) -> str:
    """As a user who may do what docs/stores.md lists, with a certificate of his own."""
    with tls_server.client() as admin:
        allow(admin, "publisher", "test*")
    return f"rediss://publisher:{PASSWORD}@{tls_server.address}?{certificates.query}"


def allow(admin: Any, user: str, prefix: str) -> None:
    """Make a user as docs/stores.md says, for the keys of a prefix."""
    found = re.search(rf"ACL SETUSER {user} (.*)", (ROOT / "docs" / "stores.md").read_text())
    assert found is not None
    rules = found[1].replace("ranktower", prefix).replace(">password", f">{unquote(PASSWORD)}")
    admin.execute_command("ACL SETUSER", user, *rules.split())


@dataclass
class Place:
    """A store that is empty at first, seen by several clients."""

    url: str
    local: Path
    admin: str = ""  # URL of a user who may do all, where that of the store may not

    def open(self, lease_s: float = LEASE_S) -> ReleaseStore:
        """A client of its own, as another process would have."""
        return RedisStore(self.url, lease_s=lease_s) if self.url.startswith("redis") else open_store(self.url)

    @property
    def prefix(self) -> str:
        return self.url.split("prefix=")[1]

    def fetch(self, release_id: str) -> Path:
        """As a replica that has nothing yet."""
        cache = self.local / f"cache-{time.monotonic_ns()}"
        return self.open().fetch(release_id, cache)

    def redis(self) -> Any:
        """A client that may do all, of the kind that the store has."""
        return Clients(read_url(self.admin or self.url)).quick

    def damage(self, release_id: str, change: Callable[[bytes], bytes]) -> None:
        """Change the first chunk of the stored item table."""
        if self.url.startswith("file"):
            path = Path(self.url.removeprefix("file://")) / "releases" / release_id / ITEMS
            content = path.read_bytes()
            path.write_bytes(change(content[:CHUNK_BYTES]) + content[CHUNK_BYTES:])
        else:
            with self.redis() as client:
                key = f"{self.prefix}:release:{release_id}:{ITEMS}:0"
                client.set(key, change(client.get(key)))

    def leftovers(self) -> int:
        """Folders, or keys, of releases that are not listed."""
        listed = {info.id for info in self.open().list()}
        if self.url.startswith("file"):
            temporary = Path(self.url.removeprefix("file://")) / "tmp"
            return len(list(temporary.iterdir())) if temporary.is_dir() else 0
        with self.redis() as client:
            names = {key.decode().split(":")[2] for key in client.scan_iter(f"{self.prefix}:release:*")}
        return len(names - listed)


@pytest.fixture(params=["file", "redis_url", "cluster_store", "sentinel_store", "tls_store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "file":
        yield Place(f"file://{tmp_path}/store", tmp_path)
        return
    name = re.sub(r"\W", "-", request.node.name)
    url = request.getfixturevalue(request.param)
    admin = url.replace(f"publisher:{PASSWORD}@", "")
    place = Place(f"{url}{'&' if '?' in url else '?'}prefix={name}", tmp_path, admin)
    yield place
    with place.redis() as client:
        client.flushdb()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Releases 0 to 3, each a second younger than the one before."""
    home = tmp_path_factory.mktemp("releases")
    for number in range(4):
        write_release(home / str(number), number, items=10_000 if number < 2 else 50)
    return [home / str(number) for number in range(4)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of 20 MB: twelve chunks."""
    folder = tmp_path_factory.mktemp("large") / "release"
    write_release(folder, items=40_000)
    return folder


def published(place: Place, folders: list[Path], *, activate: bool = True) -> list[str]:
    store = place.open()
    names = [store.publish(folder) for folder in folders]
    for name in names:
        if activate:
            store.activate(name)
    return names


def flipped(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


# --- publishing and switching ----------------------------------------------------------------------------------------


def test_an_empty_store_has_nothing(place: Place) -> None:
    store = place.open()
    assert store.current() is None
    assert store.list() == []
    assert store.users_version(SPEC_ID) is None
    assert store.prune(1) == []


def test_what_was_published_is_fetched_whole(place: Place, folders: list[Path]) -> None:
    (name,) = published(place, folders[:1])
    fetched = place.fetch(name)
    assert verify_release(fetched) == read_release(folders[0])
    for path in folders[0].rglob("*"):
        if path.is_file():
            assert (fetched / path.relative_to(folders[0])).read_bytes() == path.read_bytes()


def test_files_of_the_publisher_are_taken_without_a_copy_where_the_disk_has_links(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*paths: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    linked, copied = FileStore(f"file://{tmp_path}/a"), FileStore(f"file://{tmp_path}/b")
    name = linked.publish(folders[0], owned=True)
    with monkeypatch.context() as patch:
        patch.setattr("cache.file_store.os.link", refused)
        copied.publish(folders[0], owned=True)
    mine = (folders[0] / ITEMS).stat().st_ino
    assert [(store.fetch(name, tmp_path) / ITEMS).stat().st_ino == mine for store in (linked, copied)] == [True, False]
    shutil.rmtree(copied.root)
    assert verify_release(linked.fetch(name, tmp_path)) == read_release(folders[0])


def test_publishing_lists_a_release_and_does_not_activate_it(place: Place, folders: list[Path]) -> None:
    published(place, folders[:1], activate=True)
    published(place, folders[1:3], activate=False)
    infos = place.open().list()
    assert [info.id for info in infos] == [read_release(folder).id for folder in folders[:3]]
    assert [info.current for info in infos] == [True, False, False]
    assert infos[2].count == 50
    assert infos[0].size_bytes == read_release(folders[0]).size_bytes


def test_publishing_twice_changes_nothing(place: Place, folders: list[Path]) -> None:
    first = published(place, folders[:1])
    assert published(place, folders[:1]) == first
    assert len(place.open().list()) == 1
    assert place.leftovers() == 0


def test_progress_ends_with_all_bytes(place: Place, folders: list[Path]) -> None:
    seen: dict[str, tuple[int, int]] = {}
    place.open().publish(folders[0], lambda stage, done, total: seen.update({stage: (done, total)}))
    size = read_release(folders[0]).size_bytes
    assert seen == {"publish": (size, size), "verify": (size, size)}


def test_activating_an_unknown_release_names_those_there_are(place: Place, folders: list[Path]) -> None:
    (name,) = published(place, folders[:1])
    for verb in (place.open().activate, place.fetch):
        with pytest.raises(UnknownRelease, match=f"no release nonsense, but {name}"):
            verb("nonsense")
    assert place.open().current() == name


def test_rollback_goes_back_one_activation_at_a_time(place: Place, folders: list[Path]) -> None:
    a, b, c = published(place, folders[:3])
    store = place.open()
    store.activate(c)  # again: not a step of its own
    assert store.rollback() == b
    assert store.rollback() == a == store.current()
    with pytest.raises(StoreError, match="releases activate"):
        store.rollback()
    assert store.current() == a
    store.activate(c)
    assert store.rollback() == a


def test_rollback_passes_over_releases_that_were_pruned(place: Place, folders: list[Path]) -> None:
    a, b, c = published(place, folders[:3])
    store = place.open()
    store.activate(a)
    assert store.prune(1) == [b]
    assert store.rollback() == c


def test_prune_keeps_the_newest_and_the_current(place: Place, folders: list[Path]) -> None:
    a, b, c, d = published(place, folders, activate=False)
    store = place.open()
    store.activate(a)
    assert store.prune(2) == [b]
    assert [info.id for info in store.list()] == [a, c, d]
    assert store.prune(1) == [c]
    assert place.leftovers() == 0
    assert verify_release(place.fetch(a)).id == a
    with pytest.raises(StoreError, match="at least 1"):
        store.prune(0)


def test_a_reader_keeps_the_files_of_a_pruned_release(place: Place, folders: list[Path]) -> None:
    a, _ = published(place, folders[:2])
    snapshot = Snapshot.open(place.fetch(a) / ITEMS)
    assert place.open().prune(1) == [a]
    snapshot.verify()


# --- what came after a release ---------------------------------------------------------------------------------------


def test_what_came_after_a_release_is_fetched_with_it(place: Place, tmp_path: Path) -> None:
    """Every command of a log names one key: in a cluster, too."""
    made = tiny_release(tmp_path / "made")
    writer, reader = place.open(), place.open()
    folder = reader.fetch(publish(made, writer), tmp_path / "cache")
    assert reader.fetch_changes(folder, tmp_path / "cache") == Newer()
    end = happened(writer)
    embedded(writer, made, 0, end - 1, made.item_ids[:2], 4.0)
    embedded(writer, made, end - 1, end, made.item_ids[2:3])
    late = place.open()
    newer = late.fetch_changes(folder, tmp_path / "cache")
    assert newer.overlay is not None
    overlay = Overlay.open(newer.overlay)
    assert (overlay.watermark, overlay.held, overlay.deleted) == (end, 2, 1)
    assert (newer.behind_since_s, newer.dead) == (None, 0)
    late.close()
    assert not newer.overlay.exists()


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_wait_returns_at_once_what_was_not_seen(place: Place, folders: list[Path]) -> None:
    (name,) = published(place, folders[2:3])
    started = time.monotonic()
    assert place.open().wait(NOTHING, 60).current == name
    assert time.monotonic() - started < 10


def test_wait_returns_on_a_change(place: Place, folders: list[Path]) -> None:
    a, b = published(place, folders[2:4])
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(place.open().wait, Live(current=b), 60)
        place.open().activate(a)
        assert waiting.result(30).current == a


def test_wait_gives_up_in_time(place: Place, folders: list[Path]) -> None:
    (name,) = published(place, folders[2:3])
    assert place.open().wait(Live(current=name), 0.05).current == name
    assert place.open().wait(Live(current=name), 0).current == name


# --- canaries and shadows --------------------------------------------------------------------------------------------


def canary(release: str, weight: float) -> Change:
    return Change(verb="canary", release=release, share=weight)


def test_a_rollout_is_live_until_it_is_aborted(place: Place, folders: list[Path]) -> None:
    a, b, c = published(place, folders[:3], activate=False)
    store = place.open()
    store.activate(a)
    assert store.live() == Live(current=a)
    store.change(canary(b, 0.1), by="me@here")
    store.change(Change(verb="shadow", release=c, share=0.5))
    found = place.open().live()
    assert (weights(found), found.rollout.shadow) == ({a: 0.9, b: 0.1}, Shadow(release=c, share=0.5))
    assert store.current() == a
    store.change(Change(verb="abort"))
    assert place.open().live() == Live(current=a)


def test_a_promotion_is_one_step_and_rollback_takes_it_back(place: Place, folders: list[Path]) -> None:
    a, b = published(place, folders[:2], activate=False)
    store = place.open()
    store.activate(a)
    store.change(canary(b, 0.1))
    seen, stopping = [], threading.Event()

    def watch() -> None:
        reader = place.open()
        while not stopping.is_set():
            seen.append(reader.live())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        store.change(Change(verb="promote"))
    finally:
        stopping.set()
        watcher.join(60)
    mixed = Live(current=b, rollout=seen[0].rollout)  # a reader of two keys may see this, which answers alike
    assert {weights(live).get(b) for live in seen if live != mixed} <= {0.1, 1.0}
    assert store.live() == Live(current=b)
    assert store.rollback() == a
    assert store.live() == Live(current=a)


def test_rollback_ends_a_canary_first(place: Place, folders: list[Path]) -> None:
    a, b, c = published(place, folders[:3])
    store = place.open()
    store.change(canary(a, 0.5))
    assert store.rollback() == c
    assert store.live() == Live(current=c)
    assert store.rollback() == b


def test_wait_returns_on_a_change_of_the_rollout(place: Place, folders: list[Path]) -> None:
    a, b = published(place, folders[2:4])
    store = place.open()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(place.open().wait, Live(current=b), 60)
        started = time.monotonic()
        store.change(canary(a, 0.1))
        assert weights(waiting.result(30)) == {b: 0.9, a: 0.1}
    assert time.monotonic() - started < 10
    assert store.wait(store.live(), 0) == store.live()


def test_nothing_that_is_live_is_pruned(place: Place, folders: list[Path]) -> None:
    a, b, c, d = published(place, folders, activate=False)
    store = place.open()
    store.activate(d)
    store.change(canary(a, 0.1))
    store.change(Change(verb="shadow", release=b, share=0.1))
    assert store.prune(1) == [c]
    store.change(Change(verb="abort"))
    assert store.prune(1) == [a, b]


def test_only_what_is_complete_becomes_live(place: Place, folders: list[Path]) -> None:
    a, b = published(place, folders[:2], activate=False)
    store = place.open()
    store.activate(a)
    place.damage(b, lambda chunk: chunk[:-1])
    for verb in ("canary", "shadow"):
        with pytest.raises(StoreError, match="publish"):
            store.change(Change(verb=verb, release=b, share=0.1))
        with pytest.raises(UnknownRelease):
            store.change(Change(verb=verb, release="20260101T000000000-0123456789ab", share=0.1))
    assert store.live() == Live(current=a)
    assert [audited.verb for audited in store.audit()] == ["activate"]


def test_every_change_is_in_the_audit_trail(place: Place, folders: list[Path]) -> None:
    a, b = published(place, folders[2:4], activate=False)
    store = place.open()
    assert store.audit() == []
    store.activate(a)
    made = store.change(canary(b, 0.1), by="me@here")
    assert store.change(canary(b, 0.1)) is None
    store.change(Change(verb="promote"))
    store.rollback()
    with pytest.raises(RolloutRefused):
        store.change(Change(verb="abort"))
    trail = place.open().audit()
    assert [audited.verb for audited in trail] == ["activate", "canary", "promote", "rollback"]
    assert trail[1] == made
    assert (trail[1].who, trail[1].before, trail[1].after) == ("me@here", {a: 1.0}, {a: 0.9, b: 0.1})
    assert trail[0].who == this_user()
    assert [before.after for before in trail[:-1]] == [after.before for after in trail[1:]]
    assert sorted(audited.at for audited in trail) == [audited.at for audited in trail]


def test_the_audit_trail_is_bounded(place: Place, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("file_store", "redis_store"):
        monkeypatch.setattr(f"cache.{room}.AUDITED", 3)
    a, b = published(place, folders[2:4], activate=False)
    store = place.open()
    for name in (a, b, a, b, a):
        store.activate(name)
        assert [*store.audit()[-1].after] == [name]
    assert [[*audited.after] for audited in store.audit()] == [[a], [b], [a]]


def test_changes_at_the_same_time_all_count(place: Place, folders: list[Path]) -> None:
    a, b, c = published(place, folders[1:4], activate=False)
    place.open().activate(a)

    def change(release: str) -> None:
        store = place.open()
        for weight in (0.1, 0.2, 0.3, 0.4):
            store.change(canary(release, weight))

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(change, release) for release in (b, c)]:
            done.result(60)
    store = place.open()
    assert weights(store.live()) == {a: pytest.approx(0.2), b: 0.4, c: 0.4}
    trail = store.audit()
    assert len(trail) == 9
    assert [before.after for before in trail[:-1]] == [after.before for after in trail[1:]]


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / ITEMS).write_bytes(flipped((folder / ITEMS).read_bytes())), "not as it was written"),
        (lambda folder: (folder / ITEMS).write_bytes((folder / ITEMS).read_bytes()[:-1]), r"has \d+ bytes, not"),
        (lambda folder: (folder / ITEMS).unlink(), "is missing"),
        (lambda folder: (folder / RELEASE).write_text("{}"), "manifest cannot be read"),
        (lambda folder: (folder / RELEASE).unlink(), "is not a release"),
        (
            lambda folder: (folder / RELEASE).write_text((folder / RELEASE).read_text().replace("maxsim", "onnx")),
            "has changed",
        ),
    ],
    ids=["flipped", "truncated", "missing", "foreign", "no manifest", "other manifest"],
)
def test_a_damaged_folder_is_refused_and_the_old_release_stays(
    place: Place, folders: list[Path], tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    (old,) = published(place, folders[:1])
    shutil.copytree(folders[1], tmp_path / "damaged")
    harm(tmp_path / "damaged")
    with pytest.raises(StoreError, match=message):
        place.open().publish(tmp_path / "damaged")
    assert [info.id for info in place.open().list()] == [old]
    assert verify_release(place.fetch(old)).id == old


@pytest.mark.parametrize("change", [flipped, lambda content: content[:-5], lambda content: b""])
def test_damage_in_the_store_is_found_and_mended_by_publishing_again(
    place: Place, folders: list[Path], change: Callable[[bytes], bytes]
) -> None:
    old, new = published(place, folders[:2], activate=False)
    place.open().activate(old)
    place.damage(new, change)
    with pytest.raises(StoreError, match=r"items\.snap"):
        place.fetch(new)
    if change is not flipped:  # activate looks at sizes, fetch at hashes
        with pytest.raises(StoreError, match=r"items\.snap"):
            place.open().activate(new)
    assert place.open().current() == old
    assert verify_release(place.fetch(old)).id == old
    published(place, folders[1:2], activate=False)
    assert verify_release(place.fetch(new)).id == new


def test_a_manifest_of_another_release_is_refused(place: Place, folders: list[Path]) -> None:
    first, second = published(place, folders[:2])
    place.open().activate(first)
    if place.url.startswith("file"):
        home = Path(place.url.removeprefix("file://")) / "releases"
        (home / second / RELEASE).write_bytes((home / first / RELEASE).read_bytes())
    else:
        with place.redis() as client:
            name = f"{{{place.prefix}}}:releases"
            client.hset(name, second, client.hget(name, first))
    for verb in (place.open().activate, place.fetch):
        with pytest.raises(StoreError, match=f"holds release {first} under the name {second}"):
            verb(second)
    assert place.open().current() == first


def test_a_release_whose_manifest_is_damaged_is_listed_as_such_beside_the_others(
    place: Place, folders: list[Path]
) -> None:
    first, second = published(place, folders[2:4])
    if place.url.startswith("file"):
        (Path(place.url.removeprefix("file://")) / "releases" / first / RELEASE).write_bytes(b"\0")
    else:
        with place.redis() as client:
            client.hset(f"{{{place.prefix}}}:releases", first, b"\0")
    damaged, whole = place.open().list()
    assert (damaged.id, damaged.count, damaged.current) == (first, 0, False)
    assert damaged.damage is not None
    assert "manifest cannot be read" in damaged.damage
    assert (whole.id, whole.count, whole.current, whole.damage) == (second, 50, True, None)


def test_checking_a_store_before_the_work_leaves_nothing_in_it(place: Place) -> None:
    place.open().check_writable()
    assert place.open().list() == []
    assert place.leftovers() == 0


# --- several publishers, dead publishers -----------------------------------------------------------------------------


def test_concurrent_publishers_do_not_hurt_each_other(place: Place, folders: list[Path]) -> None:
    with ThreadPoolExecutor(6) as pool:
        names = list(pool.map(lambda folder: place.open().publish(folder), [*folders, folders[0], folders[0]]))
    assert [info.id for info in place.open().list()] == names[:4]
    assert place.leftovers() == 0
    for name in names:
        assert verify_release(place.fetch(name)).id == name


def test_prune_spares_a_publisher_at_work(place: Place, folders: list[Path]) -> None:
    found: list[list[str]] = []
    publisher = place.open(lease_s=30.0)
    name = publisher.publish(folders[0], lambda stage, done, total: found.append(place.open().prune(1)))
    assert found
    assert not any(found)
    assert verify_release(place.fetch(name)).id == name


PUBLISH_UNTIL = """
import sys
from pathlib import Path
from tests.integration.test_stores import Place
url, folder, stage, share, local = sys.argv[1:]

def progress(at, done, total):
    if at == stage and done >= float(share) * total:
        print("reached", flush=True)
        sys.stdin.read()

Place(url, Path(local)).open().publish(Path(folder), progress)
"""


def kill_publisher(place: Place, folder: Path, stage: str, share: float = 0.0) -> None:
    """Kill a process that publishes when it reports so much of a stage."""
    killed(PUBLISH_UNTIL, place.url, str(folder), stage, str(share), str(place.local))


def killed(script: str, *arguments: str) -> None:
    """Run a script until it says that it has reached its point, and kill it there."""
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reached\n"
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("stage", ["publish", "verify"])
def test_a_killed_publisher_leaves_the_old_release_and_remains_that_prune_finds(
    place: Place, folders: list[Path], stage: str
) -> None:
    (old,) = published(place, folders[:1])
    kill_publisher(place, folders[1], stage)
    dead = read_release(folders[1]).id
    assert [info.id for info in place.open().list()] == [old]
    assert place.open().current() == old
    assert place.leftovers() > 0
    with pytest.raises(UnknownRelease):
        place.open().activate(dead)
    assert eventually(lambda: place.open().prune(1) == [dead])
    assert place.leftovers() == 0
    assert verify_release(place.fetch(old)).id == old


def test_publishing_again_after_a_kill_sends_only_what_is_missing(place: Place, large: Path) -> None:
    kill_publisher(place, large, "publish", 0.5)
    sent: list[int] = []
    name = place.open().publish(large, lambda stage, done, total: sent.append(done) if stage == "publish" else None)
    assert len(sent) <= len(list(read_release(large).chunks())) // 2
    place.open().activate(name)
    assert verify_release(place.fetch(name)).id == name
    assert place.open().prune(1) == []
    assert place.leftovers() == 0


# --- users -----------------------------------------------------------------------------------------------------------


def test_the_user_table_is_published_replaced_and_deleted(place: Place, tmp_path: Path) -> None:
    store, cache = place.open(), tmp_path / "replica"
    first = store.publish_users(write_users(tmp_path / "first.snap"))
    fetched = store.fetch_users(SPEC_ID, cache)
    assert fetched is not None
    assert Snapshot.open(fetched).lookup(["u3"]).tolist() == [3]
    assert abs(created_at(first).timestamp() - time.time()) < 60
    second = store.publish_users(write_users(tmp_path / "second.snap", seed=1, users=60))
    table = place.open().users(SPEC_ID)
    assert table is not None
    assert (table.id, table.count, table.spec_id) == (second, 60, SPEC_ID)
    assert store.users_version(SPEC_ID) == second != first
    newer = store.fetch_users(SPEC_ID, cache)
    assert newer is not None
    assert len(Snapshot.open(newer)) == 60
    assert not fetched.exists(), "user data that was replaced must not stay"
    assert store.users_version("0" * 16) is None
    assert store.users("0" * 16) is None
    store.delete_users(SPEC_ID)
    assert place.open().users_version(SPEC_ID) is None
    assert store.fetch_users(SPEC_ID, cache) is None
    assert not newer.exists()
    assert place.open().prune(1) == []


def test_user_tables_of_different_specifications_live_side_by_side(place: Place, tmp_path: Path) -> None:
    store = place.open()
    store.publish_users(write_users(tmp_path / "a.snap"))
    other = store.publish_users(write_users(tmp_path / "b.snap", spec_id="6" * 16))
    store.delete_users(SPEC_ID)
    assert place.open().users_version("6" * 16) == other
    assert store.fetch_users("6" * 16, tmp_path / "cache") is not None


def test_an_item_table_is_not_published_as_users(place: Place, folders: list[Path]) -> None:
    with pytest.raises(StoreError, match="holds items, not users"):
        place.open().publish_users(folders[2] / ITEMS)


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(StoreError, match=r"ftp.*file://, redis://.*rediss\+sentinel://"):
        open_store("ftp://host/folder")
    with pytest.raises(StoreError, match="no store answers"):
        open_store("var/releases")


def test_a_file_url_without_a_folder_says_how_to_write_it() -> None:
    with pytest.raises(StoreError, match="write "):
        open_store("file://")


@pytest.mark.parametrize("place", ["localhost/tmp/x", "host/x", "var/releases", "/a%00b", "", "./a?b"])
def test_a_file_url_names_a_folder_of_this_machine_and_no_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"names no folder of this machine: write file://\./folder or file:///folder"):
        open_store(f"file://{place}").check_writable()
    assert not list(tmp_path.iterdir())


def test_a_file_url_is_relative_or_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = open_store("file://./var/releases").publish(folders[2])
    assert [info.id for info in open_store(f"file://{tmp_path}/var/releases").list()] == [name]


# --- only files ------------------------------------------------------------------------------------------------------


def test_a_file_store_serves_in_place(tmp_path: Path, folders: list[Path]) -> None:
    place = Place(f"file://{tmp_path}/store", tmp_path)
    (name,) = published(place, folders[:1])
    assert place.fetch(name) == tmp_path / "store" / "releases" / name
    assert not list(tmp_path.glob("cache-*"))


def test_a_file_store_drops_nothing_from_a_cache(tmp_path: Path, folders: list[Path]) -> None:
    place = Place(f"file://{tmp_path}/store", tmp_path)
    a, b = published(place, folders[2:4])
    (tmp_path / "cache" / a).mkdir(parents=True)
    store = place.open()
    assert store.drop_cached(tmp_path / "cache", {b}) == []
    assert (tmp_path / "cache" / a).is_dir()
    assert verify_release(store.fetch(a, tmp_path / "cache")).id == a


def test_a_full_disk_proposes_a_command_as_it_can_be_typed(tmp_path: Path, folders: list[Path]) -> None:
    def full(stage: str, done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="`ranktower releases prune --keep 1`"):
        FileStore(f"file://{tmp_path}/store").publish(folders[2], full)


def test_a_full_disk_of_a_replica_is_named(tmp_path: Path, folders: list[Path]) -> None:
    def full(stage: str, done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with running_redis() as server:
        store = RedisStore(server.url)
        name = store.publish(folders[2])
        cache = tmp_path / "cache"
        with pytest.raises(StoreError, match=f"^{cache}: No space left on device: free space there, or name another"):
            store.fetch(name, cache, full)
        store.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, folders: list[Path]) -> None:
    (tmp_path / "store").write_text("a file, not a folder")
    store = FileStore(f"file://{tmp_path}/store")
    for attempt in (store.check_writable, lambda: store.publish(folders[2])):
        with pytest.raises(StoreError, match="store"):
            attempt()


def test_a_release_that_was_moved_and_linked_is_pruned_like_any_other(tmp_path: Path, folders: list[Path]) -> None:
    place = Place(f"file://{tmp_path}/store", tmp_path)
    a, b, c = published(place, folders[:3])
    for name in (a, b):
        shutil.move(tmp_path / "store" / "releases" / name, tmp_path / name)
        (tmp_path / "store" / "releases" / name).symlink_to(tmp_path / name)
    assert place.fetch(a).is_dir()
    shutil.rmtree(tmp_path / b)  # its link leads nowhere
    assert place.open().prune(1) == [a, b]
    assert place.open().prune(1) == []
    assert place.leftovers() == 0
    assert [info.id for info in place.open().list()] == [c]
    assert verify_release(tmp_path / a).id == a, "it is not the store's"


def test_a_disk_that_is_read_only_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(f"file://{tmp_path}/store")
    store.check_writable()

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("cache.file_store.locked", refuse)
    monkeypatch.setattr("cache.file_store.os.access", lambda *_: False)
    with pytest.raises(StoreError, match=r"\.lock: Read-only file system: the disk is read-only: name a folder"):
        store.check_writable()


def test_a_damaged_pointer_to_the_users_says_so_and_is_mended_by_publishing(tmp_path: Path) -> None:
    store = FileStore(f"file://{tmp_path}/store")
    store.publish_users(write_users(tmp_path / "u.snap"))
    for content in (b"\0" * 31, b"\xff", b"", b"../../elsewhere"):
        (tmp_path / "store" / "users" / SPEC_ID / "current").write_bytes(content)
        for verb in (store.users_version, store.users, lambda spec_id: store.fetch_users(spec_id, tmp_path)):
            with pytest.raises(StoreError, match=r"current holds .* publish the users again"):
                verb(SPEC_ID)
    assert store.publish_users(write_users(tmp_path / "u.snap")) == store.users_version(SPEC_ID)


# --- only Redis ------------------------------------------------------------------------------------------------------


def test_no_server_is_an_error_that_hides_the_password() -> None:
    with running_redis() as server:
        port = server.port
    with pytest.raises(StoreError, match=r"redis-server runs there") as caught:
        RedisStore(f"redis://ranker:secret@127.0.0.1:{port}/0").current()
    assert "secret" not in str(caught.value)
    assert f"redis://ranker:***@127.0.0.1:{port}/0" in str(caught.value)


def test_a_wrong_password_is_named_as_such() -> None:
    with running_redis("--requirepass", "right") as server:
        with pytest.raises(StoreError, match="password in the URL"):
            RedisStore(f"redis://:wrong@127.0.0.1:{server.port}/0").current()
        assert RedisStore(f"redis://:right@127.0.0.1:{server.port}/0").current() is None


def test_a_full_redis_refuses_the_new_release_and_keeps_the_old(large: Path, tmp_path: Path) -> None:
    write_release(tmp_path / "new", 1, items=40_000)
    with running_redis("--maxmemory", "40mb") as server:  # chunks on their way count, too
        place = Place(f"{server.url}?prefix=small", tmp_path)
        (old,) = published(place, [large])
        with pytest.raises(StoreError, match="prune"):
            place.open().publish(tmp_path / "new")
        assert place.open().current() == old
        assert verify_release(place.fetch(old)).id == old


def test_a_redis_without_memory_can_be_pruned(folders: list[Path], tmp_path: Path) -> None:
    with running_redis() as server, server.client() as admin:
        place = Place(f"{server.url}?prefix=none", tmp_path)
        old, new = published(place, folders[2:4])
        orphan = b"none:release:20000101T000000000-000000000000:items.snap:0"  # of a publisher that was refused
        admin.set(orphan, b"part")
        admin.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match="OOM"):
            place.open().activate(old)
        store = place.open()
        assert old in store.prune(1)
        assert [info.id for info in store.list()] == [new]
        assert not [key for key in admin.scan_iter("none:release:*") if new.encode() not in key]
        store.log("changes").raise_floor(7)
        assert store.log("changes").floor() == 7
        with pytest.raises(StoreError, match=r"OOM.*prune"):
            store.log("changes").append([b"row"])
        assert store.log("changes").last() == 0


def test_a_redis_that_must_not_be_written_is_found_before_the_work() -> None:
    with running_redis() as server:
        with Redis.from_url(server.url) as admin:
            admin.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read")
        with pytest.raises(StoreError, match="give this user the commands"):
            RedisStore(f"redis://reader:pw@127.0.0.1:{server.port}/0").check_writable()


def test_without_the_right_to_subscribe_wait_still_sees_a_change(folders: list[Path], tmp_path: Path) -> None:
    with running_redis() as server:
        with Redis.from_url(server.url) as admin:
            admin.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@all", "resetchannels")
        a, b = published(Place(f"{server.url}?prefix=acl", tmp_path), folders[2:4])
        reader = RedisStore(f"redis://reader:pw@127.0.0.1:{server.port}/0?prefix=acl")
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(reader.wait, Live(current=b), 60)
            Place(f"{server.url}?prefix=acl", tmp_path).open().activate(a)
            assert waiting.result(30).current == a


def test_waiting_goes_on_when_redis_comes_back(folders: list[Path], tmp_path: Path) -> None:
    with running_redis() as server:
        reader = RedisStore(f"{server.url}?prefix=gone")
        assert reader.wait(NOTHING, 0) == NOTHING
        server.kill()
        with pytest.raises(StoreError, match=r"redis-server runs there"):
            reader.wait(NOTHING, 5)
        assert server.start()
        place = Place(f"{server.url}?prefix=gone", tmp_path)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(reader.wait, NOTHING, 60)
            (name,) = published(place, folders[2:3])
            assert waiting.result(30).current == name
        reader.close()


def test_a_release_that_was_fetched_is_not_fetched_again(redis_url: str, folders: list[Path], tmp_path: Path) -> None:
    place = Place(f"{redis_url}?prefix=once", tmp_path)
    (name,) = published(place, folders[:1])
    fetched = place.open().fetch(name, tmp_path / "cache")
    place.damage(name, flipped)
    assert place.open().fetch(name, tmp_path / "cache") == fetched  # only the local copy is looked at


def test_a_damaged_local_copy_is_fetched_again(redis_url: str, folders: list[Path], tmp_path: Path) -> None:
    place = Place(f"{redis_url}?prefix=again", tmp_path)
    (name,) = published(place, folders[:1])
    path = place.open().fetch(name, tmp_path / "cache") / ITEMS
    path.write_bytes(flipped(path.read_bytes()))
    assert verify_release(place.open().fetch(name, tmp_path / "cache")).id == name


def test_a_local_copy_that_was_deleted_is_fetched_again(redis_url: str, folders: list[Path], tmp_path: Path) -> None:
    store = RedisStore(f"{redis_url}?prefix=deleted")
    store.activate(store.publish(folders[2]))
    fetched = store.fetch(store.current() or "", tmp_path / "cache")
    shutil.rmtree(fetched)
    assert verify_release(store.fetch(fetched.name, tmp_path / "cache")).id == fetched.name


def test_stores_that_share_a_cache_do_not_drop_from_each_other(
    redis_url: str, folders: list[Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    ours, theirs = (RedisStore(f"{redis_url}?prefix={name}") for name in ("ours", "theirs"))
    copies = []
    for store in (ours, theirs):
        names = [store.publish(folder) for folder in folders[2:4]]
        store.publish_users(write_users(tmp_path / "users.snap"))
        copies.append([store.fetch(name, cache) for name in names] + [store.fetch_users(SPEC_ID, cache)])
    ours.delete_users(SPEC_ID)
    assert ours.fetch_users(SPEC_ID, cache) is None
    assert ours.drop_cached(cache, {names[1]}) == [names[0]]
    assert [path.exists() for path in copies[0] if path] == [False, True, False]
    assert [path.exists() for path in copies[1] if path] == [True, True, True]


def test_a_cache_is_found_again_whatever_the_password(folders: list[Path], tmp_path: Path) -> None:
    with running_redis() as server, Redis.from_url(server.url) as admin:
        copies = []
        for password in ("one", "two"):
            admin.execute_command("ACL", "SETUSER", "reader", "reset", "on", f">{password}", "~*", "&*", "+@all")
            store = RedisStore(f"redis://reader:{password}@127.0.0.1:{server.port}/0")
            copies.append(store.fetch(store.publish(folders[2]), tmp_path / "cache"))
            assert password not in str(copies[-1].relative_to(tmp_path))
            store.close()
    assert copies[0] == copies[1]


def test_a_bundle_that_is_being_opened_is_not_dropped_by_another_process(redis_url: str, tmp_path: Path) -> None:
    store, other = (RedisStore(f"{redis_url}?prefix=opening") for _ in range(2))
    name = publish(tiny_release(tmp_path / "made"), store)
    with store.fetch_bundle(name, tmp_path / "cache") as folder, other.fetch_bundle(name, tmp_path / "cache"):
        assert other.drop_cached(tmp_path / "cache", set()) == []
        assert open_bundle(folder).item_tower().size
    assert other.drop_cached(tmp_path / "cache", set()) == [name]
    assert not folder.exists()


def test_a_bundle_that_was_dropped_before_it_could_be_held_is_fetched_again(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = (RedisStore(f"{redis_url}?prefix=dropped") for _ in range(2))
    name = publish(tiny_release(tmp_path / "made"), store)
    dropped: list[list[str]] = []

    @contextmanager
    def late(path: Path) -> Iterator[None]:
        if len(dropped) < 2:  # the first time nothing is there yet
            dropped.append(other.drop_cached(tmp_path / "cache", set()))
        with sharing(path):
            yield

    monkeypatch.setattr("cache.redis_store.sharing", late)
    with store.fetch_bundle(name, tmp_path / "cache") as folder:
        assert open_bundle(folder).item_tower().size
    assert dropped == [[], [name]]


def test_a_cut_download_goes_on_where_it_was(redis_url: str, large: Path, tmp_path: Path) -> None:
    place = Place(f"{redis_url}?prefix=cut", tmp_path)
    (name,) = published(place, [large])

    def cut(stage: str, done: int, total: int) -> None:
        raise InterruptedError("the line is cut")

    with pytest.raises(StoreError, match="the line is cut"):
        place.open().fetch(name, tmp_path / "cache", cut)
    assert not list((tmp_path / "cache").glob(f"*/{name}"))
    chunks, whole = list(read_release(large).chunks()), fetched_chunks(tmp_path / "cache", large)
    assert 0 < whole < len(chunks)
    fetched: list[int] = []
    place.open().fetch(name, tmp_path / "cache", lambda stage, done, total: fetched.append(done))
    assert len(fetched) == len(chunks) - whole


def fetched_chunks(cache: Path, folder: Path) -> int:
    """How many chunks a download that was cut has left whole."""
    release = read_release(folder)
    (draft,) = cache.glob(f"*/.{release.id}.partial")
    return sum(sha256(read_chunk(draft, chunk)) == chunk.sha256 for chunk in release.chunks())


FETCH_HALF = """
import sys
from pathlib import Path
from cache.store import open_store
url, name, cache = sys.argv[1:]

def progress(at, done, total):
    if done > total / 2:
        print("reached", flush=True)
        sys.stdin.read()

open_store(url).fetch(name, Path(cache), progress)
"""


def test_a_download_whose_process_was_killed_goes_on_in_the_next(large: Path, tmp_path: Path) -> None:
    with running_redis() as server, server.client() as client:
        place = Place(f"{server.url}?prefix=killed", tmp_path)
        (name,) = published(place, [large])
        others = client.info("clients")["connected_clients"]
        killed(FETCH_HALF, place.url, name, str(tmp_path / "cache"))
        assert eventually(lambda: client.info("clients")["connected_clients"] == others)
        chunks, whole = list(read_release(large).chunks()), fetched_chunks(tmp_path / "cache", large)
        assert whole >= len(chunks) // 2
        before = client.info("stats")["total_net_output_bytes"]
        assert verify_release(place.open().fetch(name, tmp_path / "cache")).id == name
        received = client.info("stats")["total_net_output_bytes"] - before
    assert received < (len(chunks) - whole) * CHUNK_BYTES + 100_000  # the manifest, what INFO says


def test_a_bad_chunk_is_refused_by_name_and_the_others_are_kept(redis_url: str, large: Path, tmp_path: Path) -> None:
    place = Place(f"{redis_url}?prefix=bad", tmp_path)
    (name,) = published(place, [large])
    key, cache = f"bad:release:{name}:{ITEMS}:5", tmp_path / "cache"
    with place.redis() as client:
        right = client.get(key)
        client.set(key, flipped(right))
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"{name}: chunk 5 of items.snap in redis://.* not as it was written"):
                place.open().fetch(name, cache)
            assert not list(cache.glob(f"*/{name}"))
        assert fetched_chunks(cache, large) >= 5
        client.set(key, right)
    assert verify_release(place.open().fetch(name, cache)).id == name


def test_a_client_of_few_connections_moves_few_chunks_at_a_time(redis_url: str, large: Path, tmp_path: Path) -> None:
    place = Place(f"{redis_url}?max_connections=2&prefix=few", tmp_path)
    store = place.open()
    name = store.publish(large)
    store.activate(name)
    assert store.wait(NOTHING, 0).current == name  # has a connection of its own from now on
    assert verify_release(store.fetch(name, tmp_path / "cache")).id == name


def test_replicas_of_one_machine_share_a_download(redis_url: str, folders: list[Path], tmp_path: Path) -> None:
    place = Place(f"{redis_url}?prefix=shared", tmp_path)
    (name,) = published(place, folders[:1])
    fetched = threading.Semaphore(0)

    def count(stage: str, done: int, total: int) -> None:
        if done == total:
            fetched.release()

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: place.open().fetch(name, tmp_path / "cache", count), range(4)))
    assert len(set(paths)) == 1
    assert fetched.acquire(blocking=False)
    assert not fetched.acquire(blocking=False), "downloaded more than once"


def test_a_publisher_that_was_killed_sends_only_what_is_missing_when_started_again(large: Path, tmp_path: Path) -> None:
    with running_redis() as server, server.client() as client:
        place = Place(f"{server.url}?prefix=resumed", tmp_path)
        kill_publisher(place, large, "publish", 0.1)  # at the second chunk, when ten at most have begun
        assert eventually(lambda: client.info("clients")["connected_clients"] == 1)  # what it sent has arrived
        lies_there = sum(client.strlen(key) for key in client.scan_iter("resumed:release:*"))
        missing = read_release(large).size_bytes - lies_there
        before = client.info("stats")["total_net_input_bytes"]
        name = place.open().publish(large)
        sent = client.info("stats")["total_net_input_bytes"] - before
        assert verify_release(place.fetch(name)).id == name
    assert lies_there > read_release(large).size_bytes / 10
    assert missing <= sent < 1.01 * missing  # keys, the lease, the manifest


@pytest.mark.parametrize("more", [":users", ":release", ":records", ":changes"])
def test_pruning_spares_a_store_whose_prefix_goes_on_from_this_ones(
    redis_url: str, folders: list[Path], tmp_path: Path, more: str
) -> None:
    ours, theirs = (RedisStore(f"{redis_url}?prefix=on{more[1:]}{end}") for end in ("", more))
    with Redis.from_url(redis_url) as client:
        held: list[set[bytes]] = []
        for store in (ours, theirs):
            store.activate(store.publish(folders[2]))
            store.publish_users(write_users(tmp_path / f"{len(store.url)}.snap"))
            happened(store)
            store.log(records_log("0" * 16)).append([b"of a bundle that no release has"])
            held.append({*client.scan_iter(f"*on{more[1:]}*")})
        before = {key: client.dump(key) for key in held[1] - held[0]}
        assert ours.prune(1) == []
        trim_changes(ours)
        assert {key: client.dump(key) for key in before} == before
    assert records_log("0" * 16) not in ours.logs("records")
    assert theirs.logs("records") == [records_log("0" * 16)]
    assert verify_release(theirs.fetch(theirs.current() or "", tmp_path / "cache")).id == theirs.current()


def test_redis_holds_little_more_than_the_bytes_of_a_release(large: Path) -> None:
    with running_redis() as server, server.client() as client:
        before = client.info("memory")["used_memory"]
        store = RedisStore(f"{server.url}?prefix=size")
        store.activate(store.publish(large))
        store.close()
        limit = 1.05 * read_release(large).size_bytes
        assert sum(client.memory_usage(key, samples=0) or 0 for key in client.scan_iter()) < limit
        assert eventually(lambda: client.info("memory")["used_memory"] - before < limit)  # once buffers have gone
