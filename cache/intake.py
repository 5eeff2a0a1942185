"""Changes on their way from Parquet files into the log: checked whole against a bundle, then appended as they are.

All columns are kept, also those that no bundle reads yet: the next one may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache.catalogue import as_ids, check_ids, held_rows, open_catalogue
from cache.changes import CHANGES, ENTRY_BYTES, ENTRY_ROWS, Deleted, Upserted, append_all, encode_change
from cache.release import Progress, no_progress
from cache.shards import Shard
from cache.snapshot import MAX_ID_BYTES, may_hold
from cache.store import ReleaseStore
from kernel.ids import Ids, Texts
from model.datasets.columns import open_source, read_unique_ids
from model.errors import DataError
from model.features import FeatureSpec

ID_COLUMN = b"ranktower_id_column"  # in the metadata of a batch
SHOWN = 40  # characters of an id that is too long


def append_items(
    store: ReleaseStore,
    items: Path,
    spec: FeatureSpec,
    id_column: str | None = None,
    progress: Progress = no_progress,
    shard: Shard | None = None,
) -> tuple[int, int]:
    """Append all rows of an items file, or those of a shard, as upserts; returns how many, and the position behind
    them.

    Raises DataError naming file, column and row before anything is appended. What fails later may have appended a part:
    the same again does no harm.
    """
    catalogue = open_catalogue(items, spec, id_column, shard)
    _refuse_twins(items, pq.read_schema(items).names)
    done = 0
    for ids, _ in catalogue.blocks():
        done += len(ids)
        progress("check", done, len(catalogue))
    payloads = (encode_change(Upserted(rows)) for rows in item_rows(items, catalogue.id_column, catalogue.held))
    return len(catalogue), append_all(store.log(CHANGES), payloads)


def append_deletes(store: ReleaseStore, ids: Ids) -> tuple[int, int]:
    """Append the deletion of items, known or not; returns how many, and the position behind them.

    Raises DataError for an id that no item can have.
    """
    wrong = np.flatnonzero(~may_hold(ids))
    if isinstance(ids, Texts) and len(wrong):
        shown = ids[wrong[:1]].tolist()[0][:SHOWN]
        raise DataError(
            f"id {shown!r} has {ids.sizes[wrong[0]]:,} bytes of UTF-8: a text id has 1 to {MAX_ID_BYTES:,}, shorten it"
        )
    parts = (ids[start : start + ENTRY_ROWS] for start in range(0, len(ids), ENTRY_ROWS))
    return len(ids), append_all(store.log(CHANGES), (encode_change(Deleted(part)) for part in parts))


def read_deleted(path: Path, spec: FeatureSpec, id_column: str | None = None) -> Ids:
    """The ids of a Parquet file, each once, of the type that the bundle has. Raises DataError."""
    name = id_column or spec.item_id_name
    found = read_unique_ids(open_source(path, [name], wanted_by="--id-column" if id_column else "the bundle"), name)
    check_ids(path, found, name, spec)
    return as_ids(found)


def parse_deleted(text: str, spec: FeatureSpec) -> Ids:
    """The ids of a command line, with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise DataError(f"--delete-ids {text!r} has an empty id: write ids with commas between them")
    if spec.item_id_type == "string":
        try:
            return as_ids(pa.array(parts, pa.large_string()))
        except UnicodeEncodeError as error:
            raise DataError(f"--delete-ids {text!r} is not UTF-8 ({error.reason}): write the ids of items") from error
    try:
        return np.array([_integer(part) for part in parts], np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"--delete-ids {text!r}: item ids are integers of 64 bits ({error})") from error


def _integer(text: str) -> int:
    """Decimal digits alone: `int` takes 1_0 for 10."""
    if not re.fullmatch("[+-]?[0-9]+", text):
        raise ValueError(f"{text!r} is none")
    return int(text)


def item_rows(items: Path, id_column: str, held: NDArray[np.bool_] | None = None) -> Iterator[bytes]:
    """All rows of a Parquet file, or those `held`, as Arrow IPC streams of one batch each, 1,000 rows and 64 MiB at
    most."""
    with pq.ParquetFile(items) as file:
        schema = pa.schema(file.schema_arrow, metadata={ID_COLUMN: id_column.encode()})
        for batch in held_rows(file, range(file.num_row_groups), None, held, batch_rows=ENTRY_ROWS):
            if batch.num_rows:
                yield from _streams(items, batch.cast(schema), schema)


def _refuse_twins(items: Path, names: list[str]) -> None:
    """Of all columns: those that no bundle reads today, the next one may, and could not choose."""
    twin = next((name for name in names if names.count(name) > 1), None)
    if twin is not None:
        raise DataError(f"{items} has {names.count(twin)} columns {twin!r}: keep or rename one")


def _streams(items: Path, batch: pa.RecordBatch, schema: pa.Schema) -> Iterator[bytes]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue().to_pybytes()
    if len(content) < ENTRY_BYTES // 2:
        yield content
    elif batch.num_rows == 1:
        raise DataError(f"{items}: a row has {len(content):,} octets: leave out columns that no bundle needs")
    else:
        half = batch.num_rows // 2
        yield from _streams(items, batch.slice(0, half), schema)
        yield from _streams(items, batch.slice(half), schema)
