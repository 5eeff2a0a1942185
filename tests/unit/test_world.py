from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.datasets.world import Settings, World, open_world, read_settings
from model.errors import DataError

SMALL = Settings(users=50, items=400, topics=8)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SMALL)


@given(st.integers(1, 10_000_000))
def test_ids_are_the_rows_in_another_order(count: int) -> None:
    large = World(Settings(users=count, items=max(count, 100)))
    rows = np.unique(np.linspace(0, count - 1, 100).astype(np.int64))
    ids = large.user_ids(rows)
    assert ((ids >= 0) & (ids < count)).all()
    assert len(np.unique(ids)) == len(rows)
    np.testing.assert_array_equal(large.user_rows(ids), rows)
    np.testing.assert_array_equal(large.item_rows(large.item_ids(rows)), rows)


def test_noise_has_mean_0_and_deviation_1_and_no_two_lanes_or_purposes_are_alike(world: World) -> None:
    first, second = (world.noise(what, np.arange(20_000), 7).astype(np.float64) for what in (1, 2))
    np.testing.assert_allclose(first.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(first.std(axis=0), 1, atol=0.02)
    together = np.corrcoef(np.concatenate([first, second], axis=1).T)
    np.testing.assert_allclose(together, np.eye(14), atol=0.035)


def test_a_row_is_the_same_alone_and_among_others(world: World) -> None:
    many, one = world.items(np.arange(100)), world.items(np.array([42]))
    for name in ("topic", "vector", "quality", "price"):
        np.testing.assert_array_equal(getattr(many, name)[42], getattr(one, name)[0])


def test_utility_is_what_the_page_says(world: World) -> None:
    """The formulas of the file, one pair at a time."""
    users, items = world.users(world.user_rows(np.array([3]))), world.items(world.item_rows(np.array([17])))
    affinity = 2.0 * max(float(vector @ items.vector[0]) for vector in users.vectors[0])
    misfit = abs(float(items.price[0] - users.budget[0]))
    logits = np.array([-6.0 + affinity + items.quality[0], -1.5 + affinity / 2 - misfit, 0.5 - 2 * misfit])
    utility = world.utility(np.array([3]), np.array([17]))
    np.testing.assert_allclose(utility, logits[:1], rtol=1e-5)
    np.testing.assert_allclose(
        world.chances(np.array([3]), np.array([17]))[0], np.cumprod(1 / (1 + np.exp(-logits))), rtol=1e-5
    )


def test_users_may_be_asked_about_one_item_or_a_list_each(world: World) -> None:
    users, lists = np.arange(5), np.arange(15).reshape(5, 3)
    table = world.utility(users, lists)
    assert table.shape == (5, 3)
    assert world.chances(users, lists).shape == (5, 3, 3)
    np.testing.assert_allclose(world.utility(users, lists[:, 1]), table[:, 1], rtol=1e-6)


def test_a_user_likes_the_own_topics_best(world: World) -> None:
    rows = np.arange(SMALL.users)
    topics = world.users(rows).topics
    items = np.broadcast_to(np.arange(SMALL.items), (len(rows), SMALL.items))
    click = world.judge(world.users(rows), world.items(items))[..., 0]
    mine = (world.items(items).topic[..., None] == topics[:, None]).any(axis=2)
    assert click[mine].mean() > click[~mine].mean() + 1


def test_the_first_of_a_topic_are_the_best_on_average() -> None:
    items = World(Settings(items=20_000)).items(np.arange(20_000))
    assert items.quality[:1000].mean() > items.quality[-1000:].mean() + 0.5


def test_settings_are_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "truth.toml").write_text(SMALL.to_toml())
    assert read_settings(tmp_path / "truth.toml") == SMALL
    assert open_world(tmp_path).settings == SMALL
    assert SMALL.id != Settings().id


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"items": 10_000_001}, r"items is 10,000,001: write a number from 1 to 10,000,000"),
        ({"items": 0}, r"items is 0: write a number from 1 to"),
        ({"users": 2.5}, r"users is 2.5: write a whole number"),
        ({"users": True}, r"users is True: write a whole number"),
        ({"rank_noise": float("nan")}, r"rank_noise is nan: write a number"),
        ({"rank_noise": "much"}, r"rank_noise is 'much': write a number"),
        ({"position_bias": -0.1}, r"position_bias is -0.1: write a number from 0 to 100"),
        ({"popularity": 1.0}, r"popularity is 1.0: write a number from 0 to 0.99"),
        ({"shown": 30}, r"shown is 30, above ranked \(20\): lower it, or raise ranked"),
        ({"items": 99}, r"retrieved is 100, above items \(99\): lower it, or raise items"),
    ],
)
def test_impossible_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Settings(**given)


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "world.toml"
    with pytest.raises(DataError, match=r"world.toml does not exist: give the file"):
        read_settings(path)
    path.write_text("users 3")
    with pytest.raises(DataError, match=r"world.toml cannot be read as TOML"):
        read_settings(path)
    path.write_text("shown = 0")
    with pytest.raises(DataError, match=r"world.toml: cascade: shown is 0: write a number from 1 to 10,000"):
        read_settings(path)
