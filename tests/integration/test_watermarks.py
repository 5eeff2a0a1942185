"""What each release contains of the log, and that trimming never takes what a live release still needs."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cache import file_log
from cache.changes import CHANGES, DEAD, DeadLetter, encode_dead, records_log
from cache.cli import app
from cache.errors import StoreError
from cache.intake import append_deletes
from cache.release import seal_release
from cache.store import ReleaseStore, open_store
from cache.updater import Updater
from cache.watermarks import EXPORT_S, SKEW_S, check_watermark, lowest_watermarks, trim_changes, watermark_of
from tests.redis_server import redis_server
from tests.tiny_releases import TinyRelease, tiny_release
from tests.updates import embedded, folded


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(params=["file", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReleaseStore:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(file_log, "SEGMENT_BYTES", 200)  # so that there is something to trim
    if request.param == "file":
        return open_store(f"file://{tmp_path}/store")
    return open_store(f"{request.getfixturevalue('redis_url')}?prefix={re.sub(r'[^a-z0-9]', '-', tmp_path.name)}")


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[TinyRelease]:
    """Of two bundles."""
    home = tmp_path_factory.mktemp("tiny")
    return [tiny_release(home / str(seed), seed=seed) for seed in range(2)]


def published(store: ReleaseStore, release: TinyRelease, watermark: int) -> str:
    """The same items again, said to contain the log up to a position."""
    seal_release(release.folder, bundle_id=release.bundle.id, head=release.head, watermark=watermark)
    return store.publish(release.folder)


def deleted(store: ReleaseStore, count: int, start: int = 0) -> list[int]:
    """Positions of as many deletions, of the ids from `start` on."""
    return [append_deletes(store, np.array([start + number]))[1] for number in range(count)]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


# --- finding it ------------------------------------------------------------------------------------------------------


def test_an_items_file_contains_what_was_appended_before_it_can_have_been_begun(
    store: ReleaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.watermarks.SKEW_S", 2 * EXPORT_S)  # so that moments of hours to come are tried here
    items = tmp_path / "items.parquet"
    items.touch()
    assert watermark_of(store, items, None) == 0  # no log
    deleted(store, 3)
    entries = store.log(CHANGES).read(0, 9)
    for seconds, after in ((-10, 0), (10, 0), (EXPORT_S - 10, 0), (EXPORT_S + 10, 3)):
        moment = entries[0].at_ms / 1000 + seconds
        os.utime(items, (moment, moment))
        watermark = watermark_of(store, items, None)
        assert len(store.log(CHANGES).read(watermark, 9)) == 3 - after


def test_an_items_file_from_the_future_is_refused(store: ReleaseStore, tmp_path: Path) -> None:
    """A clock that is ahead: what was changed since the export would be taken for contained in it."""
    items = tmp_path / "items.parquet"
    items.touch()
    ahead = time.time() + 3 * 3600
    os.utime(items, (ahead, ahead))
    assert watermark_of(store, items, None) == 0  # no log, nothing to lose
    (position,) = deleted(store, 1)
    with pytest.raises(
        StoreError, match=r"items.parquet was written at .*, by the clock of the log it is .* --watermark"
    ):
        watermark_of(store, items, None)
    assert watermark_of(store, items, position) == position
    os.utime(items, (time.time() + SKEW_S / 2,) * 2)
    assert watermark_of(store, items, None) < position


def test_a_publish_says_what_its_items_are_taken_to_contain(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    (position,) = deleted(store, 1)
    items = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": [1, 2], "price": [1.0, 2.0]}), items)
    bundle = releases[0].folder / "bundle"
    said = run("publish", "--bundle", bundle, "--items", items, "--store", store.url, "--watermark", position)
    assert f"items.parquet is taken to contain the updates up to position {position} " in said


def test_a_given_watermark_lies_in_the_log(store: ReleaseStore, tmp_path: Path) -> None:
    items = tmp_path / "items.parquet"
    items.touch()
    positions = deleted(store, 2)
    assert watermark_of(store, items, positions[0]) == positions[0]
    assert watermark_of(store, items, 0) == 0
    for wrong in (-1, positions[1] + 1):
        with pytest.raises(StoreError, match=f"--watermark {wrong} is not in the log .* ends at {positions[1]}"):
            watermark_of(store, items, wrong)


def test_an_items_file_contains_what_all_releases_do(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    """Though it was written within the hour: else no publish could follow one that was told its watermark."""
    positions = deleted(store, 3)
    published(store, releases[0], positions[1])
    trim_changes(store)
    items = tmp_path / "items.parquet"
    items.touch()
    moment = store.log(CHANGES).read(positions[1], 9)[0].at_ms / 1000 + 10
    os.utime(items, (moment, moment))
    assert watermark_of(store, items, None) == positions[1]


def test_an_items_file_older_than_the_trimmed_log_is_refused(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    positions = deleted(store, 3)
    published(store, releases[0], positions[1])
    assert trim_changes(store) == positions[1]
    items = tmp_path / "items.parquet"
    items.touch()
    os.utime(items, (1, 1))
    with pytest.raises(
        StoreError, match=r"items.parquet, written at 1970-01-01T00:00:01\+00:00 contains the changes up"
    ):
        watermark_of(store, items, None)
    with pytest.raises(StoreError, match=f"--watermark {positions[1]} if they contain those changes"):
        watermark_of(store, items, positions[0])
    assert watermark_of(store, items, positions[1]) == positions[1]
    check_watermark(store, positions[1], "it")


def test_what_comes_too_late_is_neither_pushed_nor_activated(store: ReleaseStore, releases: list[TinyRelease]) -> None:
    positions = deleted(store, 3)
    current = published(store, releases[0], positions[2])
    store.activate(current)
    trim_changes(store)
    seal_release(releases[1].folder, bundle_id=releases[1].bundle.id, head=releases[1].head, watermark=positions[0])
    late = store.publish(releases[1].folder)
    verbs = [("push", releases[1].folder), ("activate", late), ("canary", late, "--weight", 0.1)]
    for verb in [*verbs, ("shadow", late, "--share", 0.1)]:
        with pytest.raises(StoreError, match=f"contains the changes up to position {positions[0]}, "):
            run("releases", *verb, "--store", store.url)
    assert store.current() == current
    run("releases", "activate", current, "--store", store.url)


@pytest.mark.parametrize("count", [0, 2])
def test_a_release_of_another_store_is_neither_pushed_nor_activated(
    store: ReleaseStore, releases: list[TinyRelease], count: int
) -> None:
    """Nor one of a log that was lost: what it lacks cannot be told from positions that mean nothing here."""
    end = [0, *deleted(store, count)][-1]
    release = releases[0]
    seal_release(release.folder, bundle_id=release.bundle.id, head=release.head, watermark=end + 1)
    refusal = f"up to position {end + 1}, the log of .* ends at {end}, so .*: publish the items again"
    with pytest.raises(StoreError, match=refusal):
        run("releases", "push", release.folder, "--store", store.url)
    assert store.list() == []
    foreign = store.publish(release.folder)
    for verb in (("activate", foreign), ("canary", foreign, "--weight", 0.1), ("shadow", foreign, "--share", 0.1)):
        with pytest.raises(StoreError, match=refusal):
            run("releases", *verb, "--store", store.url)
    assert store.current() is None
    check_watermark(store, end, "the end")


def test_a_release_that_was_built_while_the_log_went_on_is_pushed(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    (end,) = deleted(store, 1)
    release = releases[0]
    seal_release(release.folder, bundle_id=release.bundle.id, head=release.head, watermark=end)
    deleted(store, 3, start=1)
    run("releases", "push", release.folder, "--store", store.url, "--cache", tmp_path / "cache")
    assert store.current() == store.list()[0].id
    assert set(folded(store, release.bundle, end).deleted.tolist()) == {1, 2, 3}


# --- trimming --------------------------------------------------------------------------------------------------------


def test_nothing_is_trimmed_without_releases_or_without_a_log(store: ReleaseStore, releases: list[TinyRelease]) -> None:
    assert trim_changes(store) is None
    name = published(store, releases[0], 0)
    assert trim_changes(store) is None
    assert run("releases", "prune", "--keep", 1, "--store", store.url) == "nothing to delete"
    assert lowest_watermarks(store) == {releases[0].bundle.id: 0}
    assert name == store.list()[0].id


def test_a_release_of_another_store_trims_nothing(store: ReleaseStore, releases: list[TinyRelease]) -> None:
    positions = deleted(store, 2)
    published(store, releases[0], positions[-1] + 1)
    assert trim_changes(store) is None
    assert store.log(CHANGES).floor() == 0
    check_watermark(store, 0, "what is published next")


def test_the_lowest_watermark_bounds_every_log(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path
) -> None:
    positions = deleted(store, 40)
    published(store, releases[0], positions[20])
    published(store, releases[1], positions[9])
    with Updater(store, tmp_path / "cache") as updater:
        updater.catch_up()
    letters = [DeadLetter(bundle_id="b", position=position, id=1, reason="r") for position in positions]
    for letter in letters:
        store.log(DEAD).append(encode_dead([letter]))
    store.log(records_log("0" * 16)).append([b"of a bundle that no release has"])
    said = run("releases", "prune", "--keep", 9, "--store", store.url)
    assert said == (
        f"nothing to delete trimmed the log of updates up to position {positions[9]}, which every release contains"
    )
    for log, needed in ((CHANGES, positions[10]), (DEAD, None)):
        left = store.log(log).read(0, 99)
        assert 30 <= len(left) < 40
        assert needed is None or needed in [entry.position for entry in left]
    for release, first in zip(releases, (20, 9), strict=True):
        found = folded(store, release.bundle, positions[first])
        assert set(found.deleted.tolist()) == set(range(first + 1, 40))
        assert found.watermark == positions[-1]
    assert len(embedded(store, releases[0].bundle.id)) < len(embedded(store, releases[1].bundle.id)) < 31 + 5
    assert store.logs("records") == sorted(f"records/{release.bundle.id}" for release in releases)


def test_a_release_published_during_a_trim_is_either_spared_or_refused(
    store: ReleaseStore, releases: list[TinyRelease], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever moment of the trim it is seen at: between any two of its calls of the store."""
    outcomes = set()
    for moment in range(12):
        positions = deleted(store, 6)
        published(store, releases[0], positions[4])
        store.prune(1)
        calls = 0
        late: list[str] = []
        whole = type(store).list

        def between(self: ReleaseStore, moment: int = moment, whole=whole, positions=positions, late=late):  # type: ignore[no-untyped-def]
            nonlocal calls
            if calls == moment:
                late.append(published(store, releases[1], positions[2]))
            calls += 1
            return whole(self)

        store.log(records_log("0" * 16)).append([b"whose deletion is another call"])
        with monkeypatch.context() as patched:
            patched.setattr(type(store), "list", between)
            trim_changes(store)
        if not late:
            break
        try:
            check_watermark(store, positions[2], "it")
        except StoreError:
            outcomes.add("refused")
        else:
            outcomes.add("spared")
            behind = store.log(CHANGES).read(positions[2], 99)
            assert [entry.position for entry in behind] == positions[3:]
    assert outcomes == {"refused", "spared"}


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_in_between_no_live_release_misses_a_change(
    store: ReleaseStore, releases: list[TinyRelease], tmp_path: Path, seed: int
) -> None:
    """Random appends, publishes, prunes, trims and updaters; then every live release knows every later change."""
    rng = random.Random(seed)
    positions = [0]
    updaters = [Updater(store, tmp_path / "cache") for _ in range(2)]
    for _ in range(40):
        what = rng.choice(["append", "append", "publish", "prune", "step", "step", "restart"])
        if what == "append":
            positions += deleted(store, rng.randint(1, 3), start=len(positions))
        elif what == "publish":
            allowed = [position for position in positions if position >= store.log(CHANGES).floor()]
            published(store, rng.choice(releases), rng.choice(allowed))
        elif what == "prune":
            store.prune(rng.randint(1, 3))
            trim_changes(store)
        elif what == "step":
            updater = rng.choice(updaters)
            updater.look()
            updater.step()
        else:
            with updaters.pop(rng.randrange(2)):
                updaters.append(Updater(store, tmp_path / "cache"))
    for updater in updaters:
        with updater:
            updater.catch_up()
    bundles = {release.bundle.id: release.bundle for release in releases}
    for info in store.list():
        behind = {number for number, position in enumerate(positions) if position > info.watermark}
        found = folded(store, bundles[info.bundle_id], info.watermark)
        assert set(found.deleted.tolist()) == behind
        assert found.watermark == max(info.watermark, positions[-1])
