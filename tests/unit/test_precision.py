"""What a record type costs is measured on real users and stored; auto takes the smallest that is good enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import precision as room
from cache.catalogue import Catalogue, open_catalogue
from cache.embed import build_release, plan_release
from cache.errors import StoreError
from cache.precision import Precision, choose_precision, kendall_tau
from cache.release import ITEMS, read_release
from cache.snapshot import Snapshot
from kernel.errors import KernelError
from model.bundle import Bundle, open_bundle
from tests.catalogues import CROSS, GRAPH, MAXSIM, Shop, open_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=400, head=replace(MAXSIM, item_bias=False))


@pytest.fixture
def opened(shop: Shop) -> tuple[Bundle, Catalogue]:
    return open_bundle(shop.bundle), open_catalogue(shop.items, shop.spec)


def test_smaller_types_cost_more(opened: tuple[Bundle, Catalogue]) -> None:
    found = choose_precision(*opened, "auto")
    assert [*found.costs] == ["int8", "f16"]
    assert 0.5 < found.costs["int8"].overlap <= found.costs["f16"].overlap <= 1
    assert 0.9 < found.costs["int8"].tau < found.costs["f16"].tau <= 1
    assert (found.items, found.k) == (400, 40)
    assert "probe" in found.source


def test_nothing_is_measured_for_float32(opened: tuple[Bundle, Catalogue]) -> None:
    assert choose_precision(*opened, "f32").costs == {}


@pytest.mark.parametrize(("least", "dtype"), [(0.0, "int8"), (1.1, "f32")])
def test_auto_takes_the_smallest_that_is_good_enough(
    opened: tuple[Bundle, Catalogue], monkeypatch: pytest.MonkeyPatch, least: float, dtype: str
) -> None:
    monkeypatch.setattr(room, "LEAST_OVERLAP", least)
    assert choose_precision(*opened, "auto").dtype == dtype
    assert choose_precision(*opened, "f16").dtype == "f16"  # what was asked for is had, whatever it costs


def test_auto_keeps_the_type_it_builds_upon_while_that_is_good_enough(
    opened: tuple[Bundle, Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LEAST_OVERLAP", 0.0)
    assert choose_precision(*opened, "auto", kept="f16").dtype == "f16"
    assert choose_precision(*opened, "auto", kept="f32").dtype == "int8"
    assert choose_precision(*opened, "int8", kept="f16").dtype == "int8"
    monkeypatch.setattr(room, "KEPT_OVERLAP", 1.1)
    assert choose_precision(*opened, "auto", kept="f16").dtype == "int8"


def test_a_type_that_does_not_exist_is_named(opened: tuple[Bundle, Catalogue]) -> None:
    with pytest.raises(StoreError, match="no record type 'f64': use auto, f32, f16, int8"):
        choose_precision(*opened, "f64")


def test_a_release_says_what_its_records_cost(shop: Shop, tmp_path: Path) -> None:
    folder = build_release(shop.bundle, shop.items, tmp_path / "release", dtype="int8")
    stored = Precision.from_json(read_release(folder).report["precision"])
    assert stored.dtype == Snapshot.open(folder / ITEMS).dtype == "int8"
    assert 0.5 < stored.costs["int8"].overlap <= 1
    assert stored.tell().startswith("records are int8: int8 keeps ")


def test_records_are_used_again_only_in_the_same_type(shop: Shop, tmp_path: Path) -> None:
    before = build_release(shop.bundle, shop.items, tmp_path / "before", dtype="int8")
    again = build_release(shop.bundle, shop.items, tmp_path / "again", dtype="int8", previous=before)
    assert read_release(again).report["reused"] == 400
    assert (again / ITEMS).read_bytes() == (before / ITEMS).read_bytes()
    assert plan_release(shop.bundle, shop.items, dtype="f16", previous=before).counts.reused == 0


def test_changed_items_are_packed_beside_those_that_stay(shop: Shop, tmp_path: Path) -> None:
    before = build_release(shop.bundle, shop.items, tmp_path / "before", dtype="int8")
    prices = np.arange(400) % 3 + 0.5
    changed = shop.changed(f"changed{tmp_path.name}", price=prices)
    together = build_release(shop.bundle, changed, tmp_path / "together", dtype="int8", previous=before)
    assert 0 < read_release(together).report["reused"] < 400
    alone = build_release(shop.bundle, changed, tmp_path / "alone", dtype="int8")
    assert (together / ITEMS).read_bytes() == (alone / ITEMS).read_bytes()


def test_a_sample_is_of_the_catalogue(shop: Shop, opened: tuple[Bundle, Catalogue]) -> None:
    catalogue = opened[1]
    every = {row.tobytes() for _, block in catalogue.blocks() for row in block}
    sample = catalogue.sample(50, 0)
    assert sample.shape == (50, shop.spec.item_width)
    assert {row.tobytes() for row in sample} <= every
    assert len(catalogue.sample(9_999, 0)) == 400
    np.testing.assert_array_equal(catalogue.sample(50, 0), sample)


def test_cross_attention_is_measured_alike(tmp_path: Path) -> None:
    shop = open_shop(tmp_path, items=120, head=CROSS)
    found = choose_precision(open_bundle(shop.bundle), open_catalogue(shop.items, shop.spec), "int8")
    assert found.costs["int8"].tau > 0.9


def test_a_graph_is_measured_in_half_the_bits_and_never_in_eight(tmp_path: Path) -> None:
    shop = open_shop(tmp_path, items=400, head=GRAPH)
    opened = open_bundle(shop.bundle), open_catalogue(shop.items, shop.spec)
    found = choose_precision(*opened, "auto")
    assert ([*found.costs], found.dtype) == (["f16"], "f16")
    assert 0.99 < found.costs["f16"].tau < 1
    assert found.tell().startswith("records are f16: f16 keeps ")
    assert choose_precision(*opened, "auto", kept="f32").dtype == "f16"
    with pytest.raises(KernelError, match=r"'int8', but the graph of a head of kind onnx .*: use auto, f32 or f16"):
        build_release(shop.bundle, shop.items, tmp_path / "release", dtype="int8")
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_records_of_a_graph_are_used_again_where_nothing_changed(tmp_path: Path, dtype: str) -> None:
    shop = open_shop(tmp_path, items=400, head=GRAPH)
    before = build_release(shop.bundle, shop.items, tmp_path / "before", dtype=dtype)
    changed = shop.changed("changed", price=np.arange(400) % 3 + 0.5)
    together = build_release(shop.bundle, changed, tmp_path / "together", dtype=dtype, previous=before)
    assert 0 < read_release(together).report["reused"] < 400
    alone = build_release(shop.bundle, changed, tmp_path / "alone", dtype=dtype)
    assert (together / ITEMS).read_bytes() == (alone / ITEMS).read_bytes()
    Snapshot.open(together / ITEMS).verify()


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30))
def test_kendall_tau_counts_pairs(values: list[int]) -> None:
    a = np.array(values, np.float32)
    b = np.roll(a, 1)
    pairs = [(i, j) for i in range(len(a)) for j in range(i) if a[i] != a[j]]
    expected = sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs) / len(pairs) if pairs else 1.0
    assert kendall_tau(a, b) == pytest.approx(expected)
    assert kendall_tau(a, a) == 1
    assert kendall_tau(a, -a) == (-1 if pairs else 1)
