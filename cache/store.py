"""Where releases live: the verbs that every store has, and the store behind a URL.

Publish writes under a new name, reads back and verifies; `activate` flips `current` in one step, as every change of
what is live is one step, audited (cache/rollout.py). Readers of the old release keep it. The user table is an artifact
of its own, keyed by the feature specification, one version at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cache.changes import ChangeLog, Newer
from cache.errors import StoreError
from cache.release import Progress, Release, UserTable, no_progress
from cache.rollout import Audited, Change, Live

Names = list[str]  # a method named `list` hides the builtin from annotations
POLL_S = 0.2  # how often a waiting reader looks, where no notice wakes it


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseInfo:
    """One line of `ranktower releases list`."""

    id: str
    created: str
    bundle_id: str
    snapshot_id: str
    count: int
    size_bytes: int
    current: bool
    damage: str | None = None  # why its manifest cannot be read; then all but name and `current` is empty
    watermark: int = 0  # up to where it contains the log of changes
    dtype: str = "f32"  # of its records
    index: str = "none"

    @classmethod
    def of(cls, release: Release, current: str | None) -> ReleaseInfo:
        return cls(
            id=release.id,
            created=release.created,
            bundle_id=release.bundle_id,
            snapshot_id=release.snapshot_id,
            count=release.count,
            size_bytes=release.size_bytes,
            current=release.id == current,
            watermark=release.watermark,
            dtype=release.report.get("precision", {}).get("dtype", "f32"),
            index=release.index,
        )

    @classmethod
    def read(cls, name: str, manifest: Callable[[], Release], current: str | None) -> ReleaseInfo:
        """The release of that name; one whose manifest cannot be read is listed as damaged, and hides no other."""
        try:
            return cls.of(manifest(), current)
        except StoreError as error:
            return cls(
                id=name,
                created="",
                bundle_id="",
                snapshot_id="",
                count=0,
                size_bytes=0,
                current=name == current,
                damage=str(error),
            )


ReleaseInfos = list[ReleaseInfo]
Changes = list[Audited]


class ReadableStore(Protocol):
    """What a replica needs of a store. Every method raises StoreError, naming store and remedy."""

    @property
    def url(self) -> str:
        """The URL, without a password."""

    def wait(self, seen: Live, timeout_s: float) -> Live:
        """What is live, as soon as it is not `seen` or the time is up."""

    def fetch(self, release_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path:
        """A local folder with the release, every hash verified once in the life of this object.

        A store that copies does so into a folder of its own below `cache_dir`: other stores may use the same one.
        """

    def drop_cached(self, cache_dir: Path, keep: set[str]) -> Names:
        """Delete the local copies of this store's releases but those in `keep`: the names of those that went."""

    def users_version(self, spec_id: str) -> str | None:
        """Version of the user table, which begins with the time of its making (`release.created_at`)."""

    def fetch_users(self, spec_id: str, cache_dir: Path, progress: Progress = no_progress) -> Path | None:
        """A local users.snap, verified, or None; copies of other versions are deleted from the cache."""

    def fetch_changes(self, folder: Path, cache_dir: Path) -> Newer:
        """What came after the release in a folder that `fetch` gave, with a local overlay where anything has."""

    def close(self) -> None: ...


class ReleaseStore(ReadableStore, Protocol):
    """All of a store. What raises has changed nothing that readers see."""

    def check_writable(self) -> None:
        """Raise what `publish` would raise for a store that does not answer or must not be written, before the work."""

    def publish(self, folder: Path, progress: Progress = no_progress, *, owned: bool = False) -> str:
        """Store a release folder under its own name, read it back and verify; returns the name. Never flips `current`.

        owned: nobody changes these files any more, so a store on the same disk may link to them in place of a copy.
        Publishing what is there already changes nothing; what a killed publisher left is completed.
        """

    def change(self, change: Change, by: str | None = None) -> Audited | None:
        """Change what is live, in one step with its line in the audit trail; None where it is so already.

        by: who does, this process's user where None. Raises RolloutRefused, or UnknownRelease; StoreError for a release
        that is not complete.
        """

    def activate(self, release_id: str) -> None:
        """Make a complete release the current one; the one before is remembered for `rollback`."""

    def live(self) -> Live: ...

    def current(self) -> str | None: ...

    def audit(self) -> Changes:
        """The latest changes of what is live, newest last."""

    def list(self) -> ReleaseInfos:
        """All complete releases, oldest first; damaged ones, too."""

    def rollback(self) -> str:
        """End the canaries, where there are any; else go back to the release that was current before. Returns the
        current one."""

    def prune(self, keep: int) -> Names:
        """Delete all but the newest `keep` releases and those that are live, and what dead publishers left: names."""

    def publish_users(self, path: Path, progress: Progress = no_progress) -> str:
        """Replace the user table of the specification that owns the snapshot; returns its version. Older ones go."""

    def users(self, spec_id: str) -> UserTable | None:
        """The manifest of the user table: its version, how many users, how large."""

    def delete_users(self, spec_id: str) -> None: ...

    def fetch_bundle(self, release_id: str, cache_dir: Path) -> AbstractContextManager[Path]:
        """A local folder with the bundle of a release alone. Hashes are for who opens it.

        It is there until the block ends, whatever another process drops; `drop_cached` drops it afterwards.
        """

    def log(self, name: str) -> ChangeLog:
        """The change log of that name (cache/changes.py), there once something was appended to it."""

    def logs(self, kind: str) -> Names:
        """Names of all logs that are `kind`, a slash and the id of a bundle."""

    def delete_log(self, name: str) -> None: ...


def open_store(url: str) -> ReleaseStore:
    """The store behind a URL. Touches neither disk nor network yet."""
    scheme, mark, _ = url.partition("://")
    if not mark or scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise StoreError(f"no store answers to {_shown(scheme, mark)}: use a URL that starts with {known}")
    return STORES[scheme](url)


def _shown(scheme: str, mark: str) -> str:
    """What may be told of a URL that no store reads: nothing that could be a password."""
    if re.fullmatch(r"[\w+.-]+", scheme):
        return f"{scheme}{mark}"
    return "this URL (not shown: it may hold a password)" if set(":@") & set(scheme) else repr(scheme)


def _file_store(url: str) -> ReleaseStore:
    from cache.file_store import FileStore

    return FileStore(url)


def _redis_store(url: str) -> ReleaseStore:
    from cache.redis_store import RedisStore

    return RedisStore(url)


REDIS = ("redis", "rediss", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")
STORES: dict[str, Callable[[str], ReleaseStore]] = {"file": _file_store, **dict.fromkeys(REDIS, _redis_store)}
