"""Make what the benchmark of the kernel reads: tables in mapped files, the same vectors for rivals, lists and users.

Records are random, as speed does not depend on them. A list of candidates is never the same twice within a pool of four
times the last cache, so that no list is found in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.made import PART, Plan, item_ids
from benchmarks.report import machine
from cache.snapshot import Snapshot, SnapshotWriter
from kernel import engine
from kernel.engine import Table
from kernel.head import ITEM_PARTS, USER_PARTS, HeadSpec
from kernel.record import DTYPES, Dtype, RecordLayout

LIST_POOL = 4  # times the last cache
NO_CACHE_BYTES = 32 << 20  # taken where the system does not tell the size of its caches
MOST_POOL_BYTES = 2 << 30
USERS = 1_024  # distinct user records before the first comes again

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Catalogue:
    """Items as each contestant holds them, row by row the same."""

    head: HeadSpec
    ids: NDArray[np.int64]  # (n,)
    snapshots: dict[Dtype, Snapshot]
    vectors: Floats | None  # (n, item size), what rivals read; None where memory does not hold it

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> str:
        return f"{self.head.user_heads}x{self.head.item_heads}x{self.head.dim}"

    def table(self, dtype: Dtype, level: str) -> Table:
        """The mapped table as a service at that level has it."""
        engine.select(level)
        try:
            return self.snapshots[dtype].table(self.head)
        finally:
            engine.select()

    def records(self, rows: NDArray[Any]) -> Floats:
        """(b, item size), unrounded where rivals have them, else as the widest table holds them."""
        if self.vectors is not None:
            found: Floats = self.vectors[rows]
            return found
        widest = next(dtype for dtype in DTYPES if dtype in self.snapshots)
        return self.table(widest, engine.NUMPY).records(rows.astype(np.int32))


@contextmanager
def catalogue(
    head: HeadSpec, items: int, dtypes: Sequence[Dtype], folder: Path, *, with_vectors: bool
) -> Iterator[Catalogue]:
    """Drawn, written, mapped and read once; the files go with the block."""
    ids = item_ids(Plan(items=items))
    vectors = np.empty((items, head.item_size), np.float32) if with_vectors else None
    paths: list[Path] = []
    try:
        with ExitStack() as stack:
            writers = {}
            for dtype in dtypes:
                layout = RecordLayout(head, dtype)
                paths.append(folder / f"{head.kind}-{head.item_heads}x{head.dim}-{dtype}-{items}.snapshot")
                writers[dtype] = stack.enter_context(
                    SnapshotWriter(paths[-1], kind="items", owner="0" * 16, id_type="int", layout=layout)
                )
            for start, records in draw_items(head, items):
                if vectors is not None:
                    vectors[start : start + len(records)] = records
                for writer in writers.values():
                    writer.append(ids[start : start + len(records)], records)
            snapshots = {dtype: writer.finish() for dtype, writer in writers.items()}
        for snapshot in snapshots.values():
            snapshot.settle()  # as the service does: no page is missing when the clock runs
        yield Catalogue(head, ids, snapshots, vectors)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def vectors_bytes(head: HeadSpec, items: int) -> int:
    return 4 * head.item_size * items


def table_bytes(head: HeadSpec, items: int, dtype: Dtype) -> int:
    return RecordLayout(head, dtype).stride * items


def available_bytes() -> int:
    """Memory that can still be had without swapping; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)


# --- draws -----------------------------------------------------------------------------------------------------------


def draw_items(head: HeadSpec, items: int) -> Iterator[tuple[int, Floats]]:
    """Parts of the catalogue, each with the row it starts at: (b, item size) float32.

    maxsim: unit vectors. cross_attention: E and V of about unit norm, gates G between 0 and 1. Uniform numbers, which
    take a fraction of the time of normal ones: a run draws three thousand million.
    """
    for start in range(0, items, PART):
        rng = np.random.default_rng([3, start])
        shape = (min(PART, items - start), ITEM_PARTS[head.kind], head.item_heads, head.dim)
        records = rng.random(shape, np.float32)
        vectors = records[:, :2]  # E, or E and V
        vectors -= np.float32(0.5)
        if head.kind == "maxsim":
            vectors /= np.sqrt(np.einsum("...d,...d->...", vectors, vectors))[..., None]
        else:
            vectors *= np.float32(np.sqrt(12 / head.dim))
        yield start, records.reshape(shape[0], -1)


def draw_users(head: HeadSpec, count: int) -> Floats:
    """User records (count, user size): as items, A and B such that attention is neither flat nor all on one head."""
    rng = np.random.default_rng([4, head.user_heads, head.dim])
    records = rng.standard_normal((count, USER_PARTS[head.kind], head.user_heads, head.dim), np.float32)
    records[:, :2] /= np.linalg.norm(records[:, :2], axis=-1, keepdims=True)
    if head.kind == "cross_attention":
        records[:, 2] = 1 / (1 + np.exp(-records[:, 2]))
        records[:, 3:] *= np.float32(np.sqrt(head.dim))
    return records.reshape(count, -1)


class Pool:
    """Values that are handed out slice by slice; after the last come the first again."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values, self._at = values, 0

    def next(self, count: int) -> NDArray[Any]:
        if self._at + count > len(self._values):
            self._at = 0
        self._at += count
        return self._values[self._at - count : self._at]


class Users:
    """User records in turn."""

    def __init__(self, head: HeadSpec) -> None:
        self._records, self._at = draw_users(head, USERS), -1

    def next(self) -> Floats:
        self._at = (self._at + 1) % len(self._records)
        record: Floats = self._records[self._at]
        return record

    def several(self, count: int) -> Floats:
        return np.stack([self.next() for _ in range(count)])


def pool_bytes() -> int:
    """Of one pool of lists."""
    sizes = [int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in machine()["caches"].values()]
    return min(LIST_POOL * max(sizes, default=NO_CACHE_BYTES), MOST_POOL_BYTES)


def row_pool(items: int, size_bytes: int) -> Pool:
    """Random rows, int32."""
    return Pool(np.random.default_rng(5).integers(0, items, size_bytes // 4, np.int32))


def id_pool(ids: NDArray[np.int64], size_bytes: int) -> Pool:
    """Random ids of items, int64."""
    return Pool(ids[np.random.default_rng(6).integers(0, len(ids), size_bytes // 8, np.int32)])
