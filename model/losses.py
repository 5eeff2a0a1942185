"""What training minimises: scores and labels of a batch of lists -> one number, the mean over its lists.

Every loss is a pure function `loss(scores, labels, mask)` of scores (b, n) float, labels, and mask (b, n) bool, False
on padding, which has no influence whatever it holds. Lists that are all padding are not counted. Scores in half
precision are widened first. `LOSSES` gives each as a module with its options bound.

Formulas are printed as sums over the positives, pairs, ranks or impressions of a list; `reduce="mean"`, our own
default, averages them within the list, so that long lists do not drown short ones. `reduce="sum"` is the formula as
printed.

Memory: pairs of a positive and another item are rows (m, n), m the positives of the batch; pairs of impressions are
(b, i, i), i those of the longest list; only ARF holds (b, n, n). No loss needs more than O(b n^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.errors import TrainError
from model.layers import wide

Balance = Literal["equal", "learned", "fixed"]
Reduce = Literal["mean", "sum"]
Distillation = Literal["softmax", "logloss", "pairwise"]
Distill = Literal["softmax", "logloss", "pairwise", "none"]
Weighting = Literal["global", "both"]

MARGIN = 1.0
SPREAD_FLOOR = 1e-2  # below this deviation of a list's scores, SoftSort's tau shrinks no further
BALANCE_BATCHES = 50  # that a balance remembers
SCALE_LIMIT = math.log(100.0)  # of the learned scale before distillation
TOLD = {"grades", "soft_top"}  # what every loss is told of the log: the ladder's top grade, the greatest soft label
LEAST = {"margin": 0.0, "mu": 0.0, "k": 1, "m": 1, "alpha": 1e-6, "power": 1e-6, "tau": 1e-6}  # of number options


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


class _Rows(NamedTuple):
    """One row for each positive of the batch: (m, n) in place of (b, n, n). Only where all are positive is m = b n."""

    list: Tensor  # (m,) the list of a positive j
    y_j: Tensor  # (m, 1)
    y_i: Tensor  # (m, n) of the items of its list
    gap: Tensor  # (m, n) z_i - z_j
    place: Tensor  # (m,) its column
    other: Tensor  # (m, n) bool, False on padding and on itself

    @property
    def lower(self) -> Tensor:
        return self.other & (self.y_i < self.y_j)


def _rows(at: _Lists) -> _Rows:
    row, column = (at.y > 0).nonzero(as_tuple=True)
    y_j, z_j = at.y[row, column].unsqueeze(1), at.z[row, column].unsqueeze(1)
    other = at.mask[row] & (torch.arange(at.z.shape[1], device=row.device) != column.unsqueeze(1))
    return _Rows(row, y_j, at.y[row], at.z.index_select(0, row) - z_j, column, other)


def _by_list(at: _Lists, rows: _Rows, cost: Tensor) -> Tensor:
    """Sums over the positives of each list: (m,) -> (b,)."""
    return cost.new_zeros(len(at.z)).index_add(0, rows.list, cost)


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
    rows = _rows(at)
    rival = rows.other if all_rivals else rows.lower  # the positive itself is the 1 in the logarithm
    violation = (rows.gap + margin(rows.y_j, rows.y_i)).relu() * rival
    return _mean(at, _by_list(at, rows, violation.sum(dim=1).log1p()), (at.y > 0).sum(dim=1), reduce)


def ranknet(scores: Tensor, labels: Labels, mask: Tensor, *, reduce: Reduce = "mean") -> Tensor:
    """sum_{y_j > y_i} log(1 + exp(z_i - z_j)), Burges et al., ICML 2005, over the pairs of unlike grade of a list."""
    at = _lists(scores, labels, mask)
    rows = _rows(at)  # of two unlike grades the higher is positive
    cost = _softplus(rows.gap) * rows.lower
    pairs = _by_list(at, rows, rows.lower.sum(dim=1).to(cost.dtype))
    return _mean(at, _by_list(at, rows, cost.sum(dim=1)), pairs, reduce)


def approx_ndcg(scores: Tensor, labels: Labels, mask: Tensor, *, alpha: float = 0.1) -> Tensor:
    """1 - NDCG with smooth ranks, Qin et al., Information Retrieval 2010; Bruch et al., SIGIR 2019.

        rank_j = 1 + sum_{i != j} sigmoid((z_i - z_j) / alpha),   gain 2^grade - 1

    A list without positives costs 0.
    """
    at = _lists(scores, labels, mask)
    rows = _rows(at)
    rank = 1 + ((rows.gap / alpha).sigmoid() * rows.other).sum(dim=1)  # (m,)
    ndcg = _by_list(at, rows, _gain(at)[rows.list, rows.place] / (1 + rank).log2())
    return ((at.y > 0).any(dim=1).to(ndcg.dtype) - ndcg).sum() / at.lists


def lambdaloss(scores: Tensor, labels: Labels, mask: Tensor, *, mu: float = 10.0) -> Tensor:
    """NDCG-Loss2++ of Wang et al., CIKM 2018: RankNet's pairs, weighted by what they are worth in NDCG.

        sum_{y_j > y_i} (rho_ij + mu delta_ij) |G_i - G_j| log2(1 + exp(z_i - z_j)),   G = (2^grade - 1) / best DCG
        rho_ij = |1/D(rank_i) - 1/D(rank_j)|,   delta_ij = 1/D(|rank_i - rank_j|) - 1/D(|rank_i - rank_j| + 1)

    with D(r) = log2(1 + r) and hard ranks, without gradient. mu = 0 is LambdaRank. Items of equal scores share their
    mean rank and weigh as neighbours do (ours: an order among them would be that of the list).
    """
    at = _lists(scores, labels, mask)
    rows, gain, rank = _rows(at), _gain(at), _hard_ranks(at)
    discount = 1 / (1 + rank).log2()
    rank_j, discount_j, gain_j = (x[rows.list, rows.place].unsqueeze(1) for x in (rank, discount, gain))
    apart = (rank[rows.list] - rank_j).abs().clamp_min(1)  # (m, n)
    delta = 1 / (1 + apart).log2() - 1 / (2 + apart).log2()
    weight = ((discount[rows.list] - discount_j).abs() + mu * delta) * (gain[rows.list] - gain_j).abs() * rows.lower
    return (weight * _softplus(rows.gap)).sum() / math.log(2) / at.lists


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact where functional.softplus turns linear."""
    return -functional.logsigmoid(-x)


def _gain(at: _Lists) -> Tensor:
    """(b, n): 2^grade - 1 over the list's best DCG; 0 in a list without positives."""
    gain = at.y.exp2() - 1
    place = torch.arange(at.z.shape[1], device=gain.device, dtype=gain.dtype)
    best = (gain.sort(dim=1, descending=True).values / (2 + place).log2()).sum(dim=1, keepdim=True)
    return gain / best.masked_fill(best == 0, 1.0)


def _hard_ranks(at: _Lists) -> Tensor:
    """(b, n): rank of each item by score, from 1, the mean of the ranks that equal scores share. No gradient."""
    below, upto = _counts(at)
    return at.mask.sum(dim=1, keepdim=True) - (below + upto - 1).to(at.z.dtype) / 2


def _counts(at: _Lists) -> tuple[Tensor, Tensor]:
    """(b, n) int each: how many items of the list score less, and how many score no more, itself among them."""
    z = at.z.detach().masked_fill(~at.mask, math.inf)
    ascending = z.sort(dim=1).values
    below, upto = torch.searchsorted(ascending, z), torch.searchsorted(ascending, z, right=True)
    return below, upto.minimum(at.mask.sum(dim=1, keepdim=True))  # of padding, which stands last, all items


def dftopk(scores: Tensor, labels: Labels, mask: Tensor, *, k: int | None = None, tau: float = 1.0) -> Tensor:
    """Binary cross-entropy of being among the first k, mean over the items of a list (arXiv 2510.11472).

        f_i = sigmoid((z_i - (z_[k] + z_[k+1]) / 2) / tau)

    The target is the first k by (grade, then p), items that tie there sharing what is left. By default k is the number
    of positives of the list (ours). A list that is no longer than k, or has no k, costs 0.
    """
    at = _lists(scores, labels, mask)
    first, count = _wanted(at, k)
    length = mask.sum(dim=1, keepdim=True)
    cuts = (count > 0) & (count < length)  # (b, 1)
    ranked = at.z.detach().masked_fill(~mask, -math.inf).sort(dim=1, descending=True).values
    kept, dropped = (_holder(at, ranked.gather(1, (count + step).clamp(0, ranked.shape[1] - 1))) for step in (-1, 0))
    logit = (at.z - (kept + dropped) / 2) / tau
    cost = functional.binary_cross_entropy_with_logits(logit, first, reduction="none")
    return _mean(at, cost.masked_fill(~(mask & cuts), 0.0).sum(dim=1), length.squeeze(1))


def _holder(at: _Lists, value: Tensor) -> Tensor:
    """(b, 1): a score of each list as its holder's, the mean of all who have it, so that none is picked by place."""
    holds = at.mask & (at.z.detach() == value)
    return (at.z * holds).sum(dim=1, keepdim=True) / holds.sum(dim=1, keepdim=True).clamp_min(1)


def _wanted(at: _Lists, k: int | None) -> tuple[Tensor, Tensor]:
    """(b, n): the share of each item in the first k ranks by (grade, p); (b, 1): k, of None the list's positives."""
    positive = at.y > 0
    if k is None:
        return positive.to(at.z.dtype), positive.sum(dim=1, keepdim=True)
    above, tied = _places(at._replace(shown=at.mask))
    share = (k - above).clamp_min(0).minimum(tied).to(at.z.dtype) / tied.clamp_min(1)
    return share.masked_fill(~at.mask, 0.0), torch.full_like(above[:, :1], k)


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
    above, tied = _places(at)
    ordered = at.shown & (tied < at.shown.sum(dim=1, keepdim=True))  # an order to learn
    rank = torch.arange(at.z.shape[1], device=at.z.device).view(1, -1, 1)
    holds = (rank >= above.unsqueeze(1)) & (rank < (above + tied).unsqueeze(1)) & ordered.unsqueeze(1)
    return torch.where(holds, (1 / tied.clamp_min(1).to(at.z.dtype)).unsqueeze(1), 0.0)


def _places(at: _Lists) -> tuple[Tensor, Tensor]:
    """(b, n) int each: how many impressions come before an item by (grade, p), and how many tie with it, itself too."""
    by_p = at.p.argsort(dim=1, descending=True, stable=True)
    y = at.y.masked_fill(~at.shown, -math.inf)  # last
    order = by_p.gather(1, y.gather(1, by_p).argsort(dim=1, descending=True, stable=True))
    y, p = y.gather(1, order), at.p.gather(1, order)
    new = torch.ones_like(at.shown)
    new[:, 1:] = (y[:, 1:] != y[:, :-1]) | (p[:, 1:] != p[:, :-1])
    group = new.cumsum(dim=1) - 1
    tied = torch.zeros_like(order).scatter_add(1, group, torch.ones_like(order)).gather(1, group)
    start = (torch.arange(new.shape[1], device=new.device) * new).cummax(dim=1).values
    return torch.empty_like(order).scatter(1, order, start), torch.empty_like(order).scatter(1, order, tied)


def _standardised(at: _Lists) -> Tensor:
    """z over the impressions of each list with mean 0 and deviation 1, 0 elsewhere."""
    count = at.shown.sum(dim=1, keepdim=True).clamp_min(1)
    centred = at.z - (at.z * at.shown).sum(dim=1, keepdim=True) / count
    centred = centred.masked_fill(~at.shown, 0.0)
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred / (variance + SPREAD_FLOOR**2).sqrt()


# --- the teacher -----------------------------------------------------------------------------------------------------


def distillation(
    scores: Tensor,
    labels: Labels,
    mask: Tensor,
    *,
    kind: Distillation = "softmax",
    soft_top: float = 1.0,
    reduce: Reduce = "mean",
) -> Tensor:
    """The teacher's p taught to the impressions of each list, in one of three ways.

        softmax    -sum_i p_i log softmax(z)_i; p is not normalised: a list that the teacher likes weighs more
        logloss    -sum_i p_i log sigmoid(z_i) + (1 - p_i) log(1 - sigmoid(z_i))
        pairwise   sum_{p_i > p_j} (p_i - p_j) log(1 + exp(z_j - z_i))

    Logloss needs probabilities: p is divided by `soft_top`, its greatest value, and clipped to 1 (ours: above 1 the
    cost has no lower bound). A list of which the teacher says nothing (p = 0 throughout) costs 0.
    """
    at = _lists(scores, labels, mask)
    if kind == "pairwise":
        return _pairwise(_impressions(at), reduce)
    if kind == "logloss":
        judged = (at.shown & (at.p > 0)).any(dim=1, keepdim=True)
        cost = functional.binary_cross_entropy_with_logits(at.z, (at.p / soft_top).clamp_max(1.0), reduction="none")
        cost = cost.masked_fill(~(at.shown & judged), 0.0)
    else:
        cost = -at.p * _log_softmax(at.z, at.shown)
    return _mean(at, cost.sum(dim=1), at.shown.sum(dim=1), reduce)


def _pairwise(at: _Lists, reduce: Reduce) -> Tensor:
    """(b, i, j) of impressions; the mean is over pairs of unlike p."""
    above = (at.p.unsqueeze(2) - at.p.unsqueeze(1)).relu() * (at.shown.unsqueeze(2) & at.shown.unsqueeze(1))
    cost = above * _softplus(at.z.unsqueeze(1) - at.z.unsqueeze(2))
    return _mean(at, cost.sum(dim=(1, 2)), (above > 0).sum(dim=(1, 2)), reduce)


# --- modules ---------------------------------------------------------------------------------------------------------


FUNCTIONS: dict[str, Loss] = {
    "bce": bce,
    "softmax": softmax,
    "distillation": distillation,
    "softsort": softsort,
    "rankmax": rankmax,
    "am_rankmax": am_rankmax,
    "ranknet": ranknet,
    "approx_ndcg": approx_ndcg,
    "lambdaloss": lambdaloss,
    "dftopk": dftopk,
}


def _check(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """TrainError names an option that the loss does not take, or a value out of its choices or range."""
    hints = get_type_hints(function)
    known = hints.keys() - {"scores", "labels", "mask", "return"} - TOLD
    for option, value in options.items():
        if option not in known:
            raise TrainError(f"loss {name} has no option {option!r}: use {', '.join(sorted(known)) or 'none'}")
        choices = get_args(hints[option]) if get_origin(hints[option]) is Literal else ()
        if choices and value not in choices:
            raise TrainError(f"{option} of loss {name} is {value!r}: use one of {', '.join(choices)}")
        if option in LEAST and value is not None and not _in_range(value, LEAST[option]):
            what = "whole number" if isinstance(LEAST[option], int) else "number"
            raise TrainError(f"{option} of loss {name} is {value!r}: use a {what} from {LEAST[option]:g}")


def _in_range(value: object, least: float) -> bool:
    numbers = int if isinstance(least, int) else (int, float)
    return isinstance(value, numbers) and not isinstance(value, bool) and value >= least


class Listwise(nn.Module):
    """One function with its options. Every loss is told the top grade and the greatest soft label; few need them."""

    def __init__(self, name: str, *, grades: int = 1, soft_top: float = 1.0, **options: Any) -> None:
        super().__init__()
        _check(name, FUNCTIONS[name], options)
        told = {"grades": grades, "soft_top": soft_top}
        takes = signature(FUNCTIONS[name]).parameters
        self.function = partial(FUNCTIONS[name], **options, **{key: told[key] for key in TOLD & takes.keys()})

    def forward(self, scores: Tensor, labels: Labels, mask: Tensor) -> Tensor:
        return self.function(scores, labels, mask)


class Hybrid(nn.Module):
    """RankTower's loss: distillation + fine-grained sorting on impressions, Rankmax on the whole list; a weighted sum.

    `weights` names the terms; `options` are theirs. `balance` says how terms of unlike size are made to meet:
        equal    a term's gradient in the scores gets the norm of the last term's; both norms are means over the last
                 50 or so training batches where the term has one, and saved with the module
        learned  L / (2 w^2) + log w, w learned per term (Kendall et al., CVPR 2018)
        fixed    the weights alone
    `distill` is the kind of its distillation, or "none" to leave the term out.
    `distill_scale` multiplies scores before distillation by a learned positive number: soft labels and margins ask for
    different scales. Logloss, which alone sees a shift of all scores, gets a learned shift as well.
    The slides name the three terms; their weights and balance are our own design (experiments/LOG.md).
    """

    norms: Tensor  # (terms,) of each term's gradient in the scores
    measured: Tensor  # (terms,) batches behind each norm

    def __init__(
        self,
        *,
        grades: int = 1,
        soft_top: float = 1.0,
        weights: Mapping[str, float] | None = None,
        balance: Balance = "equal",
        distill: Distill = "softmax",
        distill_scale: bool = True,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        _check("hybrid", type(self).__init__, {"balance": balance, "distill": distill})
        self.weights = dict(weights or {"distillation": 0.3, "softsort": 0.3, "am_rankmax": 1.0})
        options = dict(options or {})
        for name in self.weights.keys() - FUNCTIONS.keys():
            raise TrainError(f"hybrid has no term {name!r}: use {', '.join(FUNCTIONS)}")
        for name in options.keys() - self.weights.keys():
            raise TrainError(f"hybrid has options of {name!r}, which is not a term: use {', '.join(self.weights)}")
        if distill == "none":
            self.weights.pop("distillation", None)
        elif "distillation" in self.weights:
            options["distillation"] = {"kind": distill, **options.get("distillation", {})}
        if not self.weights:
            raise TrainError("hybrid has no term left: give weights of more than distillation, or another distill")
        self.terms = nn.ModuleDict(
            {name: Listwise(name, grades=grades, soft_top=soft_top, **options.get(name, {})) for name in self.weights}
        )
        self.balance = balance
        self.register_buffer("norms", torch.zeros(len(self.terms)))
        self.register_buffer("measured", torch.zeros(len(self.terms), dtype=torch.long))
        self.log_w = nn.Parameter(torch.zeros(len(self.terms))) if balance == "learned" else None
        learns_scale = distill_scale and "distillation" in self.terms
        self.log_scale = nn.Parameter(torch.zeros(())) if learns_scale else None
        self.shift = nn.Parameter(torch.zeros(())) if learns_scale and distill == "logloss" else None

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
        scaled = scaled if self.shift is None else scaled + self.shift
        return [term(scaled if name == "distillation" else scores, labels, mask) for name, term in self.terms.items()]

    def _balanced(self, k: int, cost: Tensor) -> Tensor:
        if self.log_w is not None:
            return cost * (-2 * self.log_w[k]).exp() / 2 + self.log_w[k]
        if self.balance == "equal" and self.norms[k] and self.norms[-1]:
            return cost * (self.norms[-1] / self.norms[k])
        return cost

    def _measure(self, costs: Sequence[Tensor], scores: Tensor) -> None:
        """Running mean of each term's gradient norm over about the last BALANCE_BATCHES batches with a gradient.

        The first batches tell little: where a network starts with scores nearly equal, SoftSort is many times steeper.
        """
        for k, cost in enumerate(costs):
            norm = torch.autograd.grad(cost, scores, retain_graph=True)[0].norm()
            self.measured[k] += norm > 0
            share = self.measured[k].clamp(1, BALANCE_BATCHES).reciprocal()
            self.norms[k] += (norm - self.norms[k]) * share * (norm > 0)


class ARF(nn.Module):
    """Relaxed recall plus the whole order through NeuralSort, with a learned weight. Wang et al., WWW 2024.

        P row k = softmax_j(((n + 1 - 2k) z_j - sum_i |z_j - z_i|) / tau)                     over the n items of a list
        relax   = -1/n sum_j (sum_{r <= k} P_y)_j log(1/m sum_{r <= m} P_z)_j
        global  = -1/n^2 sum_{k,j} P_y log P_z

    m items are kept, the first k of them matter. By default k is the number of positives of the list (ours; their
    fixed k fits lists that are ordered throughout). A list of m items or fewer has nothing to select: its relax is 0.
    P_y is the hard order by (grade, then p), ties sharing their ranks as in `softsort`; a list in which all tie costs
    nothing. `weighting` is that of the authors' later code, with w learned, or weighs both terms:
        global  relax + global / (2 w^2) + log w
        both    relax / (2 w1^2) + global / (2 w2^2) + log w1 + log w2
    Not normalised by the spread of z, as published, so that tau must grow with n. Memory: (b, n, n).
    """

    weights = ("relax", "global")  # the names of `costs`

    def __init__(
        self,
        *,
        grades: int = 1,
        soft_top: float = 1.0,
        k: int | None = None,
        m: int = 20,
        tau: float = 50.0,
        weighting: Weighting = "global",
    ) -> None:
        super().__init__()
        _check("arf", type(self).__init__, {"k": k, "m": m, "tau": tau, "weighting": weighting})
        self.k, self.m, self.tau, self.weighting = k, m, tau, weighting
        self.log_w = nn.Parameter(torch.zeros(1 if weighting == "global" else 2))

    def forward(self, scores: Tensor, labels: Labels, mask: Tensor) -> Tensor:
        relax, whole = self._costs(scores, labels, mask)
        weighted = whole * (-2 * self.log_w[-1]).exp() / 2
        relaxed = relax if self.weighting == "global" else relax * (-2 * self.log_w[0]).exp() / 2
        return relaxed + weighted + self.log_w.sum()

    def costs(self, scores: Tensor, labels: Labels, mask: Tensor) -> Tensor:
        """Both terms alone (2,), without their weights: for a log of training."""
        return torch.stack(self._costs(scores, labels, mask))

    def _costs(self, scores: Tensor, labels: Labels, mask: Tensor) -> tuple[Tensor, Tensor]:
        at = _lists(scores, labels, mask)
        at = at._replace(shown=mask)  # the whole list is to be ordered
        log_p, wanted = _log_neuralsort(at, self.tau), _ranks(at)  # (b, k, j)
        count = mask.sum(dim=1).clamp_min(1)  # (b,)
        first, _ = _wanted(at, self.k)
        first = first * wanted.any(dim=1)  # nothing in a list in which all tie
        kept = log_p[:, : self.m].logsumexp(dim=1) - math.log(self.m)  # (b, j)
        relax = -(first * kept).sum(dim=1).masked_fill(count <= self.m, 0.0) / count
        whole = -torch.linalg.vecdot(wanted.flatten(1), log_p.flatten(1)) / count**2
        return relax.sum() / at.lists, whole.sum() / at.lists


def _log_neuralsort(at: _Lists, tau: float) -> Tensor:
    """(b, k, j): log of NeuralSort's row k <= n; very low, but finite, on padding. Grover et al., ICLR 2019."""
    rank = torch.arange(1, at.z.shape[1] + 1, device=at.z.device)
    factor = (at.mask.sum(dim=1, keepdim=True) + 1 - 2 * rank).to(at.z.dtype)  # (b, k): n + 1 - 2k
    minus = (-_apart(at) / tau).masked_fill(~at.mask, torch.finfo(at.z.dtype).min / 4)  # (b, j)
    outer = torch.stack((factor, torch.ones_like(factor)), dim=2) @ torch.stack((at.z / tau, minus), dim=1)
    return outer.log_softmax(dim=2)


def _apart(at: _Lists) -> Tensor:
    """(b, n): sum_i |z_j - z_i| over the items of a list, in O(n log n). Equal scores do not push each other."""
    count = at.mask.sum(dim=1, keepdim=True)
    mean = at.z.detach().sum(dim=1, keepdim=True) / count.clamp_min(1)  # what all share would only cost digits
    z = (at.z - mean).masked_fill(~at.mask, 0.0)
    order = z.masked_fill(~at.mask, math.inf).argsort(dim=1)  # padding, which adds nothing, last
    sums = functional.pad(z.gather(1, order).cumsum(dim=1), (1, 0))  # (b, n + 1): of the lowest 0, 1, .. n
    below, upto = _counts(at)
    return (below + upto - count) * z - sums.gather(1, below) + sums[:, -1:] - sums.gather(1, upto)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(Listwise, name) for name in FUNCTIONS},
    "arf": ARF,
    "hybrid": Hybrid,
}
