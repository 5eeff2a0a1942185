"""Turn raw columns and request bodies into the index matrices of the towers: the only transform, offline and online.

Every field becomes `length` columns of an int32 matrix; an entry is a row of the field's embedding table. Row 0 is
"missing" (and padding), row 1 is "unknown" (a value never seen in training); values and buckets follow. A set is padded
behind its entries, a sequence before them: its last column holds the latest. All vocabularies and bucket edges come
from training rows alone and are fixed once fitted.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from kernel.engine import Finder, Index, build_index, open_index
from model.errors import FeatureError, SpecError

Side = Literal["user", "item", "context"]
Kind = Literal["categorical", "numeric", "multi", "sequence"]
IdType = Literal["int", "string"]
Pooling = Literal["mean", "attention"]
Tower = Literal["user", "item"]

MISSING, UNKNOWN = 0, 1
LARGE, MANY = 10_000, 16  # a vocabulary beyond the cache, and as many values as make an array worth while
HISTORY = "history"  # the one sequence field: the user's past positive items, oldest first
FORMAT = 2

Column = Sequence[Any] | NDArray[Any]
Encode = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One column of the log as a network sees it. Fitting fills `values`, `vocabulary` and `edges`."""

    name: str
    side: Side
    kind: Kind
    dim: int = 16
    length: int = 1  # entries kept of a multi field (the first) or a sequence (the last)
    pooling: Pooling = "mean"
    shares: str | None = None  # the field whose embedding table this one reads
    values: IdType = "int"
    vocabulary: tuple[int, ...] | tuple[str, ...] = ()  # of the table's owner: index = position + 2
    edges: tuple[float, ...] = ()  # numeric: index = 1 + number of edges <= x

    def __post_init__(self) -> None:
        for option, allowed in (("side", Side), ("kind", Kind), ("pooling", Pooling), ("values", IdType)):
            if getattr(self, option) not in get_args(allowed):
                choices = ", ".join(get_args(allowed))
                raise SpecError(f"field {self.name}: {option} is {getattr(self, option)!r}: use one of {choices}")
        if self.dim < 1 or self.length < 1:
            raise SpecError(f"field {self.name}: dim {self.dim} and length {self.length} must be at least 1")
        if self.length > 1 and not self.is_list:
            raise SpecError(f"field {self.name}: a {self.kind} field has length 1, not {self.length}")
        if (self.kind == "sequence") != (self.name == HISTORY):
            raise SpecError(f"field {self.name}: the sequence field is named {HISTORY!r}, and only it is a sequence")

    @property
    def is_list(self) -> bool:
        return self.kind in ("multi", "sequence")

    @property
    def size(self) -> int:
        """Rows of the embedding table of this field, were it the owner."""
        return len(self.edges) + 2 if self.kind == "numeric" else len(self.vocabulary) + 2


@dataclass(frozen=True)
class FeatureSpec:
    """The fitted fields of a log. Encodes columns (`encode`) and single rows (`encode_row`) alike."""

    fields: tuple[Field, ...]
    user_id_type: IdType
    item_id_type: IdType
    user_id_name: str = "user_id"  # the id column of the users; a field of this name holds the id itself
    item_id_name: str = "item_id"

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields]
        for name in names:
            if names.count(name) > 1:
                raise SpecError(f"field {name} is declared {names.count(name)} times: keep one")
        for field in self.fields:
            self._check_table(field)

    def _check_table(self, field: Field) -> None:
        owner = self.owner(field)
        if owner.shares:
            raise SpecError(f"field {field.name} shares {owner.name}, which shares {owner.shares}: share the owner")
        if (field.kind == "numeric") != (owner.kind == "numeric") or field.dim != owner.dim:
            raise SpecError(
                f"field {field.name} (dim {field.dim}) cannot share the table of {owner.name} (dim {owner.dim})"
            )

    @cached_property
    def id(self) -> str:
        """16 hex digits that name this content."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def user_fields(self) -> tuple[Field, ...]:
        """Fields of the user tower in the order of its columns: the user's, then the context of the request."""
        return tuple(f for f in self.fields if f.side == "user") + tuple(f for f in self.fields if f.side == "context")

    @cached_property
    def item_fields(self) -> tuple[Field, ...]:
        return tuple(f for f in self.fields if f.side == "item")

    @property
    def user_width(self) -> int:
        return sum(field.length for field in self.user_fields)

    @property
    def item_width(self) -> int:
        return sum(field.length for field in self.item_fields)

    def tower_fields(self, tower: Tower) -> tuple[Field, ...]:
        if tower not in ("user", "item"):
            raise SpecError(f"there is no {tower!r} tower: use user or item")
        return self.user_fields if tower == "user" else self.item_fields

    def owner(self, field: Field) -> Field:
        """The field whose embedding table `field` reads."""
        if field.shares is None:
            return field
        for other in self.fields:
            if other.name == field.shares:
                return other
        raise SpecError(f"field {field.name} shares {field.shares}, which is not a field")

    def table_of(self, field: Field) -> str:
        return self.owner(field).name

    def columns(self, tower: Tower) -> dict[str, slice]:
        """Which columns of the tower's input each field fills."""
        found, start = {}, 0
        for field in self.tower_fields(tower):
            found[field.name] = slice(start, start + field.length)
            start += field.length
        return found

    # --- encoding ----------------------------------------------------------------------------------------------------

    def encode(self, tower: Tower, columns: Mapping[str, Column], count: int) -> NDArray[np.int32]:
        """(count, width) int32 from one column per field; an absent column is missing everywhere.

        A column is an array or list of `count` values; None and NaN are missing; list fields hold sequences, in which
        None does not count: it is left out before the sequence is cut to its length.
        """
        places = self.columns(tower)
        width = sum(place.stop - place.start for place in places.values())
        encoded = np.zeros((count, width), np.int32)
        for field in self.tower_fields(tower):
            column = columns.get(field.name)
            if column is None:
                continue
            if len(column) != count:
                raise FeatureError(field.name, f"column has {len(column)} values, the other columns {count}")
            code = self._codes[field.name]
            into = encoded[:, places[field.name]]
            if field.is_list:
                _encode_lists(field, code, column, into)
            else:
                into[:, 0] = code.column(np.asarray(column))
        return encoded

    def encode_row(self, tower: Tower, row: Mapping[str, Any]) -> NDArray[np.int32]:
        """(width,) int32 from one value per field; names that are not fields are not looked at."""
        codes: list[int] = []
        for name, is_list, keep_last, absent, code in self._plans[tower]:
            value = row.get(name)
            if value is None:
                codes += absent
            elif is_list:
                kept = code.many(name, value, len(absent), keep_last)
                padding = absent[len(kept) :]
                if keep_last:
                    codes += padding
                codes += kept
                if not keep_last:
                    codes += padding
            else:
                codes.append(code.one(value))
        return np.array(codes, np.int32)

    @cached_property
    def _codes(self) -> dict[str, _Buckets | _Vocabulary]:
        by_table: dict[str, _Buckets | _Vocabulary] = {}
        for field in self.fields:
            owner = self.owner(field)
            by_table[field.name] = (
                _Buckets(owner, field.name) if owner.kind == "numeric" else _Vocabulary(owner, field.name)
            )
        return by_table

    @cached_property
    def _plans(self) -> dict[str, list[_Step]]:
        return {
            tower: [
                _Step(f.name, f.is_list, f.kind == "sequence", (MISSING,) * f.length, self._codes[f.name])
                for f in self.tower_fields(tower)
            ]
            for tower in get_args(Tower)
        }

    # --- on disk -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "user_id_type": self.user_id_type,
            "item_id_type": self.item_id_type,
            "user_id_name": self.user_id_name,
            "item_id_name": self.item_id_name,
            "fields": [asdict(field) for field in self.fields],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FeatureSpec:
        if value.get("format") != FORMAT:
            found = value.get("format")
            raise SpecError(f"feature specification has format {found}, this version reads {FORMAT}: train again")
        fields = tuple(
            Field(**{**field, "vocabulary": tuple(field["vocabulary"]), "edges": tuple(field["edges"])})
            for field in value["fields"]
        )
        return cls(fields, *(value[f"{side}_id_{what}"] for what in ("type", "name") for side in ("user", "item")))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), separators=(",", ":")))

    @classmethod
    def load(cls, path: Path) -> FeatureSpec:
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpecError(f"{path}: not a feature specification ({error}): export the bundle again") from error


# --- values to table rows -------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """What encoding one row does for one field. Plain tuples: a row of 20 fields takes 13 us, most of it the values."""

    name: str
    is_list: bool
    keep_last: bool
    absent: tuple[int, ...]  # the codes of a field without a value
    code: _Buckets | _Vocabulary


class _Vocabulary:
    """Known values of one embedding table, by hash for single values and by binary search for integer columns."""

    def __init__(self, owner: Field, name: str) -> None:
        self.name = name
        self.values = owner.values
        self.rows: dict[Any, int] = {value: row for row, value in enumerate(owner.vocabulary, start=UNKNOWN + 1)}
        self.rows[None] = MISSING
        self._scalars = (str,) if owner.values == "string" else (int, float, np.integer, np.floating, np.bool_)
        self._plain = frozenset({str} if owner.values == "string" else {int, bool})  # right, and never NaN or None
        if owner.values == "int":
            known = np.array(owner.vocabulary, np.int64)
            order = np.argsort(known)
            self._sorted = known[order]
            self._sorted_rows = (order + UNKNOWN + 1).astype(np.int32)
        self._known = self._index(owner) if owner.values == "int" and len(owner.vocabulary) >= LARGE else None

    def one(self, value: Any) -> int:
        if type(value) in self._plain:
            return self.rows.get(value, UNKNOWN)
        if value is not None and not isinstance(value, self._scalars):
            expected = "text" if self.values == "string" else "an integer"
            raise FeatureError(self.name, f"expected {expected}, got {value!r}: send the type the log had")
        if value != value:  # NaN stands for missing, as in columns
            return MISSING
        return self.rows.get(value, UNKNOWN)

    def many(self, name: str, values: Any, length: int, keep_last: bool) -> list[int]:
        """Codes of the `length` first or last entries; no Python step an entry where all are plain."""
        if type(values) is list:
            kept = values[-length:] if keep_last else values[:length]
            if self._plain.issuperset(map(type, kept)):
                if len(kept) >= MANY and self._known is not None:
                    return self._integers_at_once(kept)
                return list(map(self.rows.get, kept, repeat(UNKNOWN)))
        _check_list(name, values)
        return [self.one(value) for value in _cut(values, length, keep_last)]

    @staticmethod
    def _index(owner: Field) -> Finder:
        keys = np.array(owner.vocabulary, np.int64).view(np.uint64)
        return open_index(Index(build_index(keys), len(keys)))

    def _integers_at_once(self, values: list[int]) -> list[int]:
        """Misses of the cache side by side instead of one after the other: a history of 50 in 7 us, by `dict` in 25."""
        try:
            wanted = np.array(values, np.int64)
        except OverflowError:
            return list(map(self.rows.get, values, repeat(UNKNOWN)))
        assert self._known is not None
        codes: list[int] = np.maximum(self._known.lookup(wanted) + (UNKNOWN + 1), UNKNOWN).tolist()
        return codes

    def column(self, values: NDArray[Any]) -> NDArray[np.int32]:
        if values.dtype.kind in "iub" and self.values == "int":
            return self._integers(values.astype(np.int64))
        if values.dtype.kind == "f" and self.values == "int":
            whole = np.isfinite(values) & (values == np.trunc(values)) & (np.abs(values) < 2.0**63)
            encoded = self._integers(np.where(whole, values, 0).astype(np.int64))
            return np.where(np.isnan(values), MISSING, np.where(whole, encoded, UNKNOWN)).astype(np.int32)
        return np.fromiter((self.one(value) for value in values.tolist()), np.int32, len(values))

    def _integers(self, values: NDArray[np.int64]) -> NDArray[np.int32]:
        if not len(self._sorted):
            return np.full(len(values), UNKNOWN, np.int32)
        place = np.minimum(np.searchsorted(self._sorted, values), len(self._sorted) - 1)
        return np.where(self._sorted[place] == values, self._sorted_rows[place], UNKNOWN).astype(np.int32)


class _Buckets:
    """Bucket of a number: 1 + how many edges it reaches."""

    def __init__(self, owner: Field, name: str) -> None:
        self.name = name
        self.edges = list(owner.edges)
        self._edges = np.array(owner.edges, np.float64)

    def one(self, value: Any) -> int:
        if type(value) is float:
            return 1 + bisect_right(self.edges, value) if value == value else MISSING
        if value is None:
            return MISSING
        if isinstance(value, (str, bytes)):
            raise FeatureError(self.name, f"expected a number, got {value!r}: send the type the log had")
        if isinstance(value, (bool, np.bool_)):
            raise FeatureError(self.name, f"expected a number, got {value!r}: send a number, 1 or 0 for yes or no")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise FeatureError(self.name, f"expected a number, got {value!r}: send a finite number") from error
        return MISSING if math.isnan(number) else 1 + bisect_right(self.edges, number)

    def many(self, name: str, values: Any, length: int, keep_last: bool) -> list[int]:
        _check_list(name, values)
        return [self.one(value) for value in _cut(values, length, keep_last)]

    def column(self, values: NDArray[Any]) -> NDArray[np.int32]:
        if values.dtype.kind not in "iubf":
            return np.fromiter((self.one(value) for value in values.tolist()), np.int32, len(values))
        numbers = values.astype(np.float64)
        buckets = 1 + np.searchsorted(self._edges, numbers, side="right")
        return np.where(np.isnan(numbers), MISSING, buckets).astype(np.int32)


def _encode_lists(field: Field, code: _Buckets | _Vocabulary, column: Column, into: NDArray[np.int32]) -> None:
    """Fill `into` (count, length) from sequences: one flat pass over all entries, then one scatter."""
    kept: list[Any] = []
    for value in column:
        if value is None:
            kept.append(())
            continue
        _check_list(field.name, value)
        kept.append(_cut(value, field.length, field.kind == "sequence"))
    sizes = np.fromiter((len(entry) for entry in kept), np.int64, len(kept))
    if not sizes.sum():
        return
    if all(isinstance(entry, np.ndarray) for entry in kept if len(entry)):
        flat = np.concatenate([entry for entry in kept if len(entry)])
    else:
        flat = np.empty(int(sizes.sum()), object)
        flat[:] = [value for entry in kept for value in entry]
    filled = np.arange(field.length) < sizes[:, None]
    into[filled[:, ::-1] if field.kind == "sequence" else filled] = code.column(flat)


def _cut(value: Any, length: int, keep_last: bool) -> Any:
    """The first or last `length` entries of a list that are not None, as the Parquet reader leaves nulls out."""
    kept = value[-length:] if keep_last else value[:length]
    if (isinstance(kept, np.ndarray) and kept.dtype != object) or not any(entry is None for entry in kept):
        return kept
    known = [entry for entry in value if entry is not None]
    return known[-length:] if keep_last else known[:length]


def _check_list(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise FeatureError(name, f"expected a list, got {value!r}: send a list, empty if there is nothing")


# --- fitting ---------------------------------------------------------------------------------------------------------


def fit_spec(
    fields: Sequence[Field],
    rows: Mapping[Side, Mapping[str, Column]],
    *,
    user_id_type: IdType,
    item_id_type: IdType,
    user_id_name: str = "user_id",
    item_id_name: str = "item_id",
    min_count: int = 1,
    buckets: int = 32,
) -> FeatureSpec:
    """Learn vocabularies and bucket edges from training rows: `rows[side][field name]` is a column.

    A value seen fewer than `min_count` times is unknown. Numeric fields get up to `buckets` quantile buckets. Fields
    that share a table add nothing to it. Vocabularies are ordered by falling count, then by value.
    """
    fitted = []
    for field in fields:
        column = rows.get(field.side, {}).get(field.name)
        if field.shares is None and column is not None:
            field = (
                _fit_edges(field, column, buckets) if field.kind == "numeric" else _fit_values(field, column, min_count)
            )
        fitted.append(field)
    return FeatureSpec(tuple(fitted), user_id_type, item_id_type, user_id_name, item_id_name)


def _fit_values(field: Field, column: Column, min_count: int) -> Field:
    values: Iterable[Any] = column if not isinstance(column, np.ndarray) else column.tolist()
    if field.is_list:
        values = (value for entry in values if entry is not None for value in _plain(entry))
    counts: dict[Any, int] = {}
    for value in values:
        if value is not None and value == value:
            counts[value] = counts.get(value, 0) + 1
    texts = {isinstance(value, str) for value in counts}
    if len(texts) > 1:
        raise SpecError(f"field {field.name} mixes text and numbers: convert the column to one type")
    kept = sorted((value for value, count in counts.items() if count >= min_count), key=lambda v: (-counts[v], v))
    if texts == {True}:
        return replace(field, values="string", vocabulary=tuple(kept))
    fractions = [value for value in kept if value != int(value)]
    if fractions:
        raise SpecError(f"field {field.name} is {field.kind} but holds {fractions[0]}: use kind numeric")
    return replace(field, values="int", vocabulary=tuple(int(value) for value in kept))


def _plain(entry: Any) -> Iterable[Any]:
    plain: Iterable[Any] = entry.tolist() if isinstance(entry, np.ndarray) else entry
    return plain


def _fit_edges(field: Field, column: Column, buckets: int) -> Field:
    """Edges between distinct values where there are few, at quantiles where there are many."""
    numbers = np.asarray(column, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    distinct = np.unique(numbers)
    if len(distinct) <= buckets:
        edges = (distinct[1:] + distinct[:-1]) / 2
    else:
        edges = np.unique(np.quantile(numbers, np.arange(1, buckets) / buckets))
    return replace(field, edges=tuple(edges.tolist()))
