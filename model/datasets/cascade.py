"""Simulate a recommender cascade in a known world, every stage logged: retrieval, pre-ranking, ranking, impressions.

A request's candidates come from the user's topics (7 in 10), from what is popular (2 in 10) and from anywhere. The
pre-ranker keeps those of the highest click logit, which it knows with an error; the ranker, with a smaller one, those
of the highest expected value. The first of them are shown in its order, looked at with a chance that falls with the
place, and clicked, carted and bought by the true chances of model/datasets/world.py. Requests are simulated in blocks,
each from a random state of its own, so that memory does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.datasets import world as worlds
from model.datasets.events import CANDIDATE, IMPRESSION, RANDOM
from model.datasets.form import Form, fields_as_toml, write_form
from model.datasets.world import Floats, Rows, Settings, World, chances, read_settings, share
from model.errors import DataError
from model.features import Field

ADAPTER = "cascade 1"  # the number rises when the simulation changes
REQUESTS, TABLE_ROWS = 1024, 65_536  # simulated or written at a time; the log depends on the first
REACHED = ("retrieved", "pre_ranked", "ranked", "shown")  # the last stage that an item came to
START_MS, DAY_MS, HOUR_MS = 1_704_067_200_000, 86_400_000, 3_600_000  # 2024-01-01 00:00 UTC
FROM_TOPICS, FROM_POPULAR = 0.7, 0.2
RUNGS = ("click", "cart", "buy")
VALUE = np.array([1, 3, 10], np.float32)  # of a click, a cart and a purchase: the soft label

HEAD = """\
name = "cascade"

[columns]
user = "user_id"
item = "item_id"
time = "time_ms"
time_unit = "ms"
request = "request_id"
stage = "stage"

[columns.teacher]               # what the ranker believed
click = "p_click"
cart = "p_cart"
buy = "p_buy"

[feedback]
ladder = ["click", "cart", "buy"]
soft_label = "click + 3*cart + 10*buy"

[split]
by = "time"
valid = 0.1
test = 0.1
"""
FIELDS = (
    Field(name="user_id", side="user", kind="categorical", dim=16),
    Field(name="segment", side="user", kind="categorical", dim=8),
    Field(name="income", side="user", kind="numeric", dim=8),
    Field(name="history", side="user", kind="sequence", dim=32, length=30, shares="item_id"),
    Field(name="hour", side="context", kind="categorical", dim=4),
    Field(name="item_id", side="item", kind="categorical", dim=32),
    Field(name="category", side="item", kind="categorical", dim=16),
    Field(name="tags", side="item", kind="multi", dim=8, length=2),
    Field(name="price", side="item", kind="numeric", dim=8),
    Field(name="rating", side="item", kind="numeric", dim=8),
)


def convert(source: Path | None, out: Path) -> Path:
    """Simulate a log into `out`. `source` is a TOML file of settings, by default none: see docs/data.md."""
    if source is None:
        return simulate(Settings(), out)
    if source.is_dir():
        raise DataError(f"{source} is a folder: give the TOML file with the settings of cascade")
    return simulate(read_settings(source), out)


def simulate(settings: Settings, out: Path) -> Path:
    """Write the log that follows from the settings into `out`, and beside it truth.toml, which tells its world."""
    world = World(settings)

    def build() -> Form:
        return Form(
            users=_users(world),
            items=_items(world),
            events=_events(world),
            document=HEAD + fields_as_toml(FIELDS),
            beside={worlds.FILE: settings.to_toml()},
        )

    return write_form(out, adapter=f"{ADAPTER}, settings {settings.id},", sources=[], build=build)


# --- users and items as a log shows them -----------------------------------------------------------------------------


def _users(world: World) -> Iterator[pa.Table]:
    """The segment is the first of a user's topics, the income the budget; both through noise."""
    for ids in _spans(world.settings.users):
        rows = world.user_rows(ids)
        users, noise = world.users(rows), world.noise(worlds.SHOWN_USER, rows, 4)
        segment = _blurred(users.topics[:, 0], noise[:, 0], noise[:, 1], world.settings.topics)
        income = 30_000 * np.exp(0.3 * users.budget + 0.1 * noise[:, 2])
        unknown = share(noise[:, 3]) < 0.05
        yield pa.table({"user_id": ids, "segment": segment, "income": pa.array(income.round(), mask=unknown)})


def _items(world: World) -> Iterator[pa.Table]:
    """The category is the topic, tags are the two directions in which an item leaves it most, the rating is the
    quality; the first and the last through noise."""
    for ids in _spans(world.settings.items):
        rows = world.item_rows(ids)
        items, noise = world.items(rows), world.noise(worlds.SHOWN_ITEM, rows, 4)
        rating = np.clip(3 + items.quality / 2 + 0.3 * noise[:, 2], 1, 5)
        unknown = share(noise[:, 3]) < 0.05
        tags = np.argsort(-items.noise, axis=1, kind="stable")[:, :2]
        yield pa.table(
            {
                "item_id": ids,
                "category": _blurred(items.topic, noise[:, 0], noise[:, 1], world.settings.topics),
                "tags": pa.FixedSizeListArray.from_arrays(pa.array(tags.ravel()), tags.shape[1]),
                "price": (20 * np.exp(0.8 * items.price)).round(2),
                "rating": pa.array(rating.round(1), mask=unknown),
            }
        )


def _spans(count: int) -> Iterator[Rows]:
    for start in range(0, count, TABLE_ROWS):
        yield np.arange(start, min(start + TABLE_ROWS, count))


def _blurred(truth: Rows, whether: Floats, which: Floats, values: int) -> Rows:
    """The truth, replaced by another value one time in ten."""
    other = np.minimum((share(which) * values).astype(np.int64), values - 1)
    return np.where(share(whether) < 0.1, other, truth)


# --- requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the cascade made of each candidate of a block of requests."""

    reached: NDArray[np.int8]  # (b, retrieved) place in REACHED, -1 for one that stands there already
    place: NDArray[np.int16]  # (b, retrieved) of an impression, from 1; 0 elsewhere
    believed: Floats  # (b, retrieved, 3) the ranker's chances, NaN where it was not asked
    given: NDArray[np.bool_]  # (b, retrieved, 3) click, cart, buy


def _events(world: World) -> Iterator[pa.Table]:
    settings = world.settings
    for block, first in enumerate(range(0, settings.requests, REQUESTS)):
        rng = np.random.default_rng((settings.seed, block))
        request = np.arange(first, min(first + REQUESTS, settings.requests))
        yield _simulated(world, rng, request)


def _simulated(world: World, rng: np.random.Generator, request: Rows) -> pa.Table:
    """A block of requests: their candidates, then their random items."""
    settings = world.settings
    user = _skewed(rng, np.full(len(request), settings.users), settings.popularity)
    users = world.users(user)
    ids = np.sort(world.item_ids(_retrieved(rng, settings, users.topics)), axis=1)
    logits = world.judge(users, world.items(world.item_rows(ids)))
    outcome = _run(rng, settings, ids, logits)
    extra = rng.integers(0, settings.items, (len(request), settings.random))
    extra_logits = world.judge(users, world.items(world.item_rows(extra)))
    kept, drawn = outcome.reached >= 0, np.ones(extra.shape, np.bool_)
    span_ms = settings.days * DAY_MS
    time_ms = START_MS + (request * span_ms + rng.integers(0, span_ms, len(request))) // settings.requests
    return pa.concat_tables(
        [
            _table(world, (request, user, time_ms), ids, logits, outcome, kept),
            _table(world, (request, user, time_ms), extra, extra_logits, None, drawn),
        ]
    )


def _retrieved(rng: np.random.Generator, settings: Settings, topics: Rows) -> Rows:
    """(b, retrieved) rows of items for users of the given topics (b, interests), with repeats."""
    count = len(topics)
    mine, popular = (round(settings.retrieved * part) for part in (FROM_TOPICS, FROM_POPULAR))
    interest = rng.integers(0, topics.shape[1], (count, mine))
    topic = np.concatenate(
        [np.take_along_axis(topics, interest, axis=1), rng.integers(0, settings.topics, (count, popular))], axis=1
    )
    places = (settings.items - topic - 1) // settings.topics + 1  # items of the topic
    skew = np.repeat([settings.popularity, (1 + settings.popularity) / 2], [mine, popular])
    known = _skewed(rng, places, skew) * settings.topics + topic
    anywhere = rng.integers(0, settings.items, (count, settings.retrieved - mine - popular))
    return np.concatenate([known, anywhere], axis=1)


def _skewed(rng: np.random.Generator, count: Rows, skew: float | NDArray[np.float64]) -> Rows:
    """Numbers from 0 to below `count`, the chance of k about (k + 1)^-skew."""
    return np.minimum((count * rng.random(count.shape) ** (1 / (1 - skew))).astype(np.int64), count - 1)


def _run(rng: np.random.Generator, settings: Settings, ids: Rows, logits: Floats) -> Outcome:
    """Pre-rank, rank and show candidates (b, retrieved), sorted by id; logits (b, retrieved, 3)."""
    fresh = np.ones(ids.shape, np.bool_)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    seen = logits[..., 0] + settings.pre_rank_noise * rng.standard_normal(ids.shape, np.float32)
    cut = len(ids[0]) - settings.pre_ranked
    passed = np.argpartition(np.where(fresh, seen, -np.inf), cut - 1 if cut else 0, axis=1)[:, cut:]
    known = np.take_along_axis(logits, passed[..., None], axis=1)
    believed = chances(known + settings.rank_noise * rng.standard_normal(known.shape, np.float32))
    value = np.where(np.take_along_axis(fresh, passed, axis=1), believed @ VALUE, -np.inf)
    order = np.argsort(-value, axis=1)[:, : settings.ranked]
    ranked = np.take_along_axis(passed, order, axis=1)
    shown = ranked[:, : settings.shown]
    reached = np.zeros(ids.shape, np.int8)
    for stage, places in enumerate((passed, ranked, shown), start=1):
        np.put_along_axis(reached, places, np.int8(stage), axis=1)
    place = np.zeros(ids.shape, np.int16)
    np.put_along_axis(place, shown, np.arange(1, settings.shown + 1, dtype=np.int16)[None], axis=1)
    told = np.full(logits.shape, np.nan, np.float32)
    np.put_along_axis(told, passed[..., None], believed, axis=1)
    given = np.zeros(logits.shape, np.bool_)
    reaction = _reactions(rng, settings, np.take_along_axis(logits, shown[..., None], axis=1))
    np.put_along_axis(given, shown[..., None], reaction, axis=1)
    return Outcome(np.where(fresh, reached, np.int8(-1)), place, told, given)


def _reactions(rng: np.random.Generator, settings: Settings, logits: Floats) -> NDArray[np.bool_]:
    """(b, shown, 3) click, cart and buy of impressions in their order."""
    looked = rng.random(logits.shape[:2]) < np.arange(1, settings.shown + 1) ** -float(settings.position_bias)
    taken = rng.random(logits.shape, np.float32) < 1 / (1 + np.exp(-logits))
    return np.logical_and.accumulate(taken & looked[..., None], axis=2)


def _table(
    world: World,
    about: tuple[Rows, Rows, Rows],
    ids: Rows,
    logits: Floats,
    outcome: Outcome | None,
    kept: NDArray[np.bool_],
) -> pa.Table:
    """Rows of events for the kept places of (b, n); without an outcome they are random items.

    about: request, row of the user and time, (b,) each. Columns that log.toml does not name tell the stage reached, the
    place, and the truth.
    """
    request, user, time_ms = (np.repeat(values, kept.sum(axis=1)) for values in about)
    count, truth = len(request), chances(logits[kept])
    if outcome is None:
        stage, given = np.full(count, RANDOM, np.int8), np.zeros((count, 3), np.bool_)
        reached = place = believed = None
    else:
        reached, place, given = outcome.reached[kept], outcome.place[kept], outcome.given[kept]
        believed = outcome.believed[kept]
        stage = np.where(place > 0, np.int8(IMPRESSION), np.int8(CANDIDATE))
    return pa.table(
        {
            "request_id": request,
            "user_id": world.user_ids(user),
            "item_id": ids[kept],
            "time_ms": time_ms,
            "hour": pa.array(time_ms % DAY_MS // HOUR_MS, pa.int8()),
            "stage": stage,
            **{rung: given[:, k] for k, rung in enumerate(RUNGS)},
            **{f"p_{rung}": _floats(believed, k, count) for k, rung in enumerate(RUNGS)},
            "reached": pa.nulls(count, pa.int8()) if reached is None else pa.array(reached),
            "place": pa.nulls(count, pa.int16()) if place is None else pa.array(place, mask=place == 0),
            "utility": logits[kept][:, 0],
            **{f"true_{rung}": truth[:, k] for k, rung in enumerate(RUNGS)},
        }
    )


def _floats(values: Floats | None, column: int, count: int) -> pa.Array:
    if values is None:
        return pa.nulls(count, pa.float32())
    return pa.array(values[:, column], mask=np.isnan(values[:, column]))
