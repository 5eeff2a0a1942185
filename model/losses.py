"""What training minimises: scores and labels of a batch of lists -> one number, the mean over its lists.

Every loss is a pure function `loss(scores, labels, mask)` of scores (b, n) float, labels, and mask (b, n) bool, False
on padding, which has no influence whatever it holds. Lists that are all padding are not counted. Scores in half
precision are widened first. `LOSSES` gives each as a module with its options bound.

Formulas are printed as sums over the positives, ranks or impressions of a list; `reduce="mean"`, our own default,
averages them within the list, so that long lists do not drown short ones. `reduce="sum"` is the formula as printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.errors import TrainError
from model.layers import wide

Balance = Literal["equal", "learned", "fixed"]
Reduce = Literal["mean", "sum"]

MARGIN = 1.0
SPREAD_FLOOR = 1e-2  # below this deviation of a list's scores, SoftSort's tau shrinks no further
BALANCE_BATCHES = 20
SCALE_LIMIT = math.log(100.0)  # of the learned scale before distillation


class Labels(NamedTuple):
    """What is known of each item of a list, all (b, n)."""

    grade: Tensor  # int or float: 0 without feedback, 1.. by the ladder
    soft: Tensor  # float: the teacher's p >= 0, not normalised, 0 where unknown
    impression: Tensor  # bool: was shown


Loss = Callable[..., Tensor]  # (scores, labels, mask, **options) -> scalar


class _Lists(NamedTuple):
    """A batch with padding zeroed."""

    z: Tensor  # (b, n) float32 or wider
    y: Tensor  # (b, n) the grade, as z
    p: Tensor  # (b, n) the teacher's, as z
    shown: Tensor  # (b, n) bool
    mask: Tensor  # (b, n) bool
    lists: Tensor  # how many are not all padding, at least 1


def _lists(scores: Tensor, labels: Labels, mask: Tensor) -> _Lists:
    z = wide(scores).masked_fill(~mask, 0.0)
    y = labels.grade.to(z.dtype).masked_fill(~mask, 0.0)
    p = labels.soft.to(z.dtype).masked_fill(~mask, 0.0)
    return _Lists(z, y, p, labels.impression & mask, mask, mask.any(dim=1).sum().clamp_min(1))


def _log_softmax(z: Tensor, members: Tensor) -> Tensor:
    """log softmax over the members of each row, 0 elsewhere. Never log(softmax): float32 gives log 0 at |z| ~ 100."""
    lowest = torch.finfo(z.dtype).min
    return z.masked_fill(~members, lowest).log_softmax(dim=-1).masked_fill(~members, 0.0)


def _mean(at: _Lists, per_list: Tensor, entries: Tensor, reduce: Reduce = "mean") -> Tensor:
    """Mean over lists of costs (b,), each divided by its number of entries (b,) first unless they are to be summed."""
    if reduce == "mean":
        per_list = per_list / entries.clamp_min(1)
    return per_list.sum() / at.lists


# --- hard labels -----------------------------------------------------------------------------------------------------


def bce(scores: Tensor, labels: Labels, mask: Tensor) -> Tensor:
    """Binary cross-entropy of grade > 0, mean over the items of a list."""
    at = _lists(scores, labels, mask)
    cost = functional.binary_cross_entropy_with_logits(at.z, (at.y > 0).to(at.z.dtype), reduction="none")
    return _mean(at, cost.masked_fill(~mask, 0.0).sum(dim=1), mask.sum(dim=1))


def softmax(scores: Tensor, labels: Labels, mask: Tensor) -> Tensor:
    """-log softmax(z) over the whole list, mean over its positives. 0 without positives."""
    at = _lists(scores, labels, mask)
    positive = at.y > 0
    return _mean(at, -(positive * _log_softmax(at.z, mask)).sum(dim=1), positive.sum(dim=1))


def rankmax(
    scores: Tensor, labels: Labels, mask: Tensor, *, rivals: Literal["lower", "all"] = "lower", reduce: Reduce = "mean"
) -> Tensor:
    """sum_{j: y_j > 0} log(1 + sum_i (z_i - z_j + 1)_+), Kong et al., NeurIPS 2020. 0 without positives.

    `rivals` are the items i: of a lower grade, or all as printed, where positives compete with each other (two equal
    positives alone then cost 2 log 2).
    """
    return _rankmax(_lists(scores, labels, mask), lambda y_j, y_i: torch.ones_like(y_i), reduce, rivals == "all")


def am_rankmax(
    scores: Tensor,
    labels: Labels,
    mask: Tensor,
    *,
    margin: float = MARGIN,
    grades: int = 1,
    reduce: Reduce = "mean",
) -> Tensor:
    """sum_{j: y_j > 0} log(1 + sum_{i: y_i < y_j} (z_i - z_j + m_ij)_+) with m_ij = margin (y_j - y_i) / grades.

    The margin that grows with the distance of the grades is our own design; `grades` is the ladder's top.
    """
    return _rankmax(_lists(scores, labels, mask), lambda y_j, y_i: margin * (y_j - y_i) / grades, reduce)


def _rankmax(
    at: _Lists, margin: Callable[[Tensor, Tensor], Tensor], reduce: Reduce, all_rivals: bool = False
) -> Tensor:
    """One row for each positive of the batch: (m, n) in place of (b, n, n)."""
    positive = at.y > 0
    row, column = positive.nonzero(as_tuple=True)  # (m,) each
    y_i, y_j = at.y[row], at.y[row, column].unsqueeze(1)  # (m, n), (m, 1)
    gap = at.z.index_select(0, row) - at.z[row, column].unsqueeze(1)  # (m, n)
    rival = at.mask[row] if all_rivals else at.mask[row] & (y_i < y_j)
    if all_rivals:  # but itself, which is the 1 in the logarithm
        rival = rival & (torch.arange(at.z.shape[1], device=row.device) != column.unsqueeze(1))
    violation = (gap + margin(y_j, y_i)).relu() * rival
    cost = violation.sum(dim=1).log1p()  # (m,)
    return _mean(at, cost.new_zeros(len(at.z)).index_add(0, row, cost), positive.sum(dim=1), reduce)


# --- the order of impressions ----------------------------------------------------------------------------------------


def softsort(
    scores: Tensor,
    labels: Labels,
    mask: Tensor,
    *,
    tau: float = 1.0,
    power: float = 1.0,
    anchors: Literal["moving", "fixed"] = "moving",
    reduce: Reduce = "mean",
) -> Tensor:
    """Cross-entropy of the sorting matrix of (grade, then p) with SoftSort(z), over the ranks of the impressions.

        SoftSort(z)_kj = softmax_j(-|z_[k] - z_j|^power / tau),   z_[1] >= z_[2] >= ...       Prillo & Eisenschlos, 2020

    z is divided by its deviation within the list (gradient included), or the loss would fall by blowing up the scale
    alone. Items that tie in both grade and p share their ranks uniformly, and a list in which all tie costs 0.
    With `anchors` moving, gradient flows through the sorted values z_[k] too, as published: an item is drawn to its
    rank and the rank's holder to the item. Fixed anchors sort any list of free scores, moving ones do not; trained
    networks came out equal or better with moving ones (docs/decisions.md).
    """
    at = _impressions(_lists(scores, labels, mask))
    z = _standardised(at)
    order = z.masked_fill(~at.shown, -math.inf).argsort(dim=1, descending=True)  # impressions first
    ranked = z.gather(1, order)
    if anchors == "fixed":
        ranked = ranked.detach()
    distance = (ranked.unsqueeze(2) - z.unsqueeze(1)).abs()  # (b, k, j)
    log_p = _log_softmax(-(distance**power) / tau, at.shown.unsqueeze(1).expand_as(distance))
    return _mean(at, -(_ranks(at) * log_p).sum(dim=(1, 2)), at.shown.sum(dim=1), reduce)


def _impressions(at: _Lists) -> _Lists:
    """The impressions alone, moved to the front of each list: (b, m), m those of the longest list. Pairs cost m^2."""
    m = max(int(at.shown.sum(dim=1).max()), 1)
    front = at.shown.byte().argsort(dim=1, descending=True, stable=True)[:, :m]
    return at._replace(**{name: getattr(at, name).gather(1, front) for name in ("z", "y", "p", "shown", "mask")})


def _ranks(at: _Lists) -> Tensor:
    """(b, k, j): the share of item j in rank k when impressions are sorted by (grade, p), best first.

    `above` items come before j and `tied` share its ranks, so j has 1/tied of each rank in [above, above + tied).
    """
    pair = at.shown.unsqueeze(1) & at.shown.unsqueeze(2)  # (b, i, j)
    y_i, y_j, p_i, p_j = at.y.unsqueeze(2), at.y.unsqueeze(1), at.p.unsqueeze(2), at.p.unsqueeze(1)
    above = (pair & ((y_i > y_j) | ((y_i == y_j) & (p_i > p_j)))).sum(dim=1)  # (b, j)
    tied = (pair & (y_i == y_j) & (p_i == p_j)).sum(dim=1)
    ordered = at.shown & (tied < at.shown.sum(dim=1, keepdim=True))  # an order to learn
    rank = torch.arange(at.z.shape[1], device=at.z.device).view(1, -1, 1)
    holds = (rank >= above.unsqueeze(1)) & (rank < (above + tied).unsqueeze(1)) & ordered.unsqueeze(1)
    return holds.to(at.z.dtype) / tied.clamp_min(1).unsqueeze(1)


def _standardised(at: _Lists) -> Tensor:
    """z over the impressions of each list with mean 0 and deviation 1, 0 elsewhere."""
    count = at.shown.sum(dim=1, keepdim=True).clamp_min(1)
    centred = at.z - (at.z * at.shown).sum(dim=1, keepdim=True) / count
    centred = centred.masked_fill(~at.shown, 0.0)
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred / (variance + SPREAD_FLOOR**2).sqrt()


# --- the teacher -----------------------------------------------------------------------------------------------------


def distillation(scores: Tensor, labels: Labels, mask: Tensor, *, reduce: Reduce = "mean") -> Tensor:
    """-sum_i p_i log softmax(z)_i over impressions; p is not normalised: a list that the teacher likes weighs more."""
    at = _lists(scores, labels, mask)
    return _mean(at, -(at.p * _log_softmax(at.z, at.shown)).sum(dim=1), at.shown.sum(dim=1), reduce)


# --- modules ---------------------------------------------------------------------------------------------------------


FUNCTIONS: dict[str, Loss] = {
    "bce": bce,
    "softmax": softmax,
    "distillation": distillation,
    "softsort": softsort,
    "rankmax": rankmax,
    "am_rankmax": am_rankmax,
}


class Listwise(nn.Module):
    """One function with its options. Every loss is told the ladder's top grade; few need it."""

    def __init__(self, name: str, *, grades: int = 1, **options: Any) -> None:
        super().__init__()
        known = set(signature(FUNCTIONS[name]).parameters) - {"scores", "labels", "mask"}
        for option in options.keys() - known:
            raise TrainError(f"loss {name} has no option {option!r}: use {', '.join(sorted(known)) or 'none'}")
        if "grades" in known:
            options["grades"] = grades
        self.function = partial(FUNCTIONS[name], **options)

    def forward(self, scores: Tensor, labels: Labels, mask: Tensor) -> Tensor:
        return self.function(scores, labels, mask)


class Hybrid(nn.Module):
    """RankTower's loss: distillation + fine-grained sorting on impressions, Rankmax on the whole list; a weighted sum.

    `weights` names the terms; `options` are theirs. `balance` says how terms of unlike size are made to meet:
        equal    a term's gradient in the scores gets the norm of the last term's; both norms are means over the first
                 20 training batches where the term has one, then kept, and saved with the module
        learned  L / (2 w^2) + log w, w learned per term (Kendall et al., CVPR 2018)
        fixed    the weights alone
    `distill_scale` multiplies scores before distillation by a learned positive number: soft labels and margins ask for
    different scales. The slides name the three terms; their weights and balance are our own design.
    """

    norms: Tensor  # (terms,) of each term's gradient in the scores
    measured: Tensor  # (terms,) batches behind each norm

    def __init__(
        self,
        *,
        grades: int = 1,
        weights: Mapping[str, float] | None = None,
        balance: Balance = "equal",
        distill_scale: bool = True,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if balance not in get_args(Balance):
            raise TrainError(f"hybrid balance is {balance!r}: use one of {', '.join(get_args(Balance))}")
        self.weights = dict(weights or {"distillation": 1.0, "softsort": 1.0, "am_rankmax": 1.0})
        for name in self.weights.keys() - FUNCTIONS.keys():
            raise TrainError(f"hybrid has no term {name!r}: use {', '.join(FUNCTIONS)}")
        for name in (options or {}).keys() - self.weights.keys():
            raise TrainError(f"hybrid has options of {name!r}, which is not a term: use {', '.join(self.weights)}")
        self.terms = nn.ModuleDict(
            {name: Listwise(name, grades=grades, **(options or {}).get(name, {})) for name in self.weights}
        )
        self.balance = balance
        self.register_buffer("norms", torch.zeros(len(self.terms)))
        self.register_buffer("measured", torch.zeros(len(self.terms), dtype=torch.long))
        self.log_w = nn.Parameter(torch.zeros(len(self.terms))) if balance == "learned" else None
        learns_scale = distill_scale and "distillation" in self.terms
        self.log_scale = nn.Parameter(torch.zeros(())) if learns_scale else None

    def forward(self, scores: Tensor, labels: Labels, mask: Tensor) -> Tensor:
        costs = self._costs(scores, labels, mask)
        if self.balance == "equal" and self.training and scores.requires_grad:
            self._measure(costs, scores)
        total = scores.new_zeros(())
        for k, (weight, cost) in enumerate(zip(self.weights.values(), costs, strict=True)):
            total = total + weight * self._balanced(k, cost)
        return total

    def costs(self, scores: Tensor, labels: Labels, mask: Tensor) -> Tensor:
        """Each term alone (terms,), in the order of `weights`, neither weighted nor balanced: for a log of training."""
        return torch.stack(self._costs(scores, labels, mask))

    def _costs(self, scores: Tensor, labels: Labels, mask: Tensor) -> list[Tensor]:
        scaled = scores if self.log_scale is None else scores * self.log_scale.clamp(-SCALE_LIMIT, SCALE_LIMIT).exp()
        return [term(scaled if name == "distillation" else scores, labels, mask) for name, term in self.terms.items()]

    def _balanced(self, k: int, cost: Tensor) -> Tensor:
        if self.log_w is not None:
            return cost * (-2 * self.log_w[k]).exp() / 2 + self.log_w[k]
        if self.balance == "equal" and self.norms[k] and self.norms[-1]:
            return cost * (self.norms[-1] / self.norms[k])
        return cost

    def _measure(self, costs: Sequence[Tensor], scores: Tensor) -> None:
        """Running mean of each term's gradient norm over its first BALANCE_BATCHES batches with a gradient."""
        for k, cost in enumerate(costs):
            if self.measured[k] < BALANCE_BATCHES:
                norm = torch.autograd.grad(cost, scores, retain_graph=True)[0].norm()
                self.measured[k] += norm > 0
                self.norms[k] += (norm - self.norms[k]) / self.measured[k].clamp_min(1) * (norm > 0)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(Listwise, name) for name in FUNCTIONS},
    "hybrid": Hybrid,
}
