from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from model.datasets import csv_files
from model.datasets.csv_files import read_csv, stream_csv
from model.errors import DataError

TYPES = {"user": pa.int64(), "brand": pa.string()}


@pytest.fixture
def sales(tmp_path: Path) -> Path:
    path = tmp_path / "sales.csv"
    path.write_text("\ufeffuser,price,brand \r\n1,2.5,a\r\n2,,NULL\r\n3,1,\r\n", encoding="utf-8")
    return path


def test_blanks_around_names_a_byte_order_mark_and_missing_values_are_understood(sales: Path) -> None:
    table = read_csv(sales, {"user": pa.int64(), "brand": pa.string(), "price": None}, "the shop").table
    assert table.to_pydict() == {"user": [1, 2, 3], "brand": ["a", None, None], "price": [2.5, None, 1.0]}


def test_a_file_without_a_header_has_its_columns_named(tmp_path: Path) -> None:
    path = tmp_path / "sales.csv"
    path.write_text("1,a\n2,b\n")
    assert read_csv(path, TYPES, "the shop", header=["user", "brand"]).table["user"].to_pylist() == [1, 2]
    with pytest.raises(DataError, match=r"has 2 columns, files of the shop have 3 \(user, price, brand\)"):
        read_csv(path, TYPES, "the shop", header=["user", "price", "brand"])


def test_blocks_hold_the_same_rows_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sales.csv"
    path.write_text("user,brand\n" + "".join(f"{k},b{k}\n" for k in range(500)))
    monkeypatch.setattr(csv_files, "BLOCK_BYTES", 1024)
    blocks = [block.table for block in stream_csv(path, TYPES, "the shop")]
    assert len(blocks) > 2
    assert pa.concat_tables(blocks).equals(read_csv(path, TYPES, "the shop").table)


@pytest.mark.parametrize("read", [read_csv, lambda *given: list(stream_csv(*given))])
def test_what_is_wrong_is_named(sales: Path, tmp_path: Path, read: type) -> None:
    with pytest.raises(DataError, match=r"sales.csv has no column 'usr', which files of the shop have: did you mean"):
        read(sales, {"usr": None}, "the shop")
    with pytest.raises(DataError, match=r"sales.csv cannot be read as a file of the shop .*int64.*'a'.*: get the"):
        read(sales, {"brand": pa.int64()}, "the shop")
    with pytest.raises(DataError, match=r"none.csv does not exist: give the folder that holds it"):
        read(tmp_path / "none.csv", TYPES, "the shop")
    (tmp_path / "packed.csv").write_bytes(b"\x1f\x8b\x08\xff\xfe")
    with pytest.raises(DataError, match=r"packed.csv cannot be read as a file of the shop"):
        read(tmp_path / "packed.csv", TYPES, "the shop")
