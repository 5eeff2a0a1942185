"""Records of the user tower by what it read: the same features under the same release give the same bits, so no answer
changes, and a hit saves the tower's run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import numpy as np
from numpy.typing import NDArray


class UserCache:
    """The records that were used last, `entries` at most. The threads of a pool may share it."""

    def __init__(self, entries: int, *, on_hit: Callable[[], None], on_miss: Callable[[], None]) -> None:
        """`on_hit` and `on_miss` are called once for each look."""
        if entries < 1:
            raise ValueError(f"a cache of {entries} entries holds nothing: make none")
        self._entries, self._on_hit, self._on_miss = entries, on_hit, on_miss
        self._records: OrderedDict[tuple[str, bytes], NDArray[np.float32]] = OrderedDict()
        self._lock = Lock()  # a look moves the record to the end: two steps that others must not come between

    def get(self, release: str, features: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """The record (user size,) of these features (user width,), read-only; None where it was not put or has gone."""
        key = (release, features.tobytes())
        with self._lock:
            record = self._records.get(key)
            if record is not None:
                self._records.move_to_end(key)
        (self._on_miss if record is None else self._on_hit)()
        return record

    def put(self, release: str, features: NDArray[np.int32], record: NDArray[np.float32]) -> None:
        """Keep a copy of a record; the one that nobody asked for longest goes where there is no room."""
        kept = record.copy()  # not a view that would hold the tower's whole output
        kept.flags.writeable = False
        key = (release, features.tobytes())
        with self._lock:
            self._records[key] = kept
            self._records.move_to_end(key)
            if len(self._records) > self._entries:
                self._records.popitem(last=False)

    def __len__(self) -> int:
        return len(self._records)
