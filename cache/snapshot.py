"""A table of records by id as one file: written in a stream, then memory-mapped, never parsed, shared by all workers.

    header     1,024 bytes, little-endian, ends with the sha256 of what is before it
    records    at 4,096; row i at i * stride: plain values, the stride a multiple of 64 bytes, padded with zeros (users
               int32; items of a head that has its own graph f32 or f16); or packed by kernel.record, whose layout says
               the stride
    keys       (n,) uint64: the int64 id itself, or the salted hash of the string id
    offsets    (n + 1,) uint64 into `text`; only with string ids
    text       UTF-8 of all string ids, end to end; only with string ids
    buckets    (m, 16) uint32, the index over the keys (kernel.reference)
    hashes     sha256 of every 2 MiB of what lies between header and here

Sections start at multiples of 64 bytes and are found by name, so a later version may add some without a change for its
readers. The header holds the sha256 of the hashes, and the hash of the header is the
file's id.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.durable import rename_durably
from cache.errors import SnapshotError
from cache.pages import read_into_huge_pages
from cache.parallel import in_order
from kernel.engine import Index, Table, build_index, hash_texts, open_index, open_table, pack
from kernel.errors import KernelError, RecordError
from kernel.head import HeadSpec, Scorer
from kernel.ids import Texts
from kernel.plain import ItemLayout, item_layout
from kernel.record import Dtype
from kernel.reference import BUCKET_WORDS, bucket_count

Kind = Literal["items", "users"]
IdType = Literal["int", "string"]
Layout = Literal["plain", "quads"]
Ids = Sequence[int] | Sequence[str] | NDArray[Any] | Texts

MAGIC, VERSION, LITTLE_ENDIAN = b"RTSNAP\r\n", 3, 0x01020304
DTYPES: dict[str, str] = {"f32": "<f4", "f16": "<f2", "int8": "|i1", "int32": "<i4"}
HEADER_BYTES, RECORDS_AT, ALIGNMENT, PIECE_BYTES = 1024, 4096, 64, 2 << 20
MAX_SECTIONS, MAX_ID_BYTES, MAX_ROWS = 16, 1024, 2**31 - 1
FIRST_SALT, SALTS = 1, 8
COPY_ROWS = 65_536  # string ids hashed or compared at a time

# magic, version, endianness, sections, file bytes, count, record size, stride, salt,
# kind, id type, dtype, layout, owner, root
_HEADER = struct.Struct("<8sIIIxxxxQQQQQ8s8s8s16s64s32s")
_SECTION = struct.Struct("<16sQQ")  # name, offset, size


class Section(NamedTuple):
    offset: int
    size: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the first kilobyte says."""

    kind: Kind
    owner: str  # bundle id of items, spec id of users
    id_type: IdType
    record_dtype: str
    record_size: int  # values
    stride: int  # bytes
    count: int
    salt: int
    layout: Layout  # of a record: its values in a row, or packed by kernel.record
    file_bytes: int
    root: bytes  # sha256 of the section `hashes`
    sections: Mapping[str, Section]

    def pack(self) -> bytes:
        fixed = _HEADER.pack(
            *(MAGIC, VERSION, LITTLE_ENDIAN, len(self.sections), self.file_bytes, self.count, self.record_size),
            *(self.stride, self.salt, self.kind.encode(), self.id_type.encode(), self.record_dtype.encode()),
            *(self.layout.encode(), self.owner.encode(), self.root),
        )
        table = b"".join(_SECTION.pack(name.encode(), *section) for name, section in self.sections.items())
        body = (fixed + table).ljust(HEADER_BYTES - 32, b"\0")
        return body + hashlib.sha256(body).digest()

    @classmethod
    def unpack(cls, path: Path, raw: bytes) -> Header:
        """Raises SnapshotError when these are not the first bytes of a snapshot that this machine and version read."""
        if not raw.startswith(MAGIC):
            raise SnapshotError(f"{path} is not a snapshot (it starts with {raw[:8]!r}): publish the release again")
        if len(raw) < HEADER_BYTES:
            raise SnapshotError(f"{path} is cut within its header ({len(raw)} bytes): fetch or publish it again")
        _, version, endianness, sections, *numbers = _HEADER.unpack_from(raw)
        if endianness != LITTLE_ENDIAN or sys.byteorder != "little":
            raise SnapshotError(
                f"{path}: snapshots are little-endian, this file or machine is not: publish it elsewhere"
            )
        if version != VERSION:
            raise SnapshotError(f"{path} has format {version}, this version reads {VERSION}: publish the release again")
        if hashlib.sha256(raw[: HEADER_BYTES - 32]).digest() != raw[HEADER_BYTES - 32 : HEADER_BYTES]:
            raise SnapshotError(f"{path}: the header has changed since it was written: fetch or publish it again")
        if sections > MAX_SECTIONS:
            raise SnapshotError(
                f"{path} claims {sections} sections, at most {MAX_SECTIONS} fit: publish the release again"
            )
        table = [_SECTION.unpack_from(raw, _HEADER.size + k * _SECTION.size) for k in range(sections)]
        file_bytes, count, size, stride, salt, *texts = numbers
        kind, id_type, dtype, layout, owner = (text.rstrip(b"\0").decode() for text in texts[:5])
        return cls(
            kind=kind,
            owner=owner,
            id_type=id_type,
            record_dtype=dtype,
            record_size=size,
            stride=stride,
            count=count,
            salt=salt,
            layout=layout,
            file_bytes=file_bytes,
            root=texts[5],
            sections={name.rstrip(b"\0").decode(): Section(offset, length) for name, offset, length in table},
        )


# --- reading ---------------------------------------------------------------------------------------------------------


class Snapshot:
    """An opened table. Immutable; its memory is unmapped when the last array over it is gone."""

    def __init__(self, path: Path, header: Header, mapped: mmap.mmap) -> None:
        self.path, self.header = path, header
        self.id = hashlib.sha256(mapped[:HEADER_BYTES]).hexdigest()[:16]
        self._mapped = mapped
        self.keys = self._array("keys", "<u8")  # (n,) uint64
        self.buckets = self._array("buckets", "<u4").reshape(-1, BUCKET_WORDS)
        self._offsets = self._array("offsets", "<u8").view(np.int64)  # (n + 1,) or empty
        self._text = self._array("text", "|u1")
        texts = header.id_type == "string"
        self.finder = open_index(
            Index(
                self.buckets,
                header.count,
                self._offsets.view(np.uint64) if texts else None,
                self._text if texts else None,
                header.salt,
            )
        )

    @classmethod
    def open(cls, path: Path) -> Snapshot:
        """Map the file. Raises SnapshotError unless it is whole by its sizes; `verify` checks its content."""
        try:
            with path.open("rb") as stream:
                header = _read_header(path, stream)
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise SnapshotError(f"{path} cannot be opened ({error.strerror}): fetch or publish it again") from error
        try:
            return cls(path, header, mapped)
        except KernelError as error:
            raise SnapshotError(f"{path}: {error}: fetch or publish it again") from error

    @cached_property
    def records(self) -> NDArray[Any]:
        """(n, record size) of a plain table, rows a stride apart."""
        header, dtype = self.header, DTYPES[self.header.record_dtype]
        if header.layout != "plain":
            raise SnapshotError(f"{self.path} holds packed records: open its table with their head")
        return np.ndarray(
            (header.count, header.record_size),
            dtype,
            buffer=self._mapped,
            offset=header.sections["records"].offset,
            strides=(header.stride, np.dtype(dtype).itemsize),
        )

    @cached_property
    def rows(self) -> NDArray[np.uint8]:
        """(n, stride): the records as octets."""
        return self._array("records", "|u1").reshape(len(self), self.header.stride)

    def table(self, head: HeadSpec, graph: Scorer | None = None) -> Table:
        """The records as the kernel, or the head's own graph, scores them. Raises SnapshotError unless they are of this
        head."""
        found = (self.header.layout, self.header.record_size, self.header.stride)
        try:
            layout = item_layout(head, self.dtype)
            wanted = (layout.form, head.item_size, layout.stride)
            if found != wanted:
                raise KernelError(f"its records are {found} (layout, floats, stride), the head reads {wanted}")
            return open_table(layout, self.rows, self.finder, graph)
        except KernelError as error:
            raise SnapshotError(f"{self.path}: {error}: publish the release again") from error

    @property
    def dtype(self) -> Dtype:
        """Of item records."""
        return self.header.record_dtype  # type: ignore[return-value]  # a layout refuses another

    @property
    def kind(self) -> Kind:
        return self.header.kind

    @property
    def owner(self) -> str:
        return self.header.owner

    @property
    def id_type(self) -> IdType:
        return self.header.id_type

    @property
    def record_size(self) -> int:
        return self.header.record_size

    def __len__(self) -> int:
        return self.header.count

    def lookup(self, ids: Ids) -> NDArray[np.int32]:
        """Rows (b,) int32 of ids, -1 where unknown. Raises SnapshotError when the ids are not of the table's type."""
        if self.id_type == "int":
            return self.finder.lookup(as_integers(ids))
        return self.finder.lookup(as_texts(ids))

    def ids(self, rows: NDArray[Any] | slice = slice(None)) -> NDArray[Any]:
        """Ids of rows: int64, or str in an object array."""
        if self.id_type == "int":
            return self.keys[rows].view(np.int64)
        wanted = np.arange(len(self))[rows]
        starts, ends = self._offsets[wanted], self._offsets[wanted + 1]
        texts = np.empty(len(wanted), object)
        texts[:] = [bytes(self._text[a:b]).decode() for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        return texts

    def settle(self) -> float:
        """Have the whole file in memory, in huge pages where the system has them for files; returns their share."""
        return read_into_huge_pages(self.path, self._mapped)

    def verify(self) -> None:
        """Read the whole file; raise SnapshotError naming the first piece that is not as it was written."""
        stored = self._array("hashes", "|u1").tobytes()
        if hashlib.sha256(stored).digest() != self.header.root:
            raise SnapshotError(f"{self.path}: its list of hashes has changed: fetch or publish it again")
        for piece, found in enumerate(self._hashes()):
            if found != stored[32 * piece : 32 * piece + 32]:
                raise SnapshotError(
                    f"{self.path} has changed in the {PIECE_BYTES} bytes from {RECORDS_AT + piece * PIECE_BYTES}: "
                    "fetch or publish it again"
                )

    def _hashes(self) -> Iterable[bytes]:
        view = memoryview(self._mapped)[RECORDS_AT : self.header.sections["hashes"].offset]
        return (hashlib.sha256(view[at : at + PIECE_BYTES]).digest() for at in range(0, len(view), PIECE_BYTES))

    def _array(self, name: str, dtype: str) -> NDArray[Any]:
        section = self.header.sections.get(name, Section(0, 0))
        return np.frombuffer(self._mapped, dtype, section.size // np.dtype(dtype).itemsize, section.offset)


def read_header(path: Path) -> Header:
    """What a file says of itself, without mapping it. Raises SnapshotError unless it is whole by its sizes."""
    try:
        with path.open("rb") as stream:
            return _read_header(path, stream)
    except OSError as error:
        raise SnapshotError(f"{path} cannot be opened ({error.strerror}): fetch or publish it again") from error


def _read_header(path: Path, stream: BinaryIO) -> Header:
    header = Header.unpack(path, stream.read(HEADER_BYTES))
    size = os.fstat(stream.fileno()).st_size
    if size != header.file_bytes:
        raise SnapshotError(f"{path} has {size} bytes, not {header.file_bytes}: fetch or publish it again")
    _check_sections(path, header)
    return header


def _check_sections(path: Path, header: Header) -> None:
    """Raise SnapshotError unless every section lies within the file and has the size that its content asks for."""
    if (
        header.record_dtype not in DTYPES
        or header.kind not in ("items", "users")
        or header.id_type not in ("int", "string")
        or header.layout not in ("plain", "quads")
    ):
        raise SnapshotError(
            f"{path} holds {header.record_dtype} {header.layout} records of {header.kind} by {header.id_type} id, "
            "unknown to this version: publish the release again"
        )
    count, text_bytes = header.count, header.sections.get("text", Section(0, -1)).size
    wanted = section_sizes(count, header.stride, header.id_type, text_bytes)
    wanted["hashes"] = _hashes_size(header.sections.get("hashes", Section(0, 0)).offset)
    if count > MAX_ROWS:
        raise SnapshotError(f"{path} claims {count} rows, at most {MAX_ROWS} fit: publish the release again")
    for name, size in wanted.items():
        section = header.sections.get(name)
        if section is None or section.size != size or size < 0 or section.offset % ALIGNMENT:
            raise SnapshotError(f"{path}: section {name} is {section}, not of {size} bytes: publish the release again")
    if any(offset < RECORDS_AT or offset + size > header.file_bytes for offset, size in header.sections.values()):
        raise SnapshotError(f"{path}: a section lies outside of the file: publish the release again")
    if header.stride < header.record_size * np.dtype(DTYPES[header.record_dtype]).itemsize:
        raise SnapshotError(f"{path}: records of {header.record_size} values overlap: publish the release again")


def section_sizes(count: int, stride: int, id_type: IdType, text_bytes: int = 0) -> dict[str, int]:
    """Bytes of every section of a table but the hashes, in the order of the file. `text_bytes`: of all string ids."""
    texts = {"offsets": 8 * (count + 1), "text": text_bytes} if id_type == "string" else {}
    buckets = 4 * BUCKET_WORDS * bucket_count(count)
    return {"records": count * stride, "keys": 8 * count, **texts, "buckets": buckets}


def file_bytes(count: int, stride: int, id_type: IdType, text_bytes: int = 0) -> int:
    """Bytes of the file that `SnapshotWriter` makes of so many rows."""
    end = RECORDS_AT
    for size in section_sizes(count, stride, id_type, text_bytes).values():
        end = _aligned(end) + size
    return _aligned(end) + _hashes_size(_aligned(end))


def _hashes_size(hashes_at: int) -> int:
    return 32 * -(-(hashes_at - RECORDS_AT) // PIECE_BYTES)


def as_integers(ids: Ids) -> NDArray[np.int64]:
    """(b,) int64. Raises SnapshotError unless all ids are integers of 64 bits; True is not one."""
    if isinstance(ids, Texts):
        raise SnapshotError("this table has integer ids, got texts: send integers of 64 bits")
    try:
        found = np.asarray(ids)
    except (ValueError, OverflowError) as error:
        raise SnapshotError(f"ids do not form one column ({error}): send integers") from error
    if found.dtype.kind == "i" or not len(found):
        return np.ascontiguousarray(found, np.int64)
    if found.dtype.kind == "u" and int(found.max()) < 2**63:
        return found.astype(np.int64)
    raise SnapshotError(f"this table has integer ids, got {ids[0]!r}: send integers of 64 bits")


def as_texts(ids: Ids) -> Texts:
    """Raises SnapshotError unless all ids are text that UTF-8 can hold."""
    if isinstance(ids, Texts):
        return ids
    texts: list[Any] = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    try:
        return Texts.of(texts)
    except (TypeError, AttributeError) as error:
        wrong = next(value for value in texts if not isinstance(value, str))
        raise SnapshotError(f"this table has text ids, got {wrong!r}: send text") from error
    except UnicodeEncodeError as error:
        raise SnapshotError(
            f"an id is not text ({error.object[error.start : error.end]!r}): send valid Unicode"
        ) from error


def may_hold(ids: NDArray[Any] | Texts) -> NDArray[np.bool_]:
    """(n,) which of these ids a table may have: texts of 1 to 1,024 bytes, any integers."""
    return (ids.sizes > 0) & (ids.sizes <= MAX_ID_BYTES) if isinstance(ids, Texts) else np.ones(len(ids), np.bool_)


# --- writing ---------------------------------------------------------------------------------------------------------


class SnapshotWriter:
    """Streams batches into a new snapshot: 8 bytes of memory a row, and the batch. The file appears only when finished.

    with SnapshotWriter(path, kind="items", owner=bundle_id, id_type="int", layout=layout) as writer:
        writer.append(ids, records)
        snapshot = writer.finish()

    Without a layout records are `record_size` int32 each.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: Kind,
        owner: str,
        id_type: IdType,
        layout: ItemLayout | None = None,
        record_size: int = 0,
    ) -> None:
        self.path, self.kind, self.owner, self.id_type, self.layout = path, kind, owner, id_type, layout
        self.record_dtype = layout.dtype if layout else "int32"
        self.record_size = layout.head.item_size if layout else record_size
        self.stride = layout.stride if layout else _aligned(4 * record_size)
        self.count = 0
        self._keys: list[NDArray[np.uint64]] = []
        self._sizes: list[NDArray[np.int64]] = []  # bytes of each string id
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._spool_path = self._temporary.with_name(self._temporary.name + ".ids")

    def __enter__(self) -> SnapshotWriter:
        self._stream: BinaryIO = self._temporary.open("w+b")
        self._spool: BinaryIO = self._spool_path.open("w+b")  # string ids until the records end
        self._stream.seek(RECORDS_AT)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()
        self._spool.close()
        self._temporary.unlink(missing_ok=True)
        self._spool_path.unlink(missing_ok=True)

    def append(self, ids: Ids, records: NDArray[Any]) -> None:
        """Add rows: ids (b,), records (b, record size), or (b, stride) uint8 that a layout has packed already.

        Raises SnapshotError naming the item with a NaN, an infinity or a number that the dtype cannot hold.
        """
        packed = self.layout is not None and records.dtype == np.uint8
        if records.shape != (len(ids), self.stride if packed else self.record_size):
            raise SnapshotError(
                f"{self.path}: {len(ids)} ids with records {records.shape}, not (b, {self.record_size})"
            )
        if self.count + len(ids) > MAX_ROWS:
            raise SnapshotError(f"{self.path}: more than {MAX_ROWS} {self.kind} do not fit one table: shard them")
        rows = records if packed else self.packed(ids, records)
        if self.id_type == "int":
            self._keys.append(as_integers(ids).view(np.uint64))
        else:
            self._spool_texts(Texts.of(ids.tolist()) if isinstance(ids, Texts) else as_texts(ids))
        self._stream.write(np.ascontiguousarray(rows).data)
        self.count += len(ids)

    def finish(self, *, durable: bool = True) -> Snapshot:
        """Index the ids, write what follows the records, sync and put the file in its place.

        What need not be durable does not wait for the disk. Raises SnapshotError naming an id that came twice.
        """
        sections = {"records": Section(RECORDS_AT, self.count * self.stride)}
        keys, salt = self._distinct_keys()
        self._section(sections, "keys", [keys])
        if self.id_type == "string":
            self._section(sections, "offsets", [self._offsets()])
            self._section(sections, "text", self._spooled())
        self._section(sections, "buckets", [build_index(keys)])
        hashes_at = self._pad()
        hashes = b"".join(self._hash_pieces(hashes_at))
        self._stream.seek(hashes_at)
        self._section(sections, "hashes", [hashes])
        header = Header(
            kind=self.kind,
            owner=self.owner,
            id_type=self.id_type,
            record_dtype=self.record_dtype,
            record_size=self.record_size,
            stride=self.stride,
            count=self.count,
            salt=salt,
            layout=self.layout.form if self.layout else "plain",
            file_bytes=self._stream.tell(),
            root=hashlib.sha256(hashes).digest(),
            sections=sections,
        )
        self._stream.seek(0)
        self._stream.write(header.pack())
        self._stream.flush()
        if durable:
            os.fsync(self._stream.fileno())
            rename_durably(self._temporary, self.path)
        else:
            os.replace(self._temporary, self.path)
        return Snapshot.open(self.path)

    def packed(self, ids: Ids, records: NDArray[Any], start: int = 0) -> NDArray[np.uint8]:
        """Rows (b, stride) as `append` writes them. Raises SnapshotError naming an item that does not fit.

        `start`: how many rows come before these in what is appended next. Several threads may pack.
        """
        if self.layout is not None:
            try:
                return pack(self.layout, records)
            except RecordError as error:
                raise self._not_finite(ids, error.row, start) from error
        padded = np.zeros((len(ids), self.stride // 4), "<i4")
        padded[:, : self.record_size] = records
        return padded.view(np.uint8)

    def _not_finite(self, ids: Ids, row: int, start: int) -> SnapshotError:
        return SnapshotError(
            f"the record of {self.kind[:-1]} {ids[row]!r} (row {self.count + start + row}) holds NaN or infinity, or "
            f"more than {self.record_dtype} can: check that item's features, or train and export again"
        )

    # --- ids and keys

    def _spool_texts(self, texts: Texts) -> None:
        wrong = np.flatnonzero(~may_hold(texts))
        if len(wrong):
            shown = texts[wrong[:1]].tolist()[0][:40]
            raise SnapshotError(
                f"id {shown!r} of row {self.count + int(wrong[0])} has {texts.sizes[wrong[0]]} bytes: "
                f"ids have 1 to {MAX_ID_BYTES}"
            )
        self._spool.write(texts.data.data)  # `Texts.of` lays them end to end
        self._sizes.append(texts.sizes)
        self._keys.append(hash_texts(texts, FIRST_SALT))

    def _distinct_keys(self) -> tuple[NDArray[np.uint64], int]:
        """All keys and the salt that made them distinct. Raises SnapshotError when an id came twice."""
        keys = np.concatenate([np.empty(0, np.uint64), *self._keys])
        self._keys = [keys]
        for salt in range(FIRST_SALT, FIRST_SALT + SALTS):
            if salt > FIRST_SALT:  # two different texts had one hash: take another
                keys = self._hash_again(salt)
            pair = equal_pair(keys)
            if pair is None:
                return keys, salt if self.id_type == "string" else 0
            first, second = (self._id_at(row, keys) for row in pair)
            if first == second:
                raise SnapshotError(
                    f"{self.kind[:-1]} {first!r} comes twice, in rows {pair[0]} and {pair[1]}: keep one row for each"
                )
        raise SnapshotError(f"{self.path}: ids collide under {SALTS} salts: are they made to?")

    def _offsets(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), *self._sizes]).cumsum()

    def _id_at(self, row: int, keys: NDArray[np.uint64]) -> int | str:
        if self.id_type == "int":
            return int(keys.view(np.int64)[row])
        start, end = self._offsets()[row : row + 2].tolist()
        self._spool.seek(start)
        return self._spool.read(end - start).decode()

    def _hash_again(self, salt: int) -> NDArray[np.uint64]:
        offsets = self._offsets()
        parts = [np.empty(0, np.uint64)]
        for start in range(0, self.count, COPY_ROWS):
            places = offsets[start : start + COPY_ROWS + 1]
            self._spool.seek(places[0])
            flat = self._spool.read(int(places[-1] - places[0]))
            starts = places[:-1] - places[0]
            parts.append(hash_texts(Texts(np.frombuffer(flat, np.uint8), starts, np.diff(places)), salt))
        return np.concatenate(parts)

    def _spooled(self) -> Iterable[bytes]:
        self._spool.seek(0)
        return iter(lambda: self._spool.read(PIECE_BYTES), b"")

    # --- sections

    def _pad(self) -> int:
        """Write zeros up to the next multiple of 64; returns the place."""
        at = self._stream.tell()
        self._stream.write(bytes(_aligned(at) - at))
        return _aligned(at)

    def _section(self, sections: dict[str, Section], name: str, parts: Iterable[Any]) -> None:
        start = self._pad()
        for part in parts:
            self._stream.write(memoryview(part).cast("B") if len(part) else b"")
        sections[name] = Section(start, self._stream.tell() - start)

    def _hash_pieces(self, end: int) -> Iterable[bytes]:
        self._stream.flush()
        handle = self._stream.fileno()

        def hashed(at: int) -> bytes:
            return hashlib.sha256(os.pread(handle, min(PIECE_BYTES, end - at), at)).digest()

        return in_order(hashed, range(RECORDS_AT, end, PIECE_BYTES))


def equal_pair(keys: NDArray[np.uint64]) -> tuple[int, int] | None:
    """Two rows with the same key, the earlier first, or None."""
    ranked = np.sort(keys)  # a tenth of the time of sorting stably, which tells who is first
    if not (ranked[1:] == ranked[:-1]).any():
        return None
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    twice = int(np.argmax(ranked[1:] == ranked[:-1]))
    return int(order[twice]), int(order[twice + 1])


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
