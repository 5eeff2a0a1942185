"""The index over item heads: it brings what exhaustive scoring would, and FAISS reads nothing that was not checked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from cache.errors import StoreError
from cache.index import RetrievalIndex, build_index, item_vectors, queries, recall_curve
from cache.release import INDEX, ITEMS, RELEASE, IndexKind, index_kind, seal_release
from cache.snapshot import Snapshot, SnapshotWriter
from kernel.head import HeadSpec
from kernel.record import RecordLayout
from kernel.reference import score, top_k

BUNDLE_ID = "b" * 16
ITEMS_COUNT, GROUPS = 3000, 40


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), np.float32)


def heads_of(groups: np.ndarray, count: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """Unit heads (n, count, dim) around their group's centre, as trained towers make them."""
    centres = np.random.default_rng(7).standard_normal((GROUPS, 1, dim))
    return unit(centres[groups] + 0.8 * rng.standard_normal((len(groups), count, dim)))


def records(head: HeadSpec, side: str, groups: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    e = heads_of(groups, head.user_heads if side == "user" else head.item_heads, head.dim, rng).reshape(len(groups), -1)
    if head.kind == "cross_attention":
        small = [0.2 * rng.standard_normal(e.shape), np.full(e.shape, 0.1)]
        e = np.hstack([2.5 * e, *small, *([2 * e, 2 * e] if side == "user" else [])])
    if side == "item" and head.item_bias:
        e = np.hstack([e, rng.standard_normal((len(groups), 1))])
    return e.astype(np.float32)


def release_of(folder: Path, head: HeadSpec, kind: str, count: int = ITEMS_COUNT) -> Snapshot:
    """A release folder with an index over random items."""
    folder.mkdir()
    groups = np.random.default_rng(1).integers(0, GROUPS, count)
    with SnapshotWriter(
        folder / ITEMS, kind="items", owner=BUNDLE_ID, id_type="int", layout=RecordLayout(head, "f32")
    ) as writer:
        writer.append(np.arange(count), records(head, "item", groups, 2))
        snapshot = writer.finish()
    build_index(snapshot, head, kind, folder / INDEX)
    seal_release(folder, bundle_id=BUNDLE_ID, head=head, index=kind)
    return snapshot


def head_of(kind: str, *, bias: bool = True, user_heads: int = 4, item_heads: int = 3, dim: int = 16) -> HeadSpec:
    return HeadSpec(  # type: ignore[arg-type]
        kind=kind, user_heads=user_heads, item_heads=item_heads, dim=dim, scale=2.5, item_bias=bias
    )


@pytest.mark.parametrize("kind", ["flat", "ivf-sq8"])
@pytest.mark.parametrize("head_kind", ["maxsim", "cross_attention"])
def test_recall_against_exhaustive_scoring_is_high(tmp_path: Path, kind: str, head_kind: str) -> None:
    head = head_of(head_kind)
    snapshot = release_of(tmp_path / "release", head, kind)
    index = RetrievalIndex.open(tmp_path / "release" / INDEX)
    users = records(head, "user", np.random.default_rng(3).integers(0, GROUPS, 10), 4)
    curve = recall_curve(index, snapshot, head, users, k=50, per_head=[20, 200, 1500])
    assert curve[20] < curve[200] <= curve[1500]
    assert curve[1500] >= 0.95


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head_kind", ["maxsim", "cross_attention"])
def test_all_candidates_of_a_flat_index_are_all_items(tmp_path: Path, head_kind: str, bias: bool) -> None:
    head = head_of(head_kind, bias=bias)
    release_of(tmp_path / "release", head, "flat", count=60)
    index = RetrievalIndex.open(tmp_path / "release" / INDEX)
    user = records(head, "user", np.array([0]), 5)[0]
    for per_head in (60 * 3, 10**9):
        assert index.search(user, per_head).tolist() == list(range(60))
    assert 1 <= len(index.search(user, 0)) <= head.user_heads


def test_with_one_head_each_a_flat_index_is_exact(tmp_path: Path) -> None:
    head = head_of("maxsim", user_heads=1, item_heads=1)
    snapshot = release_of(tmp_path / "release", head, "flat", count=500)
    index = RetrievalIndex.open(tmp_path / "release" / INDEX)
    for user in records(head, "user", np.arange(5), 6):
        best = top_k(snapshot.table(head).score(user, np.arange(len(snapshot), dtype=np.int32)), 20)
        assert index.search(user, 20).tolist() == sorted(best.tolist())


def test_the_vectors_add_up_to_the_score() -> None:
    head = head_of("maxsim")
    items = records(head, "item", np.arange(GROUPS), 2)
    user = records(head, "user", np.array([3]), 3)[0]
    products = queries(head, user, 24) @ item_vectors(head, items, 24).T  # (Hu, n * Hi)
    summed = head.scale * products.reshape(4, len(items), 3).max(axis=2).sum(axis=0)
    np.testing.assert_allclose(summed, score(head, user, items), atol=1e-5)


def test_recall_does_not_ask_which_of_equal_items_came_first(tmp_path: Path) -> None:
    head = head_of("maxsim")
    folder = tmp_path / "release"
    folder.mkdir()
    with SnapshotWriter(
        folder / ITEMS, kind="items", owner=BUNDLE_ID, id_type="int", layout=RecordLayout(head, "f32")
    ) as writer:
        writer.append(np.arange(600), np.tile(records(head, "item", np.arange(2), 2), (300, 1)))
        snapshot = writer.finish()
    build_index(snapshot, head, "flat", folder / INDEX)
    seal_release(folder, bundle_id=BUNDLE_ID, head=head, index="flat")
    users = records(head, "user", np.arange(2), 4)
    seen: list[int] = []
    index = RetrievalIndex.open(folder / INDEX)
    curve = recall_curve(
        index, snapshot, head, users, k=20, per_head=[300], progress=lambda stage, done, total: seen.append(done)
    )
    assert curve == {300: 1.0}
    assert seen == [1, 2]


def test_found_rows_are_distinct_and_rising(tmp_path: Path) -> None:
    head = head_of("maxsim")
    release_of(tmp_path / "release", head, "ivf-sq8")
    found = RetrievalIndex.open(tmp_path / "release" / INDEX).search(records(head, "user", np.array([1]), 3)[0], 100)
    assert found.dtype == np.int32
    assert (np.diff(found) > 0).all()
    assert len(found) <= 400


def test_an_index_of_another_file_is_not_given_to_faiss(tmp_path: Path) -> None:
    head = head_of("maxsim")
    release_of(tmp_path / "release", head, "flat", count=50)
    path = tmp_path / "release" / INDEX
    whole = path.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-4], whole + b"x", b""):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"items\.faiss"):
            RetrievalIndex.open(path)
    path.unlink()
    with pytest.raises(StoreError, match="publish with --index flat"):
        RetrievalIndex.open(path)


def test_an_index_that_the_release_does_not_name_is_not_opened(tmp_path: Path) -> None:
    head = head_of("maxsim")
    release_of(tmp_path / "release", head, "flat", count=50)
    path = tmp_path / "release" / INDEX
    whole = path.read_bytes()
    path.unlink()
    seal_release(tmp_path / "release", bundle_id=BUNDLE_ID, head=head)
    path.write_bytes(whole)
    with pytest.raises(StoreError, match=r"has no items\.faiss"):
        RetrievalIndex.open(path)


def test_an_index_over_other_items_is_refused(tmp_path: Path) -> None:
    head = head_of("maxsim")
    release_of(tmp_path / "release", head, "flat", count=50)
    release_of(tmp_path / "other", head, "flat", count=40)
    (tmp_path / "other" / INDEX).replace(tmp_path / "release" / INDEX)
    (tmp_path / "release" / RELEASE).unlink()
    seal_release(tmp_path / "release", bundle_id=BUNDLE_ID, head=head, index="flat")
    with pytest.raises(StoreError, match="holds 120 vectors of 17, not those of its 50 items"):
        RetrievalIndex.open(tmp_path / "release" / INDEX)


def test_unknown_kinds_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="none, flat, ivf-sq8"):
        release_of(tmp_path / "release", head_of("maxsim"), "hnsw", count=10)
    with pytest.raises(StoreError, match="build flat or ivf-sq8"):
        build_index(
            release_of(tmp_path / "other", head_of("maxsim"), "flat", count=10), head_of("maxsim"), "none", tmp_path
        )


def test_a_head_without_vectors_has_no_index() -> None:
    head = head_of("onnx")
    assert index_kind("none", head) is IndexKind.NONE
    with pytest.raises(StoreError, match="no vectors to search"):
        index_kind("flat", head)


class Counting:
    """A FAISS index that notes how many threads its search may use."""

    ntotal, d = 60, 17

    def __init__(self) -> None:
        self.threads: list[int] = []

    def search(self, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        self.threads.append(faiss.omp_get_max_threads())
        return np.zeros((len(vectors), count)), np.zeros((len(vectors), count), np.int64)


@pytest.mark.parametrize(("given", "used"), [({}, 1), ({"threads": 2}, 2)])
def test_a_search_in_a_pool_keeps_to_its_threads(tmp_path: Path, given: dict[str, Any], used: int) -> None:
    head = head_of("maxsim")
    release_of(tmp_path / "release", head, "flat", count=60)
    index = RetrievalIndex.open(tmp_path / "release" / INDEX, **given)
    counting = Counting()
    index._index = counting
    user = records(head, "user", np.array([0]), 5)[0]

    def search() -> int:
        faiss.omp_set_num_threads(5)
        index.search(user, 5)
        return int(faiss.omp_get_max_threads())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(search).result() == 5, "what the thread does else keeps its own number"
    assert counting.threads == [used]


@pytest.mark.parametrize(("users", "items"), [(0, 10), (2, 0)])
def test_recall_of_nothing_is_no_number(tmp_path: Path, users: int, items: int) -> None:
    head = head_of("maxsim")
    release_of(tmp_path / "release", head, "flat", count=10)
    snapshot = Snapshot.open(tmp_path / "release" / ITEMS)
    if not items:
        path = tmp_path / "empty.snap"
        with SnapshotWriter(
            path, kind="items", owner=BUNDLE_ID, id_type="int", layout=RecordLayout(head, "f32")
        ) as writer:
            snapshot = writer.finish()
    index = RetrievalIndex.open(tmp_path / "release" / INDEX)
    with pytest.raises(StoreError, match=f"recall of {users} users over {items} items"):
        recall_curve(index, snapshot, head, records(head, "user", np.arange(2), 4)[:users], k=5, per_head=[5])
