"""One process asks the store and fetches; others read from its view, a small file, what lies here verified, and map it.

view.json   what the store names, which releases and user tables lie here, how the store answers; replaced in one step
the folder  locked by the process that writes the view, as long as it lives
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from cache.changes import Newer
from cache.durable import is_held, replace_file
from cache.errors import Awaited, StoreError, disk_error
from cache.release import BUNDLE, ITEMS, Progress, no_progress
from cache.retry import STORE_PAUSE_S, Retry
from cache.rollout import ALONE, NOTHING, Live, Rollout
from cache.snapshot import Snapshot
from cache.store import Names, ReadableStore
from model.errors import RankTowerError

VIEW = "view.json"
CHANGES_S = 0.2  # how often the changes behind a release are looked for, at least
POLL_S = 0.1  # how often a waiting reader looks at the view
FIRST_WORD_S = 5.0  # how long a reader waits for the first view of all

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRelease:
    """A release whose every hash has been checked here."""

    folder: str
    spec_id: str  # whose user table goes with it
    overlay: str | None = None  # what came after it, if anything
    looked_s: float | None = field(default=None, compare=False)  # as of `Newer`; to look again is no news
    behind_since_s: float | None = None
    dead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalUsers:
    """The user table that the store names for a specification, if any, and where it lies once it is here."""

    version: str | None
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one process knows of the store and has fetched from it. Replaced as a whole."""

    current: str | None = None  # the release that the store named last
    rollout: Rollout = ALONE  # and what it named beside it
    releases: Mapping[str, LocalRelease] = field(default_factory=dict)  # newest, the one before it, the rollout's
    users: Mapping[str, LocalUsers] = field(default_factory=dict)  # by specification
    reachable: bool = False  # whether the store answered when last asked
    contact_s: float | None = None  # monotonic time of its last answer: one clock for all processes of a machine
    failure: str | None = None  # why the last attempt failed; None once all that is wanted is here
    failures: int = 0


def read_view(folder: Path) -> View | None:
    """The view in a folder, None before there is one. Raises StoreError when it cannot be read."""
    path = folder / VIEW
    try:
        return msgspec.json.decode(path.read_bytes(), type=View)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(disk_error(error)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} is not the view of a store ({error}): the refresher replaces it, see its log"
        ) from error


# --- writing ---------------------------------------------------------------------------------------------------------


class Mirror:
    """Keeps here what the store names, and tells readers in the view. Goes on from the view that it finds."""

    def __init__(
        self, store: ReadableStore, cache_dir: Path, folder: Path, *, refresh_s: float = 1.0, huge_pages: bool = False
    ) -> None:
        self._store, self._cache_dir, self._folder, self._refresh_s = store, cache_dir, folder, refresh_s
        self._huge_pages = huge_pages
        self._seen = NOTHING
        self._retries: dict[str, Retry] = {}  # by what is fetched: "release", or the specification of a user table
        self._told_s = 0.0
        self.view = _view_before(folder)

    def run(self) -> None:
        """Look at the store for ever."""
        pause_s = self.look(0.0)
        while True:
            time.sleep(pause_s)
            pause_s = self.look(min(self._refresh_s, CHANGES_S))

    def look(self, timeout_s: float) -> float:
        """Wait for news, fetch what is named, tell; returns how long to pause. Whatever fails is told, too."""
        try:
            self._seen = self._store.wait(self._seen, timeout_s)
        except Exception as error:  # whatever the store's client raises, this process lives on
            self._fail(error, reachable=False)
            return STORE_PAUSE_S
        # a store without any release has lost all it had: readers keep what they have
        self._tell(
            current=self._seen.current or self.view.current,
            rollout=self._seen.rollout,
            reachable=True,
            contact_s=monotonic(),
        )
        try:
            whole = self._seen.current is None or self._bring(self._seen.current, self._seen.rollout.releases)
        except Exception as error:
            self._fail(error)
            return 0.0
        if whole and self.view.failure is not None:
            self._tell(failure=None)
        return 0.0

    def _bring(self, current: str, beside: tuple[str, ...]) -> bool:
        """Fetch the releases and the user tables of what lies here; returns whether all of it is here now."""
        whole = self._attempt("release", current, partial(self._bring_current, current))
        for release_id in beside:
            whole = self._attempt(release_id, release_id, partial(self._bring_beside, release_id)) and whole
        self._forget({current, *beside})
        serving = current if current in self.view.releases else next(iter(self.view.releases), None)
        for name in dict.fromkeys([serving, *beside]):
            if name is not None and name in self.view.releases:
                whole = self._attempt(f"changes of {name}", name, partial(self._bring_changes, name)) and whole
        for spec_id in {release.spec_id for release in self.view.releases.values()}:
            version = self._store.users_version(spec_id)
            whole = self._attempt(spec_id, version, partial(self._bring_users, spec_id, version)) and whole
        return whole

    def _attempt(self, what: str, name: str | None, bring: Callable[[], None]) -> bool:
        """Whether it is here now; what failed waits its time, and keeps nothing else from being fetched."""
        retry = self._retries.get(what, Retry())
        if not retry.allows(name):
            return False
        try:
            bring()
        except Exception as error:
            self._retries[what] = retry.later(name)
            self._fail(error)
            return False
        self._retries.pop(what, None)
        return True

    def _bring_current(self, release_id: str) -> None:
        here = self._brought(release_id)
        if here is None or release_id != next(iter(self.view.releases)):
            here = self._fetch(release_id) if here is None else self._changed(here)
            self._tell_releases({release_id: here} | {**self.view.releases, release_id: here})

    def _bring_beside(self, release_id: str) -> None:
        if self._brought(release_id) is None:
            self._tell_releases({**self.view.releases, release_id: self._fetch(release_id)})

    def _brought(self, release_id: str) -> LocalRelease | None:
        here = self.view.releases.get(release_id)
        return here if here is not None and Path(here.folder).is_dir() else None

    def _fetch(self, release_id: str) -> LocalRelease:
        folder = self._store.fetch(release_id, self._cache_dir, self._progress).absolute()
        if self._huge_pages:  # before a worker has mapped it in small ones
            Snapshot.open(folder / ITEMS).settle()
        here = self._changed(LocalRelease(folder=str(folder), spec_id=_spec_id(folder)))
        if here.spec_id not in self.view.users:  # a release is told together with its users
            self._bring_users(here.spec_id, self._store.users_version(here.spec_id))
        return here

    def _forget(self, live: set[str]) -> None:
        """All but what is live and the one before: a reader may be opening it just now, and a rollback finds it."""
        releases = self.view.releases
        before = islice((name for name in list(releases)[1:] if name not in live), 1)
        kept = {*list(releases)[:1], *before, *live}
        if not kept.issuperset(releases):
            self._tell_releases({name: here for name, here in releases.items() if name in kept})

    def _tell_releases(self, releases: dict[str, LocalRelease]) -> None:
        specs = {release.spec_id for release in releases.values()}
        users = {spec_id: table for spec_id, table in self.view.users.items() if spec_id in specs}
        self._tell(releases=releases, users=users)
        self._store.drop_cached(self._cache_dir, {*releases})

    def _changed(self, here: LocalRelease) -> LocalRelease:
        """With what came after it: no reader goes back to items that were changed or deleted.

        A replica that has nothing to serve yet begins without.
        """
        try:
            return _with_changes(here, self._store.fetch_changes(Path(here.folder), self._cache_dir))
        except Exception as error:
            if self.view.releases:
                raise
            self._fail(error)
            return replace(here, behind_since_s=monotonic())

    def _bring_changes(self, release_id: str) -> None:
        """Tell of what came after the release; what was told before stays told."""
        here = self.view.releases[release_id]
        told = _with_changes(here, self._store.fetch_changes(Path(here.folder), self._cache_dir))
        releases = {**self.view.releases, release_id: told}
        if told != here:
            self._tell(releases=releases)
        else:  # told with the next look
            self.view = replace(self.view, releases=releases)

    def _bring_users(self, spec_id: str, version: str | None) -> None:
        here = self.view.users.get(spec_id)
        if here is not None and here.version == version and (version is None or _lies_here(here)):
            return
        self._tell_users(
            spec_id, LocalUsers(version=version)
        )  # first: fetching deletes the local copy of the one before
        path = self._store.fetch_users(spec_id, self._cache_dir, self._progress)
        self._tell_users(spec_id, LocalUsers(version=version, path=None if path is None else str(path.absolute())))

    # --- telling

    def _tell_users(self, spec_id: str, table: LocalUsers) -> None:
        self._tell(users={**self.view.users, spec_id: table})

    def _progress(self, stage: str, done: int, total: int) -> None:
        """What arrives is an answer of the store, also while a large release is on its way."""
        if monotonic() - self._told_s >= self._refresh_s:
            self._tell(reachable=True, contact_s=monotonic())

    def _fail(self, error: Exception, **changes: Any) -> None:
        """Readers log what a user can mend; a defect is logged here, where its traceback is."""
        if not isinstance(error, RankTowerError):
            log.exception("the store could not be mirrored")
        failure = str(error) or type(error).__name__
        self._tell(failure=failure, failures=self.view.failures + 1, **changes)

    def _tell(self, **changes: Any) -> None:
        self.view = replace(self.view, **changes)
        self._told_s = monotonic()
        replace_file(self._folder / VIEW, msgspec.json.encode(self.view))


def _view_before(folder: Path) -> View:
    """What a process before this one has left: its failures count on, what it has verified is."""
    try:
        return read_view(folder) or View()
    except StoreError as error:
        log.warning("starting anew: %s", error)
        return View()


def _with_changes(here: LocalRelease, newer: Newer) -> LocalRelease:
    overlay = None if newer.overlay is None else str(newer.overlay)
    told = {name: getattr(newer, name) for name in ("looked_s", "behind_since_s", "dead")}
    return replace(here, overlay=overlay, **told)


def _lies_here(table: LocalUsers) -> bool:
    return table.path is not None and Path(table.path).is_file()


def _spec_id(folder: Path) -> str:
    """Of the bundle of a verified release; opening all of it would take ONNX Runtime."""
    path = folder / BUNDLE / "manifest.json"
    try:
        return str(json.loads(path.read_bytes())["spec_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} names no feature specification ({error!r}): publish the release again") from error


# --- reading ---------------------------------------------------------------------------------------------------------


class MirrorStore:
    """The store as its mirror has it: the reading verbs, without network and hashing. For one thread at a time."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._folder = folder
        self._view: View | None = None  # as `wait` has found it: the other verbs tell of the same moment

    def holds_current(self) -> bool:
        """Whether the current release lies here, so that it is served in a moment."""
        try:
            view = read_view(self._folder)
        except StoreError:
            return False  # `wait` says why
        return view is not None and view.current in view.releases

    def contact_s(self) -> float:
        """Monotonic time of the store's last answer to the process that asks it."""
        contact_s = self._known().contact_s
        return monotonic() if contact_s is None else contact_s

    def wait(self, seen: Live, timeout_s: float) -> Live:
        """What the store names, as soon as there is news of any kind or the time is up.

        Raises StoreError when the store or the process that asks it is gone; news of what lies here comes before that.
        """
        deadline = monotonic() + (timeout_s if self._view else max(timeout_s, FIRST_WORD_S))
        while True:
            view = read_view(self._folder)
            if view is None and self._view is not None:
                raise StoreError(
                    f"{self._folder / VIEW} is gone: keep what clears temporary files from it, start again"
                )
            if view is not None:
                news = view.contact_s is not None and (self._view is None or _told(view) != _told(self._view))
                self._view = view
                if news:
                    return _live(view)
                self._check(view)
            left = deadline - monotonic()
            if left <= 0:
                return _live(self._known())
            time.sleep(min(POLL_S, left))

    def fetch(self, release_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path:
        """Where the release lies. Raises Awaited while it does not."""
        here = self._known().releases.get(release_id)
        if here is None:
            raise self._awaited(f"release {release_id}")
        return Path(here.folder)

    def fetch_changes(self, folder: Path, cache_dir: Path) -> Newer:
        here = self._known().releases.get(folder.name)
        if here is None:
            return Newer()
        overlay = None if here.overlay is None else Path(here.overlay)
        return Newer(overlay=overlay, looked_s=here.looked_s, behind_since_s=here.behind_since_s, dead=here.dead)

    def drop_cached(self, cache_dir: Path, keep: set[str]) -> Names:
        """Nothing: who fetches deletes."""
        return []

    def users_version(self, spec_id: str) -> str | None:
        return self._table(spec_id).version

    def fetch_users(self, spec_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path | None:
        """Where the user table lies, None where there is none. Raises Awaited while it is on its way."""
        table = self._table(spec_id)
        if table.version is not None and table.path is None:
            raise self._awaited(f"user table {table.version}")
        return None if table.path is None else Path(table.path)

    def close(self) -> None:
        """Nothing is held open."""

    def _check(self, view: View) -> None:
        if not is_held(self._folder):
            raise StoreError(
                f"{self.url} is not asked for news, for the refresher has ended: the supervisor starts another"
            )
        if not view.reachable:
            raise StoreError(view.failure or f"{self.url} has not answered yet")

    def _known(self) -> View:
        if self._view is None:
            raise StoreError(f"{self.url} has not answered yet: see the log of the refresher, which asks it")
        return self._view

    def _table(self, spec_id: str) -> LocalUsers:
        table = self._known().users.get(spec_id)
        if table is None:
            raise StoreError(
                f"the users of specification {spec_id} are no longer followed: two releases of other specifications "
                "have come since: activate one that can be served"
            )
        return table

    def _awaited(self, what: str) -> Awaited:
        view = self._known()
        if view.failure is None:
            return Awaited(f"{what} is being fetched from {self.url}: it is served once it is here")
        return Awaited(view.failure, failures=view.failures)


def _live(view: View) -> Live:
    return Live(current=view.current, rollout=view.rollout)


def _told(view: View) -> View:
    """A view without what changes with every look at the store."""
    return replace(view, contact_s=None)
