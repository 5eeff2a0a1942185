"""A tiny log and a hand-made bundle that fits it: what embedding and retrieval are tested with, no training needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kernel.head import HeadSpec
from model.datasets.log import Log, read_log
from model.features import FeatureSpec
from model.requests import fit_log_spec
from tests.graphs import write_bundle
from tests.logs import write_tiny_log

MAXSIM = HeadSpec(kind="maxsim", user_heads=2, item_heads=2, dim=8, scale=2.0, item_bias=True)
GRAPH = HeadSpec(kind="onnx", user_heads=12, item_heads=20, dim=1, scale=1.0)
CROSS = HeadSpec(kind="cross_attention", user_heads=2, item_heads=2, dim=8, scale=2.0, item_bias=True)


@dataclass(frozen=True)
class Shop:
    """Where everything of one tiny catalogue lies."""

    folder: Path
    log: Log
    spec: FeatureSpec
    bundle: Path

    @property
    def items(self) -> Path:
        return self.folder / "log" / "items.parquet"

    def changed(self, name: str, **columns: Any) -> Path:
        """A copy of the items with some columns replaced, without the log.toml beside it."""
        table = pq.read_table(self.items)
        for column, values in columns.items():
            place = table.column_names.index(column)
            values = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
            table = table.set_column(place, column, values)
        return self.write(name, table)

    def write(self, name: str, table: pa.Table, **options: Any) -> Path:
        path = self.folder / name / "items.parquet"
        path.parent.mkdir()
        pq.write_table(table, path, **options)
        return path


def open_shop(
    folder: Path, *, items: int = 80, string_ids: bool = False, head: HeadSpec = MAXSIM, seed: int = 0
) -> Shop:
    log = read_log(write_tiny_log(folder / "log", items=items, string_ids=string_ids))
    spec = fit_log_spec(log)
    return Shop(folder, log, spec, write_bundle(folder / "bundle", spec, head, seed=seed))
