"""From the log of changes to the records of every live bundle, for ever or once.

Each bundle that a release of the store has gets a log of records of its own, made with the same encoding, tower and
padded batches as a whole catalogue (cache/embed.py): a record here is that of the next full publish, bit for bit.
Whoever runs this may be killed and started again, also several at once: entries say from where to where they lead, and
readers take only what follows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache.catalogue import as_ids, check_columns, check_ids, encode_rows
from cache.changes import (
    CHANGES,
    DEAD,
    ChangeLog,
    DeadLetter,
    Deleted,
    Embedded,
    Entry,
    Upserted,
    append_all,
    decode_change,
    decode_embedded,
    encode_dead,
    encode_embedded,
    records_log,
)
from cache.embed import run_parallel
from cache.errors import StoreError
from cache.intake import ID_COLUMN
from cache.retry import STORE_PAUSE_S
from cache.store import ReleaseInfo, ReleaseStore
from kernel.engine import pack
from kernel.errors import RecordError
from kernel.ids import Ids, Texts
from kernel.plain import item_layout
from model.bundle import Bundle, open_bundle
from model.datasets.columns import Source, read_ids
from model.errors import DataError, RankTowerError
from model.features import FeatureSpec
from model.tower import Tower

READ_ENTRIES = 64  # embedded together, at most
LOOK_S = 1.0  # how often the releases are looked at
POLL_S = 0.05  # how often the log is
TELL_S = 60.0
SAFE = 65_504.0  # the largest f16: a record within it can be stored in every type

log = logging.getLogger(__name__)


# --- one entry -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """An entry of `changes` as a bundle reads it: what can be embedded or removed, and what cannot."""

    entry: Entry
    ids: Ids  # (n,)
    features: NDArray[np.int32] | None = None  # (n, item width), None where the items are gone
    dead: tuple[DeadLetter, ...] = ()


def read_entry(entry: Entry, bundle: Bundle) -> Read:
    """Decode and encode; rows that the bundle cannot encode are dead, each with its reason."""
    change = decode_change(entry)
    if isinstance(change, Deleted):
        if isinstance(change.ids, Texts) == (bundle.spec.item_id_type == "string"):
            return Read(entry=entry, ids=change.ids)
        reason = f"deletes ids of another type than {bundle.spec.item_id_type}, which the bundle was trained with"
        return _all_dead(entry, bundle, change.ids.tolist(), reason)
    return _read_rows(entry, change, bundle)


def _read_rows(entry: Entry, change: Upserted, bundle: Bundle) -> Read:
    place = Path(f"changes at {entry.position}")
    try:
        table = pa.ipc.open_stream(change.rows).read_all()
        name = (table.schema.metadata or {})[ID_COLUMN].decode()
    except (pa.ArrowException, KeyError) as error:
        return _all_dead(entry, bundle, [None], f"{place}: no rows with ids ({error!r}): use `ranktower update`")
    try:
        ids = read_ids(Source(place, table), name)
        check_ids(place, ids, name, bundle.spec)
        check_columns(place, table.column_names, name, bundle.spec)
        features, reasons = _encoded(place, table, bundle.spec, name)
    except DataError as error:
        shown = [item if isinstance(item, (int, str)) else None for item in table[name].to_pylist()]
        return _all_dead(entry, bundle, shown, str(error))
    dead = (
        DeadLetter(bundle_id=bundle.id, position=entry.position, id=ids[row].as_py(), reason=reason)
        for row, reason in reasons.items()
    )
    kept = [row for row in range(len(ids)) if row not in reasons]
    return Read(entry=entry, ids=as_ids(ids.take(pa.array(kept, pa.int64()))), features=features, dead=tuple(dead))


def _all_dead(entry: Entry, bundle: Bundle, ids: list[Any], reason: str) -> Read:
    none: Ids = Texts.of([]) if bundle.spec.item_id_type == "string" else np.empty(0, np.int64)
    letters = (DeadLetter(bundle_id=bundle.id, position=entry.position, id=item, reason=reason) for item in ids)
    return Read(entry=entry, ids=none, dead=tuple(letters))


def _encoded(place: Path, table: pa.Table, spec: FeatureSpec, name: str) -> tuple[NDArray[np.int32], dict[int, str]]:
    """Encoded rows (m, item width), and the rows that cannot be encoded, with the reason.

    Raises DataError where none can, because of a column's type.
    """
    try:
        return encode_rows(place, table, spec, name), {}
    except DataError:
        encode_rows(place, table.slice(0, 0), spec, name)
    found = list(_halved(place, table, spec, name, 0))
    features = [np.empty((0, spec.item_width), np.int32), *(rows for _, rows in found if not isinstance(rows, str))]
    return np.concatenate(features), {row: reason for row, reason in found if isinstance(reason, str)}


def _halved(
    place: Path, table: pa.Table, spec: FeatureSpec, name: str, start: int
) -> Iterator[tuple[int, NDArray[np.int32] | str]]:
    """Runs of encoded rows, or a row's reason, each with its first row."""
    try:
        yield start, encode_rows(place, table, spec, name, start)
    except DataError as error:
        half = table.num_rows // 2
        if half == 0:
            yield start, str(error)
        else:
            yield from _halved(place, table.slice(0, half), spec, name, start)
            yield from _halved(place, table.slice(half), spec, name, start + half)


# --- one bundle ------------------------------------------------------------------------------------------------------


def resume(records: ChangeLog, low: int) -> tuple[int, int]:
    """(since, at): where to go on, so that a reader with the watermark `low` or a higher one misses nothing.

    The usual case reads two entries: one line, that begins early enough. Else all of them are followed, but for those
    in front that may just be trimmed: their floor is one of `changes`.
    """
    newest, floor = records.newest(), records.floor()
    if newest is None:
        return low, low
    last, first = decode_embedded(newest), decode_embedded(records.read(0, 1)[0])
    if last.since == first.since and first.after <= low <= last.until and floor <= low:
        return last.since, last.until
    since, at = low, low
    for entry in dropwhile(lambda entry: entry.until <= floor, _every(records)):
        if entry.after <= at < entry.until:
            since, at = entry.since, entry.until
    return since, at


def _every(records: ChangeLog) -> Iterator[Embedded]:
    position = 0
    while entries := records.read(position, READ_ENTRIES):
        yield from map(decode_embedded, entries)
        position = entries[-1].position


@dataclass
class Line:
    """One bundle's way through the log of changes."""

    bundle: Bundle
    tower: Tower
    records: ChangeLog
    release_id: str  # where the bundle was taken from
    dtypes: frozenset[Any]  # of the records of its live releases
    low: int  # their lowest watermark
    since: int
    at: int  # up to here all is embedded
    end: int  # of the log of records

    def follow(self, infos: list[ReleaseInfo]) -> None:
        """See to the releases that are live now, and to a log that was deleted meanwhile."""
        low = min(info.watermark for info in infos)
        self.dtypes = frozenset(info.dtype for info in infos)
        if not self.low <= low <= self.at or self.records.last() < self.end:
            self.end = self.records.last()
            self.since, self.at = resume(self.records, low)
        self.low = low

    def add(self, read: list[Read], records: NDArray[np.float32], dead: ChangeLog) -> int:
        """Append what became of the entries behind `at`; returns how many changes are dead.

        records (n, item size): of all their features in a row.
        """
        stretches, letters, after, start = [], [letter for each in read for letter in each.dead], self.at, 0
        for each in read:
            ids, part = each.ids, None
            if each.features is not None:
                part = records[start : start + len(ids)]
                start += len(ids)
                unfit = self._unfit(each, part)
                letters += unfit.values()
                fits = np.array([row not in unfit for row in range(len(ids))], np.bool_)
                ids, part = ids[fits], part[fits]
            until = each.entry.position
            made = Embedded(since=self.since, after=after, until=until, ids=ids, records=part)
            stretches.append(encode_embedded(made))
            after = until
        if letters:  # first, so that no row is lost without a word
            append_all(dead, [encode_dead(letters)])
        self.end = append_all(self.records, stretches)
        self.at = after
        return len(letters)

    def _unfit(self, read: Read, records: NDArray[np.float32]) -> dict[int, DeadLetter]:
        """Rows whose record the bundle's live releases cannot hold."""
        unfit = {}
        for row in np.flatnonzero(~(np.abs(records).max(axis=1, initial=0) <= SAFE)).tolist():
            for dtype in sorted(self.dtypes):
                try:
                    pack(item_layout(self.bundle.head, dtype), records[row : row + 1])
                except RecordError:
                    unfit[row] = DeadLetter(
                        bundle_id=self.bundle.id,
                        position=read.entry.position,
                        id=read.ids[row : row + 1].tolist()[0],
                        reason=f"its record holds NaN, an infinity or more than {dtype} can: check the item's features",
                    )
        return unfit


# --- all of them -----------------------------------------------------------------------------------------------------


class Updater:
    """Keeps the logs of records of all live bundles, or of one, up with the log of changes.

    `tell` hears of what goes wrong with a bundle, once; the others go on.
    """

    def __init__(
        self,
        store: ReleaseStore,
        cache_dir: Path,
        *,
        only: str | None = None,
        workers: int | None = None,
        tell: Callable[[str], None] = log.warning,
    ) -> None:
        self._store, self._cache_dir, self._only, self._tell = store, cache_dir, only, tell
        self._changes, self._dead = store.log(CHANGES), store.log(DEAD)
        self._workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers)
        self._said: dict[str, str] = {}  # the last problem, by bundle
        self.lines: dict[str, Line] = {}  # by bundle
        self.dead = 0  # changes that could not be embedded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def look(self) -> None:
        """See which bundles are live."""
        live: dict[str, list[ReleaseInfo]] = {}
        for info in self._store.list():
            if not info.damage and self._only in (None, info.bundle_id):
                live.setdefault(info.bundle_id, []).append(info)
        self.lines = {bundle_id: line for bundle_id, line in self.lines.items() if bundle_id in live}
        for bundle_id, infos in live.items():
            try:
                if bundle_id in self.lines:
                    self.lines[bundle_id].follow(infos)
                else:
                    self.lines[bundle_id] = self._open(infos)
                self._check_end(self.lines[bundle_id])
                self._said.pop(bundle_id, None)
            except RankTowerError as error:
                self._say(bundle_id, f"bundle {bundle_id} gets no updates: {error}")
        self._store.drop_cached(self._cache_dir, {line.release_id for line in self.lines.values()})

    def step(self) -> int:
        """Embed the next entries for each bundle; returns how many changes that were, 0 once all is done."""
        return sum(self._advance(line) for line in self.lines.values())

    def catch_up(self) -> int:
        """Embed all that there is, once; returns how many changes that were, summed over bundles."""
        self.look()
        done = 0
        while step := self.step():
            done += step
        return done

    def run(self, stopping: Event) -> None:
        """Go on until told to stop, whatever fails; tell of the state once a minute."""
        look_at, tell_at, done = 0.0, monotonic() + TELL_S, 0
        while not stopping.is_set():
            try:
                if monotonic() >= look_at:
                    self.look()
                    look_at = monotonic() + LOOK_S
                handled = self.step()
                self._said.pop("", None)
            except Exception as error:  # whatever the store's client raises, this process lives on
                self._say("", f"trying again every {STORE_PAUSE_S:g} s: {error}")
                stopping.wait(STORE_PAUSE_S)
                continue
            done += handled
            if monotonic() >= tell_at:
                self._tell(f"{done:,} changes embedded in the last minute; {self.state()}")
                tell_at, done = monotonic() + TELL_S, 0
            if not handled:
                stopping.wait(POLL_S)

    def state(self) -> str:
        """Up to where each bundle has come."""
        return ", ".join(f"bundle {name} is at {line.at}" for name, line in self.lines.items()) or "no live bundle"

    def _check_end(self, line: Line) -> None:
        """Raise StoreError where the log of changes ends before what was made of it: a part is lost."""
        end = self._changes.last()
        if end < line.at:
            raise StoreError(
                f"the log of changes ends at {end}, its records go to {line.at}: if it was lost, delete the logs "
                "records and dead, too, and publish the items again"
            )

    def _open(self, infos: list[ReleaseInfo]) -> Line:
        newest, low = infos[-1], min(info.watermark for info in infos)
        with self._store.fetch_bundle(newest.id, self._cache_dir) as folder:
            bundle = open_bundle(folder)
            tower = bundle.item_tower()
        records = self._store.log(records_log(bundle.id))
        end = records.last()
        since, at = resume(records, low)
        return Line(
            bundle=bundle,
            tower=tower,
            records=records,
            release_id=newest.id,
            dtypes=frozenset(info.dtype for info in infos),
            low=low,
            since=since,
            at=at,
            end=end,
        )

    def _advance(self, line: Line) -> int:
        entries = self._changes.read(line.at, READ_ENTRIES)
        if not entries:
            return 0
        read = [read_entry(entry, line.bundle) for entry in entries]
        features = [each.features for each in read if each.features is not None and len(each.features)]
        records = np.empty((0, line.tower.size), np.float32)
        if features:
            records = run_parallel(line.tower, self._pool, self._workers, np.concatenate(features))
        self.dead += line.add(read, records, self._dead)
        return max(1, sum(len(each.ids) + len(each.dead) for each in read))

    def _say(self, about: str, problem: str) -> None:
        if self._said.get(about) != problem:
            self._tell(problem)
            self._said[about] = problem
