"""Move the chunks of an artifact to Redis and back: a few at a time side by side, every hash checked on both ways.

A publisher holds a lease while it writes and renews it with every batch: who holds none and left no manifest is dead,
and its chunks may go. What it left is used by the next one that publishes the same artifact.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from redis.exceptions import RedisClusterException, RedisError
from redis.lock import Lock

from cache.durable import locked, rename_durably, sync_tree
from cache.errors import StoreError
from cache.parallel import in_order
from cache.redis_client import Clients
from cache.release import (
    NAME,
    Artifact,
    Chunk,
    Progress,
    check_chunk,
    check_sizes,
    lock_of,
    prepare_files,
    read_chunk,
    sha256,
    verify_files,
    write_chunk,
)

STREAMS = 4  # chunks on their way at a time, each on a connection of its own: up to 16 MB wait here, 8 MB in Redis

COMMIT = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return 1
"""

# Deletes first, for a script that has written is not refused where memory has run out: who prunes is to free some.
LEASE = """
if redis.call('GET', KEYS[1]) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

log = logging.getLogger(__name__)


class Manifest(NamedTuple):
    """Where a manifest goes once all chunks are in place: a field of a hash, or a file of a folder."""

    place: str
    field: str
    content: bytes


class Chunks:
    """The chunks below `prefix`; `streams` move at a time."""

    def __init__(self, clients: Clients, prefix: str, url: str, lease_s: float, streams: int = STREAMS) -> None:
        self._clients, self._prefix, self._url, self._lease_s = clients, prefix, url, lease_s
        self._streams = streams

    @property
    def _client(self) -> Any:
        return self._clients.quick

    def missing(self, base: str, artifact: Artifact) -> list[Chunk]:
        """Chunks that are not there, or of another size."""
        chunks = list(artifact.chunks())
        sizes = self.pipelined("STRLEN", [self.key(base, chunk) for chunk in chunks])
        return [chunk for chunk, size in zip(chunks, sizes, strict=True) if size != chunk.size]

    def upload(self, base: str, folder: Path, artifact: Artifact, manifest: Manifest, progress: Progress) -> None:
        """Send the chunks that are missing, read all back, then write the manifest if the lease is still ours."""
        check_sizes(folder, artifact)
        with self.lease(artifact.id) as lease:
            wanted = self._wanted(base, artifact, lease)
            done = artifact.size_bytes - sum(chunk.size for chunk in wanted)
            for size in in_order(partial(self._send, base, folder, artifact), wanted, self._streams):
                lease.reacquire()
                done += size
                progress("publish", done, artifact.size_bytes)
            for _ in self._received(partial(self._read_back, base, artifact), artifact, wanted, progress):
                lease.reacquire()
            keys = [self._lease_name(artifact.id), manifest.place]
            if not self._client.eval(COMMIT, len(keys), *keys, lease.local.token, manifest.field, manifest.content):
                raise StoreError(f"{self._url}: the lease of {artifact.id} ran out: publish again")

    def _wanted(self, base: str, artifact: Artifact, lease: Lock) -> list[Chunk]:
        """Chunks that are not there, or not as they should be."""
        wanted = set(self.missing(base, artifact))
        there = [chunk for chunk in artifact.chunks() if chunk not in wanted]
        for chunk, whole in zip(there, in_order(partial(self._is_stored, base), there, self._streams), strict=True):
            if not whole:
                wanted.add(chunk)
            lease.reacquire()
        return [chunk for chunk in artifact.chunks() if chunk in wanted]

    def download(self, base: str, artifact: Artifact, target: Path, raw: tuple[str, bytes], progress: Progress) -> None:
        """Fill the folder `target`, once for all processes of this machine; what a cut left is used.

        `raw` is the name and content of the manifest's file. A target that is there already is verified, not fetched.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock_of(target)):
            if is_whole(target, artifact):
                return
            shutil.rmtree(target, ignore_errors=True)
            draft = target.with_name(f".{target.name}.partial")
            wanted = prepare_files(draft, artifact)
            for _ in self._received(partial(self._bring, base, artifact, draft), artifact, wanted, progress):
                pass
            (draft / raw[0]).write_bytes(raw[1])
            sync_tree(draft)
            rename_durably(draft, target)

    def delete(self, base: str, artifact: Artifact) -> None:
        self.pipelined("UNLINK", [self.key(base, chunk) for chunk in artifact.chunks()])

    def names(self, kind: str) -> dict[str, list[str]]:
        """Keys of all chunks of a kind, by the artifact that they belong to.

        What else begins like them is another store's, whose prefix goes on from this one's.
        """
        start = f"{self._prefix}:{kind}:"
        found: dict[str, list[str]] = {}
        for raw in self._client.scan_iter(match=f"{start}*", count=1000):
            key: str = raw.decode()
            name = key[len(start) :].split(":")[0]
            if NAME.fullmatch(name):
                found.setdefault(name, []).append(key)
        return found

    @contextmanager
    def lease(self, name: str) -> Iterator[Lock]:
        """The right to write the chunks of that name, for a while; waits until nobody else has it."""
        lease = self._lock(name)
        lease.acquire()
        try:
            yield lease
        finally:
            self._release(lease)

    @contextmanager
    def lease_now(self, name: str) -> Iterator[bool]:
        """The same without waiting, and where memory has run out: yields whether it could be had."""
        lease, token = self._lock(name), uuid4().hex.encode()
        had = bool(self._client.eval(LEASE, 1, self._lease_name(name), token, round(1e3 * self._lease_s)))
        lease.local.token = token
        try:
            yield had
        finally:
            if had:
                self._release(lease)

    def _lock(self, name: str) -> Lock:
        return Lock(self._client, self._lease_name(name), timeout=self._lease_s, thread_local=False)

    def _release(self, lease: Lock) -> None:
        """Give a lease back. One that ran out meanwhile is no error here: the commit has looked at it."""
        try:
            lease.release()
        except (RedisError, RedisClusterException) as error:
            log.warning("%s: a lease was not given back (%s): it runs out by itself", self._url, error)

    def pipelined(self, command: str, keys: Iterable[str]) -> list[Any]:
        """One command for each key, in one round trip."""
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.execute_command(command, key)
        return list(pipeline.execute())

    def key(self, base: str, chunk: Chunk) -> str:
        return f"{self._prefix}:{base}:{chunk.path}:{chunk.number}"

    def _lease_name(self, name: str) -> str:
        return f"{{{self._prefix}}}:publishing:{name}"

    # --- one chunk, on whichever thread

    def _send(self, base: str, folder: Path, artifact: Artifact, chunk: Chunk) -> int:
        self._clients.bulk.set(
            self.key(base, chunk), check_chunk(artifact, chunk, read_chunk(folder, chunk), str(folder))
        )
        return chunk.size

    def _is_stored(self, base: str, chunk: Chunk) -> bool:
        return sha256(self._client.get(self.key(base, chunk)) or b"") == chunk.sha256

    def _read_back(self, base: str, artifact: Artifact, chunk: Chunk) -> bytes:
        """Raises StoreError, naming the chunk, unless it is as the manifest says."""
        return check_chunk(artifact, chunk, self._client.get(self.key(base, chunk)), self._url)

    def _bring(self, base: str, artifact: Artifact, folder: Path, chunk: Chunk) -> None:
        write_chunk(folder, chunk, self._read_back(base, artifact, chunk))

    def _received(
        self, receive: Callable[[Chunk], object], artifact: Artifact, chunks: list[Chunk], progress: Progress
    ) -> Iterator[None]:
        """One after the other as they come, and told of."""
        done = artifact.size_bytes - sum(chunk.size for chunk in chunks)
        for chunk, _ in zip(chunks, in_order(receive, chunks, self._streams), strict=True):
            yield
            done += chunk.size
            progress("verify", done, artifact.size_bytes)


def is_whole(folder: Path, artifact: Artifact) -> bool:
    """Whether a local copy is there, every hash right."""
    if not folder.is_dir():
        return False
    try:
        verify_files(folder, artifact)
    except StoreError as error:
        log.warning("%s: fetching it again", error)
        return False
    return True
