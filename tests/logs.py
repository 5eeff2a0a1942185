"""Write a small synthetic log in the documented form, with structure that a ranker can learn.

Users and items belong to latent groups that their features show through noise, items have a quality, a user who just
took something of a series wants more of it, and the device shifts everything: features, popularity, history and context
all help.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUPS = 4
SERIES = 8
DAY_MS = 86_400_000
START_MS = 1_704_067_200_000  # 2024-01-01 00:00 UTC
RUNGS = ("click", "cart", "buy")
DEVICES = ("phone", "tablet", "desktop")
IMPRESSION, CANDIDATE, RANDOM = "impression", "candidate", "random"


@dataclass(frozen=True)
class World:
    """The hidden truth of a tiny log: who belongs where, and how good each item is."""

    user_group: np.ndarray  # (users,) int
    item_group: np.ndarray  # (items,) int
    series: np.ndarray  # (items,) int, finer than the group
    quality: np.ndarray  # (items,) float
    user_ids: list[int] | list[str]
    item_ids: list[int] | list[str]


def write_tiny_log(
    folder: Path,
    *,
    users: int = 60,
    items: int = 80,
    days: int = 8,
    shown: int = 8,
    string_ids: bool = False,
    stages: bool = False,
    teacher: bool = False,
    requests: bool = False,
    history: int = 8,
    seed: int = 0,
) -> Path:
    """Write users, items, events (users x days x 0.7 lists of `shown` impressions) and log.toml; return the folder.

    `stages` adds rows of unshown candidates and of random items to each list; `teacher` adds the true probabilities as
    logged ranker scores; `requests` adds a request id; `history` is the length of the history field, 0 for none.
    """
    rng = np.random.default_rng(seed)
    world = _world(rng, users, items, string_ids)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(_users(rng, world), folder / "users.parquet")
    pq.write_table(_items(rng, world), folder / "items.parquet")
    events = _events(rng, world, days, shown, stages)
    for name, wanted in (("stage", stages), ("request_id", requests), *((f"p_{rung}", teacher) for rung in RUNGS)):
        if not wanted:
            del events[name]
    pq.write_table(pa.table(events), folder / "events.parquet")
    (folder / "log.toml").write_text(_document(stages, teacher, requests, history, string_ids), encoding="utf-8")
    return folder


def _world(rng: np.random.Generator, users: int, items: int, string_ids: bool) -> World:
    series = rng.integers(0, SERIES, items)
    numbers = {"u": 1000 + rng.permutation(users), "i": 5000 + rng.permutation(items)}
    ids = {k: [f"{k}{n}" for n in v.tolist()] if string_ids else v.tolist() for k, v in numbers.items()}
    return World(
        user_group=rng.integers(0, GROUPS, users),
        item_group=series % GROUPS,
        series=series,
        quality=rng.normal(0.0, 0.8, items),
        user_ids=ids["u"],
        item_ids=ids["i"],
    )


def _users(rng: np.random.Generator, world: World) -> pa.Table:
    count = len(world.user_group)
    segment = _noisy(rng, world.user_group, GROUPS)
    age = (20.0 + 10.0 * world.user_group + rng.normal(0, 4, count)).round(1).tolist()
    age[0] = None  # a missing value in each numeric and categorical column
    names = [f"seg{k}" for k in segment]
    return pa.table(
        {"user_id": world.user_ids, "segment": pa.array([None, *names[1:]]), "age": pa.array(age, pa.float64())}
    )


def _items(rng: np.random.Generator, world: World) -> pa.Table:
    count = len(world.series)
    tags = [
        [f"tag{s}", *([f"tag{int(extra)}"] if extra != s and extra < SERIES else [])]
        for s, extra in zip(world.series.tolist(), rng.integers(0, 2 * SERIES, count), strict=True)
    ]
    tags[0] = None  # type: ignore[call-overload]
    price = np.exp(rng.normal(3, 1, count) - 0.3 * world.quality).round(2)
    return pa.table(
        {
            "item_id": world.item_ids,
            "category": pa.array(_noisy(rng, world.item_group, GROUPS).astype(np.int64)),
            "tags": pa.array(tags, pa.list_(pa.string())),
            "price": price,
            "title": [f"Item {k} of series {s}" for k, s in zip(world.item_ids, world.series.tolist(), strict=True)],
        }
    )


def _noisy(rng: np.random.Generator, truth: np.ndarray, values: int) -> np.ndarray:
    """The truth, replaced by a random value one time in ten."""
    return np.where(rng.random(len(truth)) < 0.1, rng.integers(0, values, len(truth)), truth)


def _events(rng: np.random.Generator, world: World, days: int, shown: int, stages: bool) -> dict[str, pa.Array]:
    columns: dict[str, list[object]] = {
        name: [] for name in ("user_id", "item_id", "time", "request_id", "stage", "device", "hour", *RUNGS)
    }
    columns |= {f"p_{rung}": [] for rung in RUNGS}
    last_series = np.full(len(world.user_ids), -1)
    request = 0
    for day in range(days):
        for user in np.flatnonzero(rng.random(len(world.user_ids)) < 0.7).tolist():
            request += 1
            _append_list(rng, world, columns, last_series, (user, day, request), shown, stages)
    device = pa.array(columns.pop("device"), pa.string())
    return {name: pa.array(values) for name, values in columns.items()} | {"device": device}


def _append_list(
    rng: np.random.Generator,
    world: World,
    columns: dict[str, list[object]],
    last_series: np.ndarray,
    at: tuple[int, int, int],
    shown: int,
    stages: bool,
) -> None:
    """One request: `shown` impressions, popular items more; with stages, half as many candidates and random items."""
    user, day, request = at
    extra = shown // 2 if stages else 0
    weight = np.exp(0.7 * world.quality)
    rows = rng.choice(len(world.series), shown + 2 * extra, replace=False, p=weight / weight.sum())
    device = int(rng.integers(0, len(DEVICES)))
    start_ms = START_MS + day * DAY_MS + int(rng.integers(0, DAY_MS - 3_600_000))
    chance = _probabilities(world, rows, user, device, int(last_series[user]))  # (n, 3)
    given = rng.random(len(rows)) < chance[:, 0]
    deeper = np.cumprod(np.column_stack([given, rng.random((len(rows), 2)) < [0.4, 0.4]]), axis=1)
    for k, row in enumerate(rows.tolist()):
        stage = (IMPRESSION, CANDIDATE, RANDOM)[0 if k < shown else 1 + (k - shown) // max(extra, 1)]
        columns["user_id"].append(world.user_ids[user])
        columns["item_id"].append(world.item_ids[row])
        columns["time"].append(start_ms + 5_000 * min(k, shown))
        columns["request_id"].append(request)
        columns["stage"].append(stage)
        columns["device"].append(DEVICES[device] if request % 50 else None)
        columns["hour"].append(start_ms // 3_600_000 % 24)
        for r, rung in enumerate(RUNGS):
            columns[rung].append(int(deeper[k, r]) if stage == IMPRESSION else 0)
            columns[f"p_{rung}"].append(float(chance[k, r]))
    taken = rows[:shown][deeper[:shown, 0] > 0]
    if len(taken):
        last_series[user] = world.series[taken[-1]]


def _probabilities(world: World, rows: np.ndarray, user: int, device: int, last_series: int) -> np.ndarray:
    """(n, 3) true probabilities of click, cart and buy."""
    match = world.item_group[rows] == world.user_group[user]
    wanted = world.series[rows] == last_series
    logit = -2.2 + 2.4 * match + 1.2 * wanted + 0.8 * world.quality[rows] + 0.3 * (device - 1)
    click = 1 / (1 + np.exp(-logit))
    return np.column_stack([click, 0.4 * click, 0.16 * click])


def _document(stages: bool, teacher: bool, requests: bool, history: int, string_ids: bool) -> str:
    optional = ('request = "request_id"\n' if requests else "") + ('stage = "stage"\n' if stages else "")
    scores = "\n[columns.teacher]\n" + "".join(f'{rung} = "p_{rung}"\n' for rung in RUNGS) if teacher else ""
    fields = [*FIELDS, *([HISTORY % history] if history else [])]
    return HEAD % ("tiny-strings" if string_ids else "tiny", optional, scores) + "".join(
        "\n[[fields]]\n" + field.replace(", ", "\n") + "\n" for field in fields
    )


HEAD = """name = "%s"

[columns]
user = "user_id"
item = "item_id"
time = "time"
title = "title"
%s%s
[feedback]
ladder = ["click", "cart", "buy"]
soft_label = "click + 3*cart + 10*buy"

[split]
by = "time"
valid = 0.15
test = 0.15

[lists]
gap_s = 1800
max_impressions = 50
"""
FIELDS = (
    'name = "user_id", side = "user", kind = "categorical", dim = 8',
    'name = "segment", side = "user", kind = "categorical", dim = 4',
    'name = "age", side = "user", kind = "numeric", dim = 4',
    'name = "device", side = "context", kind = "categorical", dim = 4',
    'name = "hour", side = "context", kind = "numeric", dim = 4',
    'name = "item_id", side = "item", kind = "categorical", dim = 8',
    'name = "category", side = "item", kind = "categorical", dim = 4',
    'name = "tags", side = "item", kind = "multi", dim = 4, length = 3',
    'name = "price", side = "item", kind = "numeric", dim = 4',
)
HISTORY = 'name = "history", side = "user", kind = "sequence", dim = 8, length = %d, shares = "item_id"'
