"""Shares of a batch, and one process alone; two real ones are in tests/integration/test_distributed.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from model.distributed import ALONE, Processes, _take_gpu, opened
from model.errors import TrainError


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("lists", [5, 6, 64])
def test_the_shares_are_the_batch(lists: int, world: int) -> None:
    shares = [np.arange(lists)[Processes(rank=rank, world=world).share(lists)] for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(lists))


def test_a_process_without_a_list_computes_the_first_for_nothing() -> None:
    assert np.arange(2)[Processes(rank=2, world=3).share(2)].tolist() == [0]


def test_without_torchrun_a_process_is_alone() -> None:
    with opened("cpu") as processes:
        assert processes is ALONE
    assert processes.lead


def test_alone_nothing_is_changed() -> None:
    scores, term, array = torch.randn(4, 3), torch.tensor(2.0), np.ones(2, np.float32)
    assert ALONE.gathered(scores, 4) is scores
    assert ALONE.averaged(term, 4) is term
    assert ALONE.filled(array) is array
    assert ALONE.told(array) is array
    ALONE.agree({"lr": 0.1})
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.weight.grad
    ALONE.add_gradients(layer, nn.Identity(), 4)
    assert layer.weight.grad is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_process_without_a_gpu_of_its_own_is_refused() -> None:
    with pytest.raises(TrainError, match="process 1 of this machine has no GPU of its own, torch sees 0"):
        _take_gpu(1)
