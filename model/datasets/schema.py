"""Parse log.toml, which says what the columns of a log mean. Every mistake is named with its key and a remedy."""

from __future__ import annotations

import keyword
import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from model.errors import DataError, SpecError
from model.features import HISTORY, FeatureSpec, Field, Kind, Pooling, Side
from model.labels import SoftLabel, expected_grade

FILE = "log.toml"
TIME_UNITS = {"s": 1_000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}  # milliseconds in one
SPLITS_BY = ("time", "order", "hash")

TOP_KEYS = ("name", "columns", "feedback", "split", "lists", "fields")
COLUMN_KEYS = ("user", "item", "time", "time_unit", "order", "request", "stage", "title", "teacher")
FEEDBACK_KEYS = ("ladder", "negative", "soft_label")
SPLIT_KEYS = ("by", "valid", "test", "valid_from", "test_from")
LIST_KEYS = ("gap_s", "max_impressions")
FIELD_KEYS = ("name", "side", "kind", "dim", "length", "pooling", "shares")

DEFAULT_LENGTHS = {"multi": 5, "sequence": 30}  # entries kept where the field names no length
MOST_IMPRESSIONS = 1_000_000
MOST_DIM = MOST_LENGTH = 4_096
LONGEST_SHOWN = 80  # characters of a wrong value in an error

Moment = int | datetime  # a number in the unit of the column, or a time with its zone


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that have a role of their own."""

    user: str
    item: str
    time: str | None = None
    time_unit: str | None = None  # of an integer time column; None: judged by its size
    order: str | None = None
    request: str | None = None
    stage: str | None = None
    title: str | None = None
    teacher: Mapping[str, str] = field(default_factory=dict)  # rung -> column of events


@dataclass(frozen=True, kw_only=True)
class Split:
    """How events are divided: moments where there are any, else fractions of events."""

    by: str  # time | order | hash
    valid: float = 0.1
    test: float = 0.1
    valid_from: Moment | None = None
    test_from: Moment | None = None


@dataclass(frozen=True, kw_only=True)
class Lists:
    """How a user's events become requests where the log has no request id."""

    gap_s: float = 1800.0
    max_impressions: int = 50


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a log's columns mean."""

    name: str
    columns: Columns
    rungs: tuple[str, ...]  # weakest first: grades 1, 2, ...
    negative: tuple[str, ...]
    soft_label: SoftLabel
    split: Split
    lists: Lists
    fields: tuple[Field, ...]  # not yet fitted

    def on(self, side: str) -> tuple[Field, ...]:
        """The fields of one side that are columns of a file (the history is made from events)."""
        return tuple(f for f in self.fields if f.side == side and f.kind != "sequence")

    @property
    def history(self) -> Field | None:
        """The field that holds the user's past items, if the log asks for it."""
        return next((f for f in self.fields if f.name == HISTORY), None)


def read_schema(path: Path) -> Schema:
    """Read and check log.toml."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: write it as docs/data.md shows, or convert with `ranktower data`"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of too many digits
        raise DataError(f"{path} cannot be read as TOML ({error}): correct it") from error
    return parse_schema(document, str(path))


def parse_schema(document: Mapping[str, Any], where: str) -> Schema:
    """Check a parsed log.toml; `where` names it in errors."""
    top = _Section(where, document, TOP_KEYS)
    feedback = top.table("feedback", FEEDBACK_KEYS, required=True)
    rungs = _rungs(feedback)
    columns = _columns(top.table("columns", COLUMN_KEYS, required=True), rungs)
    negative = _negative(feedback, rungs)
    return Schema(
        name=top.text("name", "log") or "log",
        columns=columns,
        rungs=rungs,
        negative=negative,
        soft_label=_soft_label(feedback, rungs),
        split=_split(top.table("split", SPLIT_KEYS), columns),
        lists=_lists(top.table("lists", LIST_KEYS)),
        fields=_fields(top, columns, _roles(columns, rungs, negative)),
    )


def nearest(name: str, known: Collection[str]) -> str:
    """A remedy for an unknown name: the closest known one, else all of them."""
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


class _Section:
    """One table of the TOML, read key by key; errors name the file, the table and the key."""

    def __init__(self, place: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
        self.place = place
        self.values = values
        for key in values:
            if key not in known:
                raise DataError(f"{self.place}: unknown key {key!r}: {nearest(key, known)}")

    def wrong(self, key: str, expected: str) -> DataError:
        return DataError(f"{self.place}: {key} is {_shown(self.values.get(key))}: {expected}")

    def text(self, key: str, default: str | None = None, *, required: bool = False) -> str | None:
        value = self.values.get(key, default)
        if value is None and required:
            raise DataError(f"{self.place}: {key} is missing: add it, docs/data.md shows each key")
        if value is not None and (not isinstance(value, str) or not value):
            raise self.wrong(key, "write a text in quotes")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "write a number")
        try:
            number = float(value)
        except OverflowError as error:
            raise self.wrong(key, "write a smaller number") from error
        if not math.isfinite(number):
            raise self.wrong(key, "write a finite number")
        return number

    def whole(self, key: str, default: int, most: int) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "write a whole number of at least 1")
        if value > most:
            raise self.wrong(key, f"write a whole number of at most {most:,}")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.wrong(key, "write a list of column names in quotes")
        for name in value:
            if value.count(name) > 1:
                raise self.wrong(key, f"{name!r} stands there {value.count(name)} times, keep one")
        return tuple(value)

    def table(self, key: str, known: Sequence[str], *, required: bool = False) -> _Section:
        value = self.values.get(key, None if required else {})
        if value is None:
            raise DataError(f"{self.place}: table [{key}] is missing: add it as docs/data.md shows")
        if not isinstance(value, dict):
            raise self.wrong(key, f"write it as a table, [{key}]")
        place = f"{self.place[:-1]}.{key}]" if self.place.endswith("]") else f"{self.place}: [{key}]"
        return _Section(place, value, known)


def _shown(value: object) -> str:
    """A value for an error, cut where it is long; a number can have more digits than Python prints."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "too long to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _columns(section: _Section, rungs: tuple[str, ...]) -> Columns:
    columns = Columns(
        user=section.text("user", required=True) or "",
        item=section.text("item", required=True) or "",
        teacher=_teacher(section, rungs),
        **{key: section.text(key) for key in ("time", "time_unit", "order", "request", "stage", "title")},
    )
    if columns.time and columns.order:
        raise section.wrong("order", f"time is {columns.time!r} already, keep one of the two")
    if columns.time_unit and columns.time_unit not in TIME_UNITS:
        raise section.wrong("time_unit", f"use one of {', '.join(TIME_UNITS)}")
    if columns.time_unit and not columns.time:
        raise section.wrong("time_unit", "there is no time column, remove it")
    return columns


def _teacher(columns: _Section, rungs: tuple[str, ...]) -> dict[str, str]:
    """The column of logged scores of each rung: of all rungs or of none."""
    section = columns.table("teacher", rungs)
    found = {rung: section.text(rung) or "" for rung in section.values}
    absent = [rung for rung in rungs if found and rung not in found]
    if absent:
        raise DataError(f"{section.place}: no column for {', '.join(absent)}: give one for each rung, or none at all")
    return found


def _rungs(section: _Section) -> tuple[str, ...]:
    rungs = section.names("ladder")
    if not rungs:
        raise section.wrong("ladder", "name the feedback columns of events.parquet, weakest first")
    for rung in rungs:
        if not rung.isidentifier() or keyword.iskeyword(rung):
            raise section.wrong(
                "ladder", f"{rung!r} cannot stand in soft_label, rename the column to letters, digits and _"
            )
    return rungs


def _negative(section: _Section, rungs: tuple[str, ...]) -> tuple[str, ...]:
    negative = section.names("negative")
    for name in negative:
        if name in rungs:
            raise section.wrong("negative", f"{name!r} is a rung of the ladder too, keep it in one of the two")
    return negative


def _soft_label(section: _Section, rungs: tuple[str, ...]) -> SoftLabel:
    expression = section.text("soft_label") or expected_grade(rungs)
    try:
        return SoftLabel(expression, rungs)
    except DataError as error:
        raise DataError(f"{section.place}: {error}") from error


def _split(section: _Section, columns: Columns) -> Split:
    by = section.text("by") or ("time" if columns.time else "order" if columns.order else "hash")
    if by not in SPLITS_BY:
        raise section.wrong("by", f"use one of {', '.join(SPLITS_BY)}")
    if by != "hash" and not (columns.time or columns.order):
        raise section.wrong("by", "the log has no time or order column, use hash or name one in [columns]")
    moments = {key: _moment(section, key) for key in ("valid_from", "test_from") if key in section.values}
    if not moments:
        valid, test = _fractions(section)
        return Split(by=by, valid=valid, test=test)
    if by != "time":
        raise section.wrong(next(iter(moments)), f"a split by {by} takes the fractions valid and test")
    if len(moments) == 1 or "valid" in section.values or "test" in section.values:
        raise DataError(
            f"{section.place}: give valid_from and test_from, or the fractions valid and test, not a mixture"
        )
    _check_moments(section, moments["valid_from"], moments["test_from"], columns)
    return Split(by=by, valid_from=moments["valid_from"], test_from=moments["test_from"])


def _fractions(section: _Section) -> tuple[float, float]:
    found = {key: section.number(key, 0.1) for key in ("valid", "test")}
    for key, value in found.items():
        if not 0 < value < 1:
            raise section.wrong(key, "write a fraction of the events between 0 and 1")
    if sum(found.values()) >= 1:
        raise section.wrong("test", f"with valid {found['valid']} nothing is left to train on, lower them")
    return found["valid"], found["test"]


def _moment(section: _Section, key: str) -> Moment:
    value = section.values[key]
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise section.wrong(key, "no column of 64-bit integers reaches it, write a number within them")
        return value
    raise section.wrong(
        key, "write a date, a date with time and zone (2022-05-02T00:00:00+08:00), or a number in the column's unit"
    )


def _check_moments(section: _Section, valid: Moment, test: Moment, columns: Columns) -> None:
    if type(valid) is not type(test):
        raise section.wrong(
            "test_from", "write valid_from and test_from in the same way, both as dates or both as numbers"
        )
    if valid >= test:  # type: ignore[operator]
        raise section.wrong("test_from", f"it must come after valid_from ({section.values['valid_from']})")
    if columns.order and isinstance(valid, datetime):
        raise section.wrong("valid_from", f"{columns.order!r} is an order, not a time, write a number")


def _lists(section: _Section) -> Lists:
    gap_s = section.number("gap_s", 1800.0)
    if gap_s <= 0:
        raise section.wrong("gap_s", "write a number of seconds above 0")
    return Lists(gap_s=gap_s, max_impressions=section.whole("max_impressions", 50, MOST_IMPRESSIONS))


def _roles(columns: Columns, rungs: Sequence[str], negative: Sequence[str]) -> dict[str, str]:
    """Columns of events that no context field may read: what each is, and the remedy."""
    outcome = "it is known after the request only, remove the field"
    moment = "it never comes again, make a column of its hour or weekday and name that"
    roles: dict[str | None, str] = {
        columns.user: "the user's id: use side user",
        columns.item: "the item's id: use side item",
        columns.time: f"the time: {moment}",
        columns.order: f"the order: {moment}",
        columns.request: "the request's id: it never comes again, remove the field",
        columns.stage: f"the stage: {outcome}",
        **dict.fromkeys(columns.teacher.values(), f"a logged score of the teacher: {outcome}"),
        **dict.fromkeys(negative, f"negative feedback: {outcome}"),
        **dict.fromkeys(rungs, f"a rung of the ladder: {outcome}"),
    }
    return {name: role for name, role in roles.items() if name}


def _fields(top: _Section, columns: Columns, roles: Mapping[str, str]) -> tuple[Field, ...]:
    entries = top.values.get("fields")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise DataError(
            f"{top.place}: [[fields]] is missing: name each column that the network shall read, with side and kind"
        )
    fields = tuple(
        _field(_Section(f"{top.place}: [[fields]] number {k}", e, FIELD_KEYS)) for k, e in enumerate(entries, 1)
    )
    try:
        FeatureSpec(fields, "int", "int")  # names are distinct and shared tables fit
    except SpecError as error:
        raise DataError(f"{top.place}: [[fields]]: {error}") from error
    for one in fields:
        if one.side == "context" and one.name in roles:
            raise DataError(f"{top.place}: [[fields]] {one.name}: side is 'context', but this is {roles[one.name]}")
        if one.kind == "sequence" and one.shares not in (None, columns.item):
            raise DataError(
                f"{top.place}: [[fields]] {one.name}: holds items, so shares = {columns.item!r}, or leave it out"
            )
    for tower, sides in (("user", ("user", "context")), ("item", ("item",))):
        if not any(f.side in sides for f in fields):
            raise DataError(f"{top.place}: [[fields]] has none on the {tower} side: add one, the {tower} id at least")
    return fields


def _field(section: _Section) -> Field:
    name, side, kind = (section.text(key, required=True) or "" for key in ("name", "side", "kind"))
    section.place += f" ({name})"
    pooling = section.text("pooling", "mean")
    for key, value, allowed in (("side", side, Side), ("kind", kind, Kind), ("pooling", pooling, Pooling)):
        if value not in get_args(allowed):
            raise section.wrong(key, nearest(str(value), get_args(allowed)))
    if kind == "sequence" and side != "user":
        raise section.wrong("side", "a sequence holds the user's past items, use side user")
    default_length = DEFAULT_LENGTHS.get(kind, 1)
    options: dict[str, Any] = {
        "dim": section.whole("dim", 16, MOST_DIM),
        "length": section.whole("length", default_length, MOST_LENGTH),
    }
    try:
        return Field(name=name, side=side, kind=kind, pooling=pooling, shares=section.text("shares"), **options)  # type: ignore[arg-type]
    except SpecError as error:
        raise DataError(f"{section.place}: {error}") from error
