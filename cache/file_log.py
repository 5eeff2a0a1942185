"""A change log in a folder: entries behind each other in files, each with its size and checksum, synced before told of.

<position, 20 digits>.log  entries from that position on; the last file is appended to, another begins after 64 MiB
floor                      the highest position announced for trimming
.lock                      held by who writes, shared by who reads: what a reader sees is on the disk

    entry     [u32 size of what follows the checksum][u32 crc32 of it][i64 Unix ms][payload]

A position is the number of octets of all entries up to and with this one. What a killed writer left of an entry is no
entry: readers stop before it, the next writer cuts it off.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cache.changes import ENTRY_BYTES, Entry
from cache.durable import locked, sync_path, write_durably
from cache.errors import StoreError, disk_error

SEGMENT_BYTES = 64 << 20
LOCK, FLOOR = ".lock", "floor"
_FRAME = struct.Struct("<II")
_TIME = struct.Struct("<q")

log = logging.getLogger(__name__)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class _End(NamedTuple):
    """Where the entries of a segment end, and when the last of all was appended."""

    base: int
    position: int
    at_ms: int


class FileLog:
    """The change log in a folder, which the first append makes. For one thread at a time."""

    def __init__(self, folder: Path, *, clock_ms: Callable[[], int] = now_ms) -> None:
        self._folder, self._clock_ms = folder, clock_ms
        self._end = _End(0, 0, 0)  # what is known of it: entries only come
        self._read_to = 0  # an entry ends here: the next `read` need not look for it

    def append(self, payloads: Sequence[bytes]) -> int:
        _check_sizes(payloads)
        with self._disk(), self._writing():
            end = self._find_end(self._bases())
            self._cut(end)
            if end.position - end.base >= SEGMENT_BYTES:
                end = _End(end.position, end.position, end.at_ms)
            at_ms = max(self._clock_ms(), end.at_ms)
            content = b"".join(_frame(at_ms, payload) for payload in payloads)
            self._write(end, content)
            self._end = _End(end.base, end.position + len(content), at_ms)
            return self._end.position

    def read(self, after: int, limit: int) -> list[Entry]:
        with self._disk(), self._reading():
            found = list(islice(self._entries(after), limit))
        if found:
            self._read_to = found[-1].position
        return found

    def last(self) -> int:
        with self._disk(), self._reading():
            return self._find_end(self._bases()).position

    def newest(self) -> Entry | None:
        with self._disk(), self._reading():
            newest = None
            for base in self._bases()[-1:]:
                for newest in self._segment(base, base):  # noqa: B007 its last is what is wanted
                    pass
            return newest

    def position_at(self, at_ms: int) -> int:
        with self._disk(), self._reading():
            bases = self._bases()
            for base in reversed(bases):
                position = base
                for entry in self._segment(base, base):
                    if entry.at_ms > at_ms:
                        break
                    position = entry.position
                if position > base:
                    return position
            return bases[0] if bases else 0

    def now_ms(self) -> int:
        return self._clock_ms()

    def trim(self, up_to: int) -> None:
        """Whole files go, never the last one."""
        with self._disk(), self._writing():
            bases = self._bases()
            for base, following in pairwise(bases):
                if following > up_to:
                    break
                self._path(base).unlink()

    def floor(self) -> int:
        with self._disk():
            return self._floor()

    def raise_floor(self, position: int) -> None:
        with self._disk(), self._writing():
            if position > self._floor():
                write_durably(self._folder / FLOOR, str(position).encode())

    # --- files

    def _path(self, base: int) -> Path:
        return self._folder / f"{base:020}.log"

    def _bases(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.log"))

    def _floor(self) -> int:
        path = self._folder / FLOOR
        try:
            return int(path.read_bytes())
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise StoreError(f"{path} holds no number ({error}): delete it") from error

    def _entries(self, after: int) -> Iterator[Entry]:
        """Those beyond a position, which need not be the end of an entry."""
        bases = self._bases()
        first = max(0, bisect_right(bases, after) - 1)
        for base, following in zip_longest(bases[first:], bases[first + 1 :]):
            start = after if after == self._read_to and after >= base else base
            yield from (entry for entry in self._segment(base, start, following) if entry.position > after)

    def _segment(self, base: int, start: int, following: int | None = None) -> Iterator[Entry]:
        """Whole entries of one file from the end of an entry on. `following` is where the next file begins."""
        path = self._path(base)
        with path.open("rb") as stream:
            size = base + os.fstat(stream.fileno()).st_size
            stream.seek(start - base)
            while (payload := _payload(stream, size - start)) is not None:
                start += _FRAME.size + len(payload)
                yield Entry(start, _TIME.unpack_from(payload)[0], payload[_TIME.size :])
            if start != following if following else _has_entry_behind(stream, start - base, size - base):
                space = "" if following else f", create an empty {size:020}.log in its place"
                raise StoreError(
                    f"{path} is damaged at octet {start - base}: restore it, or move it away{space}, and publish all "
                    "items again"
                )

    def _find_end(self, bases: list[int]) -> _End:
        base = bases[-1] if bases else 0
        known = self._end if self._end.base == base else _End(base, base, self._end.at_ms)
        if not bases:
            return _End(0, 0, 0)
        if self._path(base).stat().st_size < known.position - base:  # another log than the one that was known
            known = _End(base, base, 0)
        position, at_ms = known.position, known.at_ms
        for entry in self._segment(base, position):
            position, at_ms = entry.position, entry.at_ms
        self._end = _End(base, position, at_ms)
        return self._end

    def _cut(self, end: _End) -> None:
        """Off with what is no entry."""
        path = self._path(end.base)
        torn = path.stat().st_size - (end.position - end.base) if path.exists() else 0
        if torn:
            log.warning("%s: cut off %d octets of an entry that its writer did not complete", path, torn)
            os.truncate(path, end.position - end.base)

    def _write(self, end: _End, content: bytes) -> None:
        path = self._path(end.base)
        fresh = not path.exists()
        with path.open("ab") as stream:
            try:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), end.position - end.base)
                raise
        if fresh:
            sync_path(self._folder)

    # --- locks and errors

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with locked(self._folder / LOCK):
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Wait for who writes, who waits until all is on the disk: what is read here is never lost again."""
        try:
            stream = (self._folder / LOCK).open("rb")
        except FileNotFoundError:  # nobody ever wrote
            yield
            return
        with stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self._folder}: {disk_error(error)}") from error


# --- entries ---------------------------------------------------------------------------------------------------------


def _frame(at_ms: int, payload: bytes) -> bytes:
    content = _TIME.pack(at_ms) + payload
    return _FRAME.pack(len(content), zlib.crc32(content)) + content


def _payload(stream: BinaryIO, left: int) -> bytes | None:
    """Time and payload of the entry that begins here, None where none does that is whole."""
    if left < _FRAME.size:
        return None
    size, checksum = _FRAME.unpack(stream.read(_FRAME.size))
    if not _TIME.size <= size <= left - _FRAME.size:
        return None
    content = stream.read(size)
    return content if zlib.crc32(content) == checksum else None


def _has_entry_behind(stream: BinaryIO, start: int, size: int) -> bool:
    """Whether a whole entry follows what is no entry: then it was one, and its octets have changed."""
    if size - start < _FRAME.size:
        return False
    stream.seek(start)
    (claimed, _) = _FRAME.unpack(stream.read(_FRAME.size))
    following = start + _FRAME.size + claimed
    if following >= size:
        return False
    stream.seek(following)
    return _payload(stream, size - following) is not None


def _check_sizes(payloads: Sequence[bytes]) -> None:
    largest = max((len(payload) for payload in payloads), default=0)
    if not payloads or largest > ENTRY_BYTES:
        raise StoreError(f"an append of {len(payloads)} entries, the largest of {largest:,} octets: send fewer rows")
