"""Updates of a tiny catalogue: parts of its items file, and what a log of records sums to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.changes import Embedded, Fold, decode_embedded, records_log
from cache.snapshot import Snapshot
from cache.store import ReleaseStore
from model.bundle import Bundle


def with_price(table: pa.Table, rows: Iterable[int], price: float) -> pa.Table:
    """The same items, some of them with another price."""
    prices = table["price"].to_numpy().copy()
    prices[list(rows)] = price
    return table.set_column(table.column_names.index("price"), "price", pa.array(prices))


def with_id(table: pa.Table, item: Any) -> pa.Table:
    """One row under another id."""
    return table.set_column(0, table.column_names[0], pa.array([item], table[table.column_names[0]].type))


def write(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


def embedded(store: ReleaseStore, bundle_id: str) -> list[Embedded]:
    """All entries of a bundle's log of records."""
    return [decode_embedded(entry) for entry in store.log(records_log(bundle_id)).read(0, 1_000_000)]


def folded(store: ReleaseStore, bundle: Bundle, watermark: int) -> Fold:
    """What a replica with a release of that watermark knows."""
    fold = Fold(watermark, bundle.spec.item_id_type, bundle.head.item_size)
    for entry in embedded(store, bundle.id):
        fold.add(entry)
    return fold


def records_of(path: Path, bundle: Bundle, ids: list[Any]) -> np.ndarray:
    """The records of items in a published table, in float32."""
    snapshot = Snapshot.open(path)
    return snapshot.table(bundle.head, bundle.graph()).records(snapshot.lookup(ids))
