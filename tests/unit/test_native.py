"""The native head as a torch function: scores, gradients and trained weights are those of the torch path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor

from kernel import engine
from kernel.head import HeadKind, HeadSpec
from model.layers import attended_similarity, dot_similarity
from model.native import best_similarity, takes
from model.networks import NETWORKS
from tests.kernels import KINDS, NATIVE, head_of
from tests.unit.test_networks import network, rows

SHAPES = [*product((1, 2, 4, 8), (1, 2, 4, 8), (8, 16, 32)), (4, 4, 64), (4, 4, 33), (3, 5, 7)]
ERROR = 2e-6  # of the largest number

pytestmark = pytest.mark.skipif(not NATIVE, reason="the extension was not built")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@contextmanager
def without_native() -> Iterator[None]:
    before = engine.level()
    engine.select(engine.NUMPY)
    yield
    engine.select(before)


def oracle(head: HeadSpec, user: Tensor, items: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Best similarities and biases (b, n), in the dtype of the records."""
    parts = (
        items[chosen][..., : items.shape[1] - head.item_bias].unflatten(2, (-1, head.item_heads, head.dim)).unbind(2)
    )
    users = user.unflatten(1, (-1, head.user_heads, head.dim))
    similarity = dot_similarity(users[:, 0], *parts) if len(parts) == 1 else attended_similarity(users, *parts)
    return similarity.amax(dim=3).sum(dim=2), items[chosen][..., -1] * head.item_bias


def assert_near(found: Tensor, expected: Tensor, what: object) -> None:
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= ERROR * expected.abs().max(), what


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_torch_in_float64(kind: HeadKind, count: int) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        head = head_of(kind, shape, bias=True, scale=1.0)
        user, items = torch.randn(5, head.user_size), torch.randn(12, head.item_size)
        chosen = torch.randint(0, 12, (5, 21))
        chosen[:, 15:] = 0  # padding reads the first item
        weight = torch.randn(2, 5, 21)
        weight[..., 18:] = 0
        with threads(count):
            found, slopes = both(best_similarity, head, user, items, chosen, weight)
        expected, exact = both(oracle, head, user.double(), items.double(), chosen, weight.double())
        for one, other in zip((*found, *slopes), (*expected, *exact), strict=True):
            assert_near(one, other, shape)


def both(score, head: HeadSpec, user: Tensor, items: Tensor, chosen: Tensor, weight: Tensor):  # type: ignore[no-untyped-def]
    """What a head gives, and the gradients of its weighted sum."""
    records = [user.requires_grad_(), items.requires_grad_()]
    found = score(head, *records, chosen)
    slopes = torch.autograd.grad(sum((part * w).sum() for part, w in zip(found, weight, strict=True)), records)
    return [part.detach() for part in found], slopes


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_same_scores_and_gradients_without_native_code(name: str) -> None:
    native = scores_and_gradients(name)
    with without_native():
        plain = scores_and_gradients(name)
    for found, expected in zip(native, plain, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def scores_and_gradients(name: str) -> list[Tensor]:
    net = network(name)
    chosen = torch.randint(0, 7, (4, 9), generator=torch.Generator().manual_seed(0))
    scores = net.score_lists(net.user(rows("user", 4)), net.item(rows("item", 7)), chosen)
    scores.square().sum().backward()
    return [scores.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("options", [{}, {"direction": "user"}, {"tied_values": True}, {"cross_attention": False}])
def test_training_goes_the_same_way_as_without_native_code(options: dict[str, object]) -> None:
    def losses() -> list[float]:
        net = network("ranktower", **options)
        user, item = rows("user", 8, seed=1), rows("item", 12, seed=1)
        chosen = torch.randint(0, 12, (8, 6), generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        costs = []
        for _ in range(40):
            optimizer.zero_grad()
            cost = -net.score_lists(net.user(user), net.item(item), chosen).log_softmax(dim=1)[:, 0].mean()
            cost.backward()
            optimizer.step()
            costs.append(float(cost.detach()))
        return costs

    native = losses()
    with without_native():
        plain = losses()
    assert native[-1] < 0.5 * native[0]
    assert native != plain  # two ways were gone
    assert native == pytest.approx(plain, rel=0.01, abs=1e-3)


def test_only_float32_on_the_processor_is_taken() -> None:
    records = torch.zeros(2, 8)
    assert takes("maxsim", records, records)
    assert not takes("onnx", records, records)
    assert not takes("maxsim", records, records.double())
    assert not takes("maxsim", records.to("meta"), records)
    with without_native():
        assert not takes("maxsim", records, records)


def test_a_gradient_that_repeats_one_number_is_read_whole() -> None:
    head = head_of("maxsim", (1, 1, 4), bias=True, scale=1.0)
    user, items = torch.ones(2, 4, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    scores, biases = best_similarity(head, user, items, torch.tensor([[0, 1], [1, 1]]))
    (scores.sum() + biases.sum()).backward()  # expanded, not stored
    assert user.grad is not None
    assert items.grad is not None
    assert torch.equal(user.grad, torch.full((2, 4), 2.0))
    assert torch.equal(items.grad, torch.tensor([[1.0], [3.0], [0.0]]).expand(3, 5))
