"""What can go wrong between a bundle and a served release. Every message names the thing, the value and the remedy.

RankTowerError
    SnapshotError         a table file: truncated, foreign, of another version, or about to hold what it must not
    StoreError            a release store: unreachable, full, or holding something damaged
        UnknownRelease    no release of that name
        RolloutRefused    a change of what is live that makes no sense as things stand
        Awaited           another process fetches it, and tries again by itself where that fails
"""

from __future__ import annotations

import errno
from pathlib import Path

from model.errors import RankTowerError

FULL = "free space there, or name another folder; `ranktower releases prune --keep 1` frees that of a store"
IN_THE_WAY = "a file is where a folder should be: move it away, or name another folder"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: "give this user the right to read and write there",
    errno.EPERM: "give this user the right to read and write there",
    errno.EROFS: "the disk is read-only: name a folder that can be written",
    errno.ENOENT: "check the path",
    errno.EEXIST: IN_THE_WAY,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EISDIR: "a folder is where a file should be: move it away, or name another file",
}


class SnapshotError(RankTowerError):
    """A snapshot cannot be written or must not be read."""


class StoreError(RankTowerError):
    """A store did not do what was asked; what it served before, it still serves."""


class UnknownRelease(StoreError):  # noqa: N818
    """The store holds no release of that name."""


class RolloutRefused(StoreError):  # noqa: N818
    """What is live cannot be changed so; nothing was."""


class Awaited(StoreError):  # noqa: N818
    """It is not here yet. `failures`: how often fetching has failed where it is done, 0 while nothing is wrong."""

    def __init__(self, message: str, *, failures: int = 0) -> None:
        super().__init__(message)
        self.failures = failures


def disk_error(error: OSError, place: Path | None = None) -> str:
    """What the disk refused: the path, the reason and the remedy. `place`: where, for a write, which names no path."""
    reason = error.strerror or str(error) or type(error).__name__
    where = error.filename or place
    named = reason if where is None else f"{where}: {reason}"
    return f"{named}: {REMEDIES.get(error.errno or 0, 'check the disk and try again')}"
