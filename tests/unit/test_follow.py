"""Following a bundle's log: what is new comes into the next overlay, what is missing or cannot be served is said."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache import follow
from cache.changes import CHANGES, DEAD, DeadLetter, Embedded, Newer, encode_dead, encode_embedded, records_log
from cache.durable import holding, is_held
from cache.errors import SnapshotError, StoreError
from cache.file_store import FileStore
from cache.follow import KEPT, PREFIX, Follower
from cache.overlay import Overlay
from cache.release import seal_release
from kernel.ids import Texts
from tests.changed import embedded, happened, records_of
from tests.tiny_releases import TinyRelease, tiny_release


@pytest.fixture
def made(tmp_path: Path) -> TinyRelease:
    return tiny_release(tmp_path / "made")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(f"file://{tmp_path}/store")


@pytest.fixture(autouse=True)
def without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every look is one."""
    monkeypatch.setattr(follow, "REST", 0.0)


@pytest.fixture
def subject(store: FileStore) -> Follower:
    return Follower(store.log)


def opened(newer: Newer) -> Overlay:
    assert newer.overlay is not None
    return Overlay.open(newer.overlay)


def state(newer: Newer) -> tuple[set[int], set[int], int]:
    """Items with records, deleted ones, watermark."""
    overlay = opened(newer)
    ids = overlay.items.ids().tolist()
    return {*ids[: overlay.held]}, {*ids[overlay.held :]}, overlay.watermark


def test_nothing_came_after_a_release(subject: Follower, made: TinyRelease, tmp_path: Path) -> None:
    assert subject.bring(made.folder, tmp_path / "cache") == Newer()
    assert not (tmp_path / "cache").exists()


def test_what_is_new_comes_into_the_next_overlay(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    embedded(store, made, 0, 5, [100, 900], 4.0)
    first = subject.bring(made.folder, tmp_path)
    assert state(first) == ({100, 900}, set(), 5)
    assert subject.bring(made.folder, tmp_path).overlay == first.overlay
    embedded(store, made, 5, 9, [900, 101])
    embedded(store, made, 9, 12, [102], 2.0)
    second = subject.bring(made.folder, tmp_path)
    assert state(second) == ({100, 102}, {900, 101}, 12)
    overlay = opened(second)
    rows = overlay.items.lookup(np.array([100, 102]))
    table = overlay.items.table(made.head, made.bundle.graph())
    wanted = np.concatenate([records_of(made, [100], 4.0), records_of(made, [102], 2.0)])
    np.testing.assert_allclose(table.records(rows), wanted, rtol=1e-6)


def test_what_the_release_contains_is_not_laid_over_it(store: FileStore, made: TinyRelease, tmp_path: Path) -> None:
    seal_release(made.folder, bundle_id=made.bundle.id, head=made.head, watermark=5)
    embedded(store, made, 0, 5, [100])
    subject = Follower(store.log)
    assert subject.bring(made.folder, tmp_path).overlay is None
    embedded(store, made, 5, 6, [101])
    assert state(subject.bring(made.folder, tmp_path)) == (set(), {101}, 6)


def test_a_log_that_begins_again_is_read_from_its_beginning(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    embedded(store, made, 0, 5, [100, 101, 102, 103], 4.0)
    subject.bring(made.folder, tmp_path)
    store.delete_log(records_log(made.bundle.id))
    embedded(store, made, 5, 7, [104])
    assert state(subject.bring(made.folder, tmp_path)) == ({100, 101, 102, 103}, {104}, 7)


def test_a_line_that_follows_an_earlier_entry_only_is_found_by_reading_all(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    """A gap is no reason to stand still once what fills it has come."""
    embedded(store, made, 3, 6, [101], since=3)
    assert subject.bring(made.folder, tmp_path).overlay is None
    embedded(store, made, 0, 3, [100])
    assert state(subject.bring(made.folder, tmp_path)) == (set(), {100, 101}, 6)


def test_changes_that_were_trimmed_are_missed(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    last = happened(store)
    store.log(CHANGES).raise_floor(last)
    with pytest.raises(StoreError, match=f"knows the changes up to 0, those up to {last} were trimmed: publish"):
        subject.bring(made.folder, tmp_path)
    embedded(store, made, 0, last, [100])
    assert state(subject.bring(made.folder, tmp_path))[2] == last


def test_a_gap_that_nothing_fills_is_told(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    embedded(store, made, 0, 2, [100])
    subject.bring(made.folder, tmp_path)
    last = happened(store)
    store.log(CHANGES).raise_floor(last)
    embedded(store, made, last, last + 3, [101], since=last)
    with pytest.raises(StoreError, match="knows the changes up to 2"):
        subject.bring(made.folder, tmp_path)


def test_how_far_behind_it_is_counts_from_the_oldest_change_that_is_not_here(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10.0]
    monkeypatch.setattr(follow, "monotonic", lambda: now[0])
    assert subject.bring(made.folder, tmp_path).behind_since_s is None
    ends = []
    for _ in range(2):
        now[0] += 1
        ends.append(happened(store))
        assert subject.bring(made.folder, tmp_path).behind_since_s == 11.0
    embedded(store, made, 0, ends[0], [100])
    assert subject.bring(made.folder, tmp_path).behind_since_s == 12.0
    embedded(store, made, ends[0], ends[1], [100])
    assert subject.bring(made.folder, tmp_path).behind_since_s is None


def test_dead_changes_of_the_bundle_are_counted(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    seal_release(made.folder, bundle_id=made.bundle.id, head=made.head, watermark=5)
    letters = [
        DeadLetter(bundle_id=bundle, position=position, id=item, reason="r")
        for bundle, position, item in (
            (made.bundle.id, 6, 1),
            (made.bundle.id, 5, 2),  # the release has it otherwise
            ("other", 7, 3),
            (made.bundle.id, 8, 1),
            (made.bundle.id, 8, None),
            (made.bundle.id, 9, None),
        )
    ]
    for _ in range(2):
        store.log(DEAD).append(encode_dead(letters))
        assert subject.bring(made.folder, tmp_path).dead == 1 + 2


def test_a_dead_change_that_a_later_one_mends_counts_no_more(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    """Also where the letter is read after the change that mends it, as that of a second, slower updater is."""
    letters = [DeadLetter(bundle_id=made.bundle.id, position=3, id=item, reason="r") for item in (100, 101, 102)]
    store.log(DEAD).append(encode_dead(letters))
    embedded(store, made, 0, 3, [103], 1.0)
    assert subject.bring(made.folder, tmp_path).dead == 3
    embedded(store, made, 3, 5, [100], 1.0)
    assert subject.bring(made.folder, tmp_path).dead == 2
    embedded(store, made, 5, 7, [101])
    store.log(DEAD).append(encode_dead(letters))
    assert subject.bring(made.folder, tmp_path).dead == 1
    store.log(DEAD).append(encode_dead([DeadLetter(bundle_id=made.bundle.id, position=9, id=100, reason="r")]))
    embedded(store, made, 7, 9, [])
    assert subject.bring(made.folder, tmp_path).dead == 2
    assert Follower(store.log).bring(made.folder, tmp_path / "another").dead == 2


def test_a_record_that_cannot_be_served_is_named_and_what_was_there_stays(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded(store, made, 0, 2, [100])
    first = subject.bring(made.folder, tmp_path)
    monkeypatch.setattr("tests.changed.records_of", lambda made, ids, price: np.full((1, made.head.item_size), np.nan))
    embedded(store, made, 2, 4, [101], 1.0)
    for _ in range(2):
        with pytest.raises(SnapshotError, match=rf"the record of item 101 in the log of bundle {made.bundle.id}"):
            subject.bring(made.folder, tmp_path)
    assert state(first) == (set(), {100}, 2)


def test_ids_that_no_table_may_hold_are_passed_over(store: FileStore, tmp_path: Path) -> None:
    """One of them must not keep all others from the replica, for ever."""
    made = tiny_release(tmp_path / "made", ids="string")
    records, log = records_of(made, ["a", "b"], 1.0), store.log(records_log(made.bundle.id))
    for after, ids, what in ((0, ["item-1", "x" * 2000], None), (3, ["", "new"], records)):
        entry = Embedded(since=0, after=after, until=after + 3, ids=Texts.of(ids), records=what)
        log.append([encode_embedded(entry)])
    subject = Follower(store.log)
    overlay = opened(subject.bring(made.folder, tmp_path))
    assert overlay.items.ids()[: overlay.held].tolist() == ["new"]
    assert overlay.items.ids()[overlay.held :].tolist() == ["item-1"]
    assert overlay.watermark == 6
    row = overlay.items.lookup(["new"])
    found = overlay.items.table(made.head, made.bundle.graph()).records(row)
    np.testing.assert_allclose(found, records[1:], rtol=1e-6)


def test_an_overlay_that_could_not_be_written_is_written_the_next_time(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    embedded(store, made, 0, 2, [100])
    with monkeypatch.context() as patched:
        patched.setattr(follow, "write_overlay", full)
        with pytest.raises(StoreError, match="No space left"):
            subject.bring(made.folder, tmp_path)
    assert state(subject.bring(made.folder, tmp_path)) == (set(), {100}, 2)


def test_the_newest_overlays_stay_and_all_go_in_the_end(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for until in range(1, KEPT + 4):
        embedded(store, made, until - 1, until, [100 + until])
        subject.bring(made.folder, cache)
    assert len([*cache.rglob("*.snap")]) == KEPT
    subject.close()
    assert not [*cache.iterdir()]


def test_what_dead_processes_left_goes_what_the_living_hold_stays(
    store: FileStore, made: TinyRelease, tmp_path: Path
) -> None:
    dead, alive = tmp_path / f"{PREFIX}dead", tmp_path / f"{PREFIX}alive"
    for folder in (dead, alive):
        folder.mkdir()
    embedded(store, made, 0, 1, [100])
    with holding(alive):
        subject = Follower(store.log)
        subject.bring(made.folder, tmp_path)
        assert not dead.exists()
        assert alive.exists()
    subject.close()


@pytest.mark.parametrize("pattern", ["*", f"{PREFIX}*/*/*"])
def test_a_cache_that_was_cleared_is_filled_again(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path, pattern: str
) -> None:
    cache = tmp_path / "cache"
    embedded(store, made, 0, 1, [100])
    subject.bring(made.folder, cache)
    for left in cache.glob(pattern):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert state(subject.bring(made.folder, cache)) == (set(), {100}, 1)
    embedded(store, made, 1, 2, [101])
    assert state(subject.bring(made.folder, cache)) == (set(), {100, 101}, 2)
    (home,) = cache.glob(f"{PREFIX}*")
    assert is_held(home)
    subject.close()
    assert not [*cache.iterdir()]


def test_a_folder_is_held_before_another_process_may_take_it_for_left(
    store: FileStore, made: TinyRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins between the folder's creation and its lock."""
    embedded(store, made, 0, 1, [100])
    first, second = Follower(store.log), Follower(store.log)
    cache, make = tmp_path / "cache", follow.tempfile.mkdtemp
    with ThreadPoolExecutor() as pool:
        others: list[Future[Newer]] = []

        def interrupted(**given: Any) -> str:
            monkeypatch.setattr(follow.tempfile, "mkdtemp", make)
            made_now = make(**given)
            others.append(pool.submit(second.bring, made.folder, cache))
            with suppress(TimeoutError):
                others[0].result(0.3)  # as far as it gets
            return made_now

        monkeypatch.setattr(follow.tempfile, "mkdtemp", interrupted)
        assert state(first.bring(made.folder, cache)) == (set(), {100}, 1)
        assert state(others[0].result()) == (set(), {100}, 1)
    assert len([*cache.iterdir()]) == 2
    for subject in (first, second):
        subject.close()


def test_another_release_begins_from_its_own_watermark(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path
) -> None:
    embedded(store, made, 0, 3, [100])
    subject.bring(made.folder, tmp_path)
    other = Path(shutil.copytree(made.folder, tmp_path / "other"))
    seal_release(other, bundle_id=made.bundle.id, head=made.head, watermark=3)
    assert subject.bring(other, tmp_path).overlay is None
    assert state(subject.bring(made.folder, tmp_path)) == (set(), {100}, 3)


def test_it_rests_as_long_as_it_took(
    store: FileStore, subject: Follower, made: TinyRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10.0]
    monkeypatch.setattr(follow, "REST", 1.0)
    monkeypatch.setattr(follow, "monotonic", lambda: now[0])
    write = follow.write_overlay

    def slow(*given: object, **named: object) -> Path:
        now[0] += 3.0
        return write(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(follow, "write_overlay", slow)
    embedded(store, made, 0, 3, [100])
    first = subject.bring(made.folder, tmp_path)
    embedded(store, made, 3, 5, [101])
    assert subject.bring(made.folder, tmp_path) is first
    now[0] += 3.0
    assert state(subject.bring(made.folder, tmp_path)) == (set(), {100, 101}, 5)
