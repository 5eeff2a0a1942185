"""Taking releases over: what is new is tried out first, whatever fails leaves the old one serving."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cache import retry
from cache.changes import DEAD, DeadLetter, Newer, encode_dead
from cache.errors import Awaited, SnapshotError, StoreError
from cache.file_store import FileStore
from cache.release import BUNDLE
from cache.rollout import Change, Live
from service.errors import NotReady
from service.ranker import Ranker
from service.refresh import Refresher
from service.wire import RankRequest
from tests.changed import embedded, happened
from tests.tiny_releases import publish, tiny_release, tiny_spec, write_users

TIMEOUT_S = 20.0


class Flaky(FileStore):
    """A file store whose verbs can be made to fail."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.broken: set[str] = set()
        self.fetched: list[str] = []
        self.surprises: list[Exception] = []
        self.users_asked = 0
        self.changes_asked = 0
        self.newer: Newer | None = None  # what is said instead of what is so
        self.newer_of: dict[str, Newer] = {}  # the same of one release
        self.kept: list[set[str]] = []  # what local copies may stay, each time some are dropped
        self.wrong_users: Path | None = None  # the table to hand out instead of the right one
        self.awaited: Awaited | None = None  # what is said of any release

    def _may(self, verb: str) -> None:
        if verb in self.broken:
            raise StoreError(f"{self.url}: {verb} fails: mend the store")

    def wait(self, seen: Live, timeout_s: float) -> Live:
        self._may("wait")
        if self.surprises:
            raise self.surprises.pop()
        return super().wait(seen, timeout_s)

    def fetch(self, release_id: str, *arguments: Any) -> Path:
        self._may("fetch")
        if self.awaited is not None:
            raise self.awaited
        self.fetched.append(release_id)
        return super().fetch(release_id, *arguments)

    def fetch_changes(self, folder: Path, cache_dir: Path) -> Newer:
        self.changes_asked += 1
        self._may("fetch_changes")
        return self.newer_of.get(folder.name) or self.newer or super().fetch_changes(folder, cache_dir)

    def fetch_users(self, *arguments: Any) -> Path | None:
        self.users_asked += 1
        self._may("fetch_users")
        return self.wrong_users or super().fetch_users(*arguments)

    def drop_cached(self, cache_dir: Path, keep: set[str]) -> list[str]:
        self.kept.append(keep)
        return super().drop_cached(cache_dir, keep)


@pytest.fixture
def store(tmp_path: Path) -> Flaky:
    return Flaky(f"file://{tmp_path}/store")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.refresh.STORE_PAUSE_S", 0.02)
    monkeypatch.setattr("cache.retry.FIRST_PAUSE_S", 0.02)


def refresher(store: FileStore, tmp_path: Path, **given: Any) -> Refresher:
    return Refresher(store, tmp_path / "cache", **{"refresh_s": 0.05, **given})


@contextmanager
def started(refresher: Refresher) -> Iterator[Callable[[Callable[[Any], bool]], None]]:
    """Run it, and give a function that waits for a standing."""

    def until(reached: Callable[[Any], bool]) -> None:
        assert refresher.wait_until(reached, TIMEOUT_S), refresher.standing

    refresher.start()
    try:
        yield until
    finally:
        refresher.stop()


def serves(release: str) -> Callable[[Any], bool]:
    return lambda standing: standing.ranker is not None and standing.ranker.release == release


def test_nothing_is_served_before_the_first_release(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    subject.take_over(None)
    with pytest.raises(NotReady, match="has not answered yet"):
        subject.ranker()


def test_a_release_published_later_is_picked_up(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    with started(subject) as until:
        until(lambda standing: standing.reachable)
        release = publish(tiny_release(tmp_path / "made"), store)
        until(serves(release))
        assert subject.standing.users == store.users_version(subject.ranker().spec.id)


def test_swaps_are_announced_with_the_ranker_that_serves(store: Flaky, tmp_path: Path) -> None:
    seen: list[Ranker] = []
    subject = refresher(store, tmp_path, on_swap=seen.append)
    for seed in (1, 2):
        release = publish(tiny_release(tmp_path / str(seed), seed=seed), store)
        subject.take_over(release)
        subject.take_over(release)
    assert [ranker.release for ranker in seen] == store.fetched
    assert subject.ranker() is seen[-1]
    assert subject.standing.swaps == 2


def test_a_request_keeps_the_ranker_that_it_began_with(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    subject.take_over(publish(tiny_release(tmp_path / "1", seed=1), store))
    old, request = subject.ranker(), RankRequest[int, int](candidates=[100, 101])
    before = old.rank(request)
    subject.take_over(publish(tiny_release(tmp_path / "2", seed=2), store))
    assert old.rank(request).scores.tobytes() == before.scores.tobytes()
    assert subject.ranker().rank(request).scores.tobytes() != before.scores.tobytes()


@pytest.mark.parametrize("verb", ["fetch", "fetch_users"])
def test_a_failing_store_leaves_the_old_release_serving(store: Flaky, tmp_path: Path, verb: str) -> None:
    failures: list[None] = []
    subject = refresher(store, tmp_path, on_failure=lambda: failures.append(None))
    first = publish(tiny_release(tmp_path / "1", seed=1), store)
    with started(subject) as until:
        until(serves(first))
        store.broken.add(verb)
        second = publish(tiny_release(tmp_path / "2", seed=2), store)
        until(lambda standing: standing.failures > 0)
        assert subject.ranker().release == first
        assert f"{verb} fails" in (subject.standing.failure or "")
        assert failures
        store.broken.clear()
        until(serves(second))
        until(lambda standing: standing.failure is None)


def test_a_store_that_goes_away_is_told_from_one_that_answers(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    release = publish(tiny_release(tmp_path / "made"), store)
    with started(subject) as until:
        until(serves(release))
        store.broken.add("wait")
        until(lambda standing: not standing.reachable)
        contact_s = subject.standing.contact_s
        assert subject.ranker().release == release
        assert subject.standing.staleness_s() is not None
        store.broken.clear()
        until(lambda standing: standing.reachable and standing.contact_s > contact_s)


@pytest.mark.parametrize("damage", ["bundle", "warmup", "users"])
def test_a_release_that_does_not_hold_is_never_served(store: Flaky, tmp_path: Path, damage: str) -> None:
    subject = refresher(store, tmp_path)
    first = publish(tiny_release(tmp_path / "1", seed=1), store)
    subject.take_over(first)
    wrong = {"warmup": [{"candidates": ["x"]}]} if damage == "warmup" else {}
    second = tiny_release(tmp_path / "2", seed=2, **wrong)  # type: ignore[arg-type]
    name = publish(second, store, users=damage != "users")
    stored = store.fetch(name, tmp_path)
    if damage == "bundle":
        (stored / BUNDLE / "user.onnx").write_bytes(b"no graph")
    if damage == "users":
        store.publish_users(second.users)
        other = write_users(tmp_path / "x.snap", tiny_spec(items=5), second.user_ids, second.item_ids)
        store.wrong_users = other
    with pytest.raises(Exception, match=r"bundle|integers|user table"):
        subject.take_over(name)
    assert subject.ranker().release == first


def test_a_new_user_table_is_taken_over_and_a_deleted_one_forgotten(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    made = tiny_release(tmp_path / "made")
    release = publish(made, store, users=False)
    subject.take_over(release)
    assert subject.ranker().rank(RankRequest(candidates=[100], user_id=4)).user_known is False
    with started(subject) as until:
        version = store.publish_users(made.users)
        until(lambda standing: standing.users == version)
        assert subject.ranker().rank(RankRequest(candidates=[100], user_id=4)).user_known is True
        store.delete_users(made.spec.id)
        until(lambda standing: standing.users is None)
        assert subject.ranker().rank(RankRequest(candidates=[100], user_id=4)).user_known is False
    assert store.fetched == [release]


def test_users_are_followed_while_a_refused_release_is_current(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    made = tiny_release(tmp_path / "made")
    first = publish(made, store, users=False)
    with started(subject) as until:
        until(serves(first))
        publish(tiny_release(tmp_path / "bad", warmup=[{"candidates": ["x"]}]), store, users=False)
        until(lambda standing: standing.failures > 0)
        version = store.publish_users(made.users)
        until(lambda standing: standing.users == version)
        assert subject.ranker().release == first


def test_a_store_that_lost_everything_changes_nothing(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    release = publish(tiny_release(tmp_path / "made"), store)
    subject.take_over(release)
    serving = subject.ranker()
    store.delete_users(serving.spec.id)
    subject.take_over(None)
    assert subject.ranker() is serving


def test_what_another_process_fetches_is_awaited_without_a_pause_of_its_own(store: Flaky, tmp_path: Path) -> None:
    failures: list[None] = []
    subject = refresher(store, tmp_path, on_failure=lambda: failures.append(None))
    made = tiny_release(tmp_path / "made")
    first = publish(made, store, users=False)
    subject.take_over(first)
    second = publish(tiny_release(tmp_path / "2", seed=2), store, users=False)
    store.awaited = Awaited("on its way")
    version = store.publish_users(made.users)
    subject._try(Live(current=second))
    assert (subject.ranker().release, subject.standing.users) == (first, version)
    assert subject.standing.failure is None
    store.awaited = Awaited("it cannot be had", failures=3)
    for _ in range(3):
        subject._try(Live(current=second))
    assert (subject.standing.failure, subject.standing.failures, len(failures)) == ("it cannot be had", 1, 1)
    store.awaited = None
    subject._try(Live(current=second))
    assert subject.ranker().release == second
    assert subject.standing.failure is None


def test_the_store_answers_when_who_asks_it_says_so(store: Flaky, tmp_path: Path) -> None:
    with started(refresher(store, tmp_path, contact=lambda: 7.0)) as until:
        until(lambda standing: standing.contact_s == 7.0)


def test_only_the_serving_release_and_the_one_before_stay_in_the_cache(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    for seed in range(3):
        subject.take_over(publish(tiny_release(tmp_path / str(seed), seed=seed), store))
    first, second, third = store.fetched
    assert store.kept == [{first}, {first, second}, {second, third}]


def test_what_others_keep_in_the_cache_stays(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    theirs = tmp_path / "cache" / "20260101T000000000-0123456789ab"
    theirs.mkdir(parents=True)
    subject.take_over(publish(tiny_release(tmp_path / "made"), store))
    assert theirs.is_dir()


def test_a_user_table_that_is_refused_is_tried_again_later(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("cache.retry.monotonic", lambda: now_s[0])
    subject = refresher(store, tmp_path)
    made = tiny_release(tmp_path / "made")
    release = publish(made, store, users=False)
    subject.take_over(release)
    version, store.users_asked = store.publish_users(made.users), 0
    store.broken.add("fetch_users")
    for _ in range(3):
        subject._try(Live(current=release))  # as its thread does, each second
    assert (store.users_asked, subject.standing.failures) == (1, 1)
    assert "fetch_users fails" in (subject.standing.failure or "")
    now_s[0] += retry.FIRST_PAUSE_S
    for _ in range(3):
        subject._try(Live(current=release))
    assert (store.users_asked, subject.standing.failures) == (2, 2)
    store.broken.clear()
    now_s[0] += 2 * retry.FIRST_PAUSE_S
    subject._try(Live(current=release))
    assert subject.standing.users == version
    assert subject.standing.failure is None


def test_another_user_table_is_tried_at_once(store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.retry.monotonic", lambda: 100.0)
    subject = refresher(store, tmp_path)
    made = tiny_release(tmp_path / "made")
    release = publish(made, store, users=False)
    subject.take_over(release)
    store.publish_users(made.users)
    store.broken.add("fetch_users")
    subject._try(Live(current=release))
    store.broken.clear()
    mended = store.publish_users(made.users)
    subject._try(Live(current=release))
    assert subject.standing.users == mended


def test_a_refused_user_table_does_not_put_off_a_refused_release(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("cache.retry.monotonic", lambda: now_s[0])
    subject = refresher(store, tmp_path)
    made = tiny_release(tmp_path / "made")
    subject.take_over(publish(made, store, users=False))
    second = publish(tiny_release(tmp_path / "2", seed=2), store, users=False)
    store.broken |= {"fetch", "fetch_users"}
    subject._try(Live(current=second))
    store.publish_users(made.users)
    now_s[0] += 0.9 * retry.FIRST_PAUSE_S
    subject._try(Live(current=second))  # only the users are tried
    assert subject.standing.failures == 2
    store.broken.clear()
    now_s[0] += 0.1 * retry.FIRST_PAUSE_S
    subject._try(Live(current=second))
    assert subject.ranker().release == second


def test_failures_are_logged_with_what_serves(store: Flaky, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.broken.add("wait")
    subject = refresher(store, tmp_path)
    with caplog.at_level(logging.WARNING), started(subject) as until:
        until(lambda standing: standing.failures > 0)
    assert "refresh failed, serving nothing" in caplog.text
    assert "wait fails" in caplog.text


def test_an_unexpected_error_does_not_end_the_thread(store: Flaky, tmp_path: Path) -> None:
    store.surprises.append(ZeroDivisionError("what"))
    subject = refresher(store, tmp_path)
    release = publish(tiny_release(tmp_path / "made"), store)
    with started(subject) as until:
        until(serves(release))
    assert subject.standing.failures == 1


def test_stopping_ends_the_thread(store: Flaky, tmp_path: Path) -> None:
    with started(refresher(store, tmp_path)) as until:
        until(lambda standing: standing.reachable)
    assert not any(thread.name == "refresh" for thread in threading.enumerate())


# --- what came after a release


def test_changes_are_served_within_one_swap_of_the_ranker(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.follow.REST", 0.0)
    made = tiny_release(tmp_path / "made")
    subject = refresher(store, tmp_path)
    subject.take_over(publish(made, store))
    before, request = subject.ranker(), RankRequest[int, int](candidates=[100, 101, 900])
    end = happened(store)
    assert subject.follow_changes()
    assert subject.ranker() is before
    assert subject.standing.behind_s() > 0
    embedded(store, made, 0, end - 1, [900], 4.0)
    embedded(store, made, end - 1, end, [100])
    assert subject.follow_changes()
    ranking = subject.ranker().rank(request)
    assert (ranking.watermark, sorted(ranking.ids[:2]), ranking.missing.tolist()) == (end, [101, 900], [100])
    assert (subject.standing.behind_s(), subject.standing.swaps) == (0.0, 1)
    assert before.rank(request).missing.tolist() == [900]
    after = subject.ranker()
    assert subject.follow_changes()
    assert subject.ranker() is after


def test_a_started_refresher_follows_changes_and_counts_the_dead(store: Flaky, tmp_path: Path) -> None:
    made = tiny_release(tmp_path / "made")
    release = publish(made, store)
    letter = DeadLetter(bundle_id=made.bundle.id, position=3, id=101, reason="r")
    with started(refresher(store, tmp_path)) as until:
        until(serves(release))
        embedded(store, made, 0, 3, [100])
        store.log(DEAD).append(encode_dead([letter]))
        until(lambda standing: standing.ranker.watermark == 3 and standing.dead == 1)


def test_less_than_what_is_served_is_not_taken(store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.follow.REST", 0.0)
    made = tiny_release(tmp_path / "made")
    subject = refresher(store, tmp_path)
    embedded(store, made, 0, 2, [100])
    subject.take_over(publish(made, store))
    earlier = store.fetch_changes(subject.ranker().items.path.parent, tmp_path / "cache")
    embedded(store, made, 2, 4, [101])
    subject.follow_changes()
    store.newer = earlier
    subject.follow_changes()
    assert subject.ranker().watermark == 4


def test_changes_that_cannot_be_had_wait_their_time_and_leave_what_serves(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    store.broken.add("fetch_changes")
    first = publish(tiny_release(tmp_path / "1", seed=1), store)
    subject.take_over(first)  # with nothing to serve it begins without
    assert subject.ranker().release == first
    assert "fetch_changes fails" in (subject.standing.failure or "")
    with pytest.raises(StoreError, match="fetch_changes fails"):
        subject.follow_changes()
    asked = store.changes_asked
    assert subject.follow_changes() is False
    assert store.changes_asked == asked
    with pytest.raises(StoreError, match="fetch_changes fails"):
        subject.take_over(publish(tiny_release(tmp_path / "2", seed=2), store))
    assert subject.ranker().release == first


@pytest.mark.parametrize("broken", ["fetch_changes", "wait"])
def test_a_replica_that_cannot_look_falls_behind(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    release = publish(tiny_release(tmp_path / "made"), store)
    later_s = 0.0
    with started(refresher(store, tmp_path)) as until:
        until(lambda standing: serves(release)(standing) and standing.behind_s() == 0.0)
        store.broken.add(broken)
        until(lambda standing: standing.failures > 0)
        monkeypatch.setattr("service.refresh.monotonic", lambda: time.monotonic() + later_s)
        later_s = 100.0
        until(lambda standing: standing.failures > 2 and standing.behind_s() > 99.0)
        later_s = 0.0
        store.broken.clear()
        until(lambda standing: standing.failure is None and standing.behind_s() == 0.0)


def test_users_that_cannot_be_had_hold_up_no_changes(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.follow.REST", 0.0)
    made = tiny_release(tmp_path / "made")
    release = publish(made, store, users=False)
    subject = refresher(store, tmp_path)
    subject.take_over(release)
    store.publish_users(made.users)
    store.broken.add("fetch_users")
    for until in (1, 2):  # it fails, then waits its time
        embedded(store, made, until - 1, until, [100])
        with suppress(StoreError):
            subject.take_over(release)
        assert subject.ranker().watermark == until


def test_an_overlay_that_is_gone_leaves_what_serves(store: Flaky, tmp_path: Path) -> None:
    subject = refresher(store, tmp_path)
    subject.take_over(publish(tiny_release(tmp_path / "made"), store))
    before = subject.ranker()
    store.newer = Newer(overlay=tmp_path / "7-0.snap")
    with pytest.raises(SnapshotError, match=r"7-0\.snap cannot be opened"):
        subject.follow_changes()
    assert subject.ranker() is before


# --- canaries and shadow


def made_releases(store: Flaky, tmp_path: Path, count: int, **given: Any) -> list[str]:
    """The first one is current."""
    names = [
        publish(tiny_release(tmp_path / str(seed), seed=seed, **given), store, activate=seed == 0)
        for seed in range(count)
    ]
    return names


def canary(release: str, weight: float) -> Change:
    return Change(verb="canary", release=release, share=weight)


def shadow(release: str, share: float) -> Change:
    return Change(verb="shadow", release=release, share=share)


def answering(subject: Refresher) -> set[str]:
    return {subject.serving().of(user).release for user in range(200)}


def test_a_canary_and_a_shadow_stand_beside_the_current_release(store: Flaky, tmp_path: Path) -> None:
    a, b, c = made_releases(store, tmp_path, 3)
    told: list[Any] = []
    subject = refresher(store, tmp_path, on_rollout=told.append)
    with started(subject) as until:
        until(serves(a))
        store.change(canary(b, 0.5))
        until(lambda standing: b in standing.serving.beside)
        assert answering(subject) == {a, b}
        store.change(shadow(c, 0.5))
        until(lambda standing: standing.serving.shadow is not None)
        assert subject.serving().shadow.release == c  # type: ignore[union-attr]
        store.change(Change(verb="abort"))
        until(lambda standing: standing.serving.is_alone)
        assert answering(subject) == {a}
    assert [standing.rollout.releases for standing in told] == [(b,), (b, c), ()]
    assert subject.standing.swaps == 1


def test_a_promoted_canary_is_the_same_ranker_and_the_one_before_stays_in_the_cache(
    store: Flaky, tmp_path: Path
) -> None:
    a, b = made_releases(store, tmp_path, 2)
    subject = refresher(store, tmp_path)
    for change in (None, canary(b, 0.2)):
        if change:
            store.change(change)
        subject._try(store.live())
    ready = subject.serving().of(next(user for user in range(500) if subject.serving().of(user).release == b))
    store.change(Change(verb="promote"))
    subject._try(store.live())
    assert subject.ranker() is ready
    assert subject.serving().is_alone
    assert store.fetched == [a, b]
    assert store.kept[-1] == {a, b}


def test_a_canary_that_cannot_be_had_leaves_its_share_and_says_so(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("cache.retry.monotonic", lambda: now_s[0])
    failures: list[None] = []
    a, b = made_releases(store, tmp_path, 2)
    subject = refresher(store, tmp_path, on_failure=lambda: failures.append(None))
    subject._try(store.live())
    store.change(canary(b, 0.5))
    store.broken.add("fetch")
    for _ in range(3):
        subject._try(store.live())
    assert answering(subject) == {a}
    assert "fetch fails" in subject.standing.refused[b]
    assert subject.standing.failure is None  # the current release is as it should be
    assert (subject.standing.failures, len(failures)) == (1, 1)
    assert f"release {b} of the rollout is not served" in caplog.text
    store.broken.clear()
    now_s[0] += retry.FIRST_PAUSE_S
    subject._try(store.live())
    assert (answering(subject), subject.standing.refused) == ({a, b}, {})


@pytest.mark.parametrize("ready", [True, False])
def test_a_canary_whose_copy_went_as_it_left_is_no_failure(
    store: Flaky, tmp_path: Path, caplog: pytest.LogCaptureFixture, ready: bool
) -> None:
    a, b = made_releases(store, tmp_path, 2)
    subject = refresher(store, tmp_path)
    subject._try(store.live())
    store.change(canary(b, 0.5))
    seen = store.live()
    if ready:
        subject._try(seen)
        assert answering(subject) == {a, b}
    store.change(Change(verb="abort"))
    store.newer_of[b] = Newer(overlay=tmp_path / "7-0.snap")  # which who fetches has deleted
    subject._try(seen)
    assert (subject.standing.failures, subject.standing.refused, caplog.text) == (0, {}, "")
    subject._try(store.live())
    assert answering(subject) == {a}


@pytest.mark.parametrize(("given", "why"), [({"ids": "string"}, "has ids of types"), ({"warmup": [{}]}, "candidates")])
def test_a_canary_that_does_not_fit_is_refused(store: Flaky, tmp_path: Path, given: Any, why: str) -> None:
    (a,) = made_releases(store, tmp_path, 1)
    b = publish(tiny_release(tmp_path / "other", seed=9, **given), store, activate=False, users=False)
    store.change(canary(b, 0.5))
    subject = refresher(store, tmp_path)
    for _ in range(2):
        subject._try(store.live())
    assert answering(subject) == {a}
    assert why in subject.standing.refused[b]


def test_a_canary_follows_its_user_table(store: Flaky, tmp_path: Path) -> None:
    made = [tiny_release(tmp_path / str(seed), seed=seed) for seed in range(2)]
    _, b = (publish(each, store, users=False, activate=each is made[0]) for each in made)
    store.change(canary(b, 0.9))
    subject = refresher(store, tmp_path)
    subject._try(store.live())
    user = next(user for user in range(1, 12) if subject.serving().of(user).release == b)
    ask = RankRequest[int, int](candidates=[100], user_id=user)
    assert subject.serving().of(user).rank(ask).user_known is False
    store.publish_users(made[1].users)
    subject._try(store.live())
    assert subject.serving().of(user).rank(ask).user_known is True
    store.broken.add("fetch_users")
    store.delete_users(made[1].spec.id)
    subject._try(store.live())
    assert subject.serving().of(user).release == b  # with the table that it has


def test_a_current_release_that_is_refused_does_not_hold_up_the_rollout(store: Flaky, tmp_path: Path) -> None:
    a, b = made_releases(store, tmp_path, 2)
    subject = refresher(store, tmp_path)
    subject._try(store.live())
    publish(tiny_release(tmp_path / "bad", warmup=[{"candidates": ["x"]}]), store, users=False)
    store.change(canary(b, 0.5))
    subject._try(store.live())
    assert answering(subject) == {a, b}
    assert subject.standing.failure is not None
    store.rollback()
    store.rollback()
    subject._try(store.live())
    assert answering(subject) == {a}
    assert subject.standing.failure is None


def test_a_release_is_its_own_shadow(store: Flaky, tmp_path: Path) -> None:
    (a,) = made_releases(store, tmp_path, 1)
    store.change(shadow(a, 1.0))
    subject = refresher(store, tmp_path)
    subject._try(store.live())
    assert subject.serving().shadow is subject.ranker()
    assert store.fetched == [a]


def test_a_canary_that_another_process_fetches_is_awaited(store: Flaky, tmp_path: Path) -> None:
    a, b = made_releases(store, tmp_path, 2)
    subject = refresher(store, tmp_path)
    subject._try(store.live())
    store.change(canary(b, 0.5))
    store.awaited = Awaited("on its way")
    subject._try(store.live())
    assert (subject.standing.refused, subject.standing.failures) == ({b: "on its way"}, 0)
    store.awaited = Awaited("it cannot be had", failures=2)
    for _ in range(3):
        subject._try(store.live())
    assert (subject.standing.refused, subject.standing.failures) == ({b: "it cannot be had"}, 1)
    store.awaited = None
    subject._try(store.live())
    assert answering(subject) == {a, b}
