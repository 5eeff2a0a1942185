"""Events grouped into requests: who asked, when, in what context, after which positives; raw, encoded, or as a body.

A request (a list) is the adjacent events of one request id within one split. Its history holds the user's positives
strictly before its first event, whatever split they fall in: what a live service would have known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from model.datasets.log import TRAIN, Log, histories
from model.datasets.log import requests as all_requests
from model.features import HISTORY, Column, FeatureSpec, fit_spec

NONE = -1  # no item: the end of a history shorter than its array
HISTORY_LENGTH = 20  # kept for retrieval and the teacher when no field asks for more


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRequests:
    """The requests of one split in the order of time, each with its history."""

    user: np.ndarray  # (L,) int32 row of log.users
    first: np.ndarray  # (L,) int64, first event
    end: np.ndarray  # (L,) int64, one past the last event
    time: np.ndarray  # (L,) int64 of the first event
    history: np.ndarray  # (L, H) int32 rows of log.items, oldest first, NONE after the end

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> SplitRequests:
        """The requests at `rows`, (m,) int or bool."""
        return SplitRequests(
            **{name: getattr(self, name)[rows] for name in ("user", "first", "end", "time", "history")}
        )


def requests_of(log: Log, split: int | None = None) -> SplitRequests:
    """The requests of one split, or of all."""
    view = all_requests(log)
    rows = np.arange(len(view)) if split is None else np.flatnonzero(view.split == split)
    wanted = log.schema.history.length if log.schema.history else 0
    history = histories(log, max(wanted, HISTORY_LENGTH))
    return SplitRequests(
        user=view.user[rows], first=view.first[rows], end=view.end[rows], time=view.time[rows], history=history[rows]
    )


def user_columns(log: Log, requests: SplitRequests) -> dict[str, Column]:
    """Raw columns of the user side for each request: the user's features, the context, the history as item ids."""
    columns: dict[str, Column] = {name: column[requests.user] for name, column in log.users.columns.items()}
    columns[log.schema.columns.user] = log.users.ids[requests.user]
    columns |= {name: column[requests.first] for name, column in log.context.items()}
    columns[HISTORY] = history_ids(log, requests)
    return columns


def history_ids(log: Log, requests: SplitRequests) -> list[np.ndarray]:
    """Each history as an array of item ids, oldest first."""
    sizes = (requests.history != NONE).sum(axis=1)
    return [log.items.ids[row[:size]] for row, size in zip(requests.history, sizes.tolist(), strict=True)]


def item_columns(log: Log, rows: np.ndarray | None = None) -> dict[str, Column]:
    """Raw columns of the item side, for the given rows of log.items or for all."""
    which: Any = slice(None) if rows is None else rows
    columns: dict[str, Column] = {name: column[which] for name, column in log.items.columns.items()}
    columns[log.schema.columns.item] = log.items.ids[which]
    return columns


def fit_log_spec(log: Log, *, min_count: int = 1, buckets: int = 16) -> FeatureSpec:
    """Fit vocabularies and buckets on what the training events touch: their users, items and requests."""
    requests = requests_of(log, TRAIN)
    context = user_columns(log, requests)
    events = log.split == TRAIN
    users = np.unique(log.user[events])
    user_side: dict[str, Column] = {name: column[users] for name, column in log.users.columns.items()}
    user_side[log.schema.columns.user] = log.users.ids[users]
    user_side[HISTORY] = context[HISTORY]
    return fit_spec(
        log.schema.fields,
        {"user": user_side, "context": context, "item": item_columns(log, np.unique(log.item[events]))},
        user_id_type=log.users.id_type,
        item_id_type=log.items.id_type,
        user_id_name=log.schema.columns.user,
        item_id_name=log.schema.columns.item,
        min_count=min_count,
        buckets=buckets,
    )


def encode_users(spec: FeatureSpec, log: Log, requests: SplitRequests) -> np.ndarray:
    """Input of the user tower for each request, (L, user width) int32."""
    return spec.encode("user", user_columns(log, requests), len(requests))


def encode_items(spec: FeatureSpec, log: Log) -> np.ndarray:
    """Input of the item tower for each item of the log, (I, item width) int32."""
    return spec.encode("item", item_columns(log), len(log.items))


def request_body(log: Log, requests: SplitRequests, row: int, candidates: np.ndarray) -> dict[str, Any]:
    """The request as the HTTP API takes it; the history is explicit, so that no later one is filled in.

    candidates: (n,) int32 rows of log.items.
    """
    history = requests.history[row]
    context = {name: plain(column[requests.first[row]]) for name, column in log.context.items()}
    return {
        "user_id": plain(log.users.ids[requests.user[row]]),
        "context": {name: value for name, value in context.items() if value is not None},
        "history": [plain(log.items.ids[item]) for item in history[history != NONE]],
        "candidates": [plain(log.items.ids[item]) for item in candidates],
    }


def user_features(log: Log, row: int) -> dict[str, Any]:
    """Raw features of one user as a body's `user` object; missing ones are left out."""
    values = {name: plain(column[row]) for name, column in log.users.columns.items()}
    return {name: value for name, value in values.items() if value is not None}


def plain(value: Any) -> Any:
    """A value of a column as JSON has it; NaN and None become None."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if value is None or value != value else value
