"""Networks against a known truth: in a simulated world they find the order of items that its users have in mind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from model.checkpoint import load_checkpoint
from model.datasets.cascade import simulate
from model.datasets.log import TEST, Log, read_log
from model.datasets.world import Settings, World
from model.evaluate import HeldOut, held_out
from model.requests import encode_items, encode_users
from model.sampling import Lists, popularity
from model.scoring import score_network
from model.train import Recipe, train

SETTINGS = Settings(users=30, items=200, requests=6_000, topics=8, retrieved=60, position_bias=0.0)
RECIPE = Recipe(batch=64, steps=80, epochs=6, patience=6, embedding_lr=0.01, valid_lists=200)  # short, so steep


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    out = tmp_path_factory.mktemp("world") / "log"
    simulate(SETTINGS, out)
    return read_log(out)


@pytest.fixture(scope="module")
def test(log: Log) -> HeldOut:
    return held_out(log, TEST).take(np.arange(200))


def whole_catalogue(held: HeldOut, items: int) -> Lists:
    """Every item in the list of every request."""
    shape = (len(held.lists), items)
    zeros = np.zeros(shape, np.int8)
    item = np.broadcast_to(np.arange(items, dtype=np.int32), shape)
    return Lists(item=item, grade=zeros, stage=zeros, soft=np.zeros(shape, np.float32))


def agreement(log: Log, test: HeldOut, scores: np.ndarray) -> float:
    """Spearman's correlation of scores (L, items) with the true utilities of a list's user, the mean over lists."""
    users = log.users.ids[test.requests.user]
    items = np.broadcast_to(log.items.ids, scores.shape)
    ranks = [rankdata(values, axis=1) for values in (scores, World(SETTINGS).utility(users, items))]
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(*ranks, strict=True)]))


@pytest.mark.parametrize("network", ["ranktower", "two_tower"])
def test_a_network_recovers_the_order_of_utilities(log: Log, test: HeldOut, tmp_path: Path, network: str) -> None:
    """Measured: both about .74, popularity .61, random 0. Clicks are chances, and what a user wants is never seen."""
    train(log, tmp_path / "run", replace(RECIPE, network=network), test=False)
    trained, spec, _ = load_checkpoint(tmp_path / "run")
    lists = whole_catalogue(test, len(log.items))
    scores = score_network(trained, encode_users(spec, log, test.requests), encode_items(spec, log), lists)
    popular = agreement(log, test, np.broadcast_to(popularity(log), scores.shape))
    assert agreement(log, test, scores) > max(0.7, popular + 0.08)
