from __future__ import annotations

import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets.form import MARK, Form, fields_as_toml, write_form
from model.datasets.schema import parse_schema
from model.errors import DataError
from model.features import Field

FIELDS = (
    Field(name="user_id", side="user", kind="categorical", dim=8),
    Field(name="history", side="user", kind="sequence", dim=4, length=7, shares="item_id"),
    Field(name="item_id", side="item", kind="categorical", dim=4),
)
DOCUMENT = 'columns = {user = "user_id", item = "item_id"}\nfeedback = {ladder = ["click"]}\n' + fields_as_toml(FIELDS)


class Maker:
    """An adapter with one source file; counts how often it converts."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source.csv"
        self.source.write_text("1")
        self.out = folder / "out"
        self.built = 0

    def __call__(self, version: str = "test 1") -> Path:
        return write_form(self.out, adapter=version, sources=[self.source], build=self.build)

    def build(self) -> Form:
        self.built += 1
        users = pa.table({"user_id": [int(self.source.read_text())]})
        return Form(users=users, items=pa.table({"item_id": [1]}), events=pa.table({"click": [1]}), document=DOCUMENT)


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_form_is_written_whole_and_leaves_nothing_beside_it(make: Maker) -> None:
    out = make()
    assert sorted(contents(out)) == ["events.parquet", "items.parquet", "log.toml", "source.json", "users.parquet"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "source.csv"]


def test_rows_may_come_in_blocks_and_text_files_may_lie_beside(tmp_path: Path) -> None:
    blocks = (pa.table({"click": [k]}) for k in range(5))
    one = pa.table({"user_id": [1]})
    form = Form(
        users=one, items=pa.table({"item_id": [1]}), events=blocks, document=DOCUMENT, beside={"n.toml": "a = 1"}
    )
    out = write_form(tmp_path / "out", adapter="test 1", sources=[], build=lambda: form)
    assert pq.read_table(out / "events.parquet")["click"].to_pylist() == [0, 1, 2, 3, 4]
    assert (out / "n.toml").read_text() == "a = 1"
    assert write_form(tmp_path / "out", adapter="test 1", sources=[], build=lambda: pytest.fail("built twice")) == out


def test_an_empty_folder_is_filled(make: Maker) -> None:
    make.out.mkdir()
    assert "log.toml" in contents(make())


def test_writing_again_from_the_same_source_does_nothing(make: Maker) -> None:
    before = contents(make())
    assert contents(make()) == before
    assert make.built == 1


def test_a_changed_source_or_a_newer_adapter_replaces_the_form(make: Maker) -> None:
    make()
    make.source.write_text("2")
    assert pq.read_table(make() / "users.parquet")["user_id"].to_pylist() == [2]
    make("test 2")
    assert make.built == 3
    assert sorted(path.name for path in make.out.parent.iterdir()) == ["out", "source.csv"]


def test_edits_are_kept_while_the_source_stays(make: Maker) -> None:
    edited = make() / "log.toml"
    edited.write_text(DOCUMENT + "# mine\n")
    make()
    assert edited.read_text().endswith("# mine\n")


@pytest.mark.parametrize("name", ["log.toml", "users.parquet", "notes.txt"])
def test_what_someone_changed_or_added_is_never_replaced(make: Maker, name: str) -> None:
    make()
    (make.out / name).write_text("mine")
    make.source.write_text("2")
    before = contents(make.out)
    with pytest.raises(
        DataError, match=f"out must be written anew, but {name} was changed or added .* move the folder"
    ):
        make()
    assert contents(make.out) == before


def test_a_lost_file_is_written_again(make: Maker) -> None:
    (make() / "items.parquet").unlink()
    assert "items.parquet" in contents(make())


def test_a_folder_or_file_of_someone_else_is_refused(make: Maker) -> None:
    make.out.mkdir()
    (make.out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="out exists and was not written by `ranktower data`: choose another folder"):
        make()
    assert contents(make.out) == {"thesis.txt": b"years of work"}
    (make.out / MARK).write_text("{}")
    with pytest.raises(DataError, match="was not written by"):
        make()
    (make.out / "thesis.txt").unlink()
    (make.out / MARK).unlink()
    make.out.rmdir()
    make.out.write_text("a file")
    with pytest.raises(DataError, match="was not written by"):
        make()


def test_a_conversion_that_fails_leaves_what_was_there(make: Maker) -> None:
    before = contents(make())
    make.source.write_text("not a number")
    with pytest.raises(ValueError, match="invalid literal"):
        make()
    assert contents(make.out) == before
    assert sorted(path.name for path in make.out.parent.iterdir()) == ["out", "source.csv"]


def test_a_missing_source_is_named(make: Maker) -> None:
    make.source.unlink()
    with pytest.raises(DataError, match=r"source.csv does not exist: give the folder that holds it"):
        make()


def test_a_source_that_is_no_file_is_named(make: Maker) -> None:
    make.source.unlink()
    make.source.mkdir()
    with pytest.raises(DataError, match=r"source.csv cannot be read .*: give a file that can"):
        make()


def test_a_place_below_a_file_cannot_be_written(make: Maker) -> None:
    make.out = make.source / "out"
    with pytest.raises(DataError, match="out cannot be written"):
        make()


def test_fields_come_back_from_their_toml() -> None:
    assert parse_schema(tomllib.loads(DOCUMENT), "log.toml").fields == FIELDS
