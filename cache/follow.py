"""Follow the changes behind a release: read its bundle's log, fold it, and write an overlay when something is new.

Overlays lie in a folder of their own below the cache, locked while the process that writes them lives; the next one
deletes what dead processes left. The two newest stay: a reader may be about to open the one before.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cache.changes import ChangeLog, Folded, decode_embedded, records_log
from cache.durable import holding, is_held
from cache.errors import StoreError, disk_error
from cache.overlay import overlays_in, write_overlay
from cache.release import ITEMS, read_release
from cache.snapshot import read_header
from kernel.plain import ItemLayout, item_layout
from model.features import IdType

PREFIX = "overlays-"
ENTRIES = 64  # of a log, read at a time: up to 1,000 records each
KEPT = 2  # overlays that stay

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Followed:
    """A release, and what is known of what came after it."""

    folder: Path
    bundle_id: str
    id_type: IdType
    layout: ItemLayout
    folded: Folded
    position: int  # in the bundle's log
    written: Path | None = None


class Follower:
    """Of one release at a time. For one thread."""

    def __init__(self, open_log: Callable[[str], ChangeLog]) -> None:
        self._open_log = open_log
        self._followed: _Followed | None = None
        self._home: Path | None = None
        self._held = ExitStack()

    def bring(self, folder: Path, cache_dir: Path) -> Path | None:
        """The newest overlay of a release folder, None while nothing has changed behind its watermark.

        Raises StoreError where changes that it lacks are gone, SnapshotError for records that cannot be served.
        """
        if self._followed is None or self._followed.folder != folder:
            self._followed = _start(folder)
        at = self._followed
        bundle_log = self._open_log(records_log(at.bundle_id))
        before = at.folded
        while entries := bundle_log.read(at.position, ENTRIES):
            at.folded = at.folded.plus(map(decode_embedded, entries))
            at.position = entries[-1].position
        if at.written is None and at.folded is before:
            _check_floor(folder, before.watermark, self._open_log)
        if at.folded.watermark > before.watermark:
            at.written = self._write(at, cache_dir)
        return at.written

    def close(self) -> None:
        """Delete the overlays: who has mapped them keeps them."""
        self._held.close()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def _write(self, at: _Followed, cache_dir: Path) -> Path:
        try:
            home = self._folder(cache_dir) / at.folder.name
            home.mkdir(exist_ok=True)
            path = write_overlay(
                home,
                bundle_id=at.bundle_id,
                id_type=at.id_type,
                layout=at.layout,
                ids=at.folded.ids,
                records=at.folded.records,
                deleted=at.folded.deleted,
                watermark=at.folded.watermark,
            )
            for old in overlays_in(home)[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(disk_error(error)) from error
        return path

    def _folder(self, cache_dir: Path) -> Path:
        """A new one, held; what dead processes left beside it goes."""
        if self._home is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            for left in cache_dir.glob(f"{PREFIX}*"):
                if not is_held(left):
                    shutil.rmtree(left, ignore_errors=True)
            self._home = Path(tempfile.mkdtemp(prefix=PREFIX, dir=cache_dir)).absolute()
            self._held.enter_context(holding(self._home))
        return self._home


class Followers:
    """One for each release that is asked about, until it is kept no more. For one thread."""

    def __init__(self, open_log: Callable[[str], ChangeLog]) -> None:
        self._open_log = open_log
        self._by_folder: dict[Path, Follower] = {}

    def bring(self, folder: Path, cache_dir: Path) -> Path | None:
        """`Follower.bring`."""
        if folder not in self._by_folder:
            self._by_folder[folder] = Follower(self._open_log)
        return self._by_folder[folder].bring(folder, cache_dir)

    def keep(self, names: set[str]) -> None:
        """Follow the releases of these names alone."""
        for folder in [folder for folder in self._by_folder if folder.name not in names]:
            self._by_folder.pop(folder).close()

    def close(self) -> None:
        self.keep(set())


def _start(folder: Path) -> _Followed:
    release, header = read_release(folder), read_header(folder / ITEMS)
    return _Followed(
        folder=folder,
        bundle_id=release.bundle_id,
        id_type=header.id_type,
        layout=item_layout(release.head, header.record_dtype),  # type: ignore[arg-type]  # a layout refuses another
        folded=Folded.start(release.watermark, header.id_type, release.head.item_size),
        position=0,
    )


def _check_floor(folder: Path, watermark: int, open_log: Callable[[str], ChangeLog]) -> None:
    """Raise StoreError where changes behind the watermark have been trimmed away."""
    floor = open_log("changes").floor()
    if floor > watermark:
        raise StoreError(
            f"release {folder.name} holds changes up to {watermark}, those up to {floor} were trimmed: "
            "publish the items again"
        )
