"""Releases in Redis, for replicas that know nothing but a URL: chunks under versioned names, the manifest written last.

    {prefix}:releases                    hash: release id -> manifest; a release exists once its manifest does
    {prefix}:current, {prefix}:previous  the release in use; a list of those before it, newest first
    {prefix}:rollout, {prefix}:audit     canaries and shadow; a list of changes, newest first (cache/rollout.py)
    {prefix}:users                       hash: spec id -> manifest of its user table
    {prefix}:publishing:<id>             lease of a publisher at work, renewed with every batch of chunks
    {prefix}:notices                     channel: a message for every change of `current` or `rollout`
    prefix:release:<id>:<file>:<n>       chunks of 2 MiB; prefix:users:<version>:<file>:<n> likewise
    prefix:changes, prefix:dead,         change logs (cache/redis_log.py)
    prefix:records:<bundle id>

The braces are part of the names: they keep what a script changes together in one hash slot, while the chunks spread
over all masters of a cluster, one command a key. Only scripts change `current` and the manifests of releases.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from redis.exceptions import NoPermissionError, RedisClusterException, RedisError

from cache.changes import ChangeLog, Newer
from cache.durable import sharing
from cache.errors import StoreError, UnknownRelease, disk_error
from cache.follow import Followers
from cache.redis_chunks import STREAMS, Chunks, Manifest, is_whole
from cache.redis_client import ANSWER_S, Clients, is_passing, read_url, store_error
from cache.redis_log import RedisLog
from cache.release import (
    BUNDLE,
    RELEASE,
    USER_TABLE,
    USERS,
    Artifact,
    Progress,
    Release,
    UserTable,
    drop_cached,
    lock_of,
    no_progress,
    parse_release,
    parse_users,
    read_release,
    seal_users,
    sha256,
)
from cache.rollout import (
    ALONE,
    AUDITED,
    Audited,
    Change,
    Live,
    State,
    changed,
    decode_audited,
    decode_rollout,
    encode,
    newly_live,
    this_user,
)
from cache.store import Changes, Names, ReleaseInfo, ReleaseInfos

LEASE_S = 30.0  # a publisher that has written nothing for so long is dead
PATIENCE_S = 60.0  # how long a publisher waits for a server that is restarted or replaced
POLL_S = 1.0  # how often a waiting reader looks, should a notice be lost

CHANGE = """
-- as found: current, rollout, previous; what to write: current, rollout, previous, audited, how many of these stay; new
-- are the releases that become live
local function text(key) return redis.call('GET', key) or '' end
local found = cjson.decode(ARGV[1])
if text(KEYS[1]) ~= found[1] or text(KEYS[5]) ~= found[2] then return 0 end
if table.concat(redis.call('LRANGE', KEYS[2], 0, -1), ',') ~= found[3] then return 0 end
local to = cjson.decode(ARGV[2])
for _, id in ipairs(to.new) do
  if redis.call('HEXISTS', KEYS[3], id) == 0 then return 0 end
end
redis.call('SET', KEYS[1], to.current)
if to.rollout == '' then redis.call('DEL', KEYS[5]) else redis.call('SET', KEYS[5], to.rollout) end
redis.call('DEL', KEYS[2])
for place = #to.previous, 1, -1 do redis.call('LPUSH', KEYS[2], to.previous[place]) end
redis.call('LPUSH', KEYS[6], to.audited)
redis.call('LTRIM', KEYS[6], 0, to.kept - 1)
redis.call('PUBLISH', KEYS[4], to.current)
return 1
"""
PRUNE = """
local ids = redis.call('HKEYS', KEYS[3])
local live = {[redis.call('GET', KEYS[1]) or ''] = true}
local rollout = cjson.decode(redis.call('GET', KEYS[5]) or '{}')
for _, canary in ipairs(rollout.canaries or {}) do live[canary.release] = true end
if type(rollout.shadow) == 'table' then live[rollout.shadow.release] = true end
table.sort(ids)
local doomed = {}
for place = 1, #ids - ARGV[1] do
  if not live[ids[place]] then
    table.insert(doomed, ids[place])
    redis.call('HDEL', KEYS[3], ids[place])
  end
end
return doomed
"""

CONTROL = ("current", "previous", "releases", "notices", "rollout", "audit")  # KEYS of all scripts
BUNDLE_LOG = re.compile(r"([0-9a-f]{16})(:floor)?")  # else it is of a store whose prefix goes on from this one's
CONTESTED = 100  # times that a change is made anew, because another came first

Pause = Callable[[float], Any]

log = logging.getLogger(__name__)


class RedisStore:
    """The store behind the URLs of cache/redis_client.py: one server, a cluster, or the master that Sentinel names."""

    def __init__(self, url: str, *, lease_s: float = LEASE_S) -> None:
        self._address = read_url(url)
        self.url, prefix = self._address.url, self._address.prefix
        self._lease_s = lease_s
        self._control = [f"{{{prefix}}}:{name}" for name in CONTROL]
        self._current, self._previous, self._releases, self._notices, self._rollout, self._audit = self._control
        self._users = f"{{{prefix}}}:users"
        self._clients = Clients(self._address)
        self._verified: set[Path] = set()
        self._followers = Followers(self.log)
        self._notices_of: Any = None  # redis.client.PubSub, once somebody has waited
        self._may_subscribe = True

    @property
    def _client(self) -> Any:
        return self._clients.quick

    @cached_property
    def _chunks(self) -> Chunks:
        most = self._address.options.get("max_connections", STREAMS + 1)  # notices keep one for themselves
        streams = max(1, min(STREAMS, most - 1))
        return Chunks(self._clients, self._address.prefix, self.url, self._lease_s, streams)

    # --- releases

    def check_writable(self) -> None:
        with self._errors():
            for prefix in (self._address.prefix, f"{{{self._address.prefix}}}"):  # of the chunks, of the rest
                self._client.set(f"{prefix}:check", b"", px=1000)

    def publish(self, folder: Path, progress: Progress = no_progress, *, owned: bool = False) -> str:
        """`owned` changes nothing here: every chunk is sent."""
        release = read_release(folder)
        with self._errors():
            manifest = Manifest(self._releases, release.id, (folder / RELEASE).read_bytes())
            self._upload(f"release:{release.id}", folder, release, manifest, progress)
        return release.id

    def change(self, change: Change, by: str | None = None) -> Audited | None:
        with self._errors():
            for _ in range(CONTESTED):
                found = self._found()
                before = found.state(self._rollout)
                after = changed(before, change, {name.decode() for name in self._client.hkeys(self._releases)})
                for name in newly_live(before.live, after.live, change):
                    self._check_complete(name)
                if after == before:
                    return None
                audited = Audited.of(change.verb, by or this_user(), before.live, after.live)
                if self._run(CHANGE, found.as_read(), _as_written(before, after, audited)):
                    return audited
            raise StoreError(f"{self.url}: what is live changed {CONTESTED} times meanwhile: try again")

    def activate(self, release_id: str) -> None:
        self.change(Change(verb="activate", release=release_id))

    def live(self) -> Live:
        with self._errors():
            rollout = self._client.get(self._rollout)  # first: a promotion seen half is then one whose canary goes on
            return _live(_text(self._client.get(self._current)), rollout, self._rollout)

    def current(self) -> str | None:
        with self._errors():
            return _text(self._client.get(self._current))

    def audit(self) -> Changes:
        with self._errors():
            lines = self._client.lrange(self._audit, 0, AUDITED - 1)
        return [decode_audited(line, f"{self._audit} in {self.url}") for line in reversed(lines)]

    def rollback(self) -> str:
        self.change(Change(verb="rollback"))
        return self.current() or ""

    def _check_complete(self, release_id: str) -> None:
        release, _ = self._release(release_id)
        missing = self._chunks.missing(f"release:{release_id}", release)
        if missing:
            raise StoreError(
                f"release {release_id} in {self.url} lacks {len(missing)} chunks, the first of {missing[0].path}: "
                "publish it again, and set maxmemory-policy to noeviction"
            )

    def _found(self) -> _Found:
        """Read one by one: the script looks whether they hold together."""
        get = self._client.get
        return _Found(get(self._current), get(self._rollout), self._client.lrange(self._previous, 0, -1))

    def fetch(self, release_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path:
        target = self._cache(cache_dir) / release_id
        with self._errors(cache_dir):
            release, raw = self._release(release_id)
            if target not in self._verified or not target.is_dir():
                self._chunks.download(f"release:{release_id}", release, target, (RELEASE, raw), progress)
                self._verified.add(target)
        return target

    def drop_cached(self, cache_dir: Path, keep: set[str]) -> Names:
        self._followers.keep(keep)
        with self._errors():
            return drop_cached(self._cache(cache_dir), keep)

    def prune(self, keep: int) -> Names:
        if keep < 1:
            raise StoreError(f"prune keeps {keep} releases: keep at least 1")
        with self._errors():
            doomed = {name.decode() for name in self._run(PRUNE, keep)}
            return sorted(doomed | self._sweep())

    def wait(self, seen: Live, timeout_s: float) -> Live:
        """By notices, and by looking every second should one be lost. For one thread at a time."""
        deadline = time.monotonic() + timeout_s
        with self._errors(), self._notified() as pause:
            while True:
                live = self.live()
                left = deadline - time.monotonic()
                if live != seen or left <= 0:
                    return live
                pause(min(POLL_S, left))

    # --- users

    def publish_users(self, path: Path, progress: Progress = no_progress) -> str:
        with TemporaryDirectory() as name, self._errors():
            folder = Path(name)
            (folder / USER_TABLE).symlink_to(path.resolve())
            table = seal_users(folder)
            old = self._user_table(table.spec_id)
            manifest = Manifest(self._users, table.spec_id, (folder / USERS).read_bytes())
            self._upload(f"users:{table.id}", folder, table, manifest, progress)
            self._forget(old)
        return table.id

    def users_version(self, spec_id: str) -> str | None:
        found = self.users(spec_id)
        return None if found is None else found.id

    def users(self, spec_id: str) -> UserTable | None:
        with self._errors():
            found = self._user_table(spec_id)
            return None if found is None else found[0]

    def fetch_users(self, spec_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path | None:
        home = self._cache(cache_dir) / "users" / spec_id
        with self._errors(cache_dir):
            found = self._user_table(spec_id)
            drop_cached(home, set() if found is None else {found[0].id})
            if found is None:
                return None
            table, raw = found
            target = home / table.id
            if target not in self._verified or not target.is_dir():
                self._chunks.download(f"users:{table.id}", table, target, (USERS, raw), progress)
                self._verified.add(target)
        return target / USER_TABLE

    def delete_users(self, spec_id: str) -> None:
        with self._errors():
            old = self._user_table(spec_id)
            self._client.hdel(self._users, spec_id)
            self._forget(old)

    def fetch_changes(self, folder: Path, cache_dir: Path) -> Newer:
        return self._followers.bring(folder, cache_dir)

    def close(self) -> None:
        self._followers.close()
        self._unsubscribe()
        self._clients.close()

    def _cache(self, cache_dir: Path) -> Path:
        """The part of a cache that is this store's alone, whatever password it is read with."""
        return cache_dir / sha256(self.url.encode())[:16]

    def _upload(self, base: str, folder: Path, artifact: Artifact, manifest: Manifest, progress: Progress) -> None:
        """Upload, and after a failure that passes go on with what is missing then: a failover may have lost some."""
        last = time.monotonic()

        def note(stage: str, done: int, total: int) -> None:
            nonlocal last
            last = time.monotonic()
            progress(stage, done, total)

        while True:
            try:
                return self._chunks.upload(base, folder, artifact, manifest, note)
            except (RedisError, RedisClusterException) as error:
                if not is_passing(error) or time.monotonic() > last + PATIENCE_S:
                    raise
                log.warning("%s; trying again for %g s", store_error(self._address, error), PATIENCE_S)
                time.sleep(POLL_S)

    # --- manifests

    def _release(self, release_id: str) -> tuple[Release, bytes]:
        raw: bytes | None = self._client.hget(self._releases, release_id)
        if raw is None:
            raise self._unknown(release_id)
        release = parse_release(raw, f"release {release_id} in {self.url}")
        if release.id != release_id:
            raise StoreError(f"{self.url} holds release {release.id} under the name {release_id}: publish it again")
        return release, raw

    def _unknown(self, release_id: str) -> UnknownRelease:
        names = sorted(name.decode() for name in self._client.hkeys(self._releases))
        held = ", ".join(names[-5:]) or "nothing"
        return UnknownRelease(f"{self.url} holds no release {release_id}, but {held}: see `ranktower releases list`")

    def _user_table(self, spec_id: str) -> tuple[UserTable, bytes] | None:
        raw: bytes | None = self._client.hget(self._users, spec_id)
        return None if raw is None else (parse_users(raw, f"users of {spec_id} in {self.url}"), raw)

    def _forget(self, found: tuple[UserTable, bytes] | None) -> None:
        if found is not None:
            self._chunks.delete(f"users:{found[0].id}", found[0])

    def _owned(self) -> set[str]:
        """Names of all artifacts that have a manifest."""
        tables = {parse_users(raw, self.url).id for raw in self._client.hvals(self._users)}
        return tables | {name.decode() for name in self._client.hkeys(self._releases)}

    # --- updates

    @contextmanager
    def fetch_bundle(self, release_id: str, cache_dir: Path) -> Iterator[Path]:
        target = self._cache(cache_dir) / release_id
        with ExitStack() as held:
            with self._errors(cache_dir):
                release, raw = self._release(release_id)
                files = tuple(file for file in release.files if file.path.startswith(f"{BUNDLE}/"))
                part = replace(release, files=files)
                target.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(sharing(lock_of(target)))
                while not is_whole(target, part):  # not yet, or no more: another process may drop it in between
                    held.close()
                    self._chunks.download(f"release:{release_id}", part, target, (RELEASE, raw), no_progress)
                    held.enter_context(sharing(lock_of(target)))
            yield target / BUNDLE

    def log(self, name: str) -> ChangeLog:
        with self._errors():
            return RedisLog(self._clients, self._log_key(name), self._errors)

    def logs(self, kind: str) -> Names:
        start = self._log_key(f"{kind}/")
        with self._errors():
            keys = [key.decode() for key in self._client.scan_iter(match=f"{start}*", count=1000)]
        found = (BUNDLE_LOG.fullmatch(key, len(start)) for key in keys)
        return sorted({f"{kind}/{each[1]}" for each in found if each})

    def delete_log(self, name: str) -> None:
        with self._errors():
            for key in (self._log_key(name), f"{self._log_key(name)}:floor"):
                self._client.unlink(key)

    def _log_key(self, name: str) -> str:
        return f"{self._address.prefix}:{name.replace('/', ':')}"

    # --- what dead publishers left

    def _sweep(self) -> set[str]:
        """Delete chunks that no manifest names and no publisher alive is writing; returns whose they were."""
        owned = self._owned()
        found = self._chunks.names("release") | self._chunks.names("users")
        return {name for name, keys in found.items() if name not in owned and self._bury(name, keys)}

    def _bury(self, name: str, keys: list[str]) -> bool:
        with self._chunks.lease_now(name) as had:
            dead = had and name not in self._owned()  # it may have been completed since
            if dead:
                self._chunks.pipelined("UNLINK", keys)
            return dead

    # --- notices, scripts, errors

    @contextmanager
    def _notified(self) -> Iterator[Pause]:
        """A function that pauses for some seconds, or until the next notice. The subscription is kept for the next."""
        if self._may_subscribe and self._notices_of is None:
            self._subscribe()
        notices = self._notices_of
        try:
            yield time.sleep if notices is None else lambda seconds: notices.get_message(timeout=seconds)
        except (RedisError, RedisClusterException, StoreError):  # the next subscription goes to who is in charge then
            self._unsubscribe()
            raise

    def _subscribe(self) -> None:
        notices = self._client.pubsub()
        try:
            notices.subscribe(self._notices)
            notices.get_message(timeout=ANSWER_S)  # in force before anyone looks
            self._notices_of = notices
        except NoPermissionError:
            log.warning("%s: may not subscribe to %s: looking every %g s instead", self.url, self._notices, POLL_S)
            self._may_subscribe = False
            notices.close()

    def _unsubscribe(self) -> None:
        if self._notices_of is not None:
            self._notices_of.close()
            self._notices_of = None

    def _run(self, script: str, *arguments: Any) -> Any:
        return self._client.eval(script, len(self._control), *self._control, *arguments)

    @contextmanager
    def _errors(self, cache: Path | None = None) -> Iterator[None]:
        """Turn errors of Redis, and of the disk that `cache` lies on, into ones that say where and what to do."""
        try:
            yield
        except (RedisError, RedisClusterException) as error:
            if is_passing(error):
                self._clients.drop_idle()
            raise store_error(self._address, error) from error
        except OSError as error:
            raise StoreError(disk_error(error, cache)) from error

    def list(self) -> ReleaseInfos:
        with self._errors():
            current = _text(self._client.get(self._current))
            stored = sorted(self._client.hgetall(self._releases).items())
            return [
                ReleaseInfo.read(name.decode(), partial(parse_release, raw, f"{name!r} in {self.url}"), current)
                for name, raw in stored
            ]


class _Found(NamedTuple):
    """The control keys as they were read."""

    current: bytes | None
    rollout: bytes | None
    previous: list[bytes]  # newest first

    def state(self, where: str) -> State:
        live = _live(_text(self.current), self.rollout, where)
        return State(live=live, previous=tuple(name.decode() for name in self.previous))

    def as_read(self) -> str:
        """What CHANGE compares."""
        parts = [self.current or b"", self.rollout or b"", b",".join(self.previous)]
        return json.dumps([part.decode() for part in parts])


def _live(current: str | None, rollout: bytes | None, where: str) -> Live:
    found = ALONE if rollout is None else decode_rollout(rollout, where, "delete that key")
    return Live(current=current, rollout=found)


def _as_written(before: State, after: State, audited: Audited) -> str:
    live = after.live
    return json.dumps(
        {
            "current": live.current,
            "rollout": encode(live.rollout).decode() if live.rollout.releases else "",
            "previous": list(after.previous),
            "new": [name for name in live.releases if name not in before.live.releases],
            "audited": encode(audited).decode(),
            "kept": AUDITED,
        }
    )


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
