"""The mirror: one side asks and fetches, the other reads what lies here; what fails on one is known to the other."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cache.changes import Newer
from cache.durable import holding, replace_file
from cache.errors import Awaited, StoreError
from cache.file_store import FileStore
from cache.mirror import VIEW, LocalRelease, LocalUsers, Mirror, MirrorStore, View, read_view
from cache.overlay import Overlay
from cache.release import Progress, drop_cached, no_progress
from cache.rollout import NOTHING, Change, Live
from cache.store import Names
from tests.changed import embedded, happened
from tests.tiny_releases import TinyRelease, publish, tiny_release, tiny_spec

TIMEOUT_S = 20.0
URL = "redis://somewhere"


class Copying(FileStore):
    """A store that copies releases, as a remote one does, and whose verbs can be made to fail."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.broken: set[str] = set()
        self.fetched: list[str] = []
        self.during_fetch: list[View | None] = []
        self.folder: Path | None = None  # whose view is looked at while fetching

    def _may(self, verb: str) -> None:
        if verb in self.broken:
            raise StoreError(f"{self.url}: {verb} fails: mend the store")

    def wait(self, seen: Live, timeout_s: float) -> Live:
        self._may("wait")
        return super().wait(seen, timeout_s)

    def fetch(self, release_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path:
        self.fetched.append(release_id)
        self._may("fetch")
        progress("verify", 1, 2)
        self.during_fetch.append(read_view(self.folder) if self.folder else None)
        cache_dir.mkdir(exist_ok=True)
        copied = shutil.copytree(super().fetch(release_id, cache_dir), cache_dir / release_id)
        return Path(copied)

    def fetch_changes(self, folder: Path, cache_dir: Path) -> Newer:
        self._may("fetch_changes")
        return super().fetch_changes(folder, cache_dir)

    def fetch_users(self, *arguments: Any) -> Path | None:
        self._may("fetch_users")
        return super().fetch_users(*arguments)

    def drop_cached(self, cache_dir: Path, keep: set[str]) -> Names:
        return drop_cached(cache_dir, keep)


@pytest.fixture
def store(tmp_path: Path) -> Copying:
    return Copying(f"file://{tmp_path}/store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mirror").mkdir()
    return tmp_path / "mirror"


@pytest.fixture
def mirror(store: Copying, folder: Path, tmp_path: Path) -> Iterator[Mirror]:
    with holding(folder):
        yield Mirror(store, tmp_path / "cache", folder)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.mirror.FIRST_WORD_S", 0.05)


def reader(folder: Path) -> MirrorStore:
    return MirrorStore(folder, URL)


def made(tmp_path: Path, seed: int, **given: Any) -> TinyRelease:
    return tiny_release(tmp_path / str(seed), seed=seed, **given)


# --- the file


def test_a_view_is_read_as_it_was_told(mirror: Mirror, folder: Path) -> None:
    told = View(
        current="r2",
        releases={"r2": LocalRelease(folder="/x/r2", spec_id="s"), "r1": LocalRelease(folder="/x/r1", spec_id="s")},
        users={"s": LocalUsers(version="v", path="/x/users.snap"), "t": LocalUsers(version=None)},
        reachable=True,
        contact_s=12.5,
        failure="why",
        failures=3,
    )
    mirror.view = told
    mirror._tell()
    assert read_view(folder) == told
    assert [path.name for path in folder.iterdir()] == [VIEW]


def test_no_view_is_no_answer_yet(folder: Path) -> None:
    assert read_view(folder) is None
    assert not reader(folder).holds_current()
    with pytest.raises(StoreError, match=f"{URL} has not answered yet"):
        reader(folder).wait(NOTHING, 0.0)


@pytest.mark.parametrize("content", [b"", b"{", b'{"current": 5}', b'{"releases": {"r": {}}}', b"\xff\xfe"])
def test_a_damaged_view_is_refused_by_name_and_written_anew(
    mirror: Mirror, folder: Path, tmp_path: Path, content: bytes
) -> None:
    (folder / VIEW).write_bytes(content)
    with pytest.raises(StoreError, match=r"view\.json is not the view of a store"):
        reader(folder).wait(NOTHING, 0.0)
    assert not reader(folder).holds_current()
    Mirror(FileStore(f"file://{tmp_path}/empty"), tmp_path / "cache", folder).look(0.0)
    view = read_view(folder)
    assert view is not None
    assert view.reachable


def test_a_view_that_vanishes_is_missed(mirror: Mirror, folder: Path) -> None:
    mirror.look(0.0)
    subject = reader(folder)
    subject.wait(NOTHING, 0.0)
    (folder / VIEW).unlink()
    with pytest.raises(StoreError, match=r"view\.json is gone"):
        subject.wait(NOTHING, 0.0)


def test_no_reader_ever_sees_half_a_view(folder: Path) -> None:
    bodies = [
        b'{"current": "%s", "reachable": true}' % (b"a" * 20_000),
        b'{"current": "b", "reachable": true}',
    ]
    replace_file(folder / VIEW, bodies[0])

    def replace_often() -> None:
        for k in range(500):
            replace_file(folder / VIEW, bodies[k % 2])

    writer = threading.Thread(target=replace_often)
    writer.start()
    while writer.is_alive():
        view = read_view(folder)
        assert view is not None
        assert view.current in ("b", "a" * 20_000)
    assert [path.name for path in folder.iterdir()] == [VIEW]


# --- what is told


def test_what_the_store_names_is_here_with_its_users(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    release = made(tmp_path, 1)
    name = publish(release, store)
    assert mirror.look(0.0) == 0.0
    subject = reader(folder)
    assert subject.wait(NOTHING, 0.0).current == name
    assert subject.holds_current()
    assert subject.fetch(name, tmp_path) == tmp_path / "cache" / name
    assert subject.users_version(release.spec.id) == store.users_version(release.spec.id)
    assert subject.fetch_users(release.spec.id, tmp_path) == store.fetch_users(release.spec.id, tmp_path)
    assert subject.contact_s() == mirror.view.contact_s
    assert subject.drop_cached(tmp_path / "cache", set()) == []
    assert (tmp_path / "cache" / name).is_dir()


def test_the_current_release_and_the_one_before_stay(store: Copying, mirror: Mirror, tmp_path: Path) -> None:
    names = []
    for seed in range(3):
        names.append(publish(made(tmp_path, seed), store))
        mirror.look(0.0)
        mirror.look(0.0)
        assert {path.name for path in (tmp_path / "cache").glob("2*")} == {*names[-2:]}
    store.rollback()
    mirror.look(0.0)
    assert [*mirror.view.releases] == [names[1], names[2]]
    assert store.fetched == names


def test_what_arrives_is_an_answer_of_the_store(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("cache.mirror.monotonic", lambda: now_s.append(now_s[-1] + 5.0) or now_s[-1])  # type: ignore[func-returns-value]
    store.folder = folder
    name = publish(made(tmp_path, 1), store)
    mirror.look(0.0)
    seen = store.during_fetch[0]
    assert seen is not None
    assert (seen.current, seen.releases, seen.contact_s) == (name, {}, 120.0)  # the look came at 105


def test_a_new_user_table_and_a_deleted_one_are_followed(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    release = made(tmp_path, 1)
    name = publish(release, store, users=False)
    mirror.look(0.0)
    subject = reader(folder)
    subject.wait(NOTHING, 0.0)
    assert subject.users_version(release.spec.id) is None
    assert subject.fetch_users(release.spec.id, tmp_path) is None
    version = store.publish_users(release.users)
    mirror.look(0.0)
    subject.wait(Live(current=name), 0.0)
    assert subject.users_version(release.spec.id) == version
    assert subject.fetch_users(release.spec.id, tmp_path) is not None
    store.delete_users(release.spec.id)
    mirror.look(0.0)
    subject.wait(Live(current=name), 0.0)
    assert subject.users_version(release.spec.id) is None


def test_users_of_another_specification_than_those_here_are_not_known(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    old = made(tmp_path, 0, spec=tiny_spec(items=50), items=50)
    publish(old, store)
    mirror.look(0.0)
    for seed in (1, 2):
        publish(made(tmp_path, seed), store)
        mirror.look(0.0)
    subject = reader(folder)
    subject.wait(NOTHING, 0.0)
    with pytest.raises(StoreError, match=f"users of specification {old.spec.id} are no longer followed"):
        subject.users_version(old.spec.id)


# --- what came after a release


@pytest.fixture
def without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.follow.REST", 0.0)


@pytest.mark.usefixtures("without_rest")
def test_overlays_are_told_to_readers(store: Copying, mirror: Mirror, folder: Path, tmp_path: Path) -> None:
    release = made(tmp_path, 1)
    name = publish(release, store)
    mirror.look(0.0)
    subject = reader(folder)
    assert subject.wait(NOTHING, 0.0).current == name
    place = subject.fetch(name, tmp_path)
    assert subject.fetch_changes(place, tmp_path) == Newer()
    end = happened(store)
    mirror.look(0.0)
    assert subject.wait(Live(current=name), 0.0).current == name
    behind = subject.fetch_changes(place, tmp_path)
    assert behind.overlay is None
    assert behind.behind_since_s is not None
    embedded(store, release, 0, end, [101])
    mirror.look(0.0)
    assert subject.wait(Live(current=name), TIMEOUT_S).current == name
    newer = subject.fetch_changes(place, tmp_path)
    assert newer.overlay is not None
    assert Overlay.open(newer.overlay).watermark == end
    assert newer.behind_since_s is None
    assert subject.fetch_changes(tmp_path / "another", tmp_path) == Newer()


@pytest.mark.usefixtures("without_rest")
def test_readers_know_when_the_log_was_last_looked_at(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    name = publish(made(tmp_path, 1), store)
    subject, looks = reader(folder), []
    for broken in (set(), set(), set(), {"fetch_changes"}, {"fetch_changes"}, {"wait"}):  # told with the next look
        store.broken = broken
        mirror.look(0.0)
        with suppress(StoreError):
            subject.wait(Live(current=name), 0.0)
        looks.append(subject.fetch_changes(Path(mirror.view.releases[name].folder), tmp_path).looked_s)
    assert looks[0] is not None
    assert looks[0] <= looks[1] < looks[2] < looks[3] == looks[4] == looks[5]


@pytest.mark.usefixtures("without_rest")
def test_a_release_is_told_together_with_what_came_after_it(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    """Else readers would go back to what was changed."""
    first, second = made(tmp_path, 1), made(tmp_path, 2)
    publish(first, store)
    mirror.look(0.0)
    end = happened(store)
    embedded(store, second, 0, end, [101])
    told: list[View] = []
    whole = mirror._tell

    def tell(**changes: Any) -> None:
        whole(**changes)
        told.append(mirror.view)

    mirror._tell = tell  # type: ignore[method-assign]
    name = publish(second, store)
    mirror.look(0.0)
    assert next(view.releases[name].overlay for view in told if name in view.releases) is not None


@pytest.mark.usefixtures("without_rest")
def test_changes_that_cannot_be_had_keep_a_new_release_away_but_not_the_first(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    store.broken.add("fetch_changes")
    first = publish(made(tmp_path, 1), store)
    mirror.look(0.0)
    assert list(mirror.view.releases) == [first]
    assert "fetch_changes fails" in (mirror.view.failure or "")
    publish(made(tmp_path, 2), store)
    mirror.look(0.0)
    assert list(mirror.view.releases) == [first]
    assert "fetch_changes fails" in (mirror.view.failure or "")


@pytest.mark.usefixtures("without_rest")
def test_while_a_release_cannot_be_had_the_one_before_follows_changes(
    store: Copying, mirror: Mirror, tmp_path: Path
) -> None:
    first = made(tmp_path, 1)
    name = publish(first, store)
    mirror.look(0.0)
    store.broken.add("fetch")
    publish(made(tmp_path, 2), store)
    embedded(store, first, 0, happened(store), [101])
    mirror.look(0.0)
    assert mirror.view.releases[name].overlay is not None


# --- what fails


def test_a_release_that_is_not_here_is_awaited_and_says_why(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    store.broken.add("fetch")
    release = made(tmp_path, 1)
    name = publish(release, store)
    replace_file(folder / VIEW, b'{"current": "r", "reachable": true, "contact_s": 1.0}')
    subject = reader(folder)
    subject.wait(NOTHING, 0.0)
    with pytest.raises(Awaited, match=f"release {name} is being fetched from {URL}") as caught:
        subject.fetch(name, tmp_path)
    assert caught.value.failures == 0
    mirror.look(0.0)
    assert (
        subject.wait(Live(current="r"), 0.0).current == name
    )  # the store answers: it is only the release that cannot be had
    with pytest.raises(Awaited, match="fetch fails") as caught:
        subject.fetch(name, tmp_path)
    assert caught.value.failures == 1


def test_what_failed_waits_its_time_while_users_are_followed(
    store: Copying, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("cache.retry.monotonic", lambda: now_s[0])
    release = made(tmp_path, 1)
    first = publish(release, store, users=False)
    mirror.look(0.0)
    store.broken.add("fetch")
    second = publish(made(tmp_path, 2), store, users=False)
    version = store.publish_users(release.users)
    for _ in range(3):
        mirror.look(0.0)
    assert store.fetched == [first, second]
    assert mirror.view.failures == 1
    assert "fetch fails" in (mirror.view.failure or "")
    assert [*mirror.view.releases] == [first]
    assert mirror.view.users[release.spec.id].version == version
    now_s[0] += 1.0
    store.broken.clear()
    mirror.look(0.0)
    assert [*mirror.view.releases] == [second, first]
    assert mirror.view.failure is None


def test_a_user_table_that_cannot_be_had_is_awaited(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    release = made(tmp_path, 1)
    name = publish(release, store)
    mirror.look(0.0)
    store.broken.add("fetch_users")
    version = store.publish_users(release.users)
    mirror.look(0.0)
    subject = reader(folder)
    subject.wait(Live(current=name), 0.0)
    assert subject.users_version(release.spec.id) == version
    with pytest.raises(Awaited, match="fetch_users fails"):
        subject.fetch_users(release.spec.id, tmp_path)


def test_a_store_that_does_not_answer_is_told_after_what_lies_here(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    name = publish(made(tmp_path, 1), store)
    mirror.look(0.0)
    contact_s = mirror.view.contact_s
    store.broken.add("wait")
    assert mirror.look(0.0) > 0.0
    subject = reader(folder)
    assert subject.wait(NOTHING, 0.0).current == name
    assert subject.fetch(name, tmp_path).is_dir()
    with pytest.raises(StoreError, match="wait fails"):
        subject.wait(Live(current=name), 0.0)
    assert subject.contact_s() == contact_s
    store.broken.clear()
    mirror.look(0.0)
    assert subject.wait(Live(current=name), 0.0).current == name


def test_a_store_that_never_answered_has_nothing_to_tell(store: Copying, mirror: Mirror, folder: Path) -> None:
    store.broken.add("wait")
    mirror.look(0.0)
    with pytest.raises(StoreError, match="wait fails"):
        reader(folder).wait(NOTHING, 0.0)


def test_a_store_that_lost_everything_takes_nothing_away(
    store: Copying, mirror: Mirror, tmp_path: Path, folder: Path
) -> None:
    release = made(tmp_path, 1)
    name = publish(release, store)
    mirror.look(0.0)
    users = mirror.view.users
    shutil.rmtree(store.root)
    mirror.look(0.0)
    assert reader(folder).wait(NOTHING, 0.0).current == name
    assert (tmp_path / "cache" / name).is_dir()
    assert mirror.view.users == users


def test_a_copy_that_was_cleared_away_is_fetched_again(store: Copying, mirror: Mirror, tmp_path: Path) -> None:
    name = publish(made(tmp_path, 1), store)
    mirror.look(0.0)
    shutil.rmtree(tmp_path / "cache" / name)
    mirror.look(0.0)
    assert (tmp_path / "cache" / name).is_dir()


# --- ends and beginnings


def test_readers_know_when_the_writer_has_ended(store: Copying, folder: Path, tmp_path: Path) -> None:
    name = publish(made(tmp_path, 1), store)
    subject = reader(folder)
    with holding(folder):
        Mirror(store, tmp_path / "cache", folder).look(0.0)
        assert subject.wait(NOTHING, 0.0).current == name
        assert subject.wait(Live(current=name), 0.0).current == name
    with pytest.raises(StoreError, match="the refresher has ended"):
        subject.wait(Live(current=name), 0.0)
    assert reader(folder).wait(NOTHING, 0.0).current == name  # what is here is served all the same


def test_the_next_writer_goes_on_from_the_view_it_finds(store: Copying, folder: Path, tmp_path: Path) -> None:
    first = publish(made(tmp_path, 1), store)
    Mirror(store, tmp_path / "cache", folder).look(0.0)
    store.broken.add("wait")
    Mirror(store, tmp_path / "cache", folder).look(0.0)
    store.broken.clear()
    second = publish(made(tmp_path, 2), store)
    Mirror(store, tmp_path / "cache", folder).look(0.0)
    view = read_view(folder)
    assert view is not None
    assert [*view.releases] == [second, first]
    assert (view.failure, view.failures) == (None, 1)
    assert store.fetched == [first, second]


def test_a_waiting_reader_is_woken_by_news(store: Copying, mirror: Mirror, folder: Path, tmp_path: Path) -> None:
    mirror.look(0.0)
    subject, answers = reader(folder), []
    subject.wait(NOTHING, 0.0)
    thread = threading.Thread(target=lambda: answers.append(subject.wait(NOTHING, TIMEOUT_S)))
    thread.start()
    name = publish(made(tmp_path, 1), store)
    mirror.look(0.0)
    thread.join(TIMEOUT_S / 2)
    assert [answer.current for answer in answers] == [name]


def test_an_unexpected_error_is_logged_and_told(
    store: Copying, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "wait", lambda seen, timeout_s: 1 / 0)
    mirror.look(0.0)
    assert mirror.view.failure == "division by zero"
    assert "ZeroDivisionError" in caplog.text


# --- canaries and shadow


def test_what_is_live_beside_the_current_release_is_here_and_goes_when_it_ends(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    a, b, c = (publish(made(tmp_path, seed), store, activate=seed == 0) for seed in range(3))
    mirror.look(0.0)
    store.change(Change(verb="canary", release=b, share=0.1))
    store.change(Change(verb="shadow", release=c, share=0.5))
    mirror.look(0.0)
    subject = reader(folder)
    assert subject.wait(NOTHING, 0.0) == store.live()
    assert [*mirror.view.releases] == [a, b, c]
    assert subject.fetch(c, tmp_path) == tmp_path / "cache" / c
    store.change(Change(verb="promote"))
    mirror.look(0.0)
    assert [*mirror.view.releases] == [b, a, c]  # the one before for a rollback
    store.change(Change(verb="abort"))
    mirror.look(0.0)
    assert {path.name for path in (tmp_path / "cache").glob("2*")} == {a, b}
    assert store.fetched == [a, b, c]


def test_a_canary_that_cannot_be_fetched_holds_up_nothing_else(
    store: Copying, mirror: Mirror, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("cache.retry.monotonic", lambda: now_s[0])
    a, b, c = (publish(made(tmp_path, seed), store, activate=seed == 0) for seed in range(3))
    mirror.look(0.0)
    store.change(Change(verb="canary", release=b, share=0.1))
    store.broken.add("fetch")
    mirror.look(0.0)
    subject = reader(folder)
    subject.wait(NOTHING, 0.0)
    with pytest.raises(Awaited, match="fetch fails"):
        subject.fetch(b, tmp_path)
    store.broken.clear()
    store.activate(c)
    mirror.look(0.0)
    assert subject.wait(NOTHING, 0.0).current == c
    assert [*mirror.view.releases] == [c, a]
    now_s[0] += 1.0
    mirror.look(0.0)
    assert [*mirror.view.releases] == [c, a, b]
    assert mirror.view.failure is None
