"""From Parquet files to the log: checked whole, kept whole, in entries of a bounded size."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache import intake
from cache.changes import CHANGES, Deleted, Upserted, decode_change
from cache.file_store import FileStore
from cache.intake import ID_COLUMN, append_deletes, append_items, item_rows, parse_deleted, read_deleted
from kernel.ids import Texts
from model.errors import DataError
from model.features import FeatureSpec
from tests.catalogues import Shop, open_shop
from tests.tiny_releases import tiny_spec
from tests.updates import write


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=2_345)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(f"file://{tmp_path}/store")


def rows(store: FileStore) -> list[pa.Table]:
    changes = [decode_change(entry) for entry in store.log(CHANGES).read(0, 1000)]
    return [pa.ipc.open_stream(change.rows).read_all() for change in changes if isinstance(change, Upserted)]


def test_all_rows_and_columns_of_a_file_are_in_the_log(shop: Shop, store: FileStore, tmp_path: Path) -> None:
    table = pq.read_table(shop.items)
    more = table.append_column("words", pa.array([f"item {row}" for row in range(len(table))]).dictionary_encode())
    path = write(tmp_path / "more.parquet", more)
    assert append_items(store, path, shop.spec) == (2_345, store.log(CHANGES).last())
    found = rows(store)
    assert [part.num_rows for part in found] == [1000, 1000, 345]
    assert pa.concat_tables(found).to_pylist() == more.to_pylist()
    assert {part.schema.metadata[ID_COLUMN] for part in found} == {b"item_id"}


def test_ids_may_have_a_column_of_another_name(shop: Shop, store: FileStore, tmp_path: Path) -> None:
    table = pq.read_table(shop.items).slice(0, 3)
    path = write(tmp_path / "sku.parquet", table.rename_columns(["sku", *table.column_names[1:]]))
    append_items(store, path, shop.spec, "sku")
    assert rows(store)[0].schema.metadata[ID_COLUMN] == b"sku"


def test_a_wrong_row_is_named_before_anything_is_appended(shop: Shop, store: FileStore) -> None:
    price = pq.read_table(shop.items)["price"].to_numpy().copy()
    price[2_000] = np.inf
    with pytest.raises(DataError, match=r"column 'price', row 2000 \(from 0\): is inf"):
        append_items(store, shop.changed("wrong", price=price), shop.spec)
    assert store.log(CHANGES).last() == 0


def test_large_rows_make_smaller_entries_and_a_row_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "ENTRY_BYTES", 40_000)
    table = pa.table({"item_id": list(range(64)), "picture": [bytes(1_000)] * 64})
    path = write(tmp_path / "large.parquet", table)
    streams = list(item_rows(path, "item_id"))
    assert max(map(len, streams)) < 20_000
    assert pa.concat_tables(pa.ipc.open_stream(each).read_all() for each in streams)["item_id"].to_pylist() == [
        *range(64)
    ]
    one = write(tmp_path / "one.parquet", pa.table({"item_id": [1], "picture": [bytes(30_000)]}))
    with pytest.raises(DataError, match=r"one.parquet: a row has 3\d,\d{3} octets: leave out columns"):
        list(item_rows(one, "item_id"))


@pytest.mark.parametrize("ids", [np.arange(2_500), Texts.of([f"item {row}" for row in range(2_500)])])
def test_deletions_are_cut_into_entries(store: FileStore, ids: np.ndarray | Texts) -> None:
    assert append_deletes(store, ids) == (2_500, store.log(CHANGES).last())
    changes = [decode_change(entry) for entry in store.log(CHANGES).read(0, 9)]
    parts = [change.ids.tolist() for change in changes if isinstance(change, Deleted)]
    assert [len(part) for part in parts] == [1000, 1000, 500]
    assert [item for part in parts for item in part] == ids.tolist()


def test_ids_to_delete_are_read_from_a_file_or_a_line(tmp_path: Path) -> None:
    whole, texts = tiny_spec("int"), tiny_spec("string")
    path = write(tmp_path / "ids.parquet", pa.table({"item_id": pa.array([7, 9], pa.int32()), "gone": ["a", "b"]}))
    assert read_deleted(path, whole).tolist() == [7, 9]
    assert read_deleted(write(tmp_path / "texts.parquet", pa.table({"gone": ["a", "b"]})), texts, "gone").tolist() == [
        "a",
        "b",
    ]
    assert parse_deleted("7, -9", whole).tolist() == [7, -9]
    assert parse_deleted("7, x y", texts).tolist() == ["7", "x y"]
    with pytest.raises(DataError, match="holds int ids, the bundle was trained with string ids"):
        read_deleted(path, texts)


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("", tiny_spec("string"), "has an empty id"),
        ("1,,2", tiny_spec("int"), "has an empty id"),
        ("1,x", tiny_spec("int"), "item ids are integers of 64 bits"),
        (f"{2**63}", tiny_spec("int"), "item ids are integers of 64 bits"),
        ("1_0", tiny_spec("int"), "item ids are integers of 64 bits .'1_0' is none"),
        ("\u0661", tiny_spec("int"), "item ids are integers of 64 bits"),
        ("9" * 5000, tiny_spec("int"), "item ids are integers of 64 bits"),
        ("a,\udcff", tiny_spec("string"), "is not UTF-8"),
    ],
)
def test_a_line_of_ids_that_cannot_be_read_is_refused(text: str, spec: FeatureSpec, message: str) -> None:
    with pytest.raises(DataError, match=f"--delete-ids {re.escape(repr(text))}.*{message}"):
        parse_deleted(text, spec)
