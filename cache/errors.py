"""What can go wrong between a bundle and a served release. Every message names the thing, the value and the remedy.

RankTowerError
    SnapshotError         a table file: truncated, foreign, of another version, or about to hold what it must not
    StoreError            a release store: unreachable, full, or holding something damaged
        UnknownRelease    no release of that name
"""

from __future__ import annotations

from model.errors import RankTowerError


class SnapshotError(RankTowerError):
    """A snapshot cannot be written or must not be read."""


class StoreError(RankTowerError):
    """A store did not do what was asked; what it served before, it still serves."""


class UnknownRelease(StoreError):  # noqa: N818
    """The store holds no release of that name."""
