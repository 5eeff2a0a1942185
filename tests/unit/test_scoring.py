"""Scores of whole lists by torch: those of the serving reference, however the work is cut into chunks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import model.scoring
from kernel.reference import score
from model.checkpoint import build_network
from model.datasets.log import TEST, Log, read_log
from model.networks import NETWORKS, Network
from model.requests import encode_items, encode_users, fit_log_spec
from model.sampling import Lists, evaluation_lists
from model.scoring import score_network
from tests.logs import write_tiny_log

Inputs = tuple[np.ndarray, np.ndarray, Lists]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("log"), users=20, items=60))


@pytest.fixture(scope="module")
def inputs(log: Log) -> Inputs:
    """Users (L, Wu), items (I, Wi) and their lists (L, 30)."""
    spec = fit_log_spec(log)
    requests, lists = evaluation_lists(log, TEST, size=30)
    return encode_users(spec, log, requests), encode_items(spec, log), lists


def network(log: Log, name: str = "ranktower") -> Network:
    torch.manual_seed(0)
    small = {"user_heads": 2, "item_heads": 3, "dim": 8, "hidden": 16}
    return build_network(name, fit_log_spec(log), small if name == "ranktower" else {})


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_those_of_the_serving_reference(log: Log, inputs: Inputs, name: str) -> None:
    users, items, lists = inputs
    net = network(log, name).eval()
    found = score_network(net, users, items, lists)
    assert found.shape == lists.item.shape
    assert found.dtype == np.float32
    with torch.no_grad():
        user, item = net.user(torch.from_numpy(users)).numpy(), net.item(torch.from_numpy(items)).numpy()
        scorer = partial(score, net.head()) if net.kind != "onnx" else partial(one_list, net)
        for row, chosen in enumerate(lists.item):
            np.testing.assert_allclose(found[row], scorer(user[row], item[chosen]), rtol=1e-4, atol=1e-4)


def one_list(net: Network, user: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Scores (n,) of a network that no kernel serves."""
    return net.score(torch.from_numpy(user)[None], torch.from_numpy(items)[None])[0].numpy()


@pytest.mark.parametrize(("rows", "pairs"), [(1, 1), (7, 70), (64, 31)])
def test_chunks_change_no_score(
    log: Log, inputs: Inputs, rows: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(log)
    whole = score_network(net, *inputs)
    monkeypatch.setattr(model.scoring, "ROWS", rows)
    monkeypatch.setattr(model.scoring, "PAIRS", pairs)
    np.testing.assert_allclose(score_network(net, *inputs), whole, rtol=1e-5, atol=1e-5)


def test_a_score_does_not_depend_on_the_rest_of_its_list(log: Log, inputs: Inputs) -> None:
    users, items, lists = inputs
    net = network(log)
    turned = Lists(item=lists.item[:, ::-1], grade=lists.grade, stage=lists.stage, soft=lists.soft)
    found = score_network(net, users, items, turned)[:, ::-1]
    np.testing.assert_allclose(found, score_network(net, users, items, lists), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_dropout_is_off(log: Log, inputs: Inputs, training: bool) -> None:
    net = build_network("ranktower", fit_log_spec(log), {"dim": 8, "hidden": 16, "dropout": 0.5}).train(training)
    np.testing.assert_array_equal(score_network(net, *inputs), score_network(net, *inputs))
    assert net.training is training
