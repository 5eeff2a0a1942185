"""A log in the documented form is checked and brought to its place like every other: model/datasets/own.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets import adopt, kuairand, own
from model.datasets.log import read_log
from model.errors import DataError
from tests.logs import write_tiny_log


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return write_tiny_log(tmp_path / "shop", users=20, items=30, days=6)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_log_is_brought_to_out_and_reads_the_same(shop: Path, tmp_path: Path) -> None:
    before = contents(shop)
    out = adopt(shop, tmp_path / "var" / "log")
    assert out == tmp_path / "var" / "log"
    assert set(contents(out)) == {*before, "source.json"}
    assert contents(shop) == before
    first, second = read_log(shop), read_log(out)
    assert first.schema == second.schema
    assert first.report == second.report
    for name in ("user", "item", "time", "request", "grade", "split"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_columns_that_no_key_names_come_along(shop: Path, tmp_path: Path) -> None:
    items = pq.read_table(shop / "items.parquet")
    pq.write_table(items.append_column("color", pa.array(["red"] * len(items))), shop / "items.parquet")
    out = adopt(shop, tmp_path / "out")
    assert pq.read_table(out / "items.parquet")["color"].to_pylist() == ["red"] * len(items)


def test_a_log_that_is_out_already_is_left_alone(shop: Path, tmp_path: Path) -> None:
    before = contents(shop)
    link = tmp_path / "link"
    link.symlink_to(shop)
    for out in (shop, shop / ".." / "shop", link):
        assert adopt(shop, out) == out
    assert contents(shop) == before


def test_a_changed_log_is_brought_again_and_an_unchanged_one_is_not(shop: Path, tmp_path: Path) -> None:
    out = adopt(shop, tmp_path / "out")
    (out / "log.toml").write_text((out / "log.toml").read_text() + "# mine\n")
    edited = contents(out)
    assert contents(adopt(shop, out)) == edited
    (shop / "log.toml").write_text((shop / "log.toml").read_text() + "# theirs\n")
    with pytest.raises(DataError, match=r"out must be written anew, but log.toml was changed"):
        adopt(shop, out)
    assert contents(out) == edited


def test_a_log_with_a_mistake_is_not_brought(shop: Path, tmp_path: Path) -> None:
    events = pq.read_table(shop / "events.parquet")
    place = events.column_names.index("click")
    pq.write_table(events.set_column(place, "click", pa.array([7] * len(events))), shop / "events.parquet")
    with pytest.raises(DataError, match=r"shop/events.parquet: column 'click', row 0 .*: is 7"):
        adopt(shop, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_of_a_log_is_named(shop: Path, tmp_path: Path) -> None:
    (shop / "users.parquet").unlink()
    with pytest.raises(DataError, match=r"shop/users.parquet does not exist: write it as docs/data.md shows"):
        adopt(shop, tmp_path / "out")
    (shop / "users.parquet").mkdir()
    with pytest.raises(DataError, match=r"shop/users.parquet is no file: write it"):
        adopt(shop, tmp_path / "out")


def test_a_column_that_cannot_be_read_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"items.parquet cannot be read as Parquet"):
        own._whole(tmp_path / "items.parquet")


@pytest.mark.parametrize("name", kuairand.MARKS)
@pytest.mark.parametrize("below", ["", "data"])
def test_kuairand_is_known_by_its_files(tmp_path: Path, name: str, below: str) -> None:
    (tmp_path / "source" / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / "source" / below / name).touch()
    assert kuairand.holds(tmp_path / "source")
    with pytest.raises(
        DataError, match=r"(_pure.csv|_tail50.parquet) does not exist"
    ):  # the adapter looks for the rest
        adopt(tmp_path / "source", tmp_path / "out")


def test_a_folder_that_is_neither_is_told_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no log.toml .* none of .*_pure.csv, log_standard_0425_0504.parquet"):
        adopt(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="nowhere is no folder: give the folder that holds the log"):
        adopt(tmp_path / "nowhere", tmp_path / "out")
