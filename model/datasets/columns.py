"""Turn columns of Parquet files into arrays, checked at this border; errors name the column and its first wrong row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.datasets.schema import TIME_UNITS, nearest
from model.errors import DataError

LARGEST_EXACT = 2.0**53  # whole numbers up to here survive as float64
MAX_ID_BYTES = 1024  # of a text id in UTF-8: what a published snapshot holds
YEAR_9999_MS = 253_402_300_799_999
GUESSED_UNITS = ((1e11, "s"), (1e14, "ms"), (1e17, "us"))  # an epoch time below the bound has this unit; above, ns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A file read whole, with its path for errors."""

    path: Path
    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> pa.Array:
        """One column as one contiguous array, dictionaries decoded."""
        array = self.table[name].combine_chunks()
        return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array

    def wrong(self, name: str, row: int, problem: str) -> DataError:
        return DataError(f"{self.path}: column {name!r}, row {row} (from 0): {problem}")

    def mistyped(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.path}: column {name!r} is {self.table.schema.field(name).type}: {problem}")


def open_source(path: Path, columns: Sequence[str], wanted_by: str = "log.toml") -> Source:
    """Read the named columns of a Parquet file. Raises DataError for a file or a column that is not there."""
    try:
        with pq.ParquetFile(path) as file:
            known = file.schema_arrow.names
            for name in columns:
                if name not in known:
                    raise DataError(f"{path} has no column {name!r}, which {wanted_by} names: {nearest(name, known)}")
                if known.count(name) > 1:
                    raise DataError(f"{path} has {known.count(name)} columns {name!r}: keep or rename one")
            return Source(path, file.read(columns=list(dict.fromkeys(columns))))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: write it as docs/data.md shows") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}): write it again") from error


def read_ids(source: Source, name: str) -> pa.Array:
    """Ids as an int64 or string Arrow array without nulls."""
    array = source.column(name)
    _refuse_nulls(source, name, array, "give every row an id")
    if pa.types.is_integer(array.type):
        return _cast(source, name, array, pa.int64(), "ids must fit 64-bit signed integers, or be text")
    if _is_text(array.type):
        return array.cast(pa.large_string())
    raise source.mistyped(name, "ids are integers or text, convert the column")


def read_unique_ids(source: Source, name: str) -> pa.Array:
    """The same, each id once, and text ids of a length that can be published."""
    ids = read_ids(source, name)
    _refuse_long_ids(source, name, ids)
    if len(ids) == 0:
        raise DataError(f"{source.path} has no rows: write at least one")
    if pc.count_distinct(ids).as_py() == len(ids):
        return ids
    _, first, inverse = np.unique(as_objects(ids), return_index=True, return_inverse=True)
    row = int(np.flatnonzero(first[inverse] != np.arange(len(ids)))[0])
    raise source.wrong(
        name, row, f"id {ids[row].as_py()!r} stands in row {first[inverse][row]} already: keep one row per id"
    )


def _refuse_long_ids(source: Source, name: str, ids: pa.Array) -> None:
    """Text ids hold 1 to MAX_ID_BYTES bytes."""
    if pa.types.is_integer(ids.type):
        return
    size = np.asarray(pc.binary_length(ids).to_numpy(zero_copy_only=False))
    rows = np.flatnonzero((size == 0) | (size > MAX_ID_BYTES))
    if len(rows):
        length = "is empty" if size[rows[0]] == 0 else f"has {size[rows[0]]:,} bytes of UTF-8"
        raise source.wrong(
            name, int(rows[0]), f"id {length}{_more(rows)}: a text id has 1 to {MAX_ID_BYTES:,}, shorten or fill it"
        )


def match_ids(source: Source, name: str, known: pa.Array, known_in: str) -> NDArray[np.int32]:
    """(n,) int32 row of each id among the known ones, -1 where unknown."""
    ids = read_ids(source, name)
    if ids.type != known.type:
        kinds = {True: "integers", False: "text"}
        problem = f"ids are {kinds[pa.types.is_integer(known.type)]} in {known_in}, write the same type in both files"
        raise source.mistyped(name, problem)
    return np.asarray(pc.fill_null(pc.index_in(ids, value_set=known), -1).to_numpy(zero_copy_only=False), np.int32)


def as_objects(ids: pa.Array) -> NDArray[Any]:
    """Ids as an int64 array or an array of str objects."""
    return np.asarray(ids.to_numpy(zero_copy_only=False))


def read_categorical(source: Source, name: str) -> NDArray[Any]:
    """int64, float64 with NaN (integers with nulls), or an object array of str and None."""
    array = source.column(name)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if pa.types.is_integer(array.type):
        return _integers(source, name, array)
    if pa.types.is_floating(array.type):
        return _whole_floats(source, name, array)
    if _is_text(array.type):
        return np.asarray(array.to_numpy(zero_copy_only=False), object)
    if pa.types.is_null(array.type):
        return np.full(len(array), np.nan)
    raise source.mistyped(name, "a categorical field holds integers or text" + _hint(array.type))


def read_text(source: Source, name: str) -> NDArray[Any]:
    """Text to show, such as a title: an object array of str and None."""
    array = source.column(name)
    if not _is_text(array.type):
        raise source.mistyped(name, "a title is text, convert the column")
    return np.asarray(array.to_numpy(zero_copy_only=False), object)


def read_numeric(source: Source, name: str) -> NDArray[np.float64]:
    """float64, NaN where null; a NaN or an infinity in the file itself is refused."""
    array = source.column(name)
    if not (_is_number(array.type) or pa.types.is_boolean(array.type) or pa.types.is_null(array.type)):
        raise source.mistyped(name, "a numeric field holds numbers" + _hint(array.type))
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    values = np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)
    _refuse_unless_finite(source, name, array, values)
    return values


def read_multi(source: Source, name: str) -> NDArray[Any]:
    """(n,) object array: an array of the row's values, or None where null. Nulls inside a list are left out."""
    array = source.column(name)
    kind = array.type
    if pa.types.is_null(kind):
        return np.full(len(array), None, object)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise source.mistyped(
            name, "a multi field holds lists of integers or text, write lists or use kind categorical"
        )
    values = array.flatten()
    owner = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not (pa.types.is_integer(values.type) or _is_text(values.type) or pa.types.is_null(values.type)):
        raise source.mistyped(name, "a multi field holds lists of integers or text, convert the entries")
    if values.null_count:
        owner = owner[np.asarray(values.is_valid().to_numpy(zero_copy_only=False))]
        values = values.drop_null()
    flat = values.to_numpy(zero_copy_only=False)
    flat = flat.astype(np.int64) if pa.types.is_integer(values.type) else flat.astype(object)
    counts = np.bincount(owner, minlength=len(array))
    ends = np.cumsum(counts)
    rows = np.empty(len(array), object)
    for row, (start, end) in enumerate(zip((ends - counts).tolist(), ends.tolist(), strict=True)):
        rows[row] = flat[start:end]
    if array.null_count:
        rows[np.asarray(array.is_null().to_numpy(zero_copy_only=False))] = None
    return rows


def read_flags(source: Source, name: str, required: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """0/1 or true/false feedback. Null is allowed, as 0, only where `required` is false."""
    array = source.column(name)
    if not (pa.types.is_boolean(array.type) or pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise source.mistyped(name, "feedback is 0 or 1, or boolean")
    _refuse_nulls(source, name, array, "write 0 where nothing was given", required)
    values = np.asarray(array.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False))
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise source.wrong(
            name, int(wrong[0]), f"is {values[wrong[0]]:g}: feedback is 0 or 1, make a column for each level"
        )
    return np.asarray(values == 1)


def read_scores(source: Source, name: str, required: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Logged ranker scores, probabilities from 0 to 1. Null is allowed, as 0, only where `required` is false."""
    array = source.column(name)
    if not _is_number(array.type):
        raise source.mistyped(name, "a teacher's scores are numbers")
    _refuse_nulls(source, name, array, "every impression needs the ranker's score", required)
    values = np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)
    _refuse_unless_finite(source, name, array, values)
    wrong = np.flatnonzero((values < 0) | (values > 1))
    if len(wrong):
        raise source.wrong(
            name,
            int(wrong[0]),
            f"is {values[wrong[0]]:g}{_more(wrong)}: a teacher's score is the probability of its rung, from 0 to 1; "
            "calibrate it, or drop it from [columns.teacher]",
        )
    return np.nan_to_num(values, nan=0.0).astype(np.float32)


def read_choices(source: Source, name: str, choices: Sequence[str]) -> NDArray[np.int8]:
    """Texts out of a few (or their numbers) as their positions."""
    array = source.column(name)
    _refuse_nulls(source, name, array, f"write one of {', '.join(choices)}")
    numbered = pa.types.is_integer(array.type)
    if not (numbered or _is_text(array.type)):
        raise source.mistyped(name, f"write one of {', '.join(choices)}")
    known = pa.array(range(len(choices)), pa.int64()) if numbered else pa.array(choices, pa.large_string())
    codes = pc.index_in(array.cast(known.type), value_set=known)
    if codes.null_count:
        row = int(np.flatnonzero(codes.is_null().to_numpy(zero_copy_only=False))[0])
        value = array[row].as_py()
        raise source.wrong(name, row, f"is {value!r}: {nearest(str(value), choices)}")
    return np.asarray(codes.to_numpy(zero_copy_only=False), np.int8)


def read_codes(source: Source, name: str) -> NDArray[np.int64]:
    """Any ids, of requests say, as dense numbers."""
    encoded = read_ids(source, name).dictionary_encode()
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)


def read_order(source: Source, name: str) -> NDArray[np.int64]:
    """Integers that grow with time."""
    array = source.column(name)
    _refuse_nulls(source, name, array, "give every event its place")
    if not pa.types.is_integer(array.type):
        raise source.mistyped(name, "an order holds integers, convert the column")
    return np.asarray(_cast(source, name, array, pa.int64(), "use a 64-bit signed integer").to_numpy(), np.int64)


def read_times(source: Source, name: str, unit: str | None) -> tuple[NDArray[np.int64], str]:
    """Epoch milliseconds, rounded down, and the unit of the column. Times without a zone are UTC."""
    array = source.column(name)
    _refuse_nulls(source, name, array, "give every event its time")
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(array.type):
        unit = str(array.type.unit)
        array = array.view(pa.int64())  # a zone changes how a time prints, not its number
    if not pa.types.is_integer(array.type):
        raise source.mistyped(name, "a time is an integer, a timestamp or a date, convert the column")
    raw = np.asarray(_cast(source, name, array, pa.int64(), "use a 64-bit signed integer").to_numpy(), np.int64)
    if unit is None:
        unit = guess_unit(raw)
        log.info(
            "%s: column %r read as epoch time in %s; set time_unit in log.toml if that is wrong",
            source.path,
            name,
            unit,
        )
    late = np.flatnonzero(np.abs(raw.astype(np.float64)) * TIME_UNITS[unit] > YEAR_9999_MS)
    if len(late):
        raise source.wrong(
            name, int(late[0]), f"is {raw[late[0]]}, beyond the year 9999 in {unit}: set time_unit in log.toml"
        )
    return to_milliseconds(raw, unit), unit


def guess_unit(times: NDArray[np.int64]) -> str:
    """The unit of epoch times, judged by their middle: years 1973 to 5138 in each unit do not overlap."""
    middle = float(np.median(np.abs(times))) if len(times) else 0.0
    return next((unit for bound, unit in GUESSED_UNITS if middle < bound), "ns")


def to_milliseconds(times: NDArray[np.int64], unit: str) -> NDArray[np.int64]:
    """Whole milliseconds, rounded down, without passing through floats."""
    factor = TIME_UNITS[unit]
    return times * int(factor) if factor >= 1 else times // round(1 / factor)


def _integers(source: Source, name: str, array: pa.Array) -> NDArray[Any]:
    whole = _cast(source, name, array, pa.int64(), "values must fit 64-bit signed integers, or be text")
    if not whole.null_count:
        return np.asarray(whole.to_numpy(zero_copy_only=False), np.int64)
    span = pc.min_max(whole).as_py()
    if span["min"] is None or max(-span["min"], span["max"]) <= LARGEST_EXACT:
        return np.asarray(whole.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    values = np.empty(len(whole), object)
    values[:] = whole.to_pylist()
    return values


def _whole_floats(source: Source, name: str, array: pa.Array) -> NDArray[np.float64]:
    """Integers that became floats because some are null, as pandas writes them."""
    values = np.array(array.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    _refuse_unless_finite(source, name, array, values)
    wrong = np.flatnonzero(np.isfinite(values) & ((values != np.trunc(values)) | (np.abs(values) > LARGEST_EXACT)))
    if len(wrong):
        raise source.wrong(
            name, int(wrong[0]), f"is {values[wrong[0]]}: a categorical field holds whole numbers, use kind numeric"
        )
    return values


def _refuse_nulls(
    source: Source, name: str, array: pa.Array, remedy: str, required: NDArray[np.bool_] | None = None
) -> None:
    if not array.null_count:
        return
    null = np.asarray(array.is_null().to_numpy(zero_copy_only=False))
    rows = np.flatnonzero(null if required is None else null & required)
    if len(rows):
        raise source.wrong(name, int(rows[0]), f"is null{_more(rows)}: {remedy}")


def _refuse_unless_finite(source: Source, name: str, array: pa.Array, values: NDArray[np.float64]) -> None:
    wrong = ~np.isfinite(values)
    if array.null_count:
        wrong &= np.asarray(array.is_valid().to_numpy(zero_copy_only=False))
    rows = np.flatnonzero(wrong)
    if len(rows):
        value = values[rows[0]]
        raise source.wrong(name, int(rows[0]), f"is {value}{_more(rows)}: write null where a value is missing")


def _more(rows: NDArray[Any]) -> str:
    return f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""


def _cast(source: Source, name: str, array: pa.Array, kind: pa.DataType, remedy: str) -> pa.Array:
    try:
        return array.cast(kind)
    except pa.ArrowInvalid as error:
        raise source.mistyped(name, f"{remedy} ({error})") from error


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _hint(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return ", use kind multi for lists"
    if pa.types.is_temporal(kind):
        return ", make numbers or categories (hour, weekday) of times"
    return ", use kind categorical for text" if _is_text(kind) else ", convert the column"
