"""The unit of deployment as a folder: one bundle, the snapshot it embedded, a manifest with the hash of every chunk.

    release.json   id, created, bundle_id, snapshot_id, head, count, index, inputs, watermark, report, chunk_bytes,
                   files [{path, size, chunks [sha256]}]
    bundle/...     the bundle, as exported
    items.snap     the item table
    items.faiss    optional: an index over the item heads, for requests without candidates
    inputs.hash    (n,) uint64: fingerprint of each item's encoded input, in the table's order

A user table is published by itself, with a manifest of the same kind (users.json beside users.snap). Names end in the
hash of their manifest, so neither a changed manifest nor another's can pass for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cache.durable import locked_now
from cache.errors import StoreError
from cache.parallel import in_order
from cache.snapshot import Snapshot
from kernel.head import HeadSpec

FORMAT = 1
CHUNK_BYTES = (
    2 << 20
) - 4096  # 2 MiB as a Redis value, with its header, would take the allocator's next class: 2.5 MiB
RELEASE, USERS = "release.json", "users.json"
BUNDLE, ITEMS, INDEX, INPUTS, USER_TABLE = "bundle", "items.snap", "items.faiss", "inputs.hash", "users.snap"
NAME = re.compile(r"\d{8}T\d{9}-[0-9a-f]{12}")


class IndexKind(StrEnum):
    """What answers requests without candidates. Known here, so that a command line needs no FAISS to check it."""

    NONE = "none"
    FLAT = "flat"
    IVF_SQ8 = "ivf-sq8"


class DtypeChoice(StrEnum):
    """How item records are stored."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"


Progress = Callable[[str, int, int], None]  # stage, done, total: bytes, or items while embedding
Clock = Callable[[], datetime]


def no_progress(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file of an artifact and the sha256 of each of its chunks."""

    path: str
    size: int  # bytes
    chunks: tuple[str, ...]


class Chunk(NamedTuple):
    """Where one chunk lies, and what it must hash to."""

    path: str
    number: int
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """Named files with the hashes of their chunks: what a store moves."""

    id: str
    created: str  # ISO 8601, UTC
    snapshot_id: str
    count: int
    chunk_bytes: int
    files: tuple[StoredFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def chunks(self) -> Iterator[Chunk]:
        for file in self.files:
            for number, digest in enumerate(file.chunks):
                offset = number * self.chunk_bytes
                yield Chunk(file.path, number, offset, min(self.chunk_bytes, file.size - offset), digest)

    def file(self, path: str) -> StoredFile | None:
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Artifact):
    """The manifest of one release. `report`: what building it took, such as items embedded, reused and removed."""

    bundle_id: str
    head: HeadSpec
    index: str
    inputs: str  # name of the fingerprint that inputs.hash holds
    watermark: int  # position in the change log up to which the items hold all changes
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class UserTable(Artifact):
    """The manifest of one user table; `id` is its version."""

    spec_id: str


def index_kind(name: str, head: HeadSpec) -> IndexKind:
    """The kind of that name. Raises StoreError when there is none, or none that can search the vectors of this head."""
    if name not in list(IndexKind):
        raise StoreError(f"there is no index of kind {name!r}: use {', '.join(IndexKind)}")
    if name != IndexKind.NONE and head.kind == "onnx":
        raise StoreError("a head of kind onnx has no vectors to search: publish with --index none")
    return IndexKind(name)


def created_at(name: str) -> datetime:
    """When the release or user table of that name was made: names begin with the time."""
    return datetime.strptime(name[:18] + "000", "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)


# --- writing ---------------------------------------------------------------------------------------------------------


def seal_release(
    folder: Path,
    *,
    bundle_id: str,
    head: HeadSpec,
    index: str = "none",
    inputs: str = "",
    watermark: int = 0,
    report: Mapping[str, Any] | None = None,
    now: Clock = utc_now,
) -> Release:
    """Hash every file already in `folder`, name the release and write release.json."""
    snapshot = Snapshot.open(folder / ITEMS)
    if snapshot.owner != bundle_id:
        raise StoreError(
            f"{folder}: {ITEMS} was embedded with bundle {snapshot.owner}, not {bundle_id}: embed it again"
        )
    body = {
        "snapshot_id": snapshot.id,
        "count": len(snapshot),
        "bundle_id": bundle_id,
        "head": head.to_json(),
        "index": index,
        "inputs": inputs,
        "watermark": watermark,
        "report": dict(report or {}),
    }
    (folder / RELEASE).unlink(missing_ok=True)
    return parse_release(_seal(folder, RELEASE, body, now), str(folder))


def seal_users(folder: Path, *, now: Clock = utc_now) -> UserTable:
    """The same for a folder with users.snap, whose content is checked against its own hashes."""
    snapshot = Snapshot.open(folder / USER_TABLE)
    if snapshot.kind != "users":
        raise StoreError(f"{folder / USER_TABLE} holds {snapshot.kind}, not users: publish it as a release")
    snapshot.verify()
    body = {"snapshot_id": snapshot.id, "count": len(snapshot), "spec_id": snapshot.owner}
    (folder / USERS).unlink(missing_ok=True)
    return parse_users(_seal(folder, USERS, body, now), str(folder))


def _seal(folder: Path, manifest: str, body: Mapping[str, Any], now: Clock) -> bytes:
    created = now()
    files = [
        {"path": path.relative_to(folder).as_posix(), **_hashes(path, CHUNK_BYTES)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    whole = {
        "format": FORMAT,
        "created": created.isoformat(timespec="milliseconds"),
        "chunk_bytes": CHUNK_BYTES,
        "files": files,
        **body,
    }
    content = _written({**whole, "id": f"{_stamp(created)}-{_digest(whole)}"})
    (folder / manifest).write_bytes(content)
    return content


def _hashes(path: Path, chunk_bytes: int) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        handle = stream.fileno()
        chunks = in_order(lambda at: sha256(os.pread(handle, chunk_bytes, at)), range(0, size, chunk_bytes))
        return {"size": size, "chunks": list(chunks)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _stamp(created: datetime) -> str:
    return created.strftime("%Y%m%dT%H%M%S%f")[:-3]


def _written(whole: Mapping[str, Any]) -> bytes:
    return json.dumps(whole, indent=1).encode()


def _digest(whole: Mapping[str, Any]) -> str:
    return sha256(json.dumps(whole, sort_keys=True).encode())[:12]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_release(folder: Path) -> Release:
    """The manifest of a release folder; nothing but its own hash is checked."""
    return parse_release(_read(folder / RELEASE, "a release"), str(folder))


def read_users(folder: Path) -> UserTable:
    return parse_users(_read(folder / USERS, "a user table"), str(folder))


def parse_release(raw: bytes, source: str) -> Release:
    """Raises StoreError naming the source when this is no release manifest, or not as it was written."""
    whole, common = _parse(raw, source)
    try:
        return Release(
            **common,
            bundle_id=whole["bundle_id"],
            head=HeadSpec.from_json(whole["head"]),
            index=whole["index"],
            inputs=whole["inputs"],
            watermark=whole.get("watermark", 0),
            report=whole["report"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{source}: not a release manifest ({error!r}): publish the release again") from error


def parse_users(raw: bytes, source: str) -> UserTable:
    whole, common = _parse(raw, source)
    if "spec_id" not in whole:
        raise StoreError(f"{source}: not the manifest of a user table: publish the users again")
    return UserTable(**common, spec_id=whole["spec_id"])


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path.parent} is not {what} ({path.name}: {error.strerror}): build it again") from error


def _parse(raw: bytes, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole manifest, and the part that every artifact has."""
    try:
        whole = json.loads(raw)
        if whole["format"] != FORMAT:
            raise StoreError(f"{source} has format {whole['format']}, this version reads {FORMAT}: publish it again")
        files = tuple(_stored_file(entry, whole["chunk_bytes"]) for entry in whole["files"])
        common = {key: whole[key] for key in ("id", "created", "snapshot_id", "count", "chunk_bytes")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{source}: its manifest cannot be read ({error!r}): publish it again") from error
    if not _is_as_written(whole, raw):
        raise StoreError(f"{source}: its manifest has changed since it was written: publish it again")
    return whole, {**common, "files": files}


def _is_as_written(whole: dict[str, Any], raw: bytes) -> bool:
    """Whether the name fits, and no octet has changed, be it one that changes no meaning, as in 1E-05 for 1e-05."""
    body = {key: whole[key] for key in whole if key != "id"}
    if not NAME.fullmatch(whole["id"]) or whole["id"][-12:] != _digest(body):
        return False
    return whole["id"][:18] == _stamp(datetime.fromisoformat(whole["created"])) and raw == _written(whole)


def _stored_file(entry: Mapping[str, Any], chunk_bytes: int) -> StoredFile:
    file = StoredFile(path=entry["path"], size=entry["size"], chunks=tuple(entry["chunks"]))
    place = PurePosixPath(file.path)
    if place.is_absolute() or ".." in place.parts or not place.parts or "\\" in file.path:
        raise ValueError(f"path {file.path!r} leads out of the folder")
    if len(file.chunks) != -(-file.size // chunk_bytes):
        raise ValueError(f"{file.path} has {len(file.chunks)} chunks for {file.size} bytes")
    return file


# --- checking --------------------------------------------------------------------------------------------------------


def check_sizes(folder: Path, artifact: Artifact) -> None:
    """Raise StoreError naming the first file that is missing or of another size."""
    for file in artifact.files:
        path = folder / file.path
        found = path.stat().st_size if path.is_file() else None
        if found != file.size:
            state = "is missing" if found is None else f"has {found} bytes, not {file.size}"
            raise StoreError(f"{artifact.id}: {file.path} {state} in {folder}: publish it again")


def verify_files(folder: Path, artifact: Artifact, progress: Progress = no_progress) -> None:
    """Read every file; raise StoreError naming the first chunk that is not as it was written."""
    check_sizes(folder, artifact)
    done, chunks = 0, list(artifact.chunks())
    checked = in_order(lambda chunk: check_chunk(artifact, chunk, read_chunk(folder, chunk), str(folder)), chunks)
    for chunk, _ in zip(chunks, checked, strict=True):
        done += chunk.size
        progress("verify", done, artifact.size_bytes)


def read_chunk(folder: Path, chunk: Chunk) -> bytes:
    """Its bytes, unchecked."""
    with (folder / chunk.path).open("rb", buffering=0) as stream:
        return os.pread(stream.fileno(), chunk.size, chunk.offset)


def prepare_files(draft: Path, artifact: Artifact) -> list[Chunk]:
    """Make files of full size, holes where nothing was written yet; returns the chunks that are still wanted."""
    fresh = not draft.is_dir() or not any(draft.iterdir())
    for file in artifact.files:
        path = draft / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.truncate(file.size)
    chunks = list(artifact.chunks())
    if fresh:
        return chunks
    whole = in_order(lambda chunk: sha256(read_chunk(draft, chunk)) == chunk.sha256, chunks)
    return [chunk for chunk, found in zip(chunks, whole, strict=True) if not found]


def write_chunk(folder: Path, chunk: Chunk, content: bytes) -> None:
    """Put it in its place in a file that is there; chunks of one file may be written side by side."""
    with (folder / chunk.path).open("r+b") as stream:
        stream.seek(chunk.offset)
        stream.write(content)


def read_chunks(folder: Path, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, bytes]]:
    """Each chunk with its bytes, unchecked; a file is opened once for its run of chunks."""
    for path, run in groupby(chunks, key=attrgetter("path")):
        with (folder / path).open("rb", buffering=0) as stream:
            for chunk in run:
                stream.seek(chunk.offset)
                yield chunk, stream.read(chunk.size)


def check_chunk(artifact: Artifact, chunk: Chunk, content: bytes | None, source: str) -> bytes:
    """The content. Raises StoreError unless these are the bytes that the manifest names."""
    if content is None:
        raise StoreError(f"{artifact.id}: chunk {chunk.number} of {chunk.path} is gone from {source}: publish it again")
    if len(content) != chunk.size or sha256(content) != chunk.sha256:
        raise StoreError(
            f"{artifact.id}: chunk {chunk.number} of {chunk.path} in {source} is not as it was written "
            f"({len(content)} of {chunk.size} bytes): publish it again"
        )
    return content


def verify_release(folder: Path, progress: Progress = no_progress) -> Release:
    """Check every hash of a release folder. Raises StoreError naming file and chunk."""
    release = read_release(folder)
    verify_files(folder, release, progress)
    return release


def lock_of(copy: Path) -> Path:
    """Held alone by who fetches or drops a copy in a cache, shared by who must find it whole."""
    return copy.with_name(f".{copy.name}.lock")


def drop_cached(folder: Path, keep: set[str]) -> list[str]:
    """Delete the copies in a folder whose names are not in `keep`; who has mapped their files can still read them.

    Downloads that were cut off go too. What another process fetches or drops just now is left to it.
    """
    copies = {path.name for path in folder.glob("*") if NAME.fullmatch(path.name)}
    cut = {path.name[1:].removesuffix(".partial") for path in folder.glob(".*.partial")}
    dropped = []
    for name in sorted((copies | cut) - keep):
        with locked_now(lock_of(folder / name)) as had:
            for remains in (folder / name, folder / f".{name}.partial"):
                if had and remains.is_dir():
                    shutil.rmtree(remains)
                    dropped.append(name)
    return dropped
