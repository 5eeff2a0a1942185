"""Reading a catalogue: what a row may hold, and how the file, column and row of a wrong one are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache import catalogue as room
from cache.catalogue import open_catalogue
from model.errors import DataError
from model.features import MISSING
from model.requests import encode_items
from tests.catalogues import Shop, open_shop


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("plain"))


def encoded(shop: Shop, items: Path, id_column: str | None = None) -> tuple[list[Any], np.ndarray]:
    """All ids and features of a catalogue."""
    ids, features = zip(*open_catalogue(items, shop.spec, id_column).blocks(), strict=True)
    return [one for block in ids for one in block.tolist()], np.concatenate(features)


@pytest.mark.parametrize("string_ids", [False, True])
def test_features_are_those_that_training_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, string_ids: bool
) -> None:
    monkeypatch.setattr(room, "BLOCK_ROWS", 30)
    shop = open_shop(tmp_path, string_ids=string_ids)
    ids, features = encoded(shop, shop.items)
    assert ids == shop.log.items.ids.tolist()
    np.testing.assert_array_equal(features, encode_items(shop.spec, shop.log))


def prices(shop: Shop, row: int, value: float | None) -> list[float | None]:
    column: list[float | None] = pq.read_table(shop.items)["price"].to_pylist()
    column[row] = value
    return column


def ids_with(shop: Shop, row: int, value: int | None) -> list[int | None]:
    column: list[int | None] = pq.read_table(shop.items)["item_id"].to_pylist()
    column[row] = value
    return column


def test_a_column_that_the_bundle_reads_and_that_comes_twice_is_named(plain: Shop, tmp_path: Path) -> None:
    table = pq.read_table(plain.items)
    pq.write_table(
        table.append_column("unread", table["price"]).append_column("unread", table["price"]), tmp_path / "a"
    )
    open_catalogue(tmp_path / "a", plain.spec)
    pq.write_table(table.append_column("price", table["price"]), tmp_path / "b")
    with pytest.raises(DataError, match=r"b has 2 columns 'price': keep or rename one"):
        open_catalogue(tmp_path / "b", plain.spec)


def test_wrong_rows_are_named_by_file_column_and_row(
    plain: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BLOCK_ROWS", 30)
    first = ids_with(plain, 0, None)[1]
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("nan", {"price": prices(plain, 71, float("nan"))}, r"'price', row 71"),
        ("inf", {"price": prices(plain, 71, float("inf"))}, r"'price', row 71"),
        ("null-id", {"item_id": ids_with(plain, 42, None)}, r"'item_id', row 42"),
        ("twice", {"item_id": ids_with(plain, 42, first)}, r"'item_id', row 42 .*stands in row 1"),
        ("text", {"category": ["c"] * 80}, r"'category'.*expected an integer, got 'c'"),
        ("not-a-list", {"tags": ["t"] * 80}, r"'tags' is string: a multi field holds lists"),
        ("float-ids", {"item_id": [float(k) for k in range(80)]}, r"'item_id' is double"),
        ("other-ids", {"item_id": [str(k) for k in range(80)]}, r"holds string ids, the bundle was trained with int"),
    ]
    for name, columns, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            encoded(plain, plain.changed(name, **columns))
        assert str(plain.folder / name / "items.parquet") in str(caught.value)


def test_missing_columns_and_files_are_named(plain: Shop, tmp_path: Path) -> None:
    without = plain.write("without", pq.read_table(plain.items).drop_columns(["price"]))
    with pytest.raises(DataError, match=r"no column 'price', which the bundle reads"):
        encoded(plain, without)
    with pytest.raises(DataError, match="does not exist"):
        encoded(plain, tmp_path / "nothing.parquet", "item_id")
    (tmp_path / "text.parquet").write_text("not Parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        encoded(plain, tmp_path / "text.parquet")
    with pytest.raises(DataError, match="no rows"):
        encoded(plain, plain.write("empty", pq.read_table(plain.items).slice(0, 0)))


def test_unknown_columns_are_not_looked_at_and_nulls_are_missing(plain: Shop, tmp_path: Path) -> None:
    table = pq.read_table(plain.items)
    table = table.append_column("noise", pa.array([float("nan")] * 80))
    table = table.set_column(table.column_names.index("price"), "price", pa.array(prices(plain, 3, None)))
    _, features = encoded(plain, plain.write("more", table))
    assert features[3, plain.spec.columns("item")["price"]].tolist() == [MISSING]


def test_the_id_column_is_that_of_the_log_unless_named(plain: Shop, tmp_path: Path) -> None:
    both = plain.write("both", pq.read_table(plain.items).append_column("sku", pa.array(range(80))))
    assert encoded(plain, both, "sku")[0] == list(range(80))
    assert encoded(plain, both)[0] == plain.log.items.ids.tolist()
    with pytest.raises(DataError, match="no column 'ean', which --id-column names"):
        encoded(plain, both, "ean")


def test_the_field_of_the_id_is_read_from_the_id_column(plain: Shop) -> None:
    assert any(field.name == plain.spec.item_id_name for field in plain.spec.item_fields)
    renamed = plain.write("renamed", pq.read_table(plain.items).rename_columns({"item_id": "sku"}))
    ids, features = encoded(plain, renamed, "sku")
    assert ids == plain.log.items.ids.tolist()
    np.testing.assert_array_equal(features, encode_items(plain.spec, plain.log))
