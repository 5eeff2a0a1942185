"""Retailrocket events into the documented form: views, carts and purchases of a web shop, May to September 2015.

R. Zykov et al., Retailrocket recommender system dataset (Kaggle). Reads the official events.csv, or a selection of its
buyers in Parquet. Nothing is logged of what was shown and not viewed, so whatever a list holds without a grade is
simulated. The official item properties change with time, beyond the split, and are never read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.datasets.columns import Source, open_source, read_choices, read_ids, read_times
from model.datasets.csv_files import read_csv
from model.datasets.form import Form, fields_as_toml, write_form
from model.errors import DataError
from model.features import Field

ADAPTER = "retailrocket 1"  # the number rises when the conversion changes
OFFICIAL, SELECTED = "events.csv", "events.parquet"
OFFICIAL_TYPES = {"visitorid": pa.int64(), "itemid": pa.int64(), "timestamp": pa.int64(), "event": pa.string()}
SELECTED_COLUMNS = ("user_id", "item_id", "timestamp", "behavior")
BEHAVIOURS = ("view", "addtocart", "transaction", "purchase")  # the last two are one, as the two sources call it
RUNGS = ("view", "cart", "buy")
HOUR_MS, DAY_MS = 3_600_000, 86_400_000

HEAD = """\
name = "retailrocket"

[columns]
user = "user_id"
item = "item_id"
time = "time_ms"
time_unit = "ms"

[feedback]                      # what a sitting made of an item is its strongest event
ladder = ["view", "cart", "buy"]
soft_label = "view + 3*cart + 10*buy"

[split]
by = "time"
valid = 0.1
test = 0.1

[lists]
gap_s = 1800
max_impressions = 50
"""
FIELDS = (
    Field(name="user_id", side="user", kind="categorical", dim=16),
    Field(name="history", side="user", kind="sequence", dim=32, length=30, shares="item_id"),
    Field(name="hour", side="context", kind="categorical", dim=4),
    Field(name="weekday", side="context", kind="categorical", dim=4),
    Field(name="item_id", side="item", kind="categorical", dim=32),
)


def holds(folder: Path) -> bool:
    """Whether a folder has events of Retailrocket: by their columns, since others call a file so, too."""
    if (folder / OFFICIAL).is_file():
        with (folder / OFFICIAL).open("rb") as file:
            return {name.encode() for name in OFFICIAL_TYPES} <= set(file.readline(1000).strip().split(b","))
    try:
        return set(SELECTED_COLUMNS) <= set(pq.read_schema(folder / SELECTED).names)
    except (OSError, pa.ArrowException):
        return False  # no such file, or none that could be theirs


def convert(source: Path | None, out: Path) -> Path:
    """Write the log into `out`. `source` is the folder that holds events.csv or events.parquet."""
    if source is None:
        raise DataError(f"retailrocket has no default place: give the folder that holds {OFFICIAL} as the source")
    if (source / OFFICIAL).is_file():
        path = source / OFFICIAL
        return write_form(out, adapter=ADAPTER, sources=[path], build=lambda: _official(path))
    if (source / SELECTED).is_file():
        path = source / SELECTED
        return write_form(out, adapter=ADAPTER, sources=[path], build=lambda: _selected(path))
    raise DataError(
        f"{source} holds neither {OFFICIAL} (official) nor {SELECTED} (selected): give the folder that does"
    )


def _official(path: Path) -> Form:
    return _form(read_csv(path, OFFICIAL_TYPES, "Retailrocket"), ("visitorid", "itemid", "timestamp", "event"), "ms")


def _selected(path: Path) -> Form:
    return _form(open_source(path, SELECTED_COLUMNS, "the retailrocket adapter"), SELECTED_COLUMNS, "s")


def _form(events: Source, names: tuple[str, str, str, str], unit: str) -> Form:
    user, item = (read_ids(events, name) for name in names[:2])
    time_ms, _ = read_times(events, names[2], unit)
    rung = np.minimum(read_choices(events, names[3], BEHAVIOURS), len(RUNGS) - 1)
    return Form(
        users=pa.table({"user_id": pc.unique(user)}),
        items=pa.table({"item_id": pc.unique(item)}),
        events=pa.table({"user_id": user, "item_id": item, **_moments(time_ms), **_flags(rung)}),
        document=HEAD + fields_as_toml(FIELDS),
    )


def _moments(time_ms: NDArray[np.int64]) -> dict[str, pa.Array]:
    """The time, and its hour and weekday in UTC: the shop's zone is not published."""
    return {
        "time_ms": pa.array(time_ms),
        "hour": pa.array(time_ms % DAY_MS // HOUR_MS, pa.int8()),
        "weekday": pa.array((time_ms // DAY_MS + 3) % 7, pa.int8()),  # day 0 was a Thursday, 0 stands for Monday
    }


def _flags(rung: NDArray[np.int8]) -> dict[str, pa.Array]:
    """A column for each rung; a stronger event implies the weaker ones, or a purchase would teach not to view."""
    return {name: pa.array(rung >= place) for place, name in enumerate(RUNGS)}
