"""Keep the served release current: watch the store, try out what is new off the request path, swap one reference."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from cache.changes import Newer
from cache.errors import Awaited
from cache.mirror import CHANGES_S
from cache.overlay import Overlay
from cache.retry import STORE_PAUSE_S, Retry
from cache.store import ReadableStore
from model.errors import RankTowerError
from service.errors import NotReady
from service.ranker import Ranker
from service.user_cache import UserCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a replica stands: what it serves and how it gets on with its store. Replaced as a whole."""

    ranker: Ranker | None = None
    users: str | None = None  # version of the user table
    current: str | None = None  # the release that the store names
    behind_since_s: float | None = None  # monotonic time since when the ranker has lacked a change that is in the log
    dead: int = 0  # changes that the release's bundle could not take
    swaps: int = 0  # how often a release or a user table was taken over
    reachable: bool = False  # whether the store answered when last asked
    contact_s: float | None = None  # monotonic time of the store's last answer
    failure: str | None = None  # why the last attempt failed; None once one has succeeded
    failures: int = 0

    def behind_s(self) -> float:
        """For how long the ranker has lacked a change that is in the log; 0 where it lacks none."""
        return 0.0 if self.behind_since_s is None else monotonic() - self.behind_since_s

    def staleness_s(self) -> float | None:
        """Seconds since the store last answered; None before it ever did."""
        return None if self.contact_s is None else monotonic() - self.contact_s


class Refresher:
    """A background thread that owns the one reference to the current Ranker.

    Whatever fails, the old release serves on and the reason is in `standing`, the log and `on_failure`.
    """

    def __init__(
        self,
        store: ReadableStore,
        cache_dir: Path,
        *,
        retrieval: bool = False,
        user_cache: UserCache | None = None,
        refresh_s: float = 1.0,
        huge_pages: bool = False,
        on_swap: Callable[[Ranker], None] = lambda ranker: None,
        on_failure: Callable[[], None] = lambda: None,
        on_wait: Callable[[str], None] = lambda why: None,  # once, after the first look at the store
        contact: Callable[[], float] = monotonic,  # when the store answered last, asked after it has
    ) -> None:
        self._store, self._cache_dir, self._retrieval, self._refresh_s = store, cache_dir, retrieval, refresh_s
        self._huge_pages = huge_pages
        self._user_cache = user_cache
        self._on_swap, self._on_failure, self._on_wait, self._contact = on_swap, on_failure, on_wait, contact
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refresh", daemon=True)
        self._retry, self._users_retry, self._changes_retry = Retry(), Retry(), Retry()
        self._heard = 0  # failures of who fetches for this process, when the last of them was recorded here
        self._changed = threading.Condition()
        self.standing = Standing()

    def ranker(self) -> Ranker:
        """The current Ranker. Raises NotReady while there is none."""
        ranker = self.standing.ranker
        if ranker is None:
            raise NotReady(f"no release is loaded: {self.why()}", remedy="publish one; this service picks it up")
        return ranker

    def why(self) -> str:
        """Why no release is loaded, while none is."""
        standing = self.standing
        if standing.failure is not None:
            return standing.failure
        if standing.contact_s is None:
            return f"{self._store.url} has not answered yet"
        if standing.current is not None:
            return f"release {standing.current} is being loaded"
        return f"{self._store.url} holds no current release yet"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end and wait until it has, for as long as one look at the store may take."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._refresh_s + 5.0)

    def wait_until(self, reached: Callable[[Standing], bool], timeout_s: float) -> bool:
        """Block until the standing is such, or the time is up; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: reached(self.standing), timeout_s)

    def _stand(self, **changes: Any) -> None:
        with self._changed:
            self.standing = replace(self.standing, **changes)
            self._changed.notify_all()

    def _run(self) -> None:
        seen, pause_s = self._look(None, 0.0)
        self._on_wait(self.why())
        while not self._stopping.wait(pause_s):
            if self.standing.reachable:
                self._try(seen)
            seen, pause_s = self._look(seen, min(self._refresh_s, CHANGES_S))

    def _look(self, seen: str | None, timeout_s: float) -> tuple[str | None, float]:
        """What the store names as current, and how long to pause before going on; what was seen where it fails."""
        try:
            seen = self._store.wait(seen, timeout_s)
        except Exception as error:  # whatever the store's client raises, this thread lives on
            self._stand(reachable=False)
            self._record(error)
            return seen, STORE_PAUSE_S
        self._stand(contact_s=self._contact(), reachable=True, current=seen)
        return seen, 0.0

    def _try(self, release_id: str | None) -> None:
        try:
            if self._retry.allows(release_id):
                self.take_over(release_id)
            else:
                self.follow_users()
                self.follow_changes()
        except Awaited as news:
            if news.failures not in (0, self._heard):
                self._heard = news.failures
                self._record(news)
        except Exception as error:  # the old release serves on
            self._record(error)

    def take_over(self, release_id: str | None) -> None:
        """Serve this release with the user table that fits it; does nothing where both are served already.

        Raises whatever refuses the release or the table; what was served is served still.
        """
        serving = self.standing.ranker
        fits = True
        if serving is not None and serving.release == release_id:
            fits = self.follow_users() and self.follow_changes()
        elif release_id is not None:  # a store without any release has lost all it had: that deletes no users here
            try:
                fits = self._take_release(release_id)
            except Awaited:
                self.follow_users()
                raise
        self._retry = Retry()
        if fits and self.standing.failure is not None:
            self._stand(failure=None)

    def follow_users(self) -> bool:
        """Take the current user table of what is served, or none where it was deleted.

        Returns whether it is served now; False while one that was refused waits to be tried again.
        """
        ranker = self.standing.ranker
        if ranker is None:
            return True
        version = self._store.users_version(ranker.spec.id)
        if version == self.standing.users:
            return True
        if not self._users_retry.allows(version):
            return False
        try:
            self._swap(ranker, version)
        except Awaited:  # who fetches it keeps the pauses
            raise
        except Exception:
            self._users_retry = self._users_retry.later(version)
            raise
        self._users_retry = Retry()
        return True

    def follow_changes(self) -> bool:
        """Serve what came after the release, too: in one step, and never less of it than before.

        Returns whether all that is known is served; False while what was refused waits to be tried again.
        """
        ranker = self.standing.ranker
        if ranker is None:
            return True
        if not self._changes_retry.allows(ranker.release):
            return False
        try:
            ranker, newer = self._under_changes(ranker)
        except Awaited:
            raise
        except Exception:
            self._changes_retry = self._changes_retry.later(ranker.release)
            raise
        self._changes_retry = Retry()
        self._stand(ranker=ranker, behind_since_s=newer.behind_since_s, dead=newer.dead)
        return True

    def _under_changes(self, ranker: Ranker) -> tuple[Ranker, Newer]:
        newer = self._store.fetch_changes(ranker.items.path.parent, self._cache_dir)
        path = newer.overlay
        if path is None or (ranker.overlay is not None and ranker.overlay.items.path == path):
            return ranker, newer
        overlay = Overlay.open(path)
        return (ranker if overlay.watermark < ranker.watermark else ranker.with_overlay(overlay)), newer

    def _begin_under_changes(self, ranker: Ranker) -> tuple[Ranker, Newer, bool]:
        """The same for a new release, and whether all went well: who serves nothing yet begins without."""
        try:
            return *self._under_changes(ranker), True
        except Awaited:
            raise
        except Exception as error:
            if self.standing.ranker is not None:
                raise
            self._record(error)
            return ranker, Newer(), False

    def _take_release(self, release_id: str) -> bool:
        """Returns whether it is served with what came after it."""
        serving = self.standing.ranker
        try:
            folder = self._store.fetch(release_id, self._cache_dir)
            ranker = Ranker.open(folder, retrieval=self._retrieval, user_cache=self._user_cache)
            ranker.check()
            ranker, newer, whole = self._begin_under_changes(ranker)
            if self._huge_pages:
                log.debug("%.0f %% of the items are in huge pages", 100 * ranker.items.settle())
            # what serves stays until the next one comes: a rollback finds it here
            self._store.drop_cached(self._cache_dir, {release_id} | ({serving.release} if serving else set()))
            self._swap(ranker, self._store.users_version(ranker.spec.id))
            self._stand(behind_since_s=newer.behind_since_s, dead=newer.dead)
            return whole
        except Awaited:
            raise
        except Exception:
            self._retry = self._retry.later(release_id)
            raise

    def _swap(self, ranker: Ranker, users: str | None) -> None:
        """Serve the ranker over this version of the user table, once it has answered its recorded requests."""
        try:
            table = self._store.fetch_users(ranker.spec.id, self._cache_dir)  # none: the local copy goes, too
        except Awaited:
            if self.standing.ranker is not None:
                raise
            table, users = None, None  # a worker that starts answers without users until their table is here
        ranker = ranker.with_users(table)
        ranker.warm_up()
        self._stand(ranker=ranker, users=users, swaps=self.standing.swaps + 1)
        self._on_swap(ranker)

    def _record(self, error: Exception) -> None:
        ranker = self.standing.ranker
        serving = ranker.release if ranker else "nothing"
        if isinstance(error, RankTowerError):
            log.warning("refresh failed, serving %s: %s", serving, error)
        else:
            log.exception("refresh failed, serving %s", serving)
        self._stand(failure=str(error) or type(error).__name__, failures=self.standing.failures + 1)
        self._on_failure()
