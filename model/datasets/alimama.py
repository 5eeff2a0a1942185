"""Alimama's display ads on Taobao into the documented form: the official csv files of eight days in May 2017.

Ali_Display_Ad_Click (Tianchi, data set 56): raw_sample.csv holds every exposure of an ad, clicked or not. What users
did in the shop (behavior_log.csv) has no ads, only categories and brands, and serves as features of the user: the most
frequent ones strictly before the first exposure of the log, so that no split sees its own future.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.datasets.columns import Source, match_ids, read_flags, read_ids, read_times, read_unique_ids
from model.datasets.csv_files import read_csv, stream_csv
from model.datasets.form import Form, fields_as_toml, write_form
from model.datasets.lists import runs
from model.errors import DataError
from model.features import Field

ADAPTER = "alimama 1"  # the number rises when the conversion changes
OF = "Alimama"
SAMPLES, ADS, PROFILES, BEHAVIOURS = "raw_sample.csv", "ad_feature.csv", "user_profile.csv", "behavior_log.csv"

WHOLE = pa.int64()
AD_CODES = ("cate_id", "campaign_id", "customer", "brand")
PROFILE_CODES = (
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation",
    "new_user_class_level",
)  # fmt: skip
SAMPLE_TYPES = {"user": WHOLE, "time_stamp": WHOLE, "adgroup_id": WHOLE, "pid": pa.string(), "clk": WHOLE}
AD_TYPES = {"adgroup_id": WHOLE, **dict.fromkeys(AD_CODES, WHOLE), "price": pa.float64()}
PROFILE_TYPES = {"userid": WHOLE, **dict.fromkeys(PROFILE_CODES, WHOLE)}
BEHAVIOUR_TYPES = {"user": WHOLE, "time_stamp": WHOLE, "cate": WHOLE, "brand": WHOLE}

CHINA_MS, HOUR_MS, DAY_MS = 8 * 3_600_000, 3_600_000, 86_400_000
MOST_CODE = 1 << 31  # categories and brands lie below, so that (user, code) is one 64-bit key
KEPT = 10  # categories and brands kept of a user
PENDING = 20_000_000  # keys gathered before they are counted together: 160 MB

HEAD = """\
name = "alimama"

[columns]
user = "user_id"
item = "adgroup_id"
time = "time_ms"
time_unit = "ms"

[feedback]
ladder = ["click"]

[split]                         # days in China: the last is test, as published, the one before it is valid
by = "time"
valid_from = 2017-05-12T00:00:00+08:00
test_from = 2017-05-13T00:00:00+08:00

[lists]                         # 23 exposures a user in eight days: a list takes half a day, a night begins another
gap_s = 14400
max_impressions = 50
"""
FIELDS = (
    Field(name="user_id", side="user", kind="categorical", dim=16),
    *(Field(name=name, side="user", kind="categorical", dim=4) for name in PROFILE_CODES),
    Field(name="history", side="user", kind="sequence", dim=32, length=30, shares="adgroup_id"),
    Field(name="pid", side="context", kind="categorical", dim=4),
    Field(name="hour", side="context", kind="categorical", dim=4),
    Field(name="adgroup_id", side="item", kind="categorical", dim=32),
    *(Field(name=name, side="item", kind="categorical", dim=16) for name in AD_CODES),
    Field(name="price", side="item", kind="numeric", dim=8),
)
INTERESTS = (
    Field(name="cates", side="user", kind="multi", dim=16, length=KEPT, shares="cate_id"),
    Field(name="brands", side="user", kind="multi", dim=16, length=KEPT, shares="brand"),
)

log = logging.getLogger(__name__)


def holds(folder: Path) -> bool:
    """Whether a folder has the exposures of this data set."""
    return (folder / SAMPLES).is_file()


def convert(source: Path | None, out: Path) -> Path:
    """Write the log into `out`. `source` is the folder of the official files; behavior_log.csv may be left out."""
    if source is None:
        raise DataError(
            f"alimama has no default place: give the folder that holds {SAMPLES} as the source "
            "(tianchi.aliyun.com, data set 56)"
        )
    samples, ads, profiles = (source / name for name in (SAMPLES, ADS, PROFILES))
    behaviours = source / BEHAVIOURS if (source / BEHAVIOURS).is_file() else None
    if behaviours is None:
        log.warning(
            "%s does not exist: users get no categories and brands from before the first exposure", source / BEHAVIOURS
        )
    files = [samples, ads, profiles, *([behaviours] if behaviours else [])]
    return write_form(out, adapter=ADAPTER, sources=files, build=lambda: _form(samples, ads, profiles, behaviours))


def _form(samples_path: Path, ads_path: Path, profiles_path: Path, behaviours_path: Path | None) -> Form:
    samples = read_csv(samples_path, SAMPLE_TYPES, OF)
    if not len(samples):
        raise DataError(f"{samples_path} has no rows: get the official file again")
    ads = read_csv(ads_path, AD_TYPES, OF)
    read_unique_ids(ads, "adgroup_id")
    time_ms, _ = read_times(samples, "time_stamp", "s")
    users = _users(samples, read_csv(profiles_path, PROFILE_TYPES, OF))
    if behaviours_path is not None:
        first_s = int(time_ms.min()) // 1000
        for name, values in _interests(behaviours_path, users["user_id"].combine_chunks(), first_s).items():
            users = users.append_column(name, values)
    return Form(
        users=users,
        items=ads.table,
        events=_events(samples, time_ms),
        document=HEAD + fields_as_toml((*FIELDS, *INTERESTS) if behaviours_path else FIELDS),
    )


def _users(samples: Source, profiles: Source) -> pa.Table:
    """The profiles, and the users without one (about one in seventeen), whose codes are null."""
    known = read_unique_ids(profiles, "userid")
    table = profiles.table.rename_columns(["user_id", *PROFILE_CODES])
    seen = pc.unique(read_ids(samples, "user"))
    unknown = seen.filter(pc.is_null(pc.index_in(seen, value_set=known)))
    return pa.concat_tables([table, pa.table({"user_id": unknown})], promote_options="default")


def _events(samples: Source, time_ms: NDArray[np.int64]) -> pa.Table:
    clicked = read_flags(samples, "clk", np.ones(len(samples), np.bool_))
    return pa.table(
        {
            "user_id": samples.column("user"),
            "adgroup_id": read_ids(samples, "adgroup_id"),
            "time_ms": time_ms,
            "click": clicked,
            "pid": samples.column("pid"),
            "hour": pa.array((time_ms + CHINA_MS) % DAY_MS // HOUR_MS, pa.int8()),
        }
    )


@dataclass
class _Counts:
    """How often each (user, code) pair came, counted whenever PENDING keys have gathered."""

    keys: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # sorted, user * MOST_CODE + code
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    waiting: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, keys: NDArray[np.int64]) -> None:
        self.waiting.append(keys)
        if sum(map(len, self.waiting)) >= PENDING:
            self.settle()

    def settle(self) -> None:
        keys = np.concatenate([self.keys, *self.waiting])
        weights = np.concatenate([self.counts, np.ones(len(keys) - len(self.keys), np.int64)])
        self.waiting = []
        order = np.argsort(keys, kind="stable")
        self.keys, first, _ = runs(keys[order])
        self.counts = np.add.reduceat(weights[order], first) if len(first) else weights[:0]

    def most_frequent(self, users: int) -> pa.Array:
        """For each user the up to KEPT codes that came most, the lower code first where equal; null where none did."""
        self.settle()
        user, code = self.keys // MOST_CODE, self.keys % MOST_CODE
        order = np.lexsort((code, -self.counts, user))
        _, first, sizes = runs(user[order])
        place = np.arange(len(order)) - np.repeat(first, sizes)
        kept = order[place < KEPT]
        sizes = np.bincount(user[kept], minlength=users)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(code[kept]), mask=pa.array(sizes == 0))


def _interests(path: Path, users: pa.Array, before_s: int) -> dict[str, pa.Array]:
    """The categories and brands that each user met most often before a moment, of whatever kind the behaviour was."""
    counts = {"cate": _Counts(), "brand": _Counts()}
    for block in _early(path, before_s):
        row = match_ids(block, "user", users, PROFILES).astype(np.int64)
        for name, found in counts.items():
            code = block.column(name)
            fine = np.asarray(code.is_valid().to_numpy(zero_copy_only=False)) & (row >= 0)
            found.add(row[fine] * MOST_CODE + _codes(block, name)[fine])
    return {f"{name}s": found.most_frequent(len(users)) for name, found in counts.items()}


def _early(path: Path, before_s: int) -> Iterator[Source]:
    """Blocks of the behaviour log with the rows before a moment."""
    for block in stream_csv(path, BEHAVIOUR_TYPES, OF):
        yield Source(path, block.table.filter(pc.less(block.table["time_stamp"], before_s)))


def _codes(block: Source, name: str) -> NDArray[np.int64]:
    """(n,) codes, 0 where null."""
    codes = np.asarray(pc.fill_null(block.column(name), 0).to_numpy(zero_copy_only=False))
    wrong = np.flatnonzero((codes < 0) | (codes >= MOST_CODE))
    if len(wrong):
        raise block.wrong(name, int(wrong[0]), f"is {codes[wrong[0]]}: codes lie from 0 to {MOST_CODE - 1:,}")
    return codes
