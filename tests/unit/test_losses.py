"""Every loss in LOSSES keeps the same promises, equals a float64 oracle and handles the known traps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import TrainError
from model.losses import LOSSES, Hybrid, Labels, am_rankmax, distillation, rankmax, softmax, softsort

GRADES = 3
Batch = tuple[Tensor, Labels, Tensor]


FIXED_ANCHORS = {"softsort": {"anchors": "fixed"}, "hybrid": {"options": {"softsort": {"anchors": "fixed"}}}}


def make(name: str, **options: Any) -> torch.nn.Module:
    """A loss as training makes it, in evaluation mode: the hybrid's balance stands still."""
    return LOSSES[name](grades=GRADES, **options).eval()


def random_batch(seed: int = 0, b: int = 5, n: int = 9, dtype: torch.dtype = torch.float64) -> Batch:
    """Lists of unlike length with ties in grade and some teacher scores; the last one has no positive."""
    rng = np.random.default_rng(seed)
    grade = rng.integers(0, GRADES + 1, (b, n)) * (rng.random((b, n)) < 0.5)
    grade[-1] = 0
    impression = rng.random((b, n)) < 0.6
    soft = rng.uniform(0, 2, (b, n)) * impression * (rng.random((b, n)) < 0.7)
    mask = np.arange(n) < rng.integers(n // 2, n + 1, (b, 1))
    scores = rng.normal(0, 2, (b, n))
    labels = Labels(torch.from_numpy(grade), torch.from_numpy(soft), torch.from_numpy(impression))
    return torch.from_numpy(scores).to(dtype), labels, torch.from_numpy(mask)


def one_list(scores: list[float], grade: list[int], soft: list[float] | None = None) -> Batch:
    """One list of impressions."""
    labels = Labels(
        torch.tensor([grade]), torch.tensor([soft or [0.0] * len(grade)]), torch.ones(1, len(grade), dtype=torch.bool)
    )
    return torch.tensor([scores]), labels, torch.ones(1, len(grade), dtype=torch.bool)


def cost_and_slope(loss: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    scores = batch[0].clone().requires_grad_()
    cost = loss(scores, *batch[1:])
    (slope,) = torch.autograd.grad(cost, scores)
    return cost.detach(), slope


# --- oracles: float64, loops, written from the formulas --------------------------------------------------------------


def log_softmax_of(values: list[float]) -> list[float]:
    top = max(values)
    log_sum = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - log_sum for value in values]


def oracle_bce(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    each = [
        math.log1p(math.exp(-s)) if grade > 0 else s + math.log1p(math.exp(-s)) for s, grade in zip(z, y, strict=True)
    ]
    return sum(each) / len(each)


def oracle_softmax(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    positive = [i for i, grade in enumerate(y) if grade > 0]
    return -sum(log_softmax_of(z)[i] for i in positive) / max(len(positive), 1)


def oracle_distillation(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    members = [i for i, is_shown in enumerate(shown) if is_shown]
    if not members:
        return 0.0
    logs = log_softmax_of([z[i] for i in members])
    return -sum(p[i] * log for i, log in zip(members, logs, strict=True)) / len(members)


def oracle_softsort(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    members = [i for i, is_shown in enumerate(shown) if is_shown]
    keys = [(y[i], p[i]) for i in members]
    if len(set(keys)) < 2:
        return 0.0
    mean = sum(z[i] for i in members) / len(members)
    spread = math.sqrt(sum((z[i] - mean) ** 2 for i in members) / len(members) + 1e-4)
    wanted = sorted(keys, reverse=True)
    total = 0.0
    for k, z_k in enumerate(sorted((z[i] for i in members), reverse=True)):
        logs = log_softmax_of([-abs(z_k - z[i]) / spread for i in members])
        holders = [j for j, key in enumerate(keys) if key == wanted[k]]
        total -= sum(logs[j] for j in holders) / len(holders)
    return total / len(members)


def oracle_rankmax(z: list[float], y: list[int], margin: Callable[[int, int], float] = lambda y_j, y_i: 1.0) -> float:
    total = 0.0
    for z_j, y_j in zip(z, y, strict=True):
        if y_j > 0:
            rivals = [(z_i, y_i) for z_i, y_i in zip(z, y, strict=True) if y_i < y_j]
            total += math.log(1 + sum(max(z_i - z_j + margin(y_j, y_i), 0.0) for z_i, y_i in rivals))
    return total / max(sum(grade > 0 for grade in y), 1)


def oracle_am_rankmax(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    return oracle_rankmax(z, y, lambda y_j, y_i: (y_j - y_i) / GRADES)


def oracle_hybrid(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    return sum(term(z, y, p, shown) for term in (oracle_distillation, oracle_softsort, oracle_am_rankmax))


ORACLES = {
    "bce": oracle_bce,
    "softmax": oracle_softmax,
    "distillation": oracle_distillation,
    "softsort": oracle_softsort,
    "rankmax": lambda z, y, p, shown: oracle_rankmax(z, y),
    "am_rankmax": oracle_am_rankmax,
    "hybrid": oracle_hybrid,
}


# --- promises of every loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_equals_its_float64_oracle(name: str, seed: int) -> None:
    scores, labels, mask = random_batch(seed)
    each = []
    for row, kept in enumerate(mask):
        columns = (scores[row], labels.grade[row], labels.soft[row], labels.impression[row])
        each.append(ORACLES[name](*(column[kept].tolist() for column in columns)))
    assert make(name)(scores, labels, mask).item() == pytest.approx(sum(each) / len(each), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    scores, labels, mask = random_batch(seed=1, b=3, n=6)
    loss = make(name)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, mask), scores.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4, 1e6])
@pytest.mark.parametrize(
    "case", ["mixed", "no positives", "all positive", "nothing shown", "one empty list", "all empty"]
)
def test_cost_and_gradients_are_finite(name: str, scale: float, case: str) -> None:
    scores, labels, mask = random_batch(dtype=torch.float32)
    grade, impression = labels.grade.clone(), labels.impression.clone()
    if case == "no positives":
        grade.zero_()
    elif case == "all positive":
        grade.fill_(2)
    elif case == "nothing shown":
        impression.zero_()
    elif case == "one empty list":
        mask[0] = False
    elif case == "all empty":
        mask.zero_()
    cost, slope = cost_and_slope(make(name), (scores * scale, Labels(grade, labels.soft, impression), mask))
    assert cost.isfinite()
    assert cost >= 0
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_a_list_has_no_influence(name: str) -> None:
    scores, labels, mask = random_batch()
    shuffled = torch.stack(
        [torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(i)) for i in range(5)]
    )
    scores2, grade, soft, impression, mask2 = (x.gather(1, shuffled) for x in (scores, *labels, mask))
    cost, slope = cost_and_slope(make(name), (scores, labels, mask))
    cost2, slope2 = cost_and_slope(make(name), (scores2, Labels(grade, soft, impression), mask2))
    torch.testing.assert_close(cost2, cost)
    torch.testing.assert_close(slope2, slope.gather(1, shuffled))


@pytest.mark.parametrize("name", LOSSES)
def test_padding_has_no_influence_whatever_it_holds(name: str) -> None:
    scores, labels, mask = random_batch()
    cost, slope = cost_and_slope(make(name), (scores, labels, mask))
    rubbish = Labels(
        labels.grade.masked_fill(~mask, 3), labels.soft.masked_fill(~mask, math.nan), labels.impression | ~mask
    )
    cost2, slope2 = cost_and_slope(make(name), (scores.masked_fill(~mask, math.nan), rubbish, mask))
    assert cost2 == cost
    assert torch.equal(slope2, slope)
    assert not slope2[~mask].any()

    def longer(x: Tensor) -> Tensor:  # two more columns and one more list, all padding
        return torch.nn.functional.pad(x, (0, 2, 0, 1), value=1)

    more = Labels(longer(labels.grade), longer(labels.soft), longer(labels.impression))
    cost3 = make(name)(longer(scores), more, torch.nn.functional.pad(mask, (0, 2, 0, 1), value=False))
    torch.testing.assert_close(cost3, cost)


@pytest.mark.parametrize("name", LOSSES)
def test_perfect_order_costs_less_than_its_reverse(name: str) -> None:
    scores, labels, mask = one_list([4.0, 3.0, 2.0, 1.0, 0.0], [3, 2, 1, 0, 0], [0.9, 0.7, 0.5, 0.2, 0.1])
    assert make(name)(scores, labels, mask) < make(name)(-scores, labels, mask)


@pytest.mark.parametrize("name", LOSSES)
def test_descending_the_loss_alone_ranks_the_positives_first(name: str) -> None:
    scores, labels, mask = one_list([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], [3, 2, 1, 0, 0, 0], [0.9, 0.7, 0.5, 0.3, 0.2, 0.1])
    scores.requires_grad_()
    loss, optimizer = make(name, **FIXED_ANCHORS.get(name, {})), torch.optim.Adam([scores], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss(scores, labels, mask).backward()
        optimizer.step()
    assert scores[0, :3].min() > scores[0, 3:].max()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_scores_are_widened(name: str) -> None:
    scores, labels, mask = random_batch(dtype=torch.bfloat16)
    cost = make(name)(scores, labels, mask)
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost, make(name)(scores.float(), labels, mask))


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_option_is_named(name: str) -> None:
    with pytest.raises((TrainError, TypeError), match="temperature"):
        LOSSES[name](grades=GRADES, temperature=2)


# --- facts that cost time if missed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [softmax, rankmax, am_rankmax])
def test_lists_without_positives_cost_nothing(loss: Callable[..., Tensor]) -> None:
    cost, slope = cost_and_slope(loss, one_list([3.0, -1.0, 2.0], [0, 0, 0], [0.5, 0.2, 0.1]))
    assert cost == 0
    assert not slope.any()


def test_two_equal_positives_alone_compete_only_in_the_printed_rankmax() -> None:
    batch = one_list([1.0, 1.0], [2, 2])
    assert am_rankmax(*batch, grades=GRADES) == 0
    assert rankmax(*batch) == 0
    assert rankmax(*batch, rivals="all", reduce="sum").item() == pytest.approx(2 * math.log(2))


def test_am_rankmax_ignores_items_of_an_equal_or_higher_grade() -> None:
    calm = one_list([0.0, 9.0, 15.0, -5.0], [1, 1, 3, 0])
    assert am_rankmax(*calm, grades=GRADES) == 0


def test_the_margin_grows_with_the_distance_of_the_grades() -> None:
    for grade in (1, 2, 3):
        cost = am_rankmax(*one_list([0.0, 0.0], [grade, 0]), grades=GRADES, margin=1.5).item()
        assert cost == pytest.approx(math.log(1 + 1.5 * grade / GRADES))


def test_log_softmax_stays_finite_where_log_of_softmax_is_minus_infinity() -> None:
    batch = one_list([0.0, 300.0], [1, 0], [1.0, 0.0])
    assert softmax(*batch).item() == pytest.approx(300)
    assert distillation(*batch, reduce="sum").item() == pytest.approx(300)
    wide_apart = one_list([0.0, 300.0, 150.0], [3, 0, 1])
    assert softsort(*wide_apart, tau=1e-3).item() > 400


def test_tied_targets_share_their_ranks_in_softsort() -> None:
    grades = [2, 1, 1, 0]
    one, other = ([3.0, 2.0, 0.5, 0.0], [3.0, 0.5, 2.0, 0.0])
    assert softsort(*one_list(one, grades)).item() == pytest.approx(softsort(*one_list(other, grades)).item())
    even = softsort(*one_list([3.0, 1.5, 1.5, 0.0], grades), tau=0.01)
    assert even.item() == pytest.approx(2 / 4 * math.log(2), abs=1e-3)  # each of the two shared ranks is a coin


def test_the_teacher_orders_what_the_grades_leave_tied() -> None:
    soft = [0.9, 0.5, 0.4, 0.1]
    right, wrong = (
        one_list([4.0, 3.0, 2.0, 1.0], [1, 1, 0, 0], soft),
        one_list([3.0, 4.0, 1.0, 2.0], [1, 1, 0, 0], soft),
    )
    assert softsort(*right, tau=0.1) < softsort(*wrong, tau=0.1)
    grade_first = one_list([4.0, 3.0], [2, 1], [0.1, 0.9])
    teacher_first = one_list([3.0, 4.0], [2, 1], [0.1, 0.9])
    assert softsort(*grade_first, tau=0.1) < softsort(*teacher_first, tau=0.1)


def test_softsort_of_a_list_without_an_order_costs_nothing() -> None:
    cost, slope = cost_and_slope(softsort, one_list([3.0, -1.0, 2.0], [1, 1, 1], [0.5, 0.5, 0.5]))
    assert cost == 0
    assert not slope.any()


def test_fixed_anchors_sort_any_list_of_free_scores_and_moving_ones_do_not() -> None:
    """From 32 random starts of 12 items: all sorted, against fewer than half (see docs/decisions.md)."""
    labels = Labels(torch.arange(12, 0, -1).expand(32, -1), torch.zeros(32, 12), torch.ones(32, 12, dtype=torch.bool))
    sorted_share = {}
    for anchors in ("fixed", "moving"):
        scores = torch.randn(32, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimizer = torch.optim.Adam([scores], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            softsort(scores, labels, labels.impression, anchors=anchors).backward()
            optimizer.step()
        sorted_share[anchors] = (scores[:, :-1] > scores[:, 1:]).all(dim=1).float().mean().item()
    assert sorted_share["fixed"] == 1
    assert sorted_share["moving"] < 0.5


@pytest.mark.parametrize("anchors", ["fixed", "moving"])
def test_the_scale_of_the_scores_does_not_lower_softsort(anchors: str) -> None:
    scores, labels, mask = one_list([1.0, 3.0, 2.0, 0.5], [2, 1, 0, 0], [0.4, 0.3, 0.2, 0.1])
    cost, slope = cost_and_slope(partial(softsort, anchors=anchors), (scores, labels, mask))
    blown_up, _ = cost_and_slope(softsort, (scores * 1000, labels, mask))
    torch.testing.assert_close(blown_up, cost, rtol=1e-3, atol=0.0)
    assert abs((slope * scores).sum()) < 1e-3 * slope.norm() * scores.norm()


def test_softsort_and_distillation_see_impressions_only() -> None:
    scores, labels, mask = random_batch()
    for loss in (softsort, distillation):
        _, slope = cost_and_slope(loss, (scores, labels, mask))
        assert not slope[~labels.impression].any()
        assert slope[labels.impression & mask].any()


def test_gradient_flows_through_the_sorted_values_unless_anchors_are_fixed() -> None:
    batch = one_list([2.0, 1.0, 0.0], [2, 1, 0])
    moving, fixed = (cost_and_slope(partial(softsort, anchors=anchors), batch) for anchors in ("moving", "fixed"))
    assert moving[0] == fixed[0]
    assert not torch.allclose(moving[1], fixed[1])


def test_soft_labels_are_not_normalised() -> None:
    scores, labels, mask = random_batch()
    doubled = labels._replace(soft=labels.soft * 2)
    torch.testing.assert_close(distillation(scores, doubled, mask), 2 * distillation(scores, labels, mask))


@pytest.mark.parametrize("name", LOSSES)
def test_a_cost_is_the_mean_over_its_lists(name: str) -> None:
    scores, labels, mask = random_batch()
    loss = make(name)
    alone = [loss(scores[i, None], Labels(*(x[i, None] for x in labels)), mask[i, None]) for i in range(len(scores))]
    torch.testing.assert_close(torch.stack(alone).mean(), loss(scores, labels, mask))


@pytest.mark.parametrize("loss", [rankmax, am_rankmax, softsort, distillation])
def test_within_a_list_the_mean_divides_the_printed_sum_by_what_it_runs_over(loss: Callable[..., Tensor]) -> None:
    batch = one_list([0.3, 1.0, 0.2, -1.0], [2, 1, 1, 0], [0.9, 0.4, 0.6, 0.2])
    entries = 3 if loss in (rankmax, am_rankmax) else 4
    torch.testing.assert_close(loss(*batch, reduce="sum"), entries * loss(*batch))


# --- the hybrid ------------------------------------------------------------------------------------------------------


def test_the_hybrid_is_the_weighted_sum_of_its_terms() -> None:
    scores, labels, mask = random_batch()
    hybrid = Hybrid(
        grades=GRADES,
        weights={"distillation": 0.5, "softsort": 2.0, "rankmax": 3.0},
        balance="fixed",
        options={"softsort": {"tau": 0.3}},
    )
    terms = (distillation(scores, labels, mask), softsort(scores, labels, mask, tau=0.3), rankmax(scores, labels, mask))
    torch.testing.assert_close(hybrid.costs(scores, labels, mask), torch.stack(terms))
    torch.testing.assert_close(hybrid(scores, labels, mask), 0.5 * terms[0] + 2 * terms[1] + 3 * terms[2])


def test_equal_balance_gives_every_term_the_gradient_norm_of_the_last_and_keeps_it() -> None:
    scores, labels, mask = random_batch(dtype=torch.float32)
    scores.requires_grad_()
    hybrid = Hybrid(grades=GRADES)
    hybrid(scores, labels, mask)
    factors = hybrid.norms[-1] / hybrid.norms
    slopes = [torch.autograd.grad(cost, scores)[0].norm() for cost in hybrid._costs(scores, labels, mask)]
    torch.testing.assert_close(factors * torch.stack(slopes), slopes[-1].expand(3))
    for _ in range(30):
        hybrid(scores, labels, mask)
    kept = hybrid.norms.clone()
    hybrid(scores * 10, labels, mask)
    torch.testing.assert_close(hybrid.norms, kept, rtol=0, atol=0)
    restored = Hybrid(grades=GRADES)
    restored.load_state_dict(hybrid.state_dict())
    torch.testing.assert_close(restored(scores, labels, mask), hybrid(scores, labels, mask))


def test_a_term_that_never_has_a_gradient_leaves_the_balance_alone() -> None:
    scores, labels, mask = random_batch(dtype=torch.float32)
    hybrid = Hybrid(grades=GRADES)
    cost, slope = cost_and_slope(hybrid, (scores, labels._replace(soft=torch.zeros_like(labels.soft)), mask))
    assert cost.isfinite()
    assert slope.isfinite().all()
    assert hybrid.norms[0] == 0


@pytest.mark.parametrize("balance", ["equal", "learned", "fixed"])
def test_gradients_reach_every_parameter_of_the_hybrid(balance: str) -> None:
    scores, labels, mask = random_batch(dtype=torch.float32)
    hybrid = Hybrid(grades=GRADES, balance=balance)
    hybrid(scores.requires_grad_(), labels, mask).backward()
    assert hybrid.log_scale is not None
    for name, parameter in hybrid.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.all(), name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"balance": "even"}, "balance is 'even'"),
        ({"weights": {"softsort": 1.0, "luck": 1.0}}, "no term 'luck'"),
        ({"options": {"softsort": {"taw": 1}}}, "no option 'taw'"),
        ({"options": {"rankmax": {"rivals": "all"}}}, "'rankmax', which is not a term"),
    ],
)
def test_a_wrong_option_of_the_hybrid_is_named(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(TrainError, match=complaint):
        Hybrid(grades=GRADES, **options)
