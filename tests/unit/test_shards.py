"""The cut of a catalogue: the same everywhere, even, apart from the id index, and each part a release of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache.catalogue import as_ids, open_catalogue
from cache.changes import CHANGES
from cache.embed import build_release, plan_release
from cache.errors import StoreError
from cache.file_store import FileStore
from cache.intake import append_items
from cache.release import ITEMS
from cache.shards import Shard, read_shard, shard_url, shards_of
from cache.snapshot import Snapshot
from cache.store import open_store
from kernel import engine
from kernel.ids import Texts
from kernel.reference import mix
from model.errors import DataError
from tests.catalogues import Shop, open_shop
from tests.integration.test_publish import run


@pytest.fixture(scope="module", params=[False, True], ids=["int", "string"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=200, string_ids=request.param)


def test_the_hash_never_changes() -> None:
    """Releases out there are cut by it."""
    ids = np.array([0, 1, -1, 17, 2**63 - 1, -(2**63)])
    assert shards_of(ids, 1024).tolist() == [334, 941, 264, 705, 630, 668]
    assert shards_of(Texts.of(["", "a", "item-17", "ü" * 20]), 1024).tolist() == [334, 859, 221, 463]


@pytest.mark.parametrize("level", ["numpy", engine.level()])
def test_every_level_of_the_kernel_cuts_alike(level: str) -> None:
    before, texts = engine.level(), Texts.of([f"item-{number}" * (number % 9) for number in range(500)])
    wanted = shards_of(texts, 7).tolist()
    engine.select(level)
    try:
        assert shards_of(texts, 7).tolist() == wanted
    finally:
        engine.select(before)


@pytest.mark.parametrize("ids", [np.arange(40_000), np.arange(40_000) << 20, Texts.of([str(k) for k in range(40_000)])])
@pytest.mark.parametrize("count", [1, 3, 4, 16])
def test_shards_are_about_equally_large(ids: Any, count: int) -> None:
    sizes = np.bincount(shards_of(ids, count), minlength=count)
    assert len(sizes) == count
    assert sizes.min() > 0.9 * len(ids) / count


def test_a_shard_fills_the_buckets_of_the_index_evenly() -> None:
    ids = np.arange(100_000)
    held = ids[shards_of(ids, 4) == 2].view(np.uint64)
    quarters = np.bincount((mix(held) >> np.uint64(62)).astype(np.int64), minlength=4)  # where the index begins to look
    assert quarters.min() > 0.95 * len(held) / 4


def test_the_parts_are_the_whole(shop: Shop, tmp_path: Path) -> None:
    """Every item once, with the record that it has in one release, whatever the row groups."""
    items = tmp_path / "items.parquet"
    pq.write_table(pq.read_table(shop.items), items, row_group_size=33)
    whole = Snapshot.open(build_release(shop.bundle, items, tmp_path / "whole") / ITEMS)
    found = 0
    for number in range(3):
        shard = Shard(number, 3)
        part = Snapshot.open(build_release(shop.bundle, items, tmp_path / str(shard), shard=shard) / ITEMS)
        ids = part.ids(np.arange(len(part), dtype=np.int32))
        rows = whole.lookup(ids)
        assert (rows >= 0).all()
        assert np.diff(rows).min() > 0  # in the order of the file
        assert (part.rows == whole.rows[rows]).all()
        assert shards_of(ids if shop.spec.item_id_type == "int" else Texts.of(ids.tolist()), 3).tolist() == [
            number
        ] * len(part)
        found += len(part)
    assert found == len(whole) == 200


def test_a_wrong_row_is_named_by_its_number_in_the_whole_file(shop: Shop) -> None:
    prices = pq.read_table(shop.items)["price"].to_numpy().copy()
    prices[123] = np.inf
    items = shop.changed("infinite", price=prices)
    refused = []
    for number in range(4):
        catalogue = open_catalogue(items, shop.spec, shard=Shard(number, 4))
        try:
            assert sum(len(ids) for ids, _ in catalogue.blocks()) == len(catalogue)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert "row 123 " in refused[0]


def test_an_id_that_comes_twice_is_named_by_its_shard(shop: Shop) -> None:
    table = pq.read_table(shop.items)
    ids = table[shop.spec.item_id_name].to_pylist()
    ids[150] = ids[20]
    items = shop.changed("twice", **{shop.spec.item_id_name: ids})
    held = Shard(0, 2).holds(np.array(ids[20:21]) if isinstance(ids[20], int) else Texts.of(ids[20:21]))[0]
    with pytest.raises(DataError, match=r"row 150 .*stands in row 20 already"):
        open_catalogue(items, shop.spec, shard=Shard(0 if held else 1, 2))


def test_an_update_keeps_its_own_part(shop: Shop, tmp_path: Path) -> None:
    counts = []
    for number in range(4):
        store = FileStore(f"file://{tmp_path}/{number}")
        count, position = append_items(store, shop.items, shop.spec, shard=Shard(number, 4))
        assert (count > 0) == (position > 0) == bool(store.log(CHANGES).last())
        counts.append(count)
    assert sum(counts) == 200
    assert min(counts) > 0


def test_an_empty_shard_is_refused(shop: Shop) -> None:
    ids = open_catalogue(shop.items, shop.spec).ids
    empty = next(number for number in range(1024) if not Shard(number, 1024).holds(as_ids(ids)).any())
    with pytest.raises(DataError, match=f"holds no item of shard-{empty}-of-1024: publish fewer shards"):
        plan_release(shop.bundle, shop.items, shard=Shard(empty, 1024))


def test_a_shard_is_read_from_its_number() -> None:
    assert read_shard("2/4") == Shard(2, 4)
    for text in ("4/4", "0/0", "0/2000"):
        with pytest.raises(StoreError, match="the numbers go from 0"):
            read_shard(text)
    for text in ("2", "-1/4", "a/b", "1/4/2"):
        with pytest.raises(StoreError, match="as in 0/4"):
            read_shard(text)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("file://./var/releases", "file://./var/releases/shard-2-of-4"),
        ("file:///srv/releases/", "file:///srv/releases/shard-2-of-4"),
        ("redis://host:6379/0", "redis://host:6379/0?prefix=ranktower:shard-2-of-4"),
        ("rediss://u:p%40@h/1?prefix=a&ssl_ca_certs=/a b", "rediss://u:p%40@h/1?prefix=a:shard-2-of-4&ssl_ca_certs=/a+b"),
        ("redis+cluster://a,b:7000?client_name=x", "redis+cluster://a,b:7000?client_name=x&prefix=ranktower:shard-2-of-4"),
    ],
)  # fmt: skip
def test_a_shard_has_a_store_of_its_own(url: str, wanted: str) -> None:
    assert shard_url(url, Shard(2, 4)) == wanted


def test_the_commands_publish_and_update_a_shard(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole, published, deleted = f"file://{tmp_path}/store", 0, 0
    gone = ",".join(map(str, open_catalogue(shop.items, shop.spec).ids_from(0, 20)))
    for number in range(2):
        shard = ("--shard", f"{number}/2", "--store", whole)
        assert run("publish", "--bundle", shop.bundle, "--items", shop.items, *shard, "--dry-run")
        told = run("publish", "--bundle", shop.bundle, "--items", shop.items, *shard)
        store = open_store(shard_url(whole, Shard(number, 2)))
        (release,) = store.list()
        published += release.count
        assert f"{release.count} items" in told
        count = int(re.findall(r"appended (\d+) deletions", run("update", "--delete-ids", gone, *shard))[0])
        assert 0 < count < 20
        deleted += count
    assert (published, deleted) == (200, 20)
    assert open_store(whole).list() == []
