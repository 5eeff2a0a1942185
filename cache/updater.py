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

from cache.catalogue import check_columns, column_of, read_rows
from cache.changes import (
    CHANGES,
    DEAD,
    ENTRY_ROWS,
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
from cache.snapshot import MAX_ID_BYTES, may_hold
from cache.store import ReleaseInfo, ReleaseStore
from kernel.engine import pack
from kernel.errors import RecordError
from kernel.ids import Ids, Texts
from kernel.plain import item_layout
from model.bundle import Bundle, open_bundle
from model.errors import RankTowerError
from model.features import FeatureSpec
from model.tower import Tower

READ_ENTRIES = 64  # embedded together, at most
LOOK_S = 1.0  # how often the releases are looked at
POLL_S = 0.05  # how often the log is
TELL_S = 60.0
REASON = 500  # characters of a dead letter's reason
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
    """Decode and encode. What the bundle cannot take is dead, with its reason: single rows, or all of an entry."""
    try:
        change = decode_change(entry)
        if isinstance(change, Deleted):
            return _read_ids(entry, change.ids, bundle)
        return _read_rows(entry, change, bundle)
    except Exception as error:  # any: read again it would fail again, and nothing behind it would ever be embedded
        return _all_dead(
            entry, bundle, [None], f"{_place(entry)} cannot be read ({_told(error)}): use `ranktower update`"
        )


def _check_size(rows: int) -> None:
    """So that what is made of it, records or dead letters, fits an entry, too."""
    if rows > ENTRY_ROWS:
        raise StoreError(f"{rows:,} changes in one entry, {ENTRY_ROWS:,} at most")


def _read_ids(entry: Entry, ids: Ids, bundle: Bundle) -> Read:
    _check_size(len(ids))
    if isinstance(ids, Texts) != (bundle.spec.item_id_type == "string"):
        reason = f"deletes ids of another type than {bundle.spec.item_id_type}, which the bundle was trained with"
        return _all_dead(entry, bundle, ids.tolist(), reason)
    return _without(Read(entry=entry, ids=ids), _wrong_ids(ids), bundle)


def _read_rows(entry: Entry, change: Upserted, bundle: Bundle) -> Read:
    place, spec = _place(entry), bundle.spec
    table = pa.ipc.open_stream(change.rows).read_all()
    _check_size(len(table))
    name = (table.schema.metadata or {})[ID_COLUMN].decode()
    try:
        check_columns(place, table.column_names, name, spec)
        table = table.select([*{name, *(column_of(field.name, spec, name) for field in spec.item_fields)}])
        table.validate(full=True)  # Arrow trusts the offsets and texts that it is given
        ids, features, reasons = _readable(place, table, spec, name)
    except Exception as error:  # as above; here the items can be named
        return _all_dead(entry, bundle, _shown(table, name), _told(error))
    dead = tuple(_letter(entry, bundle, _shown(table.slice(row, 1), name)[0], reasons[row]) for row in reasons)
    return _without(Read(entry=entry, ids=ids, features=features, dead=dead), _wrong_ids(ids), bundle)


def _readable(
    place: Path, table: pa.Table, spec: FeatureSpec, name: str
) -> tuple[Ids, NDArray[np.int32], dict[int, str]]:
    """Ids and features of the rows that can be read, and the reasons of the others.

    Raises where none can, because of a column's type.
    """
    try:
        return *read_rows(place, table, spec, name), {}
    except Exception:  # as above
        read_rows(place, table.slice(0, 0), spec, name)
    reasons = dict(_wrong_rows(place, table, spec, name, 0))
    kept = [row for row in range(len(table)) if row not in reasons]
    return *read_rows(place, table.take(pa.array(kept, pa.int64())), spec, name), reasons


def _wrong_rows(place: Path, table: pa.Table, spec: FeatureSpec, name: str, start: int) -> Iterator[tuple[int, str]]:
    """Rows that cannot be read, with the reason: found by halving, for most tables have none."""
    try:
        read_rows(place, table, spec, name, start)
    except Exception as error:  # as above
        half = len(table) // 2
        if half == 0:
            yield start, _told(error)
        else:
            yield from _wrong_rows(place, table.slice(0, half), spec, name, start)
            yield from _wrong_rows(place, table.slice(half), spec, name, start + half)


def _wrong_ids(ids: Ids) -> dict[int, str]:
    """Places of ids that no table may hold, with the reason."""
    if not isinstance(ids, Texts):
        return {}
    wrong = {
        row: f"its id has {ids.sizes[row]:,} bytes: a text id has 1 to {MAX_ID_BYTES:,}"
        for row in np.flatnonzero(~may_hold(ids)).tolist()
    }
    for row, raw in enumerate(_octets(ids)):
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            wrong[row] = f"its id is no text: {error}"
    return wrong


def _without(read: Read, wrong: dict[int, str], bundle: Bundle) -> Read:
    """The same, some of its rows dead."""
    if not wrong:
        return read
    assert isinstance(read.ids, Texts)
    fits = np.array([row not in wrong for row in range(len(read.ids))], np.bool_)
    shown = [raw.decode(errors="replace") for raw in _octets(read.ids)]
    dead = (_letter(read.entry, bundle, shown[row], reason) for row, reason in wrong.items())
    features = None if read.features is None else read.features[fits]
    return Read(entry=read.entry, ids=read.ids[fits], features=features, dead=(*read.dead, *dead))


def _octets(ids: Texts) -> list[bytes]:
    places = zip(ids.starts.tolist(), (ids.starts + ids.sizes).tolist(), strict=True)
    return [bytes(ids.data[start:end]) for start, end in places]


def _all_dead(entry: Entry, bundle: Bundle, ids: list[Any], reason: str) -> Read:
    none: Ids = Texts.of([]) if bundle.spec.item_id_type == "string" else np.empty(0, np.int64)
    return Read(entry=entry, ids=none, dead=tuple(_letter(entry, bundle, item, reason) for item in ids or [None]))


def _letter(entry: Entry, bundle: Bundle, item: Any, reason: str) -> DeadLetter:
    known = item if isinstance(item, (int, str)) and not isinstance(item, bool) else None
    shown = _cut(known, MAX_ID_BYTES) if isinstance(known, str) else known
    return DeadLetter(bundle_id=bundle.id, position=entry.position, id=shown, reason=_cut(reason, REASON))


def _shown(table: pa.Table, name: str) -> list[Any]:
    """Ids as far as they can be read."""
    try:
        table[name].validate(full=True)  # a damaged one would end the process
        found: list[Any] = table[name].to_pylist()
    except (KeyError, ValueError, pa.ArrowException):
        return [None]
    return found


def _place(entry: Entry) -> Path:
    return Path(f"changes at {entry.position}")


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, RankTowerError) else repr(error)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


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
        low, end = min(info.watermark for info in infos), self.records.last()
        self.dtypes = frozenset(info.dtype for info in infos)
        if not self.low <= low <= self.at or end < self.end:
            self.since, self.at = resume(self.records, low)
            self.end = end
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
            append_all(dead, encode_dead(letters))
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

    `tell` hears of what goes wrong with a bundle, once; it is tried again at the next look, the others go on.
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
        self._said = ""  # the last problem with the store
        self._resting: set[str] = set()  # bundles that failed since they were looked at
        self.problems: dict[str, str] = {}  # by bundle: why not all is embedded
        self.lines: dict[str, Line] = {}  # by bundle
        self.dead = 0  # changes that could not be embedded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def look(self) -> None:
        """See which bundles are live. Raises StoreError where that cannot be seen."""
        live: dict[str, list[ReleaseInfo]] = {}
        for info in self._store.list():
            if not info.damage and self._only in (None, info.bundle_id):
                live.setdefault(info.bundle_id, []).append(info)
        self.lines = {bundle_id: line for bundle_id, line in self.lines.items() if bundle_id in live}
        self.problems = {bundle_id: problem for bundle_id, problem in self.problems.items() if bundle_id in live}
        for bundle_id, infos in live.items():
            try:
                if bundle_id in self.lines:
                    self.lines[bundle_id].follow(infos)
                else:
                    self.lines[bundle_id] = self._open(infos)
                self._check_end(self.lines[bundle_id])
                self._resting.discard(bundle_id)
            except Exception as error:  # whatever is wrong with it, the others go on
                self._rest(bundle_id, error)
        self._store.drop_cached(self._cache_dir, {line.release_id for line in self.lines.values()})

    def step(self) -> int:
        """Embed the next entries for each bundle; returns how many changes that were, 0 once nothing is left to do."""
        done = 0
        for bundle_id, line in self.lines.items():
            if bundle_id not in self._resting:
                try:
                    done += self._advance(line)
                    self.problems.pop(bundle_id, None)
                except Exception as error:  # as above
                    self._rest(bundle_id, error)
        return done

    def catch_up(self) -> int:
        """Embed all that there is, once; returns how many changes that were, summed over bundles.

        `problems` says then for which bundles it is not all.
        """
        self.look()
        done = 0
        while step := self.step():
            done += step
        return done

    def run(self, stopping: Event) -> None:
        """Go on until told to stop, whatever fails; tell of the state, and of dead changes, at most once a minute."""
        look_at, tell_at, dead_at, done, dead = 0.0, monotonic() + TELL_S, 0.0, 0, self.dead
        while not stopping.is_set():
            try:
                if monotonic() >= look_at:
                    self.look()
                    look_at = monotonic() + LOOK_S
                handled = self.step()
                self._said = ""
            except Exception as error:  # whatever the store's client raises, this process lives on
                problem = f"trying again every {STORE_PAUSE_S:g} s: {error}"
                if problem != self._said:
                    self._tell(problem)
                self._said = problem
                stopping.wait(STORE_PAUSE_S)
                continue
            done += handled
            if self.dead > dead and monotonic() >= dead_at:
                self._tell(dead_told(self.dead - dead))
                dead, dead_at = self.dead, monotonic() + TELL_S
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

    def _rest(self, bundle_id: str, error: Exception) -> None:
        """Leave the bundle alone until the next look."""
        self._resting.add(bundle_id)
        problem = f"bundle {bundle_id} gets no updates: {_told(error)}"
        if self.problems.get(bundle_id) != problem:
            self._tell(problem)
            self.problems[bundle_id] = problem


def dead_told(count: int) -> str:
    return f"{count:,} change{'s' * (count != 1)} could not be embedded: see `ranktower update --dead`"
