"""Read a catalogue: items in Parquet, of any number -> blocks of ids and encoded features, checked as in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache.parallel import in_order
from cache.shards import Shard
from kernel.ids import Ids, Texts
from model.datasets.columns import Source, as_objects, open_source, read_ids, read_unique_ids
from model.datasets.events import read_field
from model.datasets.schema import nearest
from model.errors import DataError, FeatureError
from model.features import Column, FeatureSpec

BLOCK_ROWS = 32_768  # items in memory at a time
SAMPLED_GROUPS = 16


@dataclass(frozen=True)
class Catalogue:
    """Items in a Parquet file, their ids known to be distinct; the features are read in blocks."""

    path: Path
    spec: FeatureSpec
    ids: pa.Array
    id_column: str  # where the ids are; the field that holds the id itself is read from there, too
    held: NDArray[np.bool_] | None = None  # (rows of the file,) which are of the catalogue: those of a shard; None: all

    def __len__(self) -> int:
        return len(self.ids)

    def ids_from(self, start: int, count: int) -> NDArray[Any]:
        """Ids (count,) of rows from `start` on."""
        return as_objects(self.ids.slice(start, count))

    def first_row(self, groups: range | None = None) -> int:
        """Number, among the rows of the catalogue, of the first of these row groups."""
        if groups is None:
            return 0
        with pq.ParquetFile(self.path) as file:
            return self._held_before(_rows_before(file, groups))

    def _held_before(self, row: int) -> int:
        """How many of the catalogue's rows stand in the file before this one."""
        return row if self.held is None else int(np.count_nonzero(self.held[:row]))

    def blocks(self, groups: range | None = None) -> Iterator[tuple[NDArray[Any], NDArray[np.int32]]]:
        """Ids (b,) and encoded features (b, item width), of all row groups or some that follow each other.

        Raises DataError naming file, column, row and remedy.
        """

        def encoded(part: tuple[int, pa.Table]) -> tuple[NDArray[Any], NDArray[np.int32]]:
            start, batch = part
            features = encode_rows(self.path, batch, self.spec, self.id_column, start, self.held)
            return self.ids_from(start, len(batch)), features

        with pq.ParquetFile(self.path) as file:
            groups = range(file.num_row_groups) if groups is None else groups
            rows = held_rows(file, groups, self._names(), self.held)
            batches = _resized(rows, self._held_before(_rows_before(file, groups)))
            yield from in_order(encoded, batches, threads=1)  # beside whoever works on the block before

    def parts(self, least_rows: int) -> list[range]:
        """The file's row groups in runs of at least so many rows (the last may have less), to be read apart."""
        with pq.ParquetFile(self.path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        parts, first, rows = [], 0, 0
        for group, size in enumerate(sizes):
            rows += size
            if rows >= least_rows:
                parts.append(range(first, group + 1))
                first, rows = group + 1, 0
        return [*parts, range(first, len(sizes))] if rows else parts

    def sample(self, count: int, seed: int) -> NDArray[np.int32]:
        """Encoded features (m, item width) of about `count` random items, from at most 16 row groups; of the whole file
        also for a shard, so that what is chosen by them is the same for all shards."""
        rng = np.random.default_rng(seed)
        parts = []
        with pq.ParquetFile(self.path) as file:
            groups = np.sort(rng.permutation(file.num_row_groups)[:SAMPLED_GROUPS]).tolist()
            starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
            for group in groups:
                table = file.read_row_group(group, self._names())
                rows = np.sort(rng.permutation(table.num_rows)[: -(-count // len(groups))])
                parts.append(encode_rows(self.path, table.take(rows), self.spec, self.id_column, int(starts[group])))
        return np.concatenate([np.empty((0, self.spec.item_width), np.int32), *parts])[:count]

    def _names(self) -> list[str]:
        """Columns that are read of the file."""
        return list(dict.fromkeys(column_of(field.name, self.spec, self.id_column) for field in self.spec.item_fields))


@dataclass(frozen=True)
class _Block(Source):
    """Some rows of a file, that count from its beginning in errors."""

    start: int = 0
    held: NDArray[np.bool_] | None = None  # which rows of the file were counted up to `start`; None: all

    def wrong(self, name: str, row: int, problem: str) -> DataError:
        row += self.start
        return super().wrong(name, row if self.held is None else int(np.flatnonzero(self.held)[row]), problem)


def open_catalogue(
    path: Path, spec: FeatureSpec, id_column: str | None = None, shard: Shard | None = None
) -> Catalogue:
    """Check columns and ids of an items file, and take a shard's part of it. Raises DataError naming file, column, row
    and remedy."""
    name = id_column or spec.item_id_name
    source = open_source(path, [name], wanted_by="--id-column" if id_column else "the bundle")
    ids, held = _distinct_ids(source, name, shard)
    check_ids(path, ids, name, spec)
    check_columns(path, pq.read_schema(path).names, name, spec)
    return Catalogue(path, spec, ids, name, held)


def check_ids(path: Path, ids: pa.Array, name: str, spec: FeatureSpec) -> None:
    """Raise DataError unless the ids are of the bundle's type."""
    found = "int" if pa.types.is_integer(ids.type) else "string"
    if found != spec.item_id_type:
        raise DataError(
            f"{path}: column {name!r} holds {found} ids, the bundle was trained with {spec.item_id_type} ids: "
            "write the type that the log had"
        )


def as_ids(ids: pa.Array) -> Ids:
    """Checked ids in bulk."""
    return np.asarray(ids.to_numpy(), np.int64) if pa.types.is_integer(ids.type) else Texts.of(ids.to_pylist())


def check_columns(path: Path, known: list[str], id_column: str, spec: FeatureSpec) -> None:
    """Raise DataError unless all columns that the bundle reads are there, once each."""
    for wanted in spec.item_fields:
        name = column_of(wanted.name, spec, id_column)
        if known.count(name) > 1:
            raise DataError(f"{path} has {known.count(name)} columns {name!r}: keep or rename one")
        if name not in known:
            raise DataError(
                f"{path} has no column {wanted.name!r}, which the bundle reads: {nearest(wanted.name, known)}"
            )


def encode_rows(
    path: Path,
    table: pa.Table,
    spec: FeatureSpec,
    id_column: str,
    start: int = 0,
    held: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """Encoded features (n, item width) of rows of an items file. Raises DataError naming path, column and row, where
    the first is counted as `start`, among the rows that are `held`."""
    named = pa.table({field.name: table[column_of(field.name, spec, id_column)] for field in spec.item_fields})
    block = _Block(path, named, start, held)
    columns: dict[str, Column] = {field.name: read_field(block, field) for field in spec.item_fields}
    try:
        return spec.encode("item", columns, table.num_rows)
    except FeatureError as error:
        raise DataError(f"{path}: column {error.field!r}: {error.detail}") from error


def read_rows(
    path: Path, table: pa.Table, spec: FeatureSpec, id_column: str, start: int = 0
) -> tuple[Ids, NDArray[np.int32]]:
    """Ids (n,), of any length and maybe the same twice, and encoded features (n, item width). Raises DataError."""
    ids = read_ids(_Block(path, table, start), id_column)
    check_ids(path, ids, id_column, spec)
    return as_ids(ids), encode_rows(path, table, spec, id_column, start)


def _distinct_ids(source: Source, name: str, shard: Shard | None) -> tuple[pa.Array, NDArray[np.bool_] | None]:
    """The ids of the catalogue, and which rows of the file have them. An id that comes twice does so in one shard.

    Integers are sorted, a tenth of the time of counting them; what is wrong is named by who counts.
    """
    ids = read_ids(source, name)
    held = None if shard is None else shard.holds(as_ids(ids))
    kept = ids if held is None else ids.filter(pa.array(held))
    if len(ids) and pa.types.is_integer(ids.type):
        ranked = np.sort(as_objects(kept))
        if not (ranked[1:] == ranked[:-1]).any():
            return kept, held
    ids = read_unique_ids(source, name)
    return (ids if held is None else kept), held


def column_of(field: str, spec: FeatureSpec, id_column: str) -> str:
    """Name of the column that holds an item field's values."""
    return id_column if field == spec.item_id_name else field


def _rows_before(file: pq.ParquetFile, groups: range) -> int:
    return sum(file.metadata.row_group(group).num_rows for group in range(groups.start))


def held_rows(
    file: pq.ParquetFile,
    groups: range,
    names: list[str] | None,
    held: NDArray[np.bool_] | None,
    batch_rows: int = BLOCK_ROWS,
) -> Iterator[pa.RecordBatch]:
    """The rows of these row groups that are `held`, or all, as they come from the file."""
    row = _rows_before(file, groups)
    for batch in file.iter_batches(batch_size=batch_rows, row_groups=list(groups), columns=names):
        yield batch if held is None else batch.filter(pa.array(held[row : row + batch.num_rows]))
        row += batch.num_rows


def _resized(batches: Iterator[pa.RecordBatch], start: int) -> Iterator[tuple[int, pa.Table]]:
    """Tables of BLOCK_ROWS rows (the last one less) and where each begins, however the file is cut into row groups."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= BLOCK_ROWS:
            whole = pa.Table.from_batches(waiting)
            yield start, whole.slice(0, BLOCK_ROWS)
            waiting = whole.slice(BLOCK_ROWS).to_batches()
            rows -= BLOCK_ROWS
            start += BLOCK_ROWS
    if rows:
        yield start, pa.Table.from_batches(waiting)
