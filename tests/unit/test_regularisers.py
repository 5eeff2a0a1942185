"""The terms that networks add to the loss against loops in float64, and who has a gradient in them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.features import MISSING, UNKNOWN
from model.regularisers import Batch, category_alignment, contrast, mimic


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_the_positive_pairs_of_a_batch_name_users_and_distinct_items() -> None:
    place = torch.tensor([[2, 0, 1], [1, 2, 2]])
    positive = torch.tensor([[True, False, True], [False, True, False]])
    x = torch.zeros(1)
    users, items = Batch(x, x, x, x, place, positive, torch.ones_like(positive)).pairs()
    assert users.tolist() == [0, 0, 1]
    assert items.tolist() == [2, 1, 2]


# --- mimic -----------------------------------------------------------------------------------------------------------


def test_mimic_is_the_printed_sum_over_all_pairs_in_a_mean_of_the_positive_ones() -> None:
    y = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.double)
    a, p = torch.randn(5, 3, dtype=torch.double), torch.randn(5, 3, dtype=torch.double)
    printed = sum(float((y[k] * a[k] + (1 - y[k]) * p[k] - p[k]).square().sum()) for k in range(5)) / 2
    assert float(mimic(a[y > 0], p[y > 0])) == pytest.approx(printed)
    assert float(mimic(a[:0], p[:0])) == 0.0


def test_only_the_augmented_vector_learns_to_mimic() -> None:
    a, p = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    mimic(a, p).backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    torch.testing.assert_close(a.grad, (a - p).detach() / 2)
    assert p.grad is None


# --- category alignment ----------------------------------------------------------------------------------------------


def covariance(x: Tensor) -> Tensor:
    """(d, d) by loops."""
    n, d = x.shape
    mean = [sum(float(row[i]) for row in x) / n for i in range(d)]
    cells = [
        [sum((float(r[i]) - mean[i]) * (float(r[j]) - mean[j]) for r in x) / (n - 1) for j in range(d)]
        for i in range(d)
    ]
    return torch.tensor(cells, dtype=torch.double)


def test_categories_are_aligned_with_the_largest_one() -> None:
    category = torch.tensor([5, 3, 3, 5, 3, 9, 9, 3], dtype=torch.int32)
    v = torch.randn(8, 3, dtype=torch.double)
    largest = covariance(v[category == 3])
    expected = sum(float((largest - covariance(v[category == c])).square().sum()) for c in (5, 9))
    assert float(category_alignment(v, category, most=10)) == pytest.approx(expected)
    only = float((largest - covariance(v[category == 5])).square().sum())  # 5 and 9 tie: the lower row comes first
    assert float(category_alignment(v, category, most=2)) == pytest.approx(only)


def test_missing_and_unknown_categories_and_those_of_one_item_count_nowhere() -> None:
    v = torch.randn(9, 3, requires_grad=True)
    category = torch.tensor([MISSING, UNKNOWN, MISSING, UNKNOWN, MISSING, 4, 4, 6, 7], dtype=torch.int32)
    assert category_alignment(v, category, most=10) == 0
    twice = torch.tensor([MISSING, UNKNOWN, MISSING, UNKNOWN, MISSING, 4, 4, 6, 6], dtype=torch.int32)
    category_alignment(v, twice, most=10).backward()  # type: ignore[no-untyped-call]
    assert v.grad is not None
    assert v.grad.any(dim=1).tolist() == [False] * 5 + [True] * 4
    assert v.grad.isfinite().all()


def test_equal_covariances_cost_nothing_wherever_their_means_are() -> None:
    one = torch.randn(6, 3)
    v = torch.cat([one, one + 5.0])
    category = torch.tensor([2] * 6 + [3] * 6)
    assert float(category_alignment(v, category, most=10)) == pytest.approx(0, abs=1e-8)


# --- contrast --------------------------------------------------------------------------------------------------------


def test_contrast_is_infonce_over_the_items_that_the_user_does_not_like() -> None:
    u, v = torch.randn(3, 4, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    likes = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    tau, costs = 0.3, []
    for i in range(3):
        e = [math.exp(float(torch.cosine_similarity(u[i], v[j], dim=0)) / tau) for j in range(5)]
        rivals = sum(e[w] for w in range(5) if not likes[i, w])
        costs += [-math.log(e[j] / (e[j] + rivals)) for j in range(5) if likes[i, j]]
    assert float(contrast(u, v, likes, tau=tau)) == pytest.approx(sum(costs) / len(costs))


def test_contrast_stays_finite_where_a_user_likes_all_or_nothing_and_at_a_sharp_tau() -> None:
    u, v = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    likes = torch.tensor([[True, True], [False, False], [True, False]])
    cost = contrast(u, v, likes, tau=1e-3)
    cost.backward()  # type: ignore[no-untyped-call]
    assert cost.isfinite()
    assert u.grad is not None
    assert v.grad is not None
    assert u.grad.isfinite().all()
    assert v.grad.isfinite().all()
    assert not u.grad[:2].any()
    assert contrast(u, v[:0], likes[:, :0], tau=0.1) == 0
