from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.snapshot import MAX_ID_BYTES
from model.datasets import columns as read
from model.errors import DataError

EVERY, NONE = np.ones(2, bool), np.zeros(2, bool)


def source(values: Any, kind: pa.DataType | None = None) -> read.Source:
    """A file of one column `x`, not written to disk."""
    return read.Source(Path("some.parquet"), pa.table({"x": pa.array(values, kind)}))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([3, 1], pa.int8(), [3, 1]),
        ([3, 1], pa.uint64(), [3, 1]),
        ([True, False], pa.bool_(), [1, 0]),
        ([3, None], pa.int64(), [3.0, np.nan]),
        ([3.0, None], pa.float32(), [3.0, np.nan]),
        ([2**60 + 1, None], pa.int64(), [2**60 + 1, None]),  # would lose its last digits as a float
        (["a", None], pa.string(), ["a", None]),
        (["a", None], pa.large_string(), ["a", None]),
        ([None, None], pa.null(), [np.nan, np.nan]),
    ],
)
def test_categorical_columns_keep_their_values(values: Any, kind: pa.DataType, expected: list[Any]) -> None:
    np.testing.assert_array_equal(read.read_categorical(source(values, kind), "x"), np.array(expected))


def test_dictionary_columns_are_read_as_their_values() -> None:
    encoded = read.Source(Path("some.parquet"), pa.table({"x": pa.array(["a", "b", "a"]).dictionary_encode()}))
    assert read.read_categorical(encoded, "x").tolist() == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, 2], pa.int16(), [1, 2]),
        ([1.5, None], pa.float32(), [1.5, np.nan]),
        ([None, 7], pa.int64(), [np.nan, 7]),
        ([True, False], pa.bool_(), [1, 0]),
        ([Decimal("1.25"), None], pa.decimal128(5, 2), [1.25, np.nan]),
        ([None, None], pa.null(), [np.nan, np.nan]),
    ],
)
def test_numeric_columns_become_floats_with_nan_for_null(values: Any, kind: pa.DataType, expected: list[float]) -> None:
    found = read.read_numeric(source(values, kind), "x")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("wrap", [pa.list_, pa.large_list])
def test_multi_columns_become_an_array_a_row(wrap: Callable[[pa.DataType], pa.DataType]) -> None:
    found = read.read_multi(source([["a", "b"], None, [], ["c", None]], wrap(pa.string())), "x")
    assert [None if row is None else row.tolist() for row in found] == [["a", "b"], None, [], ["c"]]
    numbers = read.read_multi(source([[1, 2], [3]], wrap(pa.int32())), "x")
    assert [row.tolist() for row in numbers] == [[1, 2], [3]]


def test_multi_columns_of_any_chunks_and_lengths_are_read() -> None:
    fixed = source([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))
    assert [row.tolist() for row in read.read_multi(fixed, "x")] == [[1, 2], [3, 4]]
    chunks = pa.chunked_array([pa.array([[1], None]), pa.array([[2, 3]]), pa.array([[9], [4]])[1:]])
    found = read.read_multi(read.Source(Path("some.parquet"), pa.table({"x": chunks})), "x")
    assert [None if row is None else row.tolist() for row in found] == [[1], None, [2, 3], [4]]
    assert read.read_multi(source([None, None], pa.null()), "x").tolist() == [None, None]


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 0], pa.int8()), ([True, False], pa.bool_()), ([1.0, 0.0], pa.float64()), ([1, None], pa.int8())],
)
def test_feedback_is_read_from_numbers_and_booleans(values: Any, kind: pa.DataType) -> None:
    assert read.read_flags(source(values, kind), "x", NONE).tolist() == [True, False]


def test_choices_are_read_from_names_and_numbers() -> None:
    assert read.read_choices(source(["b", "a"]), "x", ("a", "b")).tolist() == [1, 0]
    assert read.read_choices(source([1, 0]), "x", ("a", "b")).tolist() == [1, 0]


MOMENT_MS = 1_650_812_741_436
MOMENT = datetime.fromtimestamp(MOMENT_MS / 1000, UTC)


@pytest.mark.parametrize(
    ("value", "kind", "unit", "expected_ms"),
    [
        (MOMENT_MS, None, None, MOMENT_MS),
        (MOMENT_MS // 1000, None, None, MOMENT_MS // 1000 * 1000),
        (MOMENT_MS * 1000 + 999, None, None, MOMENT_MS),
        (MOMENT_MS * 1_000_000 + 999_999, None, None, MOMENT_MS),
        (12, None, None, 12_000),
        (12, None, "ms", 12),
        (-1, None, "us", -1),  # rounded down, so that order is kept across 1970
        (MOMENT, pa.timestamp("ms", "Asia/Shanghai"), None, MOMENT_MS),
        (MOMENT, pa.timestamp("us", "UTC"), None, MOMENT_MS),
        (MOMENT.replace(tzinfo=None), pa.timestamp("ns"), None, MOMENT_MS),
        (MOMENT.astimezone(timezone(timedelta(hours=8))), pa.timestamp("ms", "UTC"), None, MOMENT_MS),
        (date(1970, 1, 3), pa.date32(), None, 2 * 86_400_000),
    ],
)
def test_times_of_any_unit_become_epoch_milliseconds(
    value: Any, kind: pa.DataType | None, unit: str | None, expected_ms: int
) -> None:
    times, _ = read.read_times(source([value, value], kind), "x", unit)
    assert times.tolist() == [expected_ms, expected_ms]


Reader = Callable[[read.Source], Any]
READERS: dict[str, Reader] = {
    "ids": lambda s: read.read_ids(s, "x"),
    "unique ids": lambda s: read.read_unique_ids(s, "x"),
    "categorical": lambda s: read.read_categorical(s, "x"),
    "numeric": lambda s: read.read_numeric(s, "x"),
    "multi": lambda s: read.read_multi(s, "x"),
    "text": lambda s: read.read_text(s, "x"),
    "flags": lambda s: read.read_flags(s, "x", EVERY),
    "scores": lambda s: read.read_scores(s, "x", EVERY),
    "choices": lambda s: read.read_choices(s, "x", ("impression", "random")),
    "order": lambda s: read.read_order(s, "x"),
    "times": lambda s: read.read_times(s, "x", None),
    "seconds": lambda s: read.read_times(s, "x", "s"),
}


@pytest.mark.parametrize(
    ("reader", "values", "kind", "problem"),
    [
        ("ids", [1, None], None, r"row 1 \(from 0\): is null: give every row an id"),
        ("ids", [1.0, 2.0], None, "is double: ids are integers or text"),
        ("ids", [1, 2**63], pa.uint64(), "is uint64: ids must fit"),
        ("unique ids", [4, 7, 4], None, r"row 2 \(from 0\): id 4 stands in row 0 already"),
        ("unique ids", ["b", "a", "a"], None, "row 2 .*: id 'a' stands in row 1 already"),
        ("unique ids", [], pa.int64(), "has no rows"),
        ("unique ids", ["a", "", "b"], None, r"row 1 .*: id is empty: a text id has 1 to 1,024"),
        ("unique ids", ["a", "\u00e9" * 513], None, r"row 1 .*: id has 1,026 bytes of UTF-8: a text id has 1 to 1,024"),
        ("scores", [0.5, 1.5], None, r"row 1 .*: is 1.5: a teacher's score is the probability"),
        ("scores", [-0.25, 7.0], None, r"row 0 .*: is -0.25 \(and 1 more\): a teacher's score"),
        ("categorical", [1.0, 2.5], None, "row 1 .*: is 2.5: .* use kind numeric"),
        ("categorical", [1.0, float("inf")], None, "row 1 .*: is inf: write null"),
        ("categorical", [["a"], ["b"]], None, r"is list<.*: .* use kind multi"),
        ("categorical", [MOMENT], None, r"is timestamp.*: .*hour, weekday"),
        ("numeric", [0.5, float("nan"), float("inf")], None, r"row 1 .*: is nan \(and 1 more\): write null"),
        ("numeric", [None, float("-inf")], pa.float64(), "row 1 .*: is -inf"),
        ("numeric", ["1"], None, "is string: .* use kind categorical for text"),
        ("numeric", [[1]], None, "is list.*: .* use kind multi"),
        ("multi", ["a"], None, "is string: .* write lists or use kind categorical"),
        ("multi", [[1.5]], None, "is list.*: .* convert the entries"),
        ("text", [7], None, "is int64: a title is text"),
        ("flags", [0, 2], None, "row 1 .*: is 2: feedback is 0 or 1"),
        ("flags", [None, 1], None, "row 0 .*: is null"),
        ("flags", ["yes", "no"], None, "is string: feedback is 0 or 1"),
        ("scores", [0.5, None], None, "row 1 .*: is null: every impression needs the ranker's score"),
        ("scores", [0.5, float("nan")], None, "row 1 .*: is nan"),
        ("choices", ["impression", "impresion"], None, "row 1 .*: is 'impresion': did you mean 'impression'"),
        ("choices", [0, 9], None, "row 1 .*: is 9: known are impression, random"),
        ("choices", [None, "random"], None, "row 0 .*: is null"),
        ("order", [1.0], None, "is double: an order holds integers"),
        ("times", [1.5], None, "is double: a time is an integer, a timestamp or a date"),
        ("times", [None, 3], None, "row 0 .*: is null: give every event its time"),
        ("seconds", [MOMENT_MS * 10**6], None, "beyond the year 9999 in s: set time_unit"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_column_row_and_remedy(
    reader: str, values: Any, kind: pa.DataType | None, problem: str
) -> None:
    with pytest.raises(DataError, match="some.parquet: column 'x'.*" + problem if values else problem):
        READERS[reader](source(values, kind))


def test_ids_of_two_types_do_not_match() -> None:
    with pytest.raises(
        DataError, match=r"column 'x' is string: ids are integers in users.parquet, write the same type"
    ):
        read.match_ids(source(["1"]), "x", pa.array([1, 2], pa.int64()), "users.parquet")


def test_a_missing_file_and_a_file_that_is_no_parquet_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"users.parquet does not exist"):
        read.open_source(tmp_path / "users.parquet", ["x"])
    (tmp_path / "users.parquet").write_text("x\n1\n")
    with pytest.raises(DataError, match=r"users.parquet cannot be read as Parquet"):
        read.open_source(tmp_path / "users.parquet", ["x"])


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"x": list(range(1000))}), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"users.parquet cannot be read as Parquet"):
        read.open_source(path, ["x"])


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"genres": [1], "year": [2]}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"items.parquet has no column 'genre', .*: did you mean 'genres'\?"):
        read.open_source(tmp_path / "items.parquet", ["genre"])
    with pytest.raises(DataError, match=r"no column 'price', .*: known are genres, year"):
        read.open_source(tmp_path / "items.parquet", ["price"])


def test_ids_may_be_as_long_as_a_snapshot_holds() -> None:
    assert read.MAX_ID_BYTES == MAX_ID_BYTES
    ids = ["a" * MAX_ID_BYTES, "\u00e9" * (MAX_ID_BYTES // 2)]
    assert read.read_unique_ids(source(ids), "x").to_pylist() == ids


def test_a_column_that_stands_twice_is_refused_when_the_file_is_opened(tmp_path: Path) -> None:
    twice = pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["x", "y", "x"])
    pq.write_table(twice, tmp_path / "users.parquet")
    with pytest.raises(DataError, match=r"users\.parquet has 2 columns 'x': keep or rename one"):
        read.open_source(tmp_path / "users.parquet", ["x"])
    assert read.open_source(tmp_path / "users.parquet", ["y"]).column("y").to_pylist() == [2]
