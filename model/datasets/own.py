"""A log that is in the documented form already, checked and brought to where the other adapters write theirs."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from model.datasets.form import TABLES, Form, write_form
from model.datasets.log import read_log
from model.datasets.schema import FILE
from model.errors import DataError

ADAPTER = "log 1"  # the number rises when the conversion changes

log = logging.getLogger(__name__)


def holds(folder: Path) -> bool:
    """Whether a folder is meant as a log in the documented form."""
    return (folder / FILE).is_file()


def convert(source: Path, out: Path) -> Path:
    """Read and check the log in the folder `source`, then write it into `out`, columns that no key names included.

    The source is never touched; where `out` is the source itself, nothing is done.
    """
    if source.resolve() == out.resolve():
        log.info("%s: is in the documented form already", out)
        return out
    files = [source / name for name in (FILE, *(f"{table}.parquet" for table in TABLES))]
    for path in files:
        if not path.is_file():
            found = "is no file" if path.exists() else "does not exist"
            raise DataError(f"{path} {found}: write it as docs/data.md shows")

    def build() -> Form:
        read_log(source)
        tables = {name: _whole(source / f"{name}.parquet") for name in TABLES}
        return Form(**tables, document=(source / FILE).read_text(encoding="utf-8"))

    return write_form(out, adapter=ADAPTER, sources=files, build=build)


def _whole(path: Path) -> pa.Table:
    """Every column: a later edit of log.toml may name it."""
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}): write it again") from error
