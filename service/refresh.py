"""Keep what is served current: watch the store, try out what is new off the request path, swap one reference.

The current release comes first, whatever becomes of the rollout: a canary or shadow that cannot be had leaves its share
with the current one, and is tried again later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from cache.changes import Newer
from cache.errors import Awaited, StoreError
from cache.mirror import CHANGES_S
from cache.overlay import Overlay
from cache.retry import STORE_PAUSE_S, Retry
from cache.rollout import ALONE, NOTHING, Live, Rollout
from cache.store import ReadableStore
from model.errors import RankTowerError
from service.errors import NotReady
from service.live import Serving, why_not_beside
from service.ranker import Ranker
from service.user_cache import UserCache

GRACE_S = 2.0  # a replica that has looked at the log within it is up to date, if it was then

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a replica stands: what it serves and how it gets on with its store. Replaced as a whole."""

    serving: Serving | None = None
    users: str | None = None  # version of the user table
    current: str | None = None  # the release that the store names
    rollout: Rollout = ALONE  # what it names beside that
    refused: Mapping[str, str] = field(default_factory=dict)  # releases of the rollout that are not served, and why
    looked_s: float | None = None  # monotonic time of the last look at the log that succeeded
    behind_since_s: float | None = None  # since when, as found then, the ranker has lacked a change that is in the log
    dead: int = 0  # changes that the release's bundle could not take
    swaps: int = 0  # how often a release or a user table was taken over
    reachable: bool = False  # whether the store answered when last asked
    contact_s: float | None = None  # monotonic time of the store's last answer
    failure: str | None = None  # why the last attempt failed; None once one has succeeded
    failures: int = 0

    @property
    def ranker(self) -> Ranker | None:
        """Of the current release."""
        return None if self.serving is None else self.serving.current

    def behind_s(self) -> float:
        """For how long the ranker has lacked a change of the log, or nobody could look; 0 where it lacks none."""
        now, since_s = monotonic(), self.behind_since_s
        if since_s is None and self.looked_s is not None and now > self.looked_s + GRACE_S:
            since_s = self.looked_s
        return 0.0 if since_s is None else now - since_s

    def staleness_s(self) -> float | None:
        """Seconds since the store last answered; None before it ever did."""
        return None if self.contact_s is None else monotonic() - self.contact_s


@dataclass(frozen=True, slots=True)
class _Beside:
    """A release of the rollout, ready to answer."""

    ranker: Ranker
    users: str | None  # version of its user table


class Refresher:
    """A background thread that owns the one reference to what is served.

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
        aside: Callable[[str, Path], Path] | None = None,  # fetches beside a release that answers; else the store does
        on_swap: Callable[[Ranker], None] = lambda ranker: None,
        on_rollout: Callable[[Standing], None] = lambda standing: None,
        on_failure: Callable[[], None] = lambda: None,
        on_wait: Callable[[str], None] = lambda why: None,  # once, after the first look at the store
        contact: Callable[[], float] = monotonic,  # when the store answered last, asked after it has
    ) -> None:
        self._store, self._cache_dir, self._retrieval, self._refresh_s = store, cache_dir, retrieval, refresh_s
        self._huge_pages, self._aside = huge_pages, aside
        self._user_cache = user_cache
        self._on_swap, self._on_failure, self._on_wait, self._contact = on_swap, on_failure, on_wait, contact
        self._on_rollout = on_rollout
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refresh", daemon=True)
        self._retry, self._users_retry, self._changes_retry = Retry(), Retry(), Retry()
        self._beside: dict[str, _Beside] = {}
        self._beside_retries: dict[str, Retry] = {}
        self._before: str | None = None  # the release that was current before
        self._heard = 0  # failures of who fetches for this process, when the last of them was recorded here
        self._changed = threading.Condition()
        self.standing = Standing()

    def serving(self) -> Serving:
        """What answers. Raises NotReady while nothing does."""
        serving = self.standing.serving
        if serving is None:
            raise NotReady(f"no release is loaded: {self.why()}", remedy="publish one; this service picks it up")
        return serving

    def ranker(self) -> Ranker:
        """The current Ranker. Raises NotReady while there is none."""
        return self.serving().current

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
        seen, pause_s = self._look(NOTHING, 0.0)
        self._on_wait(self.why())
        while not self._stopping.wait(pause_s):
            if self.standing.reachable:
                self._try(seen)
            seen, pause_s = self._look(seen, min(self._refresh_s, CHANGES_S))

    def _look(self, seen: Live, timeout_s: float) -> tuple[Live, float]:
        """What the store names as live, and how long to pause before going on; what was seen where it fails."""
        try:
            seen = self._store.wait(seen, timeout_s)
        except Exception as error:  # whatever the store's client raises, this thread lives on
            self._stand(reachable=False)
            self._record(error)
            return seen, STORE_PAUSE_S
        self._stand(contact_s=self._contact(), reachable=True, current=seen.current)
        return seen, 0.0

    def _try(self, live: Live) -> None:
        try:
            if self._retry.allows(live.current):
                self.take_over(live.current)
            else:
                self._follow()
        except Awaited as news:
            if news.failures not in (0, self._heard):
                self._heard = news.failures
                self._record(news)
        except Exception as error:  # the old release serves on
            self._record(error)
        self.follow_rollout(live.rollout)

    def take_over(self, release_id: str | None) -> None:
        """Serve this release with the user table that fits it; does nothing where both are served already.

        Raises whatever refuses the release or the table; what was served is served still.
        """
        serving = self.standing.ranker
        fits = True
        if serving is not None and serving.release == release_id:
            fits = self._follow()
        elif release_id is not None:  # a store without any release has lost all it had: that deletes no users here
            try:
                fits = self._take_release(release_id)
            except Awaited:
                self.follow_users()
                raise
        self._retry = Retry()
        if fits and self.standing.failure is not None:
            self._stand(failure=None)

    def _follow(self) -> bool:
        """Follow users and changes of what is served; a table that cannot be had holds up no changes."""
        try:
            users = self.follow_users()
        finally:
            changes = self.follow_changes()
        return users and changes

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
        rollout = self.standing.rollout
        serving = self.standing.serving if ranker is self.standing.ranker else self._with_beside(ranker, rollout)
        self._stand(serving=serving, **_known(newer))
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
            return ranker, Newer(behind_since_s=monotonic()), False

    def _take_release(self, release_id: str) -> bool:
        """Returns whether it is served with what came after it."""
        try:
            known = self._beside.get(release_id)  # a canary that was promoted: it answers already
            if known is not None:
                self._serve(known.ranker, known.users)
                return True
            ranker, newer, whole = self._open(release_id)
            self._swap(ranker, self._store.users_version(ranker.spec.id))
            self._stand(**_known(newer))
            return whole
        except Awaited:
            raise
        except Exception:
            self._retry = self._retry.later(release_id)
            raise

    def _open(self, release_id: str) -> tuple[Ranker, Newer, bool]:
        """Fetch a release and try it out; what serves stays until it is taken over: a rollback finds it here.

        As `_begin_under_changes`.
        """
        fetch = self._store.fetch if self._aside is None or self.standing.serving is None else self._aside
        folder = fetch(release_id, self._cache_dir)
        ranker = Ranker.open(folder, retrieval=self._retrieval, user_cache=self._user_cache)
        ranker.check()
        ranker, newer, whole = self._begin_under_changes(ranker)
        if self._huge_pages:
            log.debug("%.0f %% of the items are in huge pages", 100 * ranker.items.settle())
        self._drop_cached(release_id)
        return ranker, newer, whole

    def _drop_cached(self, also: str | None) -> None:
        """Delete local copies of all that is not served; `also` stays, too."""
        serving = self.standing.ranker
        named = [serving.release if serving else None, *self.standing.rollout.releases, *self._beside, also]
        self._store.drop_cached(self._cache_dir, {name for name in named if name is not None})

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
        self._serve(ranker, users)

    def _serve(self, ranker: Ranker, users: str | None) -> None:
        standing = self.standing
        if standing.ranker is not None and standing.ranker.release != ranker.release:
            self._before = standing.ranker.release
        serving = self._with_beside(ranker, standing.rollout)
        self._stand(serving=serving, users=users, swaps=standing.swaps + 1)
        self._on_swap(ranker)

    # --- canaries and shadow

    def follow_rollout(self, rollout: Rollout) -> None:
        """Serve each release of the rollout that can be had, say of the others why not, and forget what has left it."""
        before = self.standing
        if before.serving is None:
            return
        refused = {name: why for name in rollout.releases if (why := self._bring_beside(name)) is not None}
        gone = self._beside.keys() - {*rollout.releases}
        for name in gone:
            del self._beside[name]
            self._beside_retries.pop(name, None)
        serving = self._with_beside(before.serving.current, rollout)
        news = rollout != before.rollout or refused != before.refused
        if news or serving.beside != before.serving.beside:
            self._stand(serving=serving, rollout=rollout, refused=refused)
        if news:
            self._on_rollout(self.standing)
        if gone:
            self._drop_cached(self._before)

    def _with_beside(self, current: Ranker, rollout: Rollout) -> Serving:
        fit = {name: each.ranker for name, each in self._beside.items() if not why_not_beside(current, each.ranker)}
        return Serving(current, rollout, fit)

    def _bring_beside(self, release_id: str) -> str | None:
        """Have this release of the rollout ready, as new as its users and changes are; else why it is not."""
        serving = self.standing.ranker
        assert serving is not None
        if release_id == serving.release:  # its own shadow, or promoted a moment ago
            self._beside[release_id] = _Beside(serving, self.standing.users)
            return None
        retry = self._beside_retries.get(release_id, Retry())
        known = self._beside.get(release_id)
        try:
            if retry.allows(release_id):
                self._beside[release_id] = known = self._renewed(known or self._opened(release_id))
                self._beside_retries.pop(release_id, None)
        except Awaited as news:
            if news.failures not in (0, self._heard):
                self._heard = news.failures
                self._record_beside(release_id, news)
            return None if known else str(news)
        except Exception as error:  # its share stays with the current release, or with what was served of it
            if self._has_left(release_id):
                return None
            self._beside_retries[release_id] = retry.later(release_id)
            self._record_beside(release_id, error)
            return None if known else str(error) or type(error).__name__
        if known is None:
            return self.standing.refused.get(release_id, "it is tried again soon")
        return why_not_beside(serving, known.ranker)

    def _has_left(self, release_id: str) -> bool:
        """Whether the store names it no more: then its copy may be gone already, and nothing is wrong."""
        try:
            return release_id not in self._store.wait(NOTHING, 0.0).releases
        except StoreError:
            return False

    def _opened(self, release_id: str) -> _Beside:
        ranker, _, _ = self._open(release_id)
        return self._over_users(ranker, self._store.users_version(ranker.spec.id))

    def _renewed(self, known: _Beside) -> _Beside:
        version = self._store.users_version(known.ranker.spec.id)
        if version != known.users:
            known = self._over_users(known.ranker, version)
        ranker, _ = self._under_changes(known.ranker)
        return known if ranker is known.ranker else replace(known, ranker=ranker)

    def _over_users(self, ranker: Ranker, version: str | None) -> _Beside:
        ranker = ranker.with_users(self._store.fetch_users(ranker.spec.id, self._cache_dir))
        ranker.warm_up()
        return _Beside(ranker, version)

    def _record_beside(self, release_id: str, error: Exception) -> None:
        if isinstance(error, RankTowerError):
            log.warning("release %s of the rollout is not served, its share stays as it was: %s", release_id, error)
        else:
            log.exception("release %s of the rollout is not served, its share stays as it was", release_id)
        self._stand(failures=self.standing.failures + 1)
        self._on_failure()

    def _record(self, error: Exception) -> None:
        ranker = self.standing.ranker
        serving = ranker.release if ranker else "nothing"
        if isinstance(error, RankTowerError):
            log.warning("refresh failed, serving %s: %s", serving, error)
        else:
            log.exception("refresh failed, serving %s", serving)
        self._stand(failure=str(error) or type(error).__name__, failures=self.standing.failures + 1)
        self._on_failure()


def _known(newer: Newer) -> dict[str, Any]:
    """Of the standing."""
    known = {"behind_since_s": newer.behind_since_s, "dead": newer.dead}
    return known if newer.looked_s is None else {**known, "looked_s": newer.looked_s}
