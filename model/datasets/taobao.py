"""Taobao pairs of user and item into the documented form: the strongest of view, cart and buy that each pair saw.

The version of UserBehavior (H. Zhu et al., KDD 2018) that Z. Cheng et al., WWW 2023, published. It has no times, no
features beyond the ids and no exposures that were not viewed: each user's pairs are divided by a hash, no field holds a
history (the order within a user is unknown), and whatever a list holds without a grade is simulated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.datasets.columns import open_source, read_flags, read_ids
from model.datasets.form import Form, fields_as_toml, write_form
from model.errors import DataError
from model.features import Field

ADAPTER = "taobao 1"  # the number rises when the conversion changes
PAIRS = "pairs.parquet"
RUNGS = ("view", "cart", "buy")

HEAD = """\
name = "taobao"

[columns]
user = "user_id"
item = "item_id"

[feedback]                      # each rung includes those above it: the file also has purchases without cart or view
ladder = ["view", "cart", "buy"]
soft_label = "view + 3*cart + 10*buy"

[split]                         # no times: each user's pairs at random, always the same way
by = "hash"
valid = 0.1
test = 0.1

[lists]                         # most users have no more training pairs than this
max_impressions = 50
"""
FIELDS = (
    Field(name="user_id", side="user", kind="categorical", dim=32),
    Field(name="item_id", side="item", kind="categorical", dim=32),
)


def holds(folder: Path) -> bool:
    """Whether a folder has the file of this data set."""
    return (folder / PAIRS).is_file()


def convert(source: Path | None, out: Path) -> Path:
    """Write the log into `out`. `source` is the folder that holds pairs.parquet."""
    if source is None:
        raise DataError(f"taobao has no default place: give the folder that holds {PAIRS} as the source")
    pairs = source / PAIRS
    return write_form(out, adapter=ADAPTER, sources=[pairs], build=lambda: _form(pairs))


def _form(path: Path) -> Form:
    pairs = open_source(path, ["user_id", "item_id", *RUNGS], "the taobao adapter")
    user, item = (read_ids(pairs, name) for name in ("user_id", "item_id"))
    every = np.ones(len(pairs), np.bool_)
    given = np.column_stack([read_flags(pairs, rung, every) for rung in RUNGS])
    reached = np.logical_or.accumulate(given[:, ::-1], axis=1)[:, ::-1]  # a rung implies those below
    return Form(
        users=pa.table({"user_id": pc.unique(user)}),
        items=pa.table({"item_id": pc.unique(item)}),
        events=pa.table(
            {"user_id": user, "item_id": item} | {rung: pa.array(reached[:, place]) for place, rung in enumerate(RUNGS)}
        ),
        document=HEAD + fields_as_toml(FIELDS),
    )
