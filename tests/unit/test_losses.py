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
from model.losses import (
    ARF,
    LOSSES,
    Hybrid,
    Labels,
    am_rankmax,
    approx_ndcg,
    dftopk,
    distillation,
    lambdaloss,
    rankmax,
    ranknet,
    softmax,
    softsort,
)

GRADES = 3
SOFT_TOP = 1.5  # below the greatest soft label of random_batch, so that clipping is met
Batch = tuple[Tensor, Labels, Tensor]


FIXED_ANCHORS = {"softsort": {"anchors": "fixed"}, "hybrid": {"options": {"softsort": {"anchors": "fixed"}}}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # every loss, and the options that are losses of their own
    **{name: (name, {}) for name in LOSSES},
    "arf": ("arf", {"m": 3, "tau": 1.0}),  # 20 and 50 by default: lists here are shorter
    "arf of fixed k": ("arf", {"k": 3, "m": 5, "tau": 1.0, "weighting": "both"}),
    "dftopk of fixed k": ("dftopk", {"k": 3, "tau": 0.5}),
    "lambdarank": ("lambdaloss", {"mu": 0}),
    "weighted logloss": ("distillation", {"kind": "logloss"}),
    "pairwise logloss": ("distillation", {"kind": "pairwise"}),
    "hybrid by weighted logloss": ("hybrid", {"distill": "logloss"}),
    "hybrid without distillation": ("hybrid", {"distill": "none"}),
}


def make(case: str, **options: Any) -> torch.nn.Module:
    """A loss as training makes it, in evaluation mode: the hybrid's balance stands still."""
    name, own = CASES[case]
    return LOSSES[name](grades=GRADES, soft_top=SOFT_TOP, **{**own, **options}).eval()


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


def oracle_hybrid(
    z: list[float], y: list[int], p: list[float], shown: list[bool], distillation: Callable[..., float] | None = None
) -> float:
    first = (distillation or oracle_distillation)(z, y, p, shown)
    return 0.3 * first + 0.3 * oracle_softsort(z, y, p, shown) + oracle_am_rankmax(z, y, p, shown)


def sigmoid_of(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def oracle_ranknet(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if y[i] > y[j]]
    return sum(math.log1p(math.exp(z[j] - z[i])) for i, j in pairs) / max(len(pairs), 1)


def gains_of(y: list[int]) -> list[float]:
    best = sum((2**grade - 1) / math.log2(2 + place) for place, grade in enumerate(sorted(y, reverse=True)))
    return [(2**grade - 1) / (best or 1) for grade in y]


def oracle_approx_ndcg(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    ranks = [1 + sum(sigmoid_of((b - a) / 0.1) for j, b in enumerate(z) if j != i) for i, a in enumerate(z)]
    return any(y) - sum(gain / math.log2(1 + rank) for gain, rank in zip(gains_of(y), ranks, strict=True))


def oracle_lambdaloss(z: list[float], y: list[int], mu: float) -> float:
    gain, rank = gains_of(y), [1 + sum(b > a for b in z) for a in z]  # no two scores are equal
    total = 0.0
    for i in range(len(z)):
        for j in range(len(z)):
            if y[i] > y[j]:
                apart = abs(rank[i] - rank[j])
                rho = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
                delta = 1 / math.log2(1 + apart) - 1 / math.log2(2 + apart)
                total -= (rho + mu * delta) * abs(gain[i] - gain[j]) * math.log2(sigmoid_of(z[i] - z[j]))
    return total


def shares_of(y: list[int], p: list[float]) -> list[list[float]]:
    """Of rank k (row) that item j (column) has in the order by (grade, p)."""
    keys = list(zip(y, p, strict=True))
    return [[(key == held) / keys.count(held) for key in keys] for held in sorted(keys, reverse=True)]


def oracle_dftopk(z: list[float], y: list[int], p: list[float], k: int | None, tau: float) -> float:
    count = sum(grade > 0 for grade in y) if k is None else k
    if not 0 < count < len(z):
        return 0.0
    wanted = [sum(column) for column in zip(*shares_of(y, p)[:count], strict=True)]
    if k is None:
        wanted = [float(grade > 0) for grade in y]
    ranked = sorted(z, reverse=True)
    chance = [sigmoid_of((score - (ranked[count - 1] + ranked[count]) / 2) / tau) for score in z]
    return -sum(w * math.log(f) + (1 - w) * math.log(1 - f) for w, f in zip(wanted, chance, strict=True)) / len(z)


def oracle_arf(z: list[float], y: list[int], p: list[float], k: int | None, m: int, tau: float, both: bool) -> float:
    n, shares = len(z), shares_of(y, p)
    if len(set(zip(y, p, strict=True))) < 2:
        return 0.0
    apart = [sum(abs(a - b) for b in z) for a in z]
    logs = [log_softmax_of([((n + 1 - 2 * r) * z[j] - apart[j]) / tau for j in range(n)]) for r in range(1, n + 1)]
    whole = -sum(shares[r][j] * logs[r][j] for r in range(n) for j in range(n)) / n**2
    first = [float(g > 0) for g in y] if k is None else [sum(shares[r][j] for r in range(min(k, n))) for j in range(n)]
    kept = [math.log(sum(math.exp(logs[r][j]) for r in range(min(m, n))) / m) for j in range(n)]
    relax = -sum(f * log for f, log in zip(first, kept, strict=True)) / n if n > m else 0.0
    return relax / (2 if both else 1) + whole / 2  # w = 1


def oracle_logloss(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    members = [(z[i], min(p[i] / SOFT_TOP, 1.0)) for i, is_shown in enumerate(shown) if is_shown]
    if not any(chance for _, chance in members):
        return 0.0
    each = [c * math.log(sigmoid_of(s)) + (1 - c) * math.log(1 - sigmoid_of(s)) for s, c in members]
    return -sum(each) / len(members)


def oracle_pairwise(z: list[float], y: list[int], p: list[float], shown: list[bool]) -> float:
    members = [i for i, is_shown in enumerate(shown) if is_shown]
    pairs = [(i, j) for i in members for j in members if p[i] > p[j]]
    return sum((p[i] - p[j]) * math.log1p(math.exp(z[j] - z[i])) for i, j in pairs) / max(len(pairs), 1)


ORACLES: dict[str, Callable[..., float]] = {
    "bce": oracle_bce,
    "softmax": oracle_softmax,
    "distillation": oracle_distillation,
    "softsort": oracle_softsort,
    "rankmax": lambda z, y, p, shown: oracle_rankmax(z, y),
    "am_rankmax": oracle_am_rankmax,
    "hybrid": oracle_hybrid,
    "ranknet": oracle_ranknet,
    "approx_ndcg": oracle_approx_ndcg,
    "lambdaloss": lambda z, y, p, shown: oracle_lambdaloss(z, y, 10.0),
    "dftopk": lambda z, y, p, shown: oracle_dftopk(z, y, p, None, 1.0),
    "arf": lambda z, y, p, shown: oracle_arf(z, y, p, None, 3, 1.0, False),
    "arf of fixed k": lambda z, y, p, shown: oracle_arf(z, y, p, 3, 5, 1.0, True),
    "dftopk of fixed k": lambda z, y, p, shown: oracle_dftopk(z, y, p, 3, 0.5),
    "lambdarank": lambda z, y, p, shown: oracle_lambdaloss(z, y, 0.0),
    "weighted logloss": oracle_logloss,
    "pairwise logloss": oracle_pairwise,
    "hybrid by weighted logloss": lambda *columns: oracle_hybrid(*columns, oracle_logloss),
    "hybrid without distillation": lambda *columns: oracle_hybrid(*columns, lambda *_: 0.0),
}


# --- promises of every loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_equals_its_float64_oracle(name: str, seed: int) -> None:
    scores, labels, mask = random_batch(seed)
    each = []
    for row, kept in enumerate(mask):
        columns = (scores[row], labels.grade[row], labels.soft[row], labels.impression[row])
        each.append(ORACLES[name](*(column[kept].tolist() for column in columns)))
    assert make(name)(scores, labels, mask).item() == pytest.approx(sum(each) / len(each), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    scores, labels, mask = random_batch(seed=1, b=3, n=6)
    loss = make(name)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, mask), scores.requires_grad_())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4, 1e6])
@pytest.mark.parametrize(
    "case",
    ["mixed", "no positives", "all positive", "nothing shown", "one empty list", "all empty", "one item", "one entry"],
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
    elif case == "one item":
        mask[:, 1:] = False
    elif case == "one entry":
        scores, grade, impression, mask = scores[:, :1], grade[:, :1], impression[:, :1], mask[:, :1]
        labels = labels._replace(soft=labels.soft[:, :1])
    cost, slope = cost_and_slope(make(name), (scores * scale, Labels(grade, labels.soft, impression), mask))
    assert cost.isfinite()
    assert cost >= 0
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", CASES)
def test_nor_has_it_among_items_of_equal_scores(name: str) -> None:
    scores, labels, mask = random_batch(b=20)
    scores, turned = scores.sign(), Labels(*(x.flip(1) for x in labels))
    cost, slope = cost_and_slope(make(name), (scores, labels, mask))
    cost2, slope2 = cost_and_slope(make(name), (scores.flip(1), turned, mask.flip(1)))
    torch.testing.assert_close(cost2, cost)
    if not {"softsort", "hybrid"} & {CASES[name][0]}:  # SoftSort's ranks have one holder each, whoever stands first
        torch.testing.assert_close(slope2.flip(1), slope)


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", CASES)
def test_perfect_order_costs_less_than_its_reverse(name: str) -> None:
    scores, labels, mask = one_list([2.0, 1.0, 0.0, -1.0, -2.0], [3, 2, 1, 0, 0], [0.9, 0.7, 0.5, 0.2, 0.1])
    assert make(name)(scores, labels, mask) < make(name)(-scores, labels, mask)


@pytest.mark.parametrize("name", CASES)
def test_descending_the_loss_alone_ranks_the_positives_first(name: str) -> None:
    scores, labels, mask = one_list([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], [3, 2, 1, 0, 0, 0], [0.9, 0.7, 0.5, 0.3, 0.2, 0.1])
    scores.requires_grad_()
    loss, optimizer = make(name, **FIXED_ANCHORS.get(name, {})), torch.optim.Adam([scores], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss(scores, labels, mask).backward()
        optimizer.step()
    assert scores[0, :3].min() > scores[0, 3:].max()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_widened(name: str, dtype: torch.dtype) -> None:
    scores, labels, mask = random_batch(dtype=dtype)
    cost, slope = cost_and_slope(make(name), (scores, labels, mask))
    assert cost.dtype == torch.float32
    assert slope.isfinite().all()
    torch.testing.assert_close(cost, make(name)(scores.float(), labels, mask))


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_option_is_named(name: str) -> None:
    with pytest.raises((TrainError, TypeError), match="temperature"):
        LOSSES[name](grades=GRADES, temperature=2)


# --- facts that cost time if missed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [softmax, rankmax, am_rankmax, ranknet, approx_ndcg, lambdaloss, dftopk])
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


@pytest.mark.parametrize("name", CASES)
def test_a_cost_is_the_mean_over_its_lists(name: str) -> None:
    scores, labels, mask = random_batch()
    loss = make(name)
    alone = [loss(scores[i, None], Labels(*(x[i, None] for x in labels)), mask[i, None]) for i in range(len(scores))]
    torch.testing.assert_close(torch.stack(alone).mean(), loss(scores, labels, mask))


@pytest.mark.parametrize("kind", ["softmax", "logloss", "pairwise"])
def test_a_list_of_which_the_teacher_says_nothing_costs_nothing(kind: str) -> None:
    cost, slope = cost_and_slope(partial(distillation, kind=kind), one_list([3.0, -1.0, 2.0], [1, 0, 0]))
    assert cost == 0
    assert not slope.any()


def test_logloss_of_labels_above_their_top_still_has_a_lowest_cost() -> None:
    batch = one_list([50.0, -50.0], [1, 0], [7.0, 0.0])
    assert distillation(*batch, kind="logloss").item() == pytest.approx(0)
    assert distillation(*batch, kind="logloss", soft_top=7.0).item() == pytest.approx(0)
    half = one_list([0.0, 0.0], [1, 0], [3.5, 3.5])
    assert not cost_and_slope(partial(distillation, kind="logloss", soft_top=7.0), half)[1].any()


def test_a_perfect_order_wide_apart_has_no_loss_of_ndcg_and_the_reverse_has_it_all() -> None:
    grades = [3, 1, 0, 0]
    assert approx_ndcg(*one_list([30.0, 20.0, 10.0, 0.0], grades)).item() == pytest.approx(0, abs=1e-6)
    best, worst = 7 + 1 / math.log2(3), 7 / math.log2(5) + 1 / math.log2(4)
    reverse = approx_ndcg(*one_list([0.0, 10.0, 20.0, 30.0], grades))
    assert reverse.item() == pytest.approx(1 - worst / best, abs=1e-6)


def test_the_edge_of_dftopk_lies_between_the_last_kept_and_the_first_dropped() -> None:
    batch = one_list([3.0, 1.0, 0.0, -4.0], [1, 1, 0, 0])
    apart = [3.0 - 0.5, 1.0 - 0.5, 0.5 - 0.0, 0.5 + 4.0]
    assert dftopk(*batch).item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in apart) / 4)
    assert dftopk(*batch, k=4) == 0


def test_arf_has_nothing_to_select_from_a_list_that_is_kept_whole() -> None:
    batch = one_list([3.0, 1.0, 0.0, -4.0], [1, 0, 0, 0])
    for m, selects in ((3, True), (4, False), (20, False)):
        relax, whole = ARF(m=m).costs(*batch).tolist()
        assert (relax > 0) == selects
        assert whole > 0


def test_the_weight_of_arf_settles_where_it_should() -> None:
    scores, labels, mask = random_batch()
    loss = ARF(m=3, weighting="both").double()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(scores, labels, mask).backward()
        optimizer.step()
    torch.testing.assert_close((2 * loss.log_w.detach()).exp(), loss.costs(scores, labels, mask), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("distillation", {"kind": "hinge"}, "kind of loss distillation is 'hinge': use one of softmax, logloss, pair"),
        ("dftopk", {"k": 0}, "k of loss dftopk is 0: use a whole number from 1"),
        ("arf", {"m": 2.5}, "m of loss arf is 2.5: use a whole number from 1"),
        ("arf", {"weighting": "local"}, "weighting of loss arf is 'local': use one of global, both"),
        ("arf", {"tau": 0}, "tau of loss arf is 0: use a number from 1e-06"),
        ("approx_ndcg", {"alpha": "small"}, "alpha of loss approx_ndcg is 'small': use a number"),
        ("rankmax", {"reduce": "median"}, "reduce of loss rankmax is 'median': use one of mean, sum"),
    ],
)
def test_a_wrong_value_of_an_option_is_named(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TrainError, match=complaint):
        LOSSES[name](**options)


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


def test_equal_balance_gives_every_term_the_gradient_norm_of_the_last_and_follows_it() -> None:
    scores, labels, mask = random_batch(dtype=torch.float32)
    scores.requires_grad_()
    hybrid = Hybrid(grades=GRADES)
    hybrid(scores, labels, mask)
    factors = hybrid.norms[-1] / hybrid.norms
    slopes = [torch.autograd.grad(cost, scores)[0].norm() for cost in hybrid._costs(scores, labels, mask)]
    torch.testing.assert_close(factors * torch.stack(slopes), slopes[-1].expand(3))
    flat = scores.detach() / 100  # where SoftSort is steeper
    flat.requires_grad_()
    for _ in range(300):
        hybrid(flat, labels, mask)
    slopes = [torch.autograd.grad(cost, flat)[0].norm() for cost in hybrid._costs(flat, labels, mask)]
    torch.testing.assert_close(hybrid.norms, torch.stack(slopes), rtol=0.05, atol=0)
    hybrid.eval()
    restored = Hybrid(grades=GRADES)
    restored.load_state_dict(hybrid.state_dict())
    restored.eval()
    torch.testing.assert_close(restored(scores, labels, mask), hybrid(scores, labels, mask))


def test_a_term_that_never_has_a_gradient_leaves_the_balance_alone() -> None:
    scores, labels, mask = random_batch(dtype=torch.float32)
    hybrid = Hybrid(grades=GRADES)
    cost, slope = cost_and_slope(hybrid, (scores, labels._replace(soft=torch.zeros_like(labels.soft)), mask))
    assert cost.isfinite()
    assert slope.isfinite().all()
    assert hybrid.norms[0] == 0


@pytest.mark.parametrize(
    ("distill", "kind"), [("softmax", "softmax"), ("logloss", "logloss"), ("pairwise", "pairwise")]
)
def test_the_hybrid_distils_in_the_way_it_is_asked_to(distill: str, kind: str) -> None:
    batch = random_batch()
    hybrid = Hybrid(grades=GRADES, soft_top=SOFT_TOP, distill=distill, balance="fixed")
    term = distillation(*batch, kind=kind, soft_top=SOFT_TOP)
    torch.testing.assert_close(hybrid.costs(*batch)[0], term)


def test_only_logloss_learns_a_shift_before_distillation() -> None:
    assert {name for name, _ in Hybrid(distill="logloss").named_parameters()} == {"log_scale", "shift"}
    assert {name for name, _ in Hybrid(distill="pairwise").named_parameters()} == {"log_scale"}
    assert not list(Hybrid(distill="none").parameters())


@pytest.mark.parametrize("distill", ["softmax", "logloss"])
@pytest.mark.parametrize("balance", ["equal", "learned", "fixed"])
def test_gradients_reach_every_parameter_of_the_hybrid(balance: str, distill: str) -> None:
    scores, labels, mask = random_batch(dtype=torch.float32)
    hybrid = Hybrid(grades=GRADES, balance=balance, distill=distill)
    hybrid(scores.requires_grad_(), labels, mask).backward()
    assert hybrid.log_scale is not None
    for name, parameter in hybrid.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.all(), name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"balance": "even"}, "balance of loss hybrid is 'even'"),
        ({"weights": {"softsort": 1.0, "luck": 1.0}}, "no term 'luck'"),
        ({"options": {"softsort": {"taw": 1}}}, "no option 'taw'"),
        ({"options": {"rankmax": {"rivals": "all"}}}, "'rankmax', which is not a term"),
        ({"distill": "hinge"}, "distill of loss hybrid is 'hinge'"),
        ({"distill": "none", "weights": {"distillation": 1.0}}, "no term left"),
    ],
)
def test_a_wrong_option_of_the_hybrid_is_named(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(TrainError, match=complaint):
        Hybrid(grades=GRADES, **options)


# --- a known order, learned -----------------------------------------------------------------------------------------


def kendall_tau(a: Tensor, b: Tensor) -> float:
    """Of the pairs within each list (b, n), the share in the same order less the share in the other."""
    signs = [(x.unsqueeze(2) - x.unsqueeze(1)).sign() for x in (a, b)]
    return float((signs[0] * signs[1]).sum() / signs[1].abs().sum())


TAU = {  # what was reached, less .01 to .02
    "bce": 0.94,
    "softmax": 0.93,
    "distillation": 0.96,
    "softsort": 0.98,
    "rankmax": 0.97,
    "am_rankmax": 0.97,
    "ranknet": 0.95,
    "approx_ndcg": 0.96,
    "lambdaloss": 0.97,
    "dftopk": 0.94,
    "arf": 0.96,
    "hybrid": 0.97,
    "arf of fixed k": 0.94,
    "dftopk of fixed k": 0.95,
    "lambdarank": 0.89,
    "weighted logloss": 0.98,
    "pairwise logloss": 0.95,
    "hybrid by weighted logloss": 0.97,
    "hybrid without distillation": 0.97,
}


@pytest.mark.parametrize("name", CASES)
def test_a_linear_model_recovers_the_order_it_is_taught(name: str) -> None:
    """24 items of 6 features, of which a fixed direction decides; the model starts in the opposite one."""
    draw = torch.Generator().manual_seed(0)
    items, truth = torch.randn(80, 24, 6, generator=draw), torch.tensor([2.0, -1.5, 1.0, 0.7, -0.4, 0.2])
    worth = items @ truth
    place = worth.argsort(dim=1, descending=True).argsort(dim=1)
    grade = sum((place < kept).long() for kept in (2, 5, 9))
    shown = torch.rand(80, 24, generator=draw) < 0.6
    labels = Labels(grade, SOFT_TOP * worth.sigmoid() * shown, shown)
    direction = (-0.3 * truth).requires_grad_()
    loss = make(name)
    optimizer = torch.optim.Adam([direction, *loss.parameters()], lr=0.05)
    for step in range(150):
        rows = torch.arange(20) + 20 * (step % 3)  # 60 lists to learn from, 20 to judge by
        optimizer.zero_grad()
        loss(
            items[rows] @ direction, Labels(*(x[rows] for x in labels)), torch.ones(20, 24, dtype=torch.bool)
        ).backward()
        optimizer.step()
    assert kendall_tau(items[60:] @ direction.detach(), worth[60:]) > TAU[name]
