"""Releases in a folder, for one machine or a shared disk: no server needed, and what is published is served in place.

current                        {"current": id, "previous": [newest first], "rollout": ..., "audited": the last change},
                               replaced by one rename
audit                          the changes before that one, a line each
releases/<id>/...              complete releases; a publisher renames them into place
users/<spec id>/<version>/...  user tables; users/<spec id>/current names the version
changes, records, dead         change logs (cache/file_log.py)
tmp/<name>, tmp/<name>.lock    a publisher at work; the lock is free once it is dead
.lock                          held for every change of what readers see
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import msgspec

from cache.changes import ChangeLog, Newer
from cache.durable import locked, locked_now, rename_durably, sync_tree, write_durably
from cache.errors import StoreError, UnknownRelease, disk_error
from cache.file_log import FileLog
from cache.follow import Followers
from cache.parallel import in_order
from cache.release import (
    BUNDLE,
    NAME,
    RELEASE,
    USER_TABLE,
    Artifact,
    Chunk,
    Progress,
    Release,
    UserTable,
    check_chunk,
    check_sizes,
    no_progress,
    prepare_files,
    read_chunk,
    read_release,
    read_users,
    seal_users,
    verify_files,
    write_chunk,
)
from cache.rollout import (
    ALONE,
    AUDITED,
    Audited,
    Change,
    Live,
    Rollout,
    State,
    changed,
    check_rollout,
    decode_audited,
    encode,
    newly_live,
    this_user,
)
from cache.store import POLL_S, Changes, Names, ReleaseInfo, ReleaseInfos

CURRENT, AUDIT = "current", "audit"
Lines = list[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pointer:
    """What `current` holds."""

    current: str | None = None
    previous: tuple[str, ...] = ()
    rollout: Rollout = ALONE
    audited: Audited | None = None

    @classmethod
    def of(cls, state: State, audited: Audited) -> _Pointer:
        live = state.live
        return cls(current=live.current, previous=state.previous, rollout=live.rollout, audited=audited)

    @property
    def state(self) -> State:
        return State(live=Live(current=self.current, rollout=self.rollout), previous=self.previous)


class FileStore:
    """The store behind file://./relative and file:///absolute."""

    def __init__(self, url: str) -> None:
        place = unquote(url.removeprefix("file://"))
        if not url.startswith("file://") or not place.startswith(("/", ".", "~")) or "?" in place or "\0" in place:
            raise StoreError(f"{url!r} names no folder of this machine: write file://./folder or file:///folder")
        self.url = url
        self.root = Path(place).expanduser()
        self._verified: set[Path] = set()
        self._followers = Followers(self.log)

    # --- releases

    def check_writable(self) -> None:
        with self._disk():
            with self._draft("check"):  # first: its error is the disk's own, such as that it is read-only
                pass
            for name in ("releases", "users"):
                folder = self.root / name
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    def publish(self, folder: Path, progress: Progress = no_progress, *, owned: bool = False) -> str:
        release = read_release(folder)
        target = self.root / "releases" / release.id
        with self._disk():
            if _is_whole(target, release):
                return release.id
            with self._draft(release.id, resumed=True) as temporary:
                if not (owned and _link(folder, temporary, release)):
                    _copy(folder, temporary, release, progress)
                shutil.copyfile(folder / RELEASE, temporary / RELEASE)
                sync_tree(temporary)
                verify_files(temporary, release, progress)  # read back
                self._put(temporary, target, release)
        return release.id

    def change(self, change: Change, by: str | None = None) -> Audited | None:
        with self._disk(), self._changing():
            pointer = self._pointer()
            before, names = pointer.state, self._names()
            after = changed(before, change, names)
            for name in newly_live(before.live, after.live, change):
                check_sizes(self._folder(name), self._release(name))
            if after == before:
                return None
            audited = Audited.of(change.verb, by or this_user(), before.live, after.live)
            self._archive(pointer.audited)
            self._point(_Pointer.of(after, audited))
            return audited

    def activate(self, release_id: str) -> None:
        self.change(Change(verb="activate", release=release_id))

    def live(self) -> Live:
        with self._disk():
            return self._pointer().state.live

    def current(self) -> str | None:
        return self.live().current

    def audit(self) -> Changes:
        with self._disk():
            last = self._pointer().audited
            lines = self._audit_lines()
            if last is not None and encode(last) not in lines[-1:]:
                lines.append(encode(last))
            return [decode_audited(line, str(self.root / AUDIT)) for line in lines[-AUDITED:]]

    def list(self) -> ReleaseInfos:
        with self._disk():
            current, home = self._pointer().current, self.root / "releases"
            return [ReleaseInfo.read(name, partial(read_release, home / name), current) for name in self._names()]

    def fetch(self, release_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path:
        """Served in place: `cache_dir` is not used."""
        with self._disk():
            folder = self._folder(release_id)
            if folder not in self._verified:
                release = self._release(release_id)
                verify_files(folder, release, progress)
                self._verified.add(folder)
            return folder

    def drop_cached(self, cache_dir: Path, keep: set[str]) -> Names:
        """Nothing is copied, so nothing is dropped but overlays: what lies in `cache_dir` is another's."""
        self._followers.keep(keep)
        return []

    def rollback(self) -> str:
        self.change(Change(verb="rollback"))
        return self.current() or ""

    def prune(self, keep: int) -> Names:
        if keep < 1:
            raise StoreError(f"prune keeps {keep} releases: keep at least 1")
        with self._disk(), self._changing():
            live, names = self._pointer().state.live.releases, self._names()
            doomed = [name for name in names[:-keep] if name not in live]
            for name in doomed:  # gone from sight at once, whatever happens to the deletion
                os.replace(self._folder(name), self.root / "tmp" / f"{name}.{uuid.uuid4().hex[:8]}")
            return sorted({*doomed, *self._sweep()})

    def wait(self, seen: Live, timeout_s: float) -> Live:
        deadline = time.monotonic() + timeout_s
        while True:
            live = self.live()
            left = deadline - time.monotonic()
            if live != seen or left <= 0:
                return live
            time.sleep(min(POLL_S, left))

    # --- users

    def publish_users(self, path: Path, progress: Progress = no_progress) -> str:
        with self._disk(), self._draft("users") as temporary:
            shutil.copyfile(path, temporary / USER_TABLE)
            table = seal_users(temporary)
            sync_tree(temporary)
            verify_files(temporary, table, progress)
            home = self._home(table.spec_id)
            home.mkdir(parents=True, exist_ok=True)
            self._put(temporary, home / table.id, table)
            with self._changing():
                write_durably(home / "current", table.id.encode())
                for other in home.iterdir():
                    if NAME.fullmatch(other.name) and other.name != table.id:
                        _delete(other)
        return table.id

    def users_version(self, spec_id: str) -> str | None:
        pointer = self._home(spec_id) / "current"
        with self._disk():
            version = pointer.read_bytes().decode(errors="replace") if pointer.is_file() else None
        if version is not None and not NAME.fullmatch(version):
            raise StoreError(
                f"{pointer} holds {version[:40]!r}, not the version of a user table: publish the users again"
            )
        return version

    def users(self, spec_id: str) -> UserTable | None:
        version = self.users_version(spec_id)
        return None if version is None else read_users(self._home(spec_id) / version)

    def fetch_users(self, spec_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path | None:
        """Served in place: `cache_dir` is not used."""
        version = self.users_version(spec_id)
        if version is None:
            return None
        folder = self._home(spec_id) / version
        with self._disk():
            if folder not in self._verified:
                verify_files(folder, read_users(folder), progress)
                self._verified.add(folder)
        return folder / USER_TABLE

    def delete_users(self, spec_id: str) -> None:
        home = self._home(spec_id)
        if home.exists():
            with self._disk(), self._changing():
                (home / "current").unlink(missing_ok=True)
                shutil.rmtree(home)

    def fetch_changes(self, folder: Path, cache_dir: Path) -> Newer:
        return self._followers.bring(folder, cache_dir)

    def close(self) -> None:
        """Only overlays are held."""
        self._followers.close()

    # --- updates

    @contextmanager
    def fetch_bundle(self, release_id: str, cache_dir: Path) -> Iterator[Path]:
        """In place."""
        with self._disk():
            folder = self._folder(release_id) / BUNDLE
        yield folder

    def log(self, name: str) -> ChangeLog:
        return FileLog(self.root / name)

    def logs(self, kind: str) -> Names:
        with self._disk():
            return sorted(f"{kind}/{folder.name}" for folder in (self.root / kind).glob("*") if folder.is_dir())

    def delete_log(self, name: str) -> None:
        with self._disk():
            if (self.root / name).exists():
                shutil.rmtree(self.root / name)

    # --- places

    def _home(self, spec_id: str) -> Path:
        if not spec_id.isalnum():
            raise StoreError(f"{spec_id!r} is not the id of a feature specification")
        return self.root / "users" / spec_id

    def _names(self) -> Names:
        folder = self.root / "releases"
        return sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name)) if folder.is_dir() else []

    def _folder(self, release_id: str) -> Path:
        names = self._names()
        if release_id not in names:
            held = ", ".join(names[-5:]) or "nothing"
            raise UnknownRelease(f"{self.url} holds no release {release_id}, but {held}: see `ranktower releases list`")
        return self.root / "releases" / release_id

    def _release(self, release_id: str) -> Release:
        folder = self._folder(release_id)
        release = read_release(folder)
        if release.id != release_id:
            raise StoreError(f"{folder} holds release {release.id} under the name {release_id}: publish it again")
        return release

    def _pointer(self) -> _Pointer:
        try:
            pointer = msgspec.json.decode((self.root / CURRENT).read_bytes(), type=_Pointer)
            check_rollout(pointer.rollout)
        except FileNotFoundError:
            return _Pointer()
        except (ValueError, UnicodeDecodeError) as error:
            raise StoreError(
                f"{self.root / CURRENT} cannot be read ({error}): delete it and activate a release again"
            ) from error
        return pointer

    def _point(self, pointer: _Pointer) -> None:
        write_durably(self.root / CURRENT, msgspec.json.encode(pointer))

    # --- the audit trail

    def _audit_lines(self) -> Lines:
        path = self.root / AUDIT
        return path.read_bytes().splitlines() if path.exists() else []

    def _archive(self, audited: Audited | None) -> None:
        """Put the last change with those before it, unless it is there: what `current` says next is written over it."""
        lines = self._audit_lines()
        if audited is None or encode(audited) in lines[-1:]:
            return
        lines.append(encode(audited))
        write_durably(self.root / AUDIT, b"".join(line + b"\n" for line in lines[-AUDITED:]))

    # --- changes

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn errors of the disk into ones that say where and what to do."""
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.url}: {disk_error(error)}") from error

    @contextmanager
    def _changing(self) -> Iterator[None]:
        (self.root / "tmp").mkdir(parents=True, exist_ok=True)
        with locked(self.root / ".lock"):
            yield

    @contextmanager
    def _draft(self, name: str, *, resumed: bool = False) -> Iterator[Path]:
        """A folder to fill, `resumed` where a dead publisher left one; its lock tells `prune` that one is at work."""
        with ExitStack() as held:
            with self._changing():  # else prune could take the lock between its making and its locking
                left = self._left(name) if resumed else None
                temporary = left or self.root / "tmp" / f"{name}.{uuid.uuid4().hex[:8]}"
                lock = _lock_of(temporary)
                held.enter_context(locked(lock))
            temporary.mkdir(exist_ok=True)
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                lock.unlink(missing_ok=True)

    def _left(self, name: str) -> Path | None:
        """What a dead publisher, or pruning that was cut off, has left of a release."""
        for path in sorted((self.root / "tmp").glob(f"{name}.*")):
            if path.is_dir() and path.suffix != ".damaged":
                with locked_now(_lock_of(path)) as dead:
                    if dead:
                        return path
        return None

    def _put(self, temporary: Path, target: Path, artifact: Artifact) -> None:
        """Move a complete folder into place, unless an equal one came first; a damaged one that had the name goes."""
        target.parent.mkdir(parents=True, exist_ok=True)
        damaged = temporary.with_name(f"{temporary.name}.damaged")
        with self._changing():
            if _is_whole(target, artifact):
                return
            if target.exists():
                os.replace(target, damaged)
            self._verified.discard(target)
            rename_durably(temporary, target)
        _delete(damaged)

    def _sweep(self) -> Names:
        """Delete what pruning and dead publishers left in tmp; returns the names of their releases."""
        swept = []
        for path in {
            path.with_suffix("") if path.suffix == ".lock" else path for path in (self.root / "tmp").iterdir()
        }:
            with locked_now(_lock_of(path)) as dead:
                if dead:
                    swept.append(path.name.split(".")[0])
                    _delete(path)
                    _lock_of(path).unlink()
        return swept


def _lock_of(draft: Path) -> Path:
    return draft.with_name(f"{draft.name}.lock")


def _delete(path: Path) -> None:
    """A folder, or the link to where somebody moved it by hand: what lies there is not the store's. Or nothing."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _is_whole(folder: Path, artifact: Artifact) -> bool:
    try:
        verify_files(folder, artifact)
    except StoreError:
        return False
    return True


def _link(source: Path, target: Path, artifact: Artifact) -> bool:
    """Give the files a second name in `target`; False where the disk does not, and then `_copy` completes it."""
    check_sizes(source, artifact)
    for file in artifact.files:
        path = target / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a publisher that was killed
        try:
            os.link(source / file.path, path)
        except OSError:  # another disk, or one without hard links
            return False
    return True


def _copy(source: Path, target: Path, artifact: Artifact, progress: Progress) -> None:
    """Copy the files that the manifest names, but for what is there already, checking every chunk on the way."""
    check_sizes(source, artifact)
    wanted = prepare_files(target, artifact)
    done = artifact.size_bytes - sum(chunk.size for chunk in wanted)

    def copy(chunk: Chunk) -> None:
        content = check_chunk(artifact, chunk, read_chunk(source, chunk), str(source))
        write_chunk(target, chunk, content)

    for chunk, _ in zip(wanted, in_order(copy, wanted), strict=True):
        done += chunk.size
        progress("publish", done, artifact.size_bytes)
