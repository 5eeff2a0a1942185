"""A FAISS index over all item heads, for requests without candidates: each user head searches, the union is scored.

Vector row * Hi + q is head q of the item in that row: its E part, of unit length with cross-attention, as the item
tower left it otherwise. An item bias b rides along as one more dimension: with scale * sum_p max_q <u_p, v_q> + b as
the score, b / (scale * Hu) beside v_q and 1 beside u_p share it out over the user heads, so that their search knows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from cache.errors import StoreError
from cache.release import IndexKind, Progress, check_chunk, index_kind, no_progress, read_chunks, read_release
from cache.snapshot import Snapshot
from kernel.engine import top_k
from kernel.head import HeadSpec
from kernel.reference import NORM_FLOOR

ADD_ROWS = 16_384  # items whose vectors are in memory at a time
POINTS_PER_LIST = 48  # training vectors for each list of an inverted file
MIN_POINTS, MAX_LISTS = 39, 65_536  # FAISS warns below 39 vectors a list
PROBES = 16  # one list in so many is searched
FLOOR_PROBES = 32


class RetrievalIndex:
    """An opened index. `search` may be called from several threads."""

    def __init__(self, index: Any, head: HeadSpec, kind: str, *, threads: int = 1) -> None:
        self._index, self._head, self.kind, self._threads = index, head, kind, threads

    @classmethod
    def open(cls, path: Path, *, threads: int = 1) -> RetrievalIndex:
        """Open `items.faiss` of a release folder, after checking its hash: FAISS trusts what it reads.

        Raises StoreError when it is not the file that the release names.
        """
        release = read_release(path.parent)
        file = release.file(path.name)
        if file is None or not path.is_file():
            raise StoreError(f"release {release.id} has no {path.name}: publish with --index flat")
        wanted = (chunk for chunk in release.chunks() if chunk.path == path.name)
        for chunk, content in read_chunks(path.parent, wanted):
            check_chunk(release, chunk, content, str(path.parent))
        if path.stat().st_size != file.size:
            raise StoreError(f"release {release.id}: {path.name} is longer than published: fetch it again")
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if (index.ntotal, index.d) != (release.count * release.head.item_heads, _width(release.head, release.index)):
            raise StoreError(
                f"release {release.id}: {path.name} holds {index.ntotal} vectors of {index.d}, not those of its "
                f"{release.count} items: publish the release again"
            )
        return cls(index, release.head, release.index, threads=threads)

    def search(self, user: NDArray[np.float32], per_head: int) -> NDArray[np.int32]:
        """Rows (m,) of distinct items, rising: the owners of the `per_head` item heads nearest to each user head.

        user: (user size,) record. m is at most user heads * per_head.
        """
        wanted = min(max(per_head, 1), self._index.ntotal)
        with _threads(self._threads):
            _, found = self._index.search(queries(self._head, user, self._index.d), wanted)
        return np.unique(found[found >= 0] // self._head.item_heads).astype(np.int32)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let FAISS use so many threads here. OpenMP keeps the number for each calling thread, so opening cannot set it."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def build_index(snapshot: Snapshot, head: HeadSpec, kind: str, path: Path, progress: Progress = no_progress) -> None:
    """Write the index over all heads of all items of a snapshot to `path`."""
    total = len(snapshot) * head.item_heads
    index = _empty(index_kind(kind, head), _width(head, kind), total)
    if not index.is_trained:
        index.train(_sample(snapshot, head, index.d, POINTS_PER_LIST * index.nlist))
    for rows, vectors in _all_vectors(snapshot, head, index.d):
        index.add(vectors)
        progress("index", rows.stop, len(snapshot))
    faiss.write_index(index, str(path))


def index_bytes(head: HeadSpec, kind: str, items: int) -> int:
    """Bytes of the file that `build_index` writes for so many items, to within 1 KB.

    Raises StoreError for a kind that cannot search this head.
    """
    total = items * head.item_heads
    index = _empty(index_kind(kind, head), _width(head, kind), total)
    code_bytes: int = index.code_size
    if isinstance(index, faiss.IndexFlat):
        return total * code_bytes
    lists: int = index.nlist
    vector_bytes: int = 4 * index.d  # of a centroid, and of both ends of the values' range
    return total * (code_bytes + 8) + lists * (vector_bytes + 8) + 2 * vector_bytes  # ids; how long each list is


def recall_curve(
    index: RetrievalIndex,
    snapshot: Snapshot,
    head: HeadSpec,
    users: NDArray[np.float32],
    *,
    k: int,
    per_head: list[int],
    progress: Progress = no_progress,
) -> dict[int, float]:
    """Mean share of the true top k of the whole catalogue that `search` brings, by candidates kept per head.

    users: (u, user size) records. The rest of retrieval is exact, so this is its recall@k. An item as good as the k-th
    counts like it: which of equals came first says nothing. Raises StoreError without users or items.
    """
    if not len(users) or not len(snapshot):
        raise StoreError(f"recall of {len(users)} users over {len(snapshot)} items is no number: publish some of both")
    found: dict[int, list[float]] = {kept: [] for kept in per_head}
    wanted = min(k, len(snapshot))
    table, rows = snapshot.table(head), np.arange(len(snapshot), dtype=np.int32)
    for done, user in enumerate(users, start=1):
        scores = table.score(user, rows)
        enough = scores[top_k(scores, wanted)[-1]]
        for kept, shares in found.items():
            good = int((scores[index.search(user, kept)] >= enough).sum())
            shares.append(min(good, wanted) / wanted)
        progress("recall", done, len(users))
    return {kept: float(np.mean(shares)) for kept, shares in found.items()}


# --- vectors ---------------------------------------------------------------------------------------------------------


def queries(head: HeadSpec, user: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """The vectors (Hu, width) that a user record (user size,) searches with."""
    vectors = np.zeros((head.user_heads, width), np.float32)
    vectors[:, : head.dim] = _directions(head, user[: head.user_heads * head.dim].reshape(-1, head.dim))
    vectors[:, head.dim : head.dim + head.item_bias] = 1.0
    return vectors


def item_vectors(head: HeadSpec, records: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """The vectors (n * Hi, width) of item records (n, item size)."""
    vectors = np.zeros((len(records) * head.item_heads, width), np.float32)
    vectors[:, : head.dim] = _directions(head, records[:, : head.item_heads * head.dim].reshape(-1, head.dim))
    if head.item_bias:
        vectors[:, head.dim] = np.repeat(records[:, -1] / np.float32(head.scale * head.user_heads), head.item_heads)
    return vectors


def _directions(head: HeadSpec, heads: NDArray[np.float32]) -> NDArray[np.float32]:
    """Heads (m, d) as the score compares them."""
    if head.kind != "cross_attention":
        return heads
    return np.asarray(heads / np.maximum(np.linalg.norm(heads, axis=1, keepdims=True), np.float32(NORM_FLOOR)))


def _width(head: HeadSpec, kind: str) -> int:
    """Dimensions of a vector; of an ivf-sq8 one a multiple of 8, without which FAISS searches 5 times slower."""
    width = head.dim + head.item_bias
    return -(-width // 8) * 8 if kind == "ivf-sq8" else width


def _all_vectors(snapshot: Snapshot, head: HeadSpec, width: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    table = snapshot.table(head)
    for start in range(0, len(snapshot), ADD_ROWS):
        rows = slice(start, min(start + ADD_ROWS, len(snapshot)))
        yield rows, item_vectors(head, table.records(np.arange(rows.start, rows.stop, dtype=np.int32)), width)


def _sample(snapshot: Snapshot, head: HeadSpec, width: int, wanted: int) -> NDArray[np.float32]:
    """Vectors of randomly chosen items, about `wanted` of them."""
    count = min(len(snapshot), -(-wanted // head.item_heads))
    rows = np.sort(np.random.default_rng(0).choice(len(snapshot), count, replace=False))
    return item_vectors(head, snapshot.table(head).records(rows.astype(np.int32)), width)


def _empty(kind: IndexKind, width: int, total: int) -> Any:
    if kind is IndexKind.NONE:
        raise StoreError(f"an index of kind {kind} is no index: build flat or ivf-sq8")
    if kind is IndexKind.FLAT:
        return faiss.IndexFlatIP(width)
    lists = min(max(1, min(int(2 * total**0.5), total // MIN_POINTS)), MAX_LISTS)
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.nprobe = min(lists, max(FLOOR_PROBES, lists // PROBES))
    return index
