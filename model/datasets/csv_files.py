"""Read official csv files into tables, whole or in blocks; what is wrong is named with its file and a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from model.datasets.columns import Source
from model.datasets.schema import nearest
from model.errors import DataError

BLOCK_BYTES = 16 << 20  # parsed at a time

Types = Mapping[str, pa.DataType | None]  # the columns to read; None: the type that the values have


def read_csv(path: Path, types: Types, of: str, header: Sequence[str] | None = None) -> Source:
    """The named columns of a csv file of the data set `of`. Empty fields and NULL are missing values.

    `header` names the columns of a file without a first line that does. Raises DataError for a file, a column or a
    value that is not as it should be.
    """
    options = _options(path, types, of, header)
    try:
        return Source(path, pa.csv.read_csv(path, **options))
    except (OSError, pa.ArrowException) as error:
        raise _not_of(path, of, error) from error


def stream_csv(path: Path, types: Types, of: str, header: Sequence[str] | None = None) -> Iterator[Source]:
    """The same in blocks, for files larger than memory; rows in errors count from the start of a block."""
    options = _options(path, types, of, header)
    try:
        with pa.csv.open_csv(path, **options) as reader:
            for batch in reader:
                yield Source(path, pa.Table.from_batches([batch]))
    except (OSError, pa.ArrowException) as error:
        raise _not_of(path, of, error) from error


def _options(path: Path, types: Types, of: str, header: Sequence[str] | None) -> dict[str, Any]:
    first = _first_line(path, of)
    found = list(header) if header else first
    for name in types:
        if name not in found:
            raise DataError(f"{path} has no column {name!r}, which files of {of} have: {nearest(name, found)}")
    if header and len(first) != len(header):
        raise DataError(
            f"{path} has {len(first)} columns, files of {of} have {len(header)} ({', '.join(header)}): "
            "get the official one again"
        )
    known = {name: kind for name, kind in types.items() if kind is not None}
    return {
        "read_options": pa.csv.ReadOptions(column_names=found, skip_rows=0 if header else 1, block_size=BLOCK_BYTES),
        "convert_options": pa.csv.ConvertOptions(
            include_columns=list(types), column_types=known, strings_can_be_null=True
        ),
    }


def _first_line(path: Path, of: str) -> list[str]:
    """Names of columns, without the blanks around them that an official file has."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return [name.strip() for name in file.readline().split(",")]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give the folder that holds it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _not_of(path, of, error) from error


def _not_of(path: Path, of: str, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as a file of {of} ({error}): get the official one again")
