"""What changed between two full publishes: append-only logs of changes, what their entries hold, and what they sum to.

    changes              item rows as they came, and ids of deleted items: the source of truth
    records/<bundle id>  the same embedded with a bundle, each entry with the stretch of `changes` that it stems from
    dead                 rows that could not be embedded, and why

An entry has a *position*: a number that never falls, the same for every reader, and meaningless otherwise. A release
names the position of `changes` up to which its items file contains what is in the log: its *watermark*. Only entries
behind it concern that release.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from cache.errors import StoreError
from kernel.ids import Ids, Texts
from model.features import IdType

CHANGES, DEAD = "changes", "dead"
ENTRY_ROWS = 1_000  # changes in one entry, at most
ENTRY_BYTES = 64 << 20  # no entry is larger
APPEND_BYTES = 8 << 20  # of one append, unless a single entry is larger

UPSERT, DELETE, RECORDS, REMOVED = b"U", b"D", b"R", b"X"
_STRETCH = struct.Struct("<cxxxIqqq")  # kind, floats of a record, since, after, until
_IDS = struct.Struct("<cxxxI")  # i or s, count

Pack = Callable[[NDArray[np.float32]], NDArray[np.uint8]]  # records to rows, (n, item size) to (n, stride)


def records_log(bundle_id: str) -> str:
    """The name of a bundle's log of records."""
    return f"records/{bundle_id}"


# --- logs ------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One entry of a log, whatever it holds."""

    position: int
    at_ms: int  # when it was appended: Unix time by the clock of who keeps the log; never falls
    payload: bytes


class ChangeLog(Protocol):
    """An append-only log that many processes write and read. Every method raises StoreError, naming log and remedy."""

    def append(self, payloads: Sequence[bytes]) -> int:
        """Add entries, one behind the other, all or none of them; returns the position of the last.

        They outlive what the store outlives. After an error they may be there all the same, or twice.
        """

    def read(self, after: int, limit: int) -> list[Entry]:
        """Up to `limit` entries whose position is beyond `after`, in their order."""

    def last(self) -> int:
        """The position of the newest entry that there ever was, 0 before the first."""

    def newest(self) -> Entry | None:
        """The last entry, None where none is left."""

    def position_at(self, at_ms: int) -> int:
        """A position that is not before any entry appended at or before that moment, and before all later ones."""

    def now_ms(self) -> int:
        """Unix time by the clock that entries are stamped with."""

    def trim(self, up_to: int) -> None:
        """Give the space back of entries at or before a position. Some may stay, none behind it goes."""

    def floor(self) -> int:
        """The highest position that was announced for trimming: who needs entries before it may come too late."""

    def raise_floor(self, position: int) -> None:
        """Announce it; a lower one than before changes nothing."""


def append_all(log: ChangeLog, payloads: Iterable[bytes]) -> int:
    """Append in parts of some megabytes, for each waits for the disk; returns the position of the last, 0 of none."""
    position, size = 0, 0
    part: list[bytes] = []
    for payload in payloads:
        if part and size + len(payload) > APPEND_BYTES:
            position, part, size = log.append(part), [], 0
        part.append(payload)
        size += len(payload)
    return log.append(part) if part else position


# --- what entries hold -----------------------------------------------------------------------------------------------


class Upserted(NamedTuple):
    """Items that are new or have changed, in an entry of `changes`."""

    rows: bytes  # an Arrow IPC stream with one batch: the columns of the items file, the name of the ids' as metadata


class Deleted(NamedTuple):
    """Items that are gone, in an entry of `changes`."""

    ids: Ids


Change = Upserted | Deleted


def encode_change(change: Change) -> bytes:
    return UPSERT + change.rows if isinstance(change, Upserted) else DELETE + _encode_ids(change.ids)


def decode_change(entry: Entry) -> Change:
    kind, content = entry.payload[:1], entry.payload[1:]
    if kind == UPSERT:
        return Upserted(content)
    if kind == DELETE:
        return Deleted(_decode_ids(content, 0)[0])
    raise _unknown(CHANGES, entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What a bundle makes of the entries of `changes` from `after` (excluded) to `until`, in an entry of its log.

    Stretches follow each other: whoever holds all up to a position between `after` and `until` may add this one, and
    nobody else. So an entry that comes twice, or one of another line of entries, changes nothing. `since` is where the
    line begins; it goes on from there without a gap.
    """

    since: int
    after: int
    until: int
    ids: Ids  # (n,)
    records: NDArray[np.float32] | None  # (n, item size); None where the items are gone


def encode_embedded(embedded: Embedded) -> bytes:
    records = embedded.records
    kind, size = (REMOVED, 0) if records is None else (RECORDS, records.shape[1])
    head = _STRETCH.pack(kind, size, embedded.since, embedded.after, embedded.until)
    values = b"" if records is None else np.ascontiguousarray(records, "<f4").tobytes()
    return head + _encode_ids(embedded.ids) + values


def decode_embedded(entry: Entry) -> Embedded:
    """The arrays are views of the payload."""
    if entry.payload[:1] not in (RECORDS, REMOVED):
        raise _unknown("records", entry)
    kind, size, since, after, until = _STRETCH.unpack_from(entry.payload)
    ids, end = _decode_ids(entry.payload, _STRETCH.size)
    records = np.frombuffer(entry.payload, "<f4", offset=end).reshape(len(ids), size) if kind == RECORDS else None
    return Embedded(since=since, after=after, until=until, ids=ids, records=records)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A change that a bundle could not take."""

    bundle_id: str
    position: int  # of its entry in `changes`
    id: int | str | None  # None where the ids of the entry cannot be read
    reason: str


class _Dead(msgspec.Struct):
    """Letters in a row that differ in their ids alone: a reason is long."""

    bundle_id: str
    position: int
    reason: str
    ids: list[int | str | None]


def encode_dead(letters: Sequence[DeadLetter]) -> list[bytes]:
    """Entries of the log `dead`, each far below the largest."""
    parts = (letters[start : start + ENTRY_ROWS] for start in range(0, len(letters), ENTRY_ROWS))
    return [msgspec.json.encode([*_grouped(part)]) for part in parts]


def _grouped(letters: Sequence[DeadLetter]) -> Iterator[_Dead]:
    for (bundle_id, position, reason), same in groupby(letters, attrgetter("bundle_id", "position", "reason")):
        yield _Dead(bundle_id, position, reason, [letter.id for letter in same])


def decode_dead(entry: Entry) -> list[DeadLetter]:
    try:
        found = msgspec.json.decode(entry.payload, type=list[_Dead])
    except msgspec.MsgspecError as error:
        raise _unknown(DEAD, entry) from error
    return [
        DeadLetter(bundle_id=each.bundle_id, position=each.position, id=item, reason=each.reason)
        for each in found
        for item in each.ids
    ]


def _unknown(log: str, entry: Entry) -> StoreError:
    return StoreError(
        f"the entry of the log {log!r} at {entry.position} begins with {entry.payload[:8]!r}, which this version does "
        "not read: use the version that wrote it"
    )


def _encode_ids(ids: Ids) -> bytes:
    """Padded to a multiple of 8, so that what follows lies as numbers should."""
    if isinstance(ids, Texts):
        whole = Texts.of(ids.tolist())
        content = whole.sizes.astype("<u4").tobytes() + whole.data.tobytes()
        return _IDS.pack(b"s", len(ids)) + content + bytes(-len(content) % 8)
    return _IDS.pack(b"i", len(ids)) + np.ascontiguousarray(ids, "<i8").tobytes()


def _decode_ids(payload: bytes, offset: int) -> tuple[Ids, int]:
    """The ids, and where they end."""
    kind, count = _IDS.unpack_from(payload, offset)
    start = offset + _IDS.size
    if kind == b"i":
        return np.frombuffer(payload, "<i8", count, start), start + 8 * count
    if kind != b"s":
        raise StoreError(f"its ids are of kind {kind!r}, neither integers nor texts: use the version that wrote it")
    sizes = np.frombuffer(payload, "<u4", count, start).astype(np.int64)
    used = 4 * count + int(sizes.sum())
    text = np.frombuffer(payload, np.uint8, used - 4 * count, start + 4 * count)
    return Texts(text, np.cumsum(sizes) - sizes, sizes), start + used + -used % 8


# --- what they sum to ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Newer:
    """What came after a release, as far as it is here."""

    overlay: Path | None = None  # a file (cache/overlay.py), None while nothing has changed behind the watermark
    looked_s: float | None = field(default=None, compare=False)  # monotonic time of the last look that succeeded
    behind_since_s: float | None = None  # since when, as found then, a change has been in the log that is not here
    dead: int = 0  # items whose last change the bundle could not take, and entries of which it could read no item


class Fold:
    """All that has changed behind a release's watermark, the latest of each item. For one thread.

    To add costs what comes, whatever is there. An item is in `ids` or in `deleted` or in neither, never in both.
    """

    def __init__(self, watermark: int, id_type: IdType, width: int, pack: Pack | None = None) -> None:
        """Nothing yet. Rows are records (n, width) float32, or what `pack` makes of them, (n, width) uint8."""
        self.watermark = watermark  # all of `changes` up to here is in it, or in the release
        self._id_type, self._pack = id_type, pack
        self._space = np.empty((0, width), np.float32 if pack is None else np.uint8)
        self._ids: list[int | str] = []  # of the rows
        self._changed: list[int] = []  # positions, of the rows
        self._places: dict[int | str, int] = {}
        self._deleted: dict[int | str, int] = {}  # positions

    def __len__(self) -> int:
        """How many items it has something to say of."""
        return len(self._ids) + len(self._deleted)

    @property
    def ids(self) -> Ids:
        """(n,) items that are new or have changed."""
        return _as_ids(self._ids, self._id_type)

    @property
    def rows(self) -> NDArray[Any]:
        """(n, width) in their order: a view, until something is added."""
        return self._space[: len(self._ids)]

    @property
    def deleted(self) -> Ids:
        """(m,)"""
        return _as_ids([*self._deleted], self._id_type)

    def changed_at(self, item: int | str) -> int:
        """Position of the last change of an item, 0 where there is none."""
        place = self._places.get(item)
        return self._deleted.get(item, 0) if place is None else self._changed[place]

    def add(self, entry: Embedded) -> bool:
        """Take the next entry of the bundle's log; returns False for one that does not follow what is known.

        Raises what `pack` raises; then nothing has changed.
        """
        if not entry.after <= self.watermark < entry.until:
            return False
        ids = entry.ids.tolist()
        if entry.records is None:
            for item in ids:
                self._remove(item)
            self._deleted.update(dict.fromkeys(ids, entry.until))
        else:
            rows = entry.records if self._pack is None else self._pack(entry.records)
            places = [self._place(item, entry.until) for item in ids]
            self._reserve(len(self._ids))
            self._space[places] = rows
        self.watermark = entry.until
        return True

    def _place(self, item: int | str, position: int) -> int:
        """The row of an item from now on."""
        self._deleted.pop(item, None)
        place = self._places.setdefault(item, len(self._ids))
        if place == len(self._ids):
            self._ids.append(item)
            self._changed.append(position)
        self._changed[place] = position
        return place

    def _remove(self, item: int | str) -> None:
        """The last row moves to where the item was."""
        place = self._places.pop(item, None)
        if place is None:
            return
        last, changed = self._ids.pop(), self._changed.pop()
        if place < len(self._ids):
            self._space[place] = self._space[len(self._ids)]
            self._ids[place], self._changed[place] = last, changed
            self._places[last] = place

    def _reserve(self, count: int) -> None:
        if count > len(self._space):
            wider = np.empty((max(count, 2 * len(self._space)), self._space.shape[1]), self._space.dtype)
            wider[: len(self._space)] = self._space
            self._space = wider


def _as_ids(ids: Sequence[int | str], id_type: IdType) -> Ids:
    return Texts.of([str(item) for item in ids]) if id_type == "string" else np.asarray(ids, np.int64)
