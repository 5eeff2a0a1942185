"""The door to the kernel: native code at the best level that this processor has, else the NumPy reference.

Levels, worst first: `numpy` (the reference; what serves where the extension was not built), `portable`, `avx2`,
`avx512`, `avx512-vnni`. `select` chooses one for all tables opened after it.
"""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from time import monotonic_ns
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kernel import plain, record, reference
from kernel.errors import KernelError, RecordError
from kernel.head import Scorer
from kernel.ids import Ids, Texts
from kernel.plain import ItemLayout, PlainLayout
from kernel.record import RecordLayout

native: ModuleType | None = None
try:
    native = import_module("kernel._native")
except ImportError as error:
    _why = str(error)

NUMPY = "numpy"
GRAPH = "onnxruntime"  # the level of a table that no kernel scores
GRAPH_BLOCK = 256  # candidates that a graph scores between two looks at the clock: 3 ms of the published COLD
MAX_TEXT = 1024  # characters of an id that any table holds

log = logging.getLogger(__name__)


# --- levels ----------------------------------------------------------------------------------------------------------


def levels() -> list[str]:
    """Levels that can be selected here, worst first."""
    return [NUMPY, *(name for name, here in (native.levels() if native else []) if here)]


def select(name: str = "auto", *, require_native: bool = False) -> str:
    """Choose the level of tables opened from now on; returns its name. Raises KernelError when it cannot be had.

    `auto` is the best one. Without the extension the reference serves, with one warning,
    or nothing where it is required.
    """
    global _selected  # noqa: PLW0603 - one choice a process
    here = levels()
    if require_native and (native is None or name == NUMPY):
        reason = f"the extension cannot be imported ({_why})" if native is None else "numpy was asked for"
        raise KernelError(
            f"a native kernel is required, but {reason}: install ranktower where there is a C++ compiler, "
            "or unset RANKTOWER_REQUIRE_NATIVE"
        )
    found = here[-1] if name == "auto" else name
    if found not in here:
        raise KernelError(f"kernel level {name!r} cannot be had here: use auto or one of {', '.join(here)}")
    if native is None and _selected is None:
        log.warning("the native kernel is not there (%s): the NumPy reference scores, many times slower", _why)
    _selected = found
    return found


def level() -> str:
    """The selected level; the best one where none was selected yet."""
    return _selected or select()


_selected: str | None = None


# --- building --------------------------------------------------------------------------------------------------------


def pack(layout: ItemLayout, records: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows (n, stride) of item records (n, item_size). Raises RecordError naming the first that does not fit."""
    records = np.ascontiguousarray(records, np.float32)
    if records.ndim != 2 or records.shape[1] != layout.head.item_size:
        raise KernelError(f"item records have shape {records.shape}, the head reads (n, {layout.head.item_size})")
    if isinstance(layout, PlainLayout):
        return plain.pack(layout, records)
    if native is None:
        return record.pack(layout, records)
    rows = np.empty((len(records), layout.stride), np.uint8)
    wrong = native.pack(_shape(layout), records, rows)
    if wrong < len(records):
        raise RecordError(wrong, layout.dtype)
    return rows


def build_index(keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """As `reference.build_index`."""
    if native is None:
        return reference.build_index(keys)
    buckets = np.zeros((reference.bucket_count(len(keys)), reference.BUCKET_WORDS), np.uint32)
    if native.build_index(np.ascontiguousarray(keys), buckets) < len(keys):
        raise ValueError("keys repeat: an index needs distinct keys")
    return buckets


def hash_texts(texts: Texts, salt: int) -> NDArray[np.uint64]:
    """As `reference.hash_strings`."""
    if native is None:
        return reference.hash_strings(texts.tolist(), salt)
    keys: NDArray[np.uint64] = native.hash_texts(texts.data, texts.starts, texts.sizes, salt)
    return keys


def top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    """As `reference.top_k`."""
    if native is None:
        return reference.top_k(scores, k)
    best: NDArray[np.int32] = native.top_k(scores, max(k, 0))
    return best


def _shape(layout: RecordLayout) -> Any:
    head = layout.head
    assert native is not None
    return native.make_shape(
        head.kind, layout.dtype, head.user_heads, head.item_heads, head.dim, head.item_bias, head.scale
    )


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Index:
    """Where ids are found: see kernel/reference.py. `offsets` and `text` are the stored ids where they are texts."""

    buckets: NDArray[np.uint32]  # (m, 16)
    count: int  # of the ids
    offsets: NDArray[np.uint64] | None = None  # (n + 1,) into `text`
    text: NDArray[np.uint8] | None = None  # octets
    salt: int = 0


class Finder(Protocol):
    """An opened index."""

    texts: bool  # whether its ids are

    def __len__(self) -> int: ...

    def lookup(self, ids: Ids) -> NDArray[np.int32]:
        """Rows (n,) int32, -1 where unknown. Raises KernelError for ids of the other type."""


def open_index(index: Index) -> Finder:
    """Arrays are not copied. Raises KernelError for those that do not fit together or lead out of themselves."""
    return _NumpyFinder(index) if native is None or level() == NUMPY else _NativeFinder(index)


class _NativeFinder:
    def __init__(self, index: Index) -> None:
        assert native is not None
        self.texts = index.text is not None
        try:
            self.ids = native.Ids(index.buckets, index.count, index.offsets, index.text, index.salt)
        except (ValueError, TypeError) as error:
            raise KernelError(f"the index cannot be opened ({error})") from error

    def __len__(self) -> int:
        return len(self.ids)

    def lookup(self, ids: Ids) -> NDArray[np.int32]:
        return _looked_up(self.ids, ids)


def _looked_up(where: Any, ids: Ids) -> NDArray[np.int32]:
    try:
        found: NDArray[np.int32] = (
            where.lookup_texts(ids.data, ids.starts, ids.sizes) if isinstance(ids, Texts) else where.lookup(ids)
        )
    except ValueError as error:
        raise KernelError(str(error)) from error
    return found


class _NumpyFinder:
    def __init__(self, index: Index) -> None:
        if int(index.buckets[:, 2 * reference.ENTRIES : reference.SPILLED].max(initial=0)) > index.count:
            raise KernelError(f"the index cannot be opened (a bucket names a row beyond {index.count})")
        if reference.has_twins(index.buckets):
            raise KernelError("the index cannot be opened (a bucket holds a key twice)")
        if index.buckets[:, reference.SPILLED].all():
            raise KernelError("the index cannot be opened (every bucket has spilled: a search would not end)")
        self.index, self.texts = index, index.text is not None

    def __len__(self) -> int:
        return self.index.count

    def lookup(self, ids: Ids) -> NDArray[np.int32]:
        if isinstance(ids, Texts):
            return self._lookup_texts(ids)
        if self.index.text is not None:
            raise KernelError("this table has text ids, got integers")
        return reference.lookup(self.index.buckets, ids.view(np.uint64))

    def _lookup_texts(self, ids: Texts) -> NDArray[np.int32]:
        """Equal hashes prove nothing: the stored text is compared."""
        offsets, text = self.index.offsets, self.index.text
        if offsets is None or text is None:
            raise KernelError("this table has integer ids, got texts")
        wanted = [text if len(text) <= MAX_TEXT else "" for text in ids.tolist()]  # hashing pads all to the longest
        rows = reference.lookup(self.index.buckets, reference.hash_strings(wanted, self.index.salt))
        found = np.flatnonzero(rows >= 0)
        starts = offsets.astype(np.int64)
        stored = Texts(text, starts[rows[found]], starts[rows[found] + 1] - starts[rows[found]]).tolist()
        rows[[at for at, there in zip(found.tolist(), stored, strict=True) if wanted[at] != there]] = -1
        return rows


@dataclass(frozen=True, slots=True)
class Ranked:
    """The best candidates of one list."""

    positions: NDArray[np.int32]  # (k,) into the list, best first
    scores: NDArray[np.float32]  # (k,)
    missing: NDArray[np.int32]  # (m,) positions of unknown ids
    seen: int  # candidates before the deadline: those from here on are neither scored nor told missing


class Table(Protocol):
    """Item records with their index: what a request reads. Arrays are not copied; none is written to."""

    level: str

    def __len__(self) -> int: ...

    def under(self, rows: NDArray[np.uint8], finder: Finder) -> Table:
        """The same table below newer records: rows (r, stride) of the first r ids of `finder`; the others are deleted.

        Rows of the overlay count on from the table's own, which keep their numbers though replaced or deleted.
        Raises KernelError for arrays that do not fit, and for a table that lies below an overlay already.
        """

    def lookup(self, ids: Ids) -> NDArray[np.int32]:
        """Rows (n,) int32, -1 where unknown or deleted."""

    def records(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """Unpacked records (n, item_size)."""

    def score(self, user: NDArray[np.float32], rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """Scores (n,) of rows that are all there, for a user record (user_size,)."""

    def rank(self, user: NDArray[np.float32], ids: Ids, k: int, deadline_ns: int = 0) -> Ranked:
        """Look up, score and keep the best k; ties keep the order of the list.

        With a deadline (time.monotonic_ns; 0 is none) the clock is read every 256 candidates, every 2,048 at level
        numpy, and what comes after it is left out.
        """

    def rank_batch(
        self, users: NDArray[np.float32], lists: list[Ids], ks: list[int], deadline_ns: int = 0
    ) -> list[Ranked]:
        """The same for users (b, user_size) with a list each, equal to one by one."""


def open_table(layout: ItemLayout, rows: NDArray[np.uint8], finder: Finder, graph: Scorer | None = None) -> Table:
    """A table over rows (n, stride): at the selected level, or scored by the graph of a head that has its own.

    Raises KernelError for arrays that do not fit together, and for plain records without a graph.
    """
    if isinstance(layout, PlainLayout):
        if graph is None:
            raise KernelError(f"no kernel scores a head of kind {layout.head.kind}: its graph is missing")
        return _BlockTable(layout, rows, finder, graph, GRAPH)
    if isinstance(finder, _NativeFinder) and level() != NUMPY:
        return _NativeTable.open(layout, rows, finder, level())
    return _BlockTable(layout, rows, finder, partial(reference.score, layout.head), NUMPY)


class _NativeTable:
    def __init__(self, table: Any, level: str) -> None:
        self.level, self._table = level, table

    @classmethod
    def open(cls, layout: RecordLayout, rows: NDArray[np.uint8], finder: _NativeFinder, level: str) -> _NativeTable:
        assert native is not None
        try:
            return cls(native.Table(_shape(layout), rows, finder.ids, level), level)
        except (ValueError, TypeError) as error:
            raise KernelError(f"the table cannot be opened ({error})") from error

    def __len__(self) -> int:
        return len(self._table)

    def under(self, rows: NDArray[np.uint8], finder: Finder) -> _NativeTable:
        assert native is not None
        if not isinstance(finder, _NativeFinder):
            raise KernelError("the overlay cannot be opened (its index was opened at level numpy, the table's was not)")
        try:
            return _NativeTable(native.Table(self._table, rows, finder.ids), self.level)
        except (ValueError, TypeError) as error:
            raise KernelError(f"the overlay cannot be opened ({error})") from error

    def lookup(self, ids: Ids) -> NDArray[np.int32]:
        return _looked_up(self._table, ids)

    def records(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._table.records(rows)
        return found

    def score(self, user: NDArray[np.float32], rows: NDArray[np.int32]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = self._table.score(user, rows)
        return scores

    def touch(self, rows: NDArray[np.int32]) -> int:
        """Read every cache line that `score` reads, and nothing else: for benchmarks."""
        return int(self._table.touch(rows))

    def rank(self, user: NDArray[np.float32], ids: Ids, k: int, deadline_ns: int = 0) -> Ranked:
        k = min(max(k, 0), len(ids))
        if isinstance(ids, Texts):
            return Ranked(*self._table.rank_texts(user, ids.data, ids.starts, ids.sizes, k, deadline_ns))
        return Ranked(*self._table.rank(user, ids, k, deadline_ns))

    def rank_batch(
        self, users: NDArray[np.float32], lists: list[Ids], ks: list[int], deadline_ns: int = 0
    ) -> list[Ranked]:
        together = _together(lists)
        if together is None:
            return [self.rank(user, ids, k, deadline_ns) for user, ids, k in zip(users, lists, ks, strict=True)]
        ids, ends = together
        ks = [min(max(k, 0), len(one)) for k, one in zip(ks, lists, strict=True)]
        return [Ranked(*found) for found in self._table.rank_batch(users, ids, ends, ks, deadline_ns)]


def _together(lists: list[Ids]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Integer lists as one, and where each ends; None where there are texts."""
    integers = [one for one in lists if not isinstance(one, Texts)]
    if len(integers) < len(lists) or not lists:
        return None
    return np.concatenate(integers), np.cumsum([len(one) for one in lists])


class _BlockTable:
    """Scores one block of a list after the other, by the reference or by a head's own graph."""

    def __init__(self, layout: ItemLayout, rows: NDArray[np.uint8], finder: Finder, scorer: Scorer, level: str) -> None:
        if rows.shape != (len(finder), layout.stride) or rows.dtype != np.uint8:
            raise KernelError(
                f"the table cannot be opened (rows are {rows.shape} {rows.dtype}, "
                f"not ({len(finder)}, {layout.stride}) uint8)"
            )
        self.level = level
        self._layout, self._rows, self._finder, self._scorer = layout, rows, finder, scorer
        self._over: tuple[NDArray[np.uint8], Finder] | None = None
        self._block = GRAPH_BLOCK if level == GRAPH else reference.CHUNK
        self._top_k = top_k if level == GRAPH else reference.top_k

    def __len__(self) -> int:
        return len(self._rows) + (0 if self._over is None else len(self._over[0]))

    def under(self, rows: NDArray[np.uint8], finder: Finder) -> _BlockTable:
        if self._over is not None:
            raise KernelError("the overlay cannot be opened (the table has one: lay the new one over the table itself)")
        if finder.texts != self._finder.texts:
            raise KernelError("the overlay cannot be opened (its ids are of the other type)")
        if rows.ndim != 2 or rows.shape[1] != self._layout.stride or len(rows) > len(finder) or rows.dtype != np.uint8:
            raise KernelError(
                f"the overlay cannot be opened (rows are {rows.shape} {rows.dtype}, "
                f"not (at most {len(finder)}, {self._layout.stride}) uint8)"
            )
        made = copy(self)
        made._over = rows, finder
        return made

    def lookup(self, ids: Ids) -> NDArray[np.int32]:
        rows = self._finder.lookup(ids)
        if self._over is None:
            return rows
        held, finder = self._over
        newer = finder.lookup(ids)
        newest = np.where(newer < len(held), newer + len(self._rows), -1)
        return np.where(newer >= 0, newest, rows).astype(np.int32)

    def records(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        found = self._packed(rows)
        if isinstance(self._layout, PlainLayout):
            return plain.unpack(self._layout, found)
        return record.unpack(self._layout, found)

    def _packed(self, rows: NDArray[np.int32]) -> NDArray[np.uint8]:
        if self._over is None:
            return self._rows[rows]
        own = rows < len(self._rows)
        found = np.empty((len(rows), self._layout.stride), np.uint8)
        found[own], found[~own] = self._rows[rows[own]], self._over[0][rows[~own] - len(self._rows)]
        return found

    def score(self, user: NDArray[np.float32], rows: NDArray[np.int32]) -> NDArray[np.float32]:
        blocks = [rows[at : at + self._block] for at in range(0, max(len(rows), 1), self._block)]
        return np.concatenate([self._scorer(user, self.records(block)) for block in blocks])

    def rank(self, user: NDArray[np.float32], ids: Ids, k: int, deadline_ns: int = 0) -> Ranked:
        rows = self.lookup(ids)
        scores, seen = [np.empty(0, np.float32)], 0
        while seen < len(rows) and not (deadline_ns and monotonic_ns() > deadline_ns):
            part = rows[seen : seen + self._block]
            scores.append(self.score(user, part[part >= 0]))
            seen += len(part)
        known = np.flatnonzero(rows[:seen] >= 0).astype(np.int32)
        together = np.concatenate(scores)
        best = self._top_k(together, k)
        return Ranked(known[best], together[best], np.flatnonzero(rows[:seen] < 0).astype(np.int32), seen)

    def rank_batch(
        self, users: NDArray[np.float32], lists: list[Ids], ks: list[int], deadline_ns: int = 0
    ) -> list[Ranked]:
        return [self.rank(user, ids, k, deadline_ns) for user, ids, k in zip(users, lists, ks, strict=True)]


def check_native(layout: RecordLayout, user: NDArray[np.float32], records: NDArray[np.float32]) -> float:
    """Largest difference between the selected level and the float64 reference, over these item records (n, item_size),
    in units of Hu * scale or of the largest score. A service asks before it serves: a miscompiled kernel must not.
    """
    rows = pack(layout, records)
    keys = np.arange(len(records), dtype=np.uint64)
    table = open_table(layout, rows, open_index(Index(build_index(keys), len(keys))))
    places = np.arange(len(records), dtype=np.int32)
    expected = reference.score_oracle(layout.head, user, record.unpack(layout, rows))
    found = table.score(np.ascontiguousarray(user, np.float32), places)
    unit = max(layout.head.user_heads * layout.head.scale, float(np.abs(expected).max(initial=0)))
    return float(np.abs(found - expected).max(initial=0)) / unit
