"""Changes behind a tiny release, put into its bundle's log without an updater."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cache.changes import CHANGES, Deleted, Embedded, encode_change, encode_embedded, records_log
from cache.store import ReleaseStore
from tests.tiny_releases import TinyRelease


def records_of(made: TinyRelease, ids: Sequence[Any], price: float) -> np.ndarray:
    """What the item tower makes of items at a price."""
    columns: dict[str, Any] = {"item_id": list(ids), "price": np.full(len(ids), price)}
    return made.bundle.item_tower().embed(made.spec.encode("item", columns, len(ids)))


def happened(store: ReleaseStore, ids: Sequence[int] = (1,)) -> int:
    """Something in the log of changes, whatever it is; returns its position."""
    return store.log(CHANGES).append([encode_change(Deleted(np.asarray(ids, np.int64)))])


def embedded(
    store: ReleaseStore,
    made: TinyRelease,
    after: int,
    until: int,
    ids: Sequence[int],
    price: float | None = None,
    *,
    since: int = 0,
) -> None:
    """The next entry of the bundle's log: items at a price, or gone without one."""
    records = None if price is None else records_of(made, ids, price)
    entry = Embedded(since=since, after=after, until=until, ids=np.asarray(ids, np.int64), records=records)
    store.log(records_log(made.bundle.id)).append([encode_embedded(entry)])
