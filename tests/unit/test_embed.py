"""Embedding a catalogue: every item gets its own record, only changes are embedded again, wrong rows are named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache import catalogue as catalogue_room
from cache.embed import build_release, fingerprints, plan_release, run_parallel
from cache.errors import SnapshotError, StoreError
from cache.release import BUNDLE, INPUTS, ITEMS, RELEASE, read_release, verify_release
from cache.snapshot import Snapshot
from model.bundle import open_bundle, seal_bundle
from model.errors import RankTowerError
from model.requests import item_columns
from tests.catalogues import Shop, open_shop
from tests.graphs import write_bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["int", "string"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=700, string_ids=request.param == "string")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_room, "BLOCK_ROWS", 300)


def all_records(snapshot: Snapshot, shop: Shop) -> np.ndarray:
    return snapshot.table(open_bundle(shop.bundle).head).records(np.arange(len(snapshot), dtype=np.int32))


def expected(shop: Shop) -> np.ndarray:
    """Records of the log's items, one by one through the tower."""
    features = shop.spec.encode("item", item_columns(shop.log), len(shop.log.items))
    tower = open_bundle(shop.bundle).item_tower()
    return np.concatenate([tower.embed(row[None]) for row in features])


def test_every_item_has_the_record_that_its_features_give(shop: Shop, tmp_path: Path, small_blocks: None) -> None:
    folder = build_release(shop.bundle, shop.items, tmp_path / "release")
    release = verify_release(folder)
    snapshot = Snapshot.open(folder / ITEMS)
    np.testing.assert_array_equal(all_records(snapshot, shop), expected(shop))
    assert snapshot.lookup(shop.log.items.ids).tolist() == list(range(700))
    bundle = open_bundle(folder / BUNDLE)
    assert release.bundle_id == bundle.id == snapshot.owner
    assert release.head == bundle.head
    assert release.count == 700
    assert (release.report["embedded"], release.report["reused"], release.report["removed"]) == (700, 0, 0)
    assert (folder / INPUTS).stat().st_size == 8 * 700


@pytest.mark.parametrize("rows", [1, 77, 500])
def test_row_groups_of_the_file_do_not_matter(plain: Shop, tmp_path: Path, small_blocks: None, rows: int) -> None:
    cut = plain.write(f"cut{rows}", pq.read_table(plain.items), row_group_size=rows)
    first = build_release(plain.bundle, plain.items, tmp_path / "a")
    second = build_release(plain.bundle, cut, tmp_path / "b")
    assert (first / ITEMS).read_bytes() == (second / ITEMS).read_bytes()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_threads_does_not_change_a_bit(shop: Shop, workers: int) -> None:
    tower = open_bundle(shop.bundle).item_tower()
    features = shop.spec.encode("item", item_columns(shop.log), len(shop.log.items))
    for count in (1, 255, 256, 257, 700):
        with ThreadPoolExecutor(workers) as pool:
            found = run_parallel(tower, pool, workers, features[:count])
        np.testing.assert_array_equal(found, expected(shop)[:count])


# --- incremental -----------------------------------------------------------------------------------------------------


def changed_catalogue(shop: Shop, name: str) -> Path:
    """Rows 10 to 19 have another price, 5 are gone, the rest is in another order, and one is new."""
    table = pq.read_table(shop.items)
    price = table["price"].to_numpy().copy()
    price[10:20] = np.where(price[10:20] > np.median(price), 0.0, 1e9)
    table = table.set_column(table.column_names.index("price"), "price", pa.array(price))
    fresh = table.slice(0, 1)
    new_id: Any = "brand-new" if shop.spec.item_id_type == "string" else 1
    fresh = fresh.set_column(0, "item_id", pa.array([new_id], table["item_id"].type))
    order = np.random.default_rng(0).permutation(np.arange(5, table.num_rows))
    return shop.write(name, pa.concat_tables([table.take(pa.array(order)), fresh]))


def test_only_what_changed_is_embedded_again_and_the_result_is_the_same(
    shop: Shop, tmp_path: Path, small_blocks: None
) -> None:
    items = changed_catalogue(shop, "changed")
    first = build_release(shop.bundle, shop.items, tmp_path / "first")
    whole = build_release(shop.bundle, items, tmp_path / "whole")
    partly = build_release(shop.bundle, items, tmp_path / "partly", previous=first)
    assert (partly / ITEMS).read_bytes() == (whole / ITEMS).read_bytes()
    assert (partly / INPUTS).read_bytes() == (whole / INPUTS).read_bytes()
    report = read_release(partly).report
    assert (report["embedded"], report["reused"], report["removed"]) == (11, 685, 5)
    plan = plan_release(shop.bundle, items, previous=first).counts
    assert (plan.items, plan.embedded, plan.reused, plan.removed) == (696, 11, 685, 5)


@pytest.mark.parametrize("index", ["none", "flat"])
@pytest.mark.parametrize("string_ids", [False, True])
def test_a_plan_knows_the_bytes_of_the_release(tmp_path: Path, string_ids: bool, index: str) -> None:
    shop = open_shop(tmp_path / "shop", string_ids=string_ids)
    plan = plan_release(shop.bundle, shop.items, dtype="int8", index=index, workers=1)
    made = read_release(build_release(shop.bundle, shop.items, tmp_path / "made", dtype="int8", index=index))
    assert 0 <= made.size_bytes - plan.size_bytes <= (1_000 if index == "flat" else 0)
    assert plan.embed_s > 0
    again = plan_release(shop.bundle, shop.items, dtype="int8", previous=tmp_path / "made")
    assert (again.counts.embedded, again.embed_s) == (0, 0.0)


def test_a_plan_finds_an_index_that_cannot_be(plain: Shop, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="hnsw"):
        plan_release(plain.bundle, plain.items, index="hnsw")


def test_records_of_another_bundle_are_not_used(plain: Shop, tmp_path: Path) -> None:
    first = build_release(plain.bundle, plain.items, tmp_path / "first")
    other = write_bundle(tmp_path / "other", plain.spec, open_bundle(plain.bundle).head, seed=9)
    again = build_release(other, plain.items, tmp_path / "again", previous=first)
    assert read_release(again).report["embedded"] == len(plain.log.items)
    assert (again / ITEMS).read_bytes() != (first / ITEMS).read_bytes()


def test_fingerprints_tell_rows_apart_by_place_and_value() -> None:
    rows = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 2]], np.int32)
    prints = fingerprints(rows)
    assert len(set(prints.tolist())) == 5
    np.testing.assert_array_equal(fingerprints(rows[::-1]), prints[::-1])
    assert fingerprints(np.zeros((1, 2), np.int32))[0] != fingerprints(np.zeros((1, 3), np.int32))[0]
    many = np.random.default_rng(0).integers(0, 50, (200_000, 4)).astype(np.int32)
    assert len(np.unique(fingerprints(many))) == len(np.unique(many, axis=0))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_record_that_is_not_finite_names_its_item_and_leaves_nothing(plain: Shop, tmp_path: Path) -> None:
    bundle = shutil.copytree(plain.bundle, tmp_path / "bundle")
    graph = onnx.load(bundle / "item.onnx")
    table = next(one for one in graph.graph.initializer if one.name == "table0")
    broken = onnx.numpy_helper.to_array(table).copy()
    broken[7] = np.inf
    table.CopyFrom(onnx.numpy_helper.from_array(broken, "table0"))
    onnx.save(graph, bundle / "item.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    seal_bundle(bundle, {key: value for key, value in manifest.items() if key != "id"})
    with pytest.raises(SnapshotError, match="holds NaN or infinity"):
        build_release(bundle, plain.items, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_a_folder_that_is_no_release_is_not_overwritten(plain: Shop, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RankTowerError, match=RELEASE):
        build_release(plain.bundle, plain.items, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_unknown_index_is_refused_before_anything_is_embedded(plain: Shop, tmp_path: Path) -> None:
    embedded: list[str] = []
    with pytest.raises(StoreError, match="no index of kind 'flot': use none, flat, ivf-sq8"):
        build_release(
            plain.bundle, plain.items, tmp_path / "out", index="flot", progress=lambda stage, *_: embedded.append(stage)
        )
    assert not embedded
    assert not (tmp_path / "out").exists()


def test_checking_the_kind_of_an_index_needs_no_faiss() -> None:
    script = "import sys; import cache.cli, cache.embed; sys.exit('faiss' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
