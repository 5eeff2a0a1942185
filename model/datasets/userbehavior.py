"""Taobao's UserBehavior into the documented form: the official UserBehavior.csv of nine days in 2017.

H. Zhu et al., KDD 2018 (Tianchi, data set 649): 100 million page views, favourites, carts and purchases. Nothing is
logged of what was shown and not viewed, so whatever a list holds without a grade is simulated.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.datasets.columns import Source, read_choices, read_ids, read_times
from model.datasets.csv_files import read_csv
from model.datasets.form import Form, fields_as_toml, write_form
from model.errors import DataError
from model.features import Field

ADAPTER = "userbehavior 1"  # the number rises when the conversion changes
OF = "UserBehavior"
FILE = "UserBehavior.csv"
HEADER = ("user_id", "item_id", "category_id", "behaviour", "timestamp")  # the file has no line of names
TYPES = {
    **dict.fromkeys(HEADER[:3], pa.int32()),
    "behaviour": pa.dictionary(pa.int32(), pa.string()),
    "timestamp": pa.int64(),
}
BEHAVIOURS = ("pv", "fav", "cart", "buy")
RUNG_OF = np.array([0, 1, 1, 2], np.int8)  # a favourite stands beside a cart
RUNGS = ("view", "cart", "buy")

HOUR_MS, DAY_MS, CHINA_MS = 3_600_000, 86_400_000, 8 * 3_600_000
FIRST_MS, END_MS = (
    int(datetime.fromisoformat(f"2017-{day}T00:00:00+08:00").timestamp()) * 1000 for day in ("11-25", "12-04")
)

HEAD = """\
name = "userbehavior"

[columns]
user = "user_id"
item = "item_id"
time = "time_ms"
time_unit = "ms"

[feedback]                      # cart: put into the cart or marked as a favourite; each rung includes those above it
ladder = ["view", "cart", "buy"]
soft_label = "view + 3*cart + 10*buy"

[split]                         # days in China: the last of nine is test, the one before it is valid
by = "time"
valid_from = 2017-12-02T00:00:00+08:00
test_from = 2017-12-03T00:00:00+08:00

[lists]
gap_s = 1800
max_impressions = 50
"""
FIELDS = (
    Field(name="user_id", side="user", kind="categorical", dim=32),
    Field(name="history", side="user", kind="sequence", dim=32, length=50, shares="item_id"),
    Field(name="hour", side="context", kind="categorical", dim=4),
    Field(name="item_id", side="item", kind="categorical", dim=32),
    Field(name="category_id", side="item", kind="categorical", dim=16),
)

log = logging.getLogger(__name__)


def holds(folder: Path) -> bool:
    """Whether a folder has the file of this data set."""
    return (folder / FILE).is_file()


def convert(source: Path | None, out: Path) -> Path:
    """Write the log into `out`. `source` is the folder that holds UserBehavior.csv."""
    if source is None:
        raise DataError(
            f"userbehavior has no default place: give the folder that holds {FILE} as the source "
            "(tianchi.aliyun.com, data set 649)"
        )
    path = source / FILE
    return write_form(out, adapter=ADAPTER, sources=[path], build=lambda: _form(path))


def _form(path: Path) -> Form:
    whole = read_csv(path, TYPES, OF, HEADER)
    behaviours = _within(whole, read_times(whole, "timestamp", "s")[0])
    user, item = (read_ids(behaviours, name) for name in ("user_id", "item_id"))
    rung = RUNG_OF[read_choices(behaviours, "behaviour", BEHAVIOURS)]
    time_ms, _ = read_times(behaviours, "timestamp", "s")
    return Form(
        users=pa.table({"user_id": pc.unique(user)}),
        items=_items(behaviours, item),
        events=pa.table(
            {
                "user_id": user,
                "item_id": item,
                "time_ms": time_ms,
                "hour": pa.array((time_ms + CHINA_MS) % DAY_MS // HOUR_MS, pa.int8()),
                **{name: pa.array(rung >= place) for place, name in enumerate(RUNGS)},
            }
        ),
        document=HEAD + fields_as_toml(FIELDS),
    )


def _within(behaviours: Source, time_ms: NDArray[np.int64]) -> Source:
    """Without the rows whose time lies outside the nine days, which the official file has."""
    inside = (time_ms >= FIRST_MS) & (time_ms < END_MS)
    if not inside.any():
        raise DataError(
            f"{behaviours.path}: none of {len(inside):,} rows lies within 25 November to 3 December 2017 in China: "
            "get the official file again"
        )
    if inside.all():
        return behaviours
    log.warning("%s: dropped %d of %d rows outside the nine days", behaviours.path, (~inside).sum(), len(inside))
    return Source(behaviours.path, behaviours.table.filter(pa.array(inside)))


def _items(behaviours: Source, item: pa.Array) -> pa.Table:
    """Each item with the category of its first row."""
    ids, first = np.unique(item.to_numpy(), return_index=True)
    return pa.table({"item_id": ids, "category_id": behaviours.column("category_id").take(pa.array(first))})
