"""Read a log in the documented form (docs/data.md) into arrays, and view it as requests with their histories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.datasets import lists
from model.datasets.columns import as_objects, open_source, read_text, read_unique_ids
from model.datasets.events import (
    CANDIDATE,
    IMPRESSION,
    RANDOM,
    SPLITS,
    STAGES,
    check_splits,
    clear_negative,
    drop_unknown,
    group,
    in_order,
    join_repeats,
    read_events,
    read_field,
)
from model.datasets.lists import TEST, TRAIN, VALID
from model.datasets.schema import FILE, Schema, read_schema
from model.features import Field, IdType
from model.labels import grades

__all__ = [
    "CANDIDATE", "IMPRESSION", "PADDING", "RANDOM", "SPLITS", "STAGES", "TEST", "TRAIN", "VALID",
    "Log", "Requests", "Table", "all_to_test", "histories", "latest_histories", "read_log", "requests", "without",
]  # fmt: skip

PADDING = -1


@dataclass(frozen=True)
class Table:
    """Users or items: a row each, with the columns that fields name (and the title)."""

    ids: NDArray[Any]  # (n,) int64, or objects of type str
    columns: Mapping[str, NDArray[Any]]  # (n,) each; NaN or None where missing; list fields hold an array a row

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def id_type(self) -> IdType:
        return "string" if self.ids.dtype == object else "int"


@dataclass(frozen=True)
class Log:
    """Events of known users and items, the events of a request together, requests in order of time."""

    schema: Schema
    users: Table
    items: Table
    user: NDArray[np.int32]  # (e,) row of users
    item: NDArray[np.int32]  # (e,) row of items
    time: NDArray[np.int64]  # (e,) epoch ms; or the order; or, in a split by hash, the place within the user
    request: NDArray[np.int64]  # (e,) dense, never falling
    stage: NDArray[np.int8]  # (e,) IMPRESSION, CANDIDATE or RANDOM
    feedback: NDArray[np.bool_]  # (e, rungs), weakest first
    grade: NDArray[np.int8]  # (e,) highest rung given, 0 for none
    teacher: NDArray[np.float32] | None  # (e, rungs) logged scores
    context: Mapping[str, NDArray[Any]]  # (e,) each
    split: NDArray[np.int8]  # (e,) TRAIN, VALID or TEST, the same for all events of a request
    has_stages: bool  # the log itself says what was not shown
    report: Mapping[str, int]  # what was read, dropped and joined

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Requests:
    """Where each request lies among the events; its context is that of its event `first`."""

    user: NDArray[np.int32]  # (r,) row of users
    first: NDArray[np.int64]  # (r,) offset of its first event
    end: NDArray[np.int64]  # (r,) offset after its last event
    time: NDArray[np.int64]  # (r,) of its first event
    split: NDArray[np.int8]  # (r,)

    def __len__(self) -> int:
        return len(self.user)


def without(log: Log, split: int) -> Log:
    """The log as if the events of one split had never been logged; its users and items stay."""
    kept = log.split != split
    stage = log.stage[kept]
    return replace(
        log,
        request=_dense(log.request[kept]),
        stage=stage,
        teacher=None if log.teacher is None else log.teacher[kept],
        context={name: column[kept] for name, column in log.context.items()},
        has_stages=bool((stage != IMPRESSION).any()),
        report={**log.report, "kept": int(kept.sum())},
        **{name: getattr(log, name)[kept] for name in ("user", "item", "time", "feedback", "grade", "split")},
    )


def all_to_test(log: Log) -> Log:
    """The log with all its events in the test split; its requests stay as they are."""
    return replace(log, split=np.full(len(log), TEST, np.int8))


def requests(log: Log) -> Requests:
    """The requests of a log in its order, which is that of their time."""
    _, first, counts = lists.runs(log.request)
    return Requests(log.user[first], first, first + counts, log.time[first], log.split[first])


def histories(log: Log, length: int) -> NDArray[np.int32]:
    """(requests, length) the last items that each request's user took before it, oldest first, then PADDING.

    Taken means grade > 0; before means strictly earlier than the request's first event.
    """
    view = requests(log)
    return _last_taken(log, view.user, view.time, length)


def latest_histories(log: Log, length: int) -> NDArray[np.int32]:
    """(users, length) the same for every user after all events of the log: what the service publishes."""
    users = np.arange(len(log.users), dtype=np.int32)
    after = int(log.time.max(initial=0)) + 1
    return _last_taken(log, users, np.full(len(users), after, np.int64), length)


def _last_taken(log: Log, user: NDArray[np.int32], before: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    """(n, length) the last items that user[k] took before before[k]: one sort of questions among the events taken."""
    taken = np.flatnonzero(log.grade > 0)
    users = np.concatenate([user, log.user[taken]])
    order = np.lexsort((np.concatenate([before, log.time[taken]]), users))  # stable: questions first
    is_taken = order >= len(user)
    ordered = taken[order[is_taken] - len(user)]  # events by (user, time)
    asked = order[~is_taken]
    end = np.cumsum(is_taken)[~is_taken]  # events taken before each question, those of earlier users included
    place = np.maximum(end - length, np.searchsorted(log.user[ordered], user[asked]))[:, None] + np.arange(length)
    inside = place < end[:, None]
    answers = np.full(place.shape, PADDING, np.int32)
    answers[inside] = log.item[ordered][place[inside]]
    found = np.empty_like(answers)
    found[asked] = answers
    return found


def read_log(folder: Path, *, trainable: bool = True) -> Log:
    """Read a folder in the documented form. Raises DataError naming file, column, row and remedy.

    What is to be measured only need not be `trainable`, which asks for something taken in every split.
    """
    schema = read_schema(folder / FILE)
    names = schema.columns
    users, user_ids = _table(folder / "users.parquet", names.user, schema.on("user"))
    items, item_ids = _table(folder / "items.parquet", names.item, schema.on("item"), names.title)
    raw = read_events(folder / "events.parquet", schema, user_ids, item_ids)
    report = {"events": len(raw)}
    known = clear_negative(drop_unknown(raw, report, folder / "events.parquet"), report)
    events = join_repeats(in_order(group(known, schema, users.ids, items.ids)), report)
    if trainable:
        check_splits(events, schema, folder)
    report["kept"] = len(events)
    return Log(
        schema=schema,
        users=users,
        items=items,
        user=events.user.astype(np.int32),
        item=events.item.astype(np.int32),
        time=events.when,
        request=_dense(events.request),
        stage=events.stage,
        feedback=events.feedback,
        grade=grades(events.feedback),
        teacher=events.teacher,
        context=events.context,
        split=events.split,
        has_stages=bool((events.stage != IMPRESSION).any()),
        report=report,
    )


def _table(path: Path, id_name: str, fields: tuple[Field, ...], title: str | None = None) -> tuple[Table, pa.Array]:
    """A table with its field columns and title, and its ids as Arrow, to match those of events."""
    source = open_source(path, [id_name, *(f.name for f in fields), *([title] if title else [])])
    ids = read_unique_ids(source, id_name)
    columns = {field.name: read_field(source, field) for field in fields}
    if title and title not in columns:
        columns[title] = read_text(source, title)
    return Table(as_objects(ids), columns), ids


def _dense(ordered: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 0, 1, 1, 1, 2 ... from runs of equal values."""
    _, starts, counts = lists.runs(ordered)
    return np.repeat(np.arange(len(starts)), counts)
