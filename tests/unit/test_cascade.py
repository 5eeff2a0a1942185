from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets import DATASETS, cascade
from model.datasets.cascade import REACHED, REQUESTS, RUNGS, TABLE_ROWS, simulate
from model.datasets.log import CANDIDATE, IMPRESSION, RANDOM, TEST, Log, read_log
from model.datasets.world import Settings, World, open_world
from model.errors import DataError
from model.metrics import auc
from tests.leaks import assert_no_feature_differs

SETTINGS = Settings(users=300, items=3_000, requests=4_000, topics=12, position_bias=0.9)
RETRIEVED, PRE_RANKED, RANKED, SHOWN = range(len(REACHED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(SETTINGS, tmp_path_factory.mktemp("cascade") / "log")


@pytest.fixture(scope="module")
def events(folder: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / "events.parquet")
    return {name: np.asarray(table[name].to_numpy()) for name in table.column_names}


@pytest.fixture(scope="module")
def shown(events: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values[events["stage"] == IMPRESSION] for name, values in events.items()}


def test_the_stages_nest_in_every_request(events: dict[str, np.ndarray]) -> None:
    candidate = events["stage"] != RANDOM
    assert np.isnan(events["reached"][~candidate]).all()
    wanted = {PRE_RANKED: SETTINGS.pre_ranked, RANKED: SETTINGS.ranked, SHOWN: SETTINGS.shown}
    for stage, size in wanted.items():
        kept = np.bincount(events["request_id"][events["reached"] >= stage], minlength=SETTINGS.requests)
        assert (kept == size).all(), REACHED[stage]
    retrieved = np.bincount(events["request_id"][candidate], minlength=SETTINGS.requests)
    assert retrieved.max() <= SETTINGS.retrieved
    assert retrieved.min() > SETTINGS.pre_ranked
    np.testing.assert_array_equal(events["reached"] == SHOWN, events["stage"] == IMPRESSION)
    np.testing.assert_array_equal(np.isin(events["reached"], (0, 1, 2)), events["stage"] == CANDIDATE)
    pairs = events["request_id"][candidate] * SETTINGS.items + events["item_id"][candidate]
    assert len(np.unique(pairs)) == len(pairs)


def test_each_stage_keeps_better_items_than_the_one_before(events: dict[str, np.ndarray]) -> None:
    utility = [events["utility"][events["reached"] >= stage].mean() for stage in range(len(REACHED))]
    assert (np.diff([events["utility"][events["stage"] == RANDOM].mean(), *utility]) > 0.2).all()


def test_the_ranker_is_logged_where_it_was_asked_and_decides_the_places(events: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(~np.isnan(events["p_click"]), events["reached"] >= PRE_RANKED)
    value = np.stack([events[f"p_{rung}"] for rung in RUNGS], axis=1) @ np.array([1, 3, 10])
    rows = np.flatnonzero(events["stage"] == IMPRESSION)
    rows = rows[np.lexsort((events["place"][rows], events["request_id"][rows]))]
    assert events["place"][rows].reshape(-1, SETTINGS.shown).tolist() == [[*range(1, 11)]] * SETTINGS.requests
    assert (np.diff(value[rows].reshape(-1, SETTINGS.shown), axis=1) <= 1e-6).all()
    left = np.full(SETTINGS.requests, -np.inf)
    behind = events["reached"] == PRE_RANKED
    np.maximum.at(left, events["request_id"][behind], value[behind])
    least = value[rows].reshape(-1, SETTINGS.shown)[:, -1]
    assert (least >= left - 1e-6).all()


def test_only_impressions_have_feedback_and_each_rung_implies_those_below(events: dict[str, np.ndarray]) -> None:
    for rung in RUNGS:
        assert not events[rung][events["stage"] != IMPRESSION].any()
    assert (events["click"] >= events["cart"]).all()
    assert (events["cart"] >= events["buy"]).all()
    assert events["buy"].any()


def test_the_position_bias_is_as_configured(shown: dict[str, np.ndarray]) -> None:
    for place in range(1, SETTINGS.shown + 1):
        here = shown["place"] == place
        looked = place**-SETTINGS.position_bias
        expected = shown["true_click"][here].astype(np.float64) * looked
        deviation = np.sqrt((expected * (1 - expected)).sum())
        assert abs(shown["click"][here].sum() - expected.sum()) < 4 * deviation


def test_known_utilities_predict_clicks_carts_and_purchases(shown: dict[str, np.ndarray]) -> None:
    first = shown["place"] == 1
    chance, clicked = shown["true_click"][first], shown["click"][first]
    assert auc(chance, clicked) > 0.65
    for low, high in ((0, 0.3), (0.3, 0.6), (0.6, 1)):  # calibrated, in parts
        part = (chance >= low) & (chance < high)
        assert part.sum() > 50
        assert clicked[part].mean() == pytest.approx(chance[part].mean(), abs=4 * 0.5 / np.sqrt(part.sum()))
    for rung, below in (("cart", "click"), ("buy", "cart")):
        asked = shown[below] > 0
        chance = shown[f"true_{rung}"][asked] / shown[f"true_{below}"][asked]
        assert shown[rung][asked].mean() == pytest.approx(chance.mean(), abs=4 * 0.5 / np.sqrt(asked.sum()))


def test_the_world_beside_the_log_tells_the_utility_of_any_pair(folder: Path, shown: dict[str, np.ndarray]) -> None:
    world = open_world(folder)
    users, items = shown["user_id"][:500], shown["item_id"][:500]
    np.testing.assert_allclose(world.utility(users, items), shown["utility"][:500], rtol=1e-5, atol=1e-5)
    truth = np.stack([shown[f"true_{rung}"][:500] for rung in RUNGS], axis=1)
    np.testing.assert_allclose(world.chances(users, items), truth, rtol=1e-4)


def test_the_log_reads_like_every_other(folder: Path) -> None:
    log = read_log(folder)
    assert log.has_stages
    assert log.teacher is not None
    assert (len(log.users), len(log.items)) == (SETTINGS.users, SETTINGS.items)
    assert log.report["unknown_user"] == log.report["unknown_item"] == 0
    known = {field.name for field in log.schema.fields}
    assert not known & {"place", "reached", "utility", *(f"true_{rung}" for rung in RUNGS)}


def test_features_tell_something_and_not_everything(folder: Path) -> None:
    world, log = open_world(folder), read_log(folder)
    topic = world.items(world.item_rows(log.items.ids)).topic
    assert 0.85 < (log.items.columns["category"] == topic).mean() < 0.95
    segment = world.users(world.user_rows(log.users.ids)).topics[:, 0]
    assert 0.8 < (log.users.columns["segment"] == segment).mean() < 0.97


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(folder: Path, tmp_path: Path) -> None:
    again = simulate(SETTINGS, tmp_path / "again")
    for name in ("users.parquet", "items.parquet", "events.parquet"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    small: dict[str, Any] = {"users": 20, "items": 200, "requests": 500}
    logs = [read_log(simulate(Settings(**small, seed=seed), tmp_path / f"seed-{seed}")) for seed in (0, 1)]
    assert not np.array_equal(logs[0].item[:500], logs[1].item[:500])


def test_more_requests_prolong_a_log_and_leave_what_was(tmp_path: Path) -> None:
    tables = []
    for requests in (REQUESTS, 2 * REQUESTS):
        world = World(Settings(users=50, items=300, requests=requests))
        tables.append(next(cascade._events(world)).drop_columns(["time_ms", "hour"]))
    assert tables[0].equals(tables[1])


def test_blocks_are_small_however_many_items_there_are() -> None:
    """What is held at a time depends on the requests of a block alone, so that ten million items fit as well."""
    sizes = []
    for items in (1_000, 10_000_000):
        world = World(Settings(users=1_000_000, items=items, requests=3 * REQUESTS))
        assert len(next(cascade._items(world))) == min(items, TABLE_ROWS)
        block = next(cascade._events(world))
        sizes.append(len(block))
        assert block["item_id"].to_numpy().max() > 0.99 * items - 10
    assert max(sizes) <= REQUESTS * (SETTINGS.retrieved + SETTINGS.random)


@pytest.mark.parametrize(
    "given",
    [
        {"items": 1, "retrieved": 1, "pre_ranked": 1, "ranked": 1, "shown": 1, "topics": 1},
        {"items": 5, "retrieved": 5, "pre_ranked": 5, "ranked": 5, "shown": 5, "topics": 5},
        {"random": 0, "dim": 1, "interests": 1, "popularity": 0, "position_bias": 0},
    ],
)
def test_the_smallest_worlds_work(tmp_path: Path, given: dict[str, Any]) -> None:
    folder = simulate(Settings(**{"users": 3, "items": 150, "requests": 30} | given), tmp_path / "log")
    events = pq.read_table(folder / "events.parquet")
    pairs = {
        (r, i)
        for r, i, s in zip(*(events[n].to_pylist() for n in ("request_id", "item_id", "stage")), strict=True)
        if s != RANDOM
    }
    stage = np.asarray(events["stage"])
    assert len(pairs) == (stage != RANDOM).sum()
    assert (stage == IMPRESSION).any()


def test_shuffled_test_labels_change_no_feature(folder: Path, tmp_path: Path) -> None:
    log = read_log(folder)
    other = tmp_path / "shuffled"
    shutil.copytree(folder, other)
    events = pq.read_table(other / "events.parquet")
    late = (events["time_ms"].to_numpy() >= log.time[log.split == TEST].min()) & (
        events["stage"].to_numpy() == IMPRESSION
    )
    order = np.arange(len(events))
    order[late] = np.random.default_rng(0).permutation(np.flatnonzero(late))
    for rung in RUNGS:
        place = events.column_names.index(rung)
        events = events.set_column(place, rung, events[rung].take(pa.array(order)))
    pq.write_table(events, other / "events.parquet")
    shuffled: Log = read_log(other)
    assert_no_feature_differs(log, shuffled)


def test_a_simulation_is_done_once_and_other_settings_do_it_again(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("users = 9\nitems = 150\nrequests = 40\n")
    out = DATASETS["cascade"](tmp_path / "small.toml", tmp_path / "log")
    written = (out / "events.parquet").stat().st_mtime_ns
    DATASETS["cascade"](tmp_path / "small.toml", tmp_path / "log")
    assert (out / "events.parquet").stat().st_mtime_ns == written
    (tmp_path / "small.toml").write_text("users = 10\nitems = 150\nrequests = 40\n")
    DATASETS["cascade"](tmp_path / "small.toml", tmp_path / "log")
    assert len(pq.read_table(out / "users.parquet")) == 10


def test_a_folder_in_place_of_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder: give the TOML file with the settings of cascade"):
        DATASETS["cascade"](tmp_path, tmp_path / "log")
