"""Events of a log on their way from Parquet to arrays: read, drop the unknown, divide into splits and requests."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.datasets import columns as read
from model.datasets import lists
from model.datasets.lists import Ints, Splits
from model.datasets.schema import FILE, TIME_UNITS, Moment, Schema
from model.errors import DataError
from model.features import Field

STAGES = ("impression", "candidate", "random")
IMPRESSION, CANDIDATE, RANDOM = range(3)
SPLITS = ("train", "valid", "test")

READERS = {"categorical": read.read_categorical, "numeric": read.read_numeric, "multi": read.read_multi}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Events:
    """One row per event, in the order of the file until they are grouped."""

    user: Ints  # (e,) row of users, -1 where unknown
    item: Ints  # (e,) row of items, -1 where unknown
    when: Ints  # (e,) epoch ms, order, or 0 where the log has neither
    unit: str | None  # of the time column, None where the log has no clock
    request: Ints  # (e,) logged request, or 0 until requests are derived
    stage: NDArray[np.int8]  # (e,)
    feedback: NDArray[np.bool_]  # (e, rungs)
    negative: NDArray[np.bool_]  # (e,)
    teacher: NDArray[np.float32] | None  # (e, rungs)
    context: Mapping[str, NDArray[Any]]  # (e,) each
    split: Splits  # (e,)

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: NDArray[Any]) -> Events:
        """The same for some rows (positions or a mask)."""
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in ("user", "item", "when", "request", "stage", "split")},
            feedback=self.feedback[rows],
            negative=self.negative[rows],
            teacher=None if self.teacher is None else self.teacher[rows],
            context={name: values[rows] for name, values in self.context.items()},
        )


def read_events(path: Path, schema: Schema, users: pa.Array, items: pa.Array) -> Events:
    """Read and check events.parquet against the ids of users and items."""
    source = read.open_source(path, _wanted(schema))
    if not len(source):
        raise DataError(f"{path} has no rows: a log needs events")
    names = schema.columns
    count = len(source)
    stage = read.read_choices(source, names.stage, STAGES) if names.stage else np.zeros(count, np.int8)
    shown = stage == IMPRESSION
    when, unit = _when(source, schema)
    negative = [read.read_flags(source, name, shown) for name in schema.negative]
    return Events(
        user=read.match_ids(source, names.user, users, "users.parquet").astype(np.int64),
        item=read.match_ids(source, names.item, items, "items.parquet").astype(np.int64),
        when=when,
        unit=unit,
        request=read.read_codes(source, names.request) if names.request else np.zeros(count, np.int64),
        stage=stage,
        feedback=np.column_stack([read.read_flags(source, rung, shown) for rung in schema.rungs]),
        negative=np.logical_or.reduce(negative) if negative else np.zeros(count, np.bool_),
        teacher=_teacher(source, schema, shown),
        context={field.name: read_field(source, field) for field in schema.on("context")},
        split=np.zeros(count, np.int8),
    )


def read_field(source: read.Source, field: Field) -> NDArray[Any]:
    """The column of a field, checked for its kind."""
    return READERS[field.kind](source, field.name)


def drop_unknown(events: Events, report: dict[str, int], path: Path) -> Events:
    """Events of known users and items; counts the others."""
    known = (events.user >= 0) & (events.item >= 0)
    report["unknown_user"] = int((events.user < 0).sum())
    report["unknown_item"] = int(((events.item < 0) & (events.user >= 0)).sum())
    if not known.any():
        raise DataError(
            f"{path}: none of {len(events)} events has a user of users.parquet and an item of items.parquet: "
            "check that the three files use the same ids"
        )
    if known.all():
        return events
    log.warning("%s: dropped %d of %d events of unknown users or items", path, (~known).sum(), len(events))
    return events.take(known)


def clear_negative(events: Events, report: dict[str, int]) -> Events:
    """An event with negative feedback counts as shown and not taken, whatever else was given."""
    cleared = events.negative & events.feedback.any(axis=1)
    report["negative"] = int(events.negative.sum())
    return replace(events, feedback=events.feedback & ~events.negative[:, None]) if cleared.any() else events


def group(events: Events, schema: Schema, user_ids: NDArray[Any], item_ids: NDArray[Any]) -> Events:
    """Divide into splits and requests."""
    hashes = lists.pair_hashes(user_ids, item_ids, events.user, events.item) if schema.split.by == "hash" else None
    when = events.when
    if hashes is not None and not (schema.columns.time or schema.columns.order):
        when = (hashes >> np.uint64(1)).astype(np.int64)  # any order that does not follow the labels
    split = _split(events, schema, hashes)
    if schema.columns.request:
        request = lists.logged_requests(events.user, events.request)
        split = lists.split_of_requests(request, when, split)
    else:
        gap_ms = schema.lists.gap_s * 1000 if events.unit and hashes is None else None
        request = lists.derived_requests(events.user, when, split, gap_ms, schema.lists.max_impressions)
    if hashes is not None:
        when = lists.places_in_user(events.user, split, when, request)
    return replace(events, when=when, split=split, request=request)


def in_order(events: Events) -> Events:
    """Requests by the time of their first event, the events of one together and by time, then as in the file."""
    return events.take(np.lexsort((events.when, events.request, lists.starts_of_requests(events.request, events.when))))


def join_repeats(events: Events, report: dict[str, int]) -> Events:
    """One event for each item of a request: the first of its lowest stage, with the feedback of all."""
    kept, groups = lists.repeats(events.request, events.item, events.stage)
    report["repeats"] = len(events) - len(kept)
    if not report["repeats"]:
        return events
    feedback = np.zeros((len(kept), events.feedback.shape[1]), np.bool_)
    np.logical_or.at(feedback, groups, events.feedback)
    return in_order(replace(events.take(kept), feedback=feedback))  # the first event of a request may be another now


def check_splits(events: Events, schema: Schema, folder: Path) -> None:
    """Every split holds events, and at least one that was taken."""
    taken = np.asarray(events.feedback.any(axis=1))
    for number, name in enumerate(SPLITS):
        inside = np.asarray(events.split == number)
        if not inside.any():
            raise DataError(
                f"{folder / FILE}: [split]: no event falls into {name} ({_range(events)}): "
                "change valid_from and test_from, or the fractions valid and test"
            )
        if not taken[inside].any():
            raise DataError(
                f"{folder / 'events.parquet'}: none of the {int(inside.sum())} events of the {name} split has any of "
                f"{', '.join(schema.rungs)}: check the ladder, or change the split"
            )


def _wanted(schema: Schema) -> list[str]:
    names = schema.columns
    roles = (names.user, names.item, names.time, names.order, names.request, names.stage)
    fields = [field.name for field in schema.on("context")]
    return [name for name in (*roles, *schema.rungs, *schema.negative, *names.teacher.values(), *fields) if name]


def _when(source: read.Source, schema: Schema) -> tuple[Ints, str | None]:
    if schema.columns.time:
        return read.read_times(source, schema.columns.time, schema.columns.time_unit)
    if schema.columns.order:
        return read.read_order(source, schema.columns.order), None
    return np.zeros(len(source), np.int64), None


def _teacher(source: read.Source, schema: Schema, shown: NDArray[np.bool_]) -> NDArray[np.float32] | None:
    by_rung = schema.columns.teacher
    if not by_rung:
        return None
    return np.column_stack([read.read_scores(source, by_rung[rung], shown) for rung in schema.rungs])


def _split(events: Events, schema: Schema, hashes: NDArray[np.uint64] | None) -> Splits:
    rule = schema.split
    if hashes is not None:
        return lists.split_by_hash(hashes, rule.valid, rule.test)
    if rule.by == "order":
        return lists.split_each_user(events.user, events.when, rule.valid, rule.test)
    if rule.valid_from is None or rule.test_from is None:
        return lists.split_at(events.when, *lists.moments_of_fractions(events.when, rule.valid, rule.test))
    return lists.split_at(events.when, _number(rule.valid_from, events.unit), _number(rule.test_from, events.unit))


def _number(moment: Moment, unit: str | None) -> int:
    """A moment on the scale of Events.when; one that no time can reach counts as the end of the year 9999."""
    if isinstance(moment, datetime):
        return round(moment.timestamp() * 1000)
    if not unit:
        return moment
    most = int(read.YEAR_9999_MS / TIME_UNITS[unit]) + 1
    within = max(-most, min(most, moment))
    return int(read.to_milliseconds(np.array([within], np.int64), unit)[0])


def _range(events: Events) -> str:
    first, last = int(events.when.min()), int(events.when.max())
    if not events.unit:
        return f"order {first} to {last}"
    return " to ".join(_readable(moment) for moment in (first, last))


def _readable(time_ms: int) -> str:
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{time_ms} ms"
