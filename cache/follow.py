"""Follow the changes behind a release: read its bundle's log, fold it, and write an overlay when something is new.

Overlays lie in a folder of their own below the cache, locked while the process that writes them lives; the next one
deletes what dead processes left. The newest stay: a reader may be about to open one of those before.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic

from cache.changes import (
    CHANGES,
    DEAD,
    ChangeLog,
    Embedded,
    Entry,
    Fold,
    Newer,
    decode_dead,
    decode_embedded,
    records_log,
)
from cache.durable import holding, is_held
from cache.errors import SnapshotError, StoreError, disk_error
from cache.overlay import overlays_in, write_overlay
from cache.release import ITEMS, read_release
from cache.snapshot import may_hold, read_header
from kernel.engine import pack
from kernel.errors import RecordError
from kernel.plain import ItemLayout, item_layout
from model.features import IdType

PREFIX = "overlays-"
ENTRIES = 64  # of a log, read at a time: up to 1,000 records each
KEPT = 4  # overlays that stay
REST = 1.0  # of the time that a look took, until the next one: at most half of all goes into it
SIGHTS = 1_000  # ends of the log of changes that are remembered, at most

log = logging.getLogger(__name__)


class _Reader:
    """Of what is new in a log, also in another one that has taken its place."""

    def __init__(self, source: ChangeLog) -> None:
        self._log, self._position = source, 0

    def new(self) -> Iterator[Entry]:
        if self._position and self._log.last() < self._position:
            self.rewind()
        while entries := self._log.read(self._position, ENTRIES):
            for entry in entries:
                yield entry
                self._position = entry.position

    def rewind(self) -> None:
        self._position = 0

    @property
    def at_start(self) -> bool:
        return self._position == 0


@dataclass(slots=True)
class _Followed:
    """A release, and what is known of what came after it."""

    folder: Path
    watermark: int  # of the release
    bundle_id: str
    id_type: IdType
    layout: ItemLayout
    fold: Fold
    records: _Reader
    dead: _Reader
    changes: ChangeLog
    told: Newer = field(default_factory=Newer)
    written: int = 0  # watermark of the overlay
    seen: int = 0  # up to which change there are records in the log, whether they follow or not
    lost: dict[int | str, int] = field(default_factory=dict)  # items whose last change is dead, and its position
    unread: set[int] = field(default_factory=set)  # positions of entries of which no item could be read
    sights: deque[tuple[int, float]] = field(default_factory=deque)  # an end of `changes`, when it was seen first
    rest_until_s: float = 0.0


class Follower:
    """Of one release at a time. For one thread."""

    def __init__(self, open_log: Callable[[str], ChangeLog]) -> None:
        self._open_log = open_log
        self._followed: _Followed | None = None
        self._home: Path | None = None
        self._held = ExitStack()

    def bring(self, folder: Path, cache_dir: Path) -> Newer:
        """What came after the release in a folder, up to now, or a moment ago where folding takes long.

        Raises StoreError where changes that it lacks are gone, SnapshotError for records that cannot be served.
        """
        if self._followed is None or self._followed.folder != folder:
            self._followed = self._start(folder)
        at, start_s = self._followed, monotonic()
        if start_s < at.rest_until_s:
            return at.told
        _see_end(at)
        _read(at)
        path = at.told.overlay
        if at.fold.watermark > at.written or (path is not None and not path.exists()):
            path = self._write(at, cache_dir)
            at.written = at.fold.watermark
        at.told = Newer(overlay=path, looked_s=start_s, behind_since_s=_behind_since(at), dead=_count_dead(at))
        end_s = monotonic()
        at.rest_until_s = end_s + REST * (end_s - start_s)
        return at.told

    def close(self) -> None:
        """Delete the overlays: who has mapped them keeps them."""
        self._held.close()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def _start(self, folder: Path) -> _Followed:
        release, header = read_release(folder), read_header(folder / ITEMS)
        layout = item_layout(release.head, header.record_dtype)  # type: ignore[arg-type]  # a layout refuses another
        return _Followed(
            folder=folder,
            watermark=release.watermark,
            bundle_id=release.bundle_id,
            id_type=header.id_type,
            layout=layout,
            fold=Fold(release.watermark, header.id_type, layout.stride, partial(pack, layout)),
            records=_Reader(self._open_log(records_log(release.bundle_id))),
            dead=_Reader(self._open_log(DEAD)),
            changes=self._open_log(CHANGES),
            written=release.watermark,
        )

    def _write(self, at: _Followed, cache_dir: Path) -> Path:
        try:
            home = self._folder(cache_dir) / at.folder.name
            home.mkdir(exist_ok=True)
            path = write_overlay(
                home,
                bundle_id=at.bundle_id,
                id_type=at.id_type,
                layout=at.layout,
                ids=at.fold.ids,
                records=at.fold.rows,
                deleted=at.fold.deleted,
                watermark=at.fold.watermark,
            )
            for old in overlays_in(home)[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(disk_error(error, cache_dir)) from error
        return path

    def _folder(self, cache_dir: Path) -> Path:
        """One that is held, another where the cache was cleared meanwhile; what dead processes left beside it goes."""
        if self._home is None or not self._home.is_dir():
            self._held.close()
            cache_dir.mkdir(parents=True, exist_ok=True)
            with holding(cache_dir):  # nobody finds a folder here that is not held yet
                for left in cache_dir.glob(f"{PREFIX}*"):
                    with suppress(FileNotFoundError):  # whose it was has deleted it
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

    def bring(self, folder: Path, cache_dir: Path) -> Newer:
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


def _read(at: _Followed) -> None:
    """Fold what is new in the bundle's log; all of it where that does not follow what is known."""
    whole = at.records.at_start
    if _fold(at) and at.seen > at.fold.watermark and not whole:
        at.records.rewind()
        _fold(at)
    floor = at.changes.floor() if at.seen > at.fold.watermark or at.told.overlay is None else 0
    if floor > at.fold.watermark:
        raise StoreError(
            f"release {at.folder.name} knows the changes up to {at.fold.watermark}, those up to {floor} were trimmed: "
            "publish the items again"
        )


def _fold(at: _Followed) -> bool:
    """Take what follows; returns whether any entry was new, followed or not."""
    any_new = False
    for entry in at.records.new():
        any_new = True
        embedded = _holdable(decode_embedded(entry))
        try:
            at.fold.add(embedded)
        except RecordError as error:
            item = embedded.ids[error.row : error.row + 1].tolist()[0]
            raise SnapshotError(
                f"the record of item {item!r} in the log of bundle {at.bundle_id}, at {entry.position}: {error}: "
                "publish the items again"
            ) from error
        at.seen = max(at.seen, embedded.until)
    return any_new


def _holdable(embedded: Embedded) -> Embedded:
    """Without ids that no table may hold: no release has such items, and they would keep all others from an overlay."""
    fits = may_hold(embedded.ids)
    if fits.all():
        return embedded
    return replace(
        embedded,
        ids=embedded.ids[fits],
        records=None if embedded.records is None else embedded.records[fits],
    )


def _see_end(at: _Followed) -> None:
    end = at.changes.last()
    known = at.sights[-1][0] if at.sights else at.fold.watermark
    if end > known and len(at.sights) < SIGHTS:
        at.sights.append((end, monotonic()))


def _behind_since(at: _Followed) -> float | None:
    while at.sights and at.sights[0][0] <= at.fold.watermark:
        at.sights.popleft()
    return at.sights[0][1] if at.sights else None


def _count_dead(at: _Followed) -> int:
    """Each item once, whoever tells of it and how often, until a later change mends it."""
    for entry in at.dead.new():
        for letter in decode_dead(entry):
            if letter.bundle_id == at.bundle_id and letter.position > at.watermark:
                if letter.id is None:
                    at.unread.add(letter.position)
                else:
                    at.lost[letter.id] = max(letter.position, at.lost.get(letter.id, 0))
    at.lost = {item: position for item, position in at.lost.items() if at.fold.changed_at(item) <= position}
    return len(at.lost) + len(at.unread)
