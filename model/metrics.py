"""Measure ranked lists: scores and grades in, Recall@K, NDCG@K, AUC, GAUC, intervals and calibration out.

A list metric takes ranked lists and a k and returns one value a list, NaN where the list has nothing to measure (no
positives), so that what is left out stays visible and can be counted. Ties take their expected value over a random
order of the tied items: a constant scorer equals a random one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from model.errors import DataError

CHUNK = 64  # bootstrap rounds held in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over lists and the bootstrap interval of it over users."""

    mean: float
    low: float
    high: float
    lists: int  # measured
    left_out: int  # without anything to measure

    def to_json(self) -> dict[str, float | int | None]:
        """The interval as plain numbers, null where nothing was measured: JSON has no NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """probability = sigmoid(a * score + b); `ece` is what is left of the error, `base_rate` the mean label."""

    a: float
    b: float
    ece: float
    base_rate: float

    def to_json(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """Where each item of each list stands: what list metrics read. (L, n) each."""

    before: np.ndarray  # int64, items that score higher
    tied: np.ndarray  # int64, items that score the same, itself included
    grade: np.ndarray  # int, 0 on padding
    mask: np.ndarray  # bool


def rank(scores: np.ndarray, grade: np.ndarray, mask: np.ndarray) -> Ranked:
    """Order each list once, for every metric. scores, grade, mask: (L, n), mask False on padding."""
    before, tied = _places(scores, mask)
    return Ranked(before=before, tied=tied, grade=np.where(mask, np.maximum(grade, 0), 0), mask=mask)


def recall(ranked: Ranked, k: int) -> np.ndarray:
    """Expected share of the positives in the first k, of the min(k, positives) that could be there; (L,) float64."""
    hit = np.clip((k - ranked.before) / ranked.tied, 0.0, 1.0)
    positive = ranked.grade > 0
    return _ratio((hit * positive).sum(axis=1), np.minimum(positive.sum(axis=1), k))


def ndcg(ranked: Ranked, k: int) -> np.ndarray:
    """Expected DCG@k over the ideal one, gain 2^grade - 1, discount 1/log2(place + 1); (L,) float64."""
    width = ranked.grade.shape[1]
    discount = np.where(np.arange(width) < k, 1.0 / np.log2(np.arange(width) + 2.0), 0.0)
    total = np.concatenate([[0.0], np.cumsum(discount)])
    expected = (total[np.minimum(ranked.before + ranked.tied, width)] - total[ranked.before]) / ranked.tied
    gain = np.exp2(ranked.grade.astype(np.float64)) - 1.0
    ideal = (-np.sort(-gain, axis=1) * discount).sum(axis=1)
    return _ratio((gain * expected).sum(axis=1), ideal)


def list_auc(ranked: Ranked, k: int = 0) -> np.ndarray:
    """Share of (positive, negative) pairs of a list in the right order, ties one half; (L,) float64. `k` has no say."""
    positive = ranked.grade > 0
    count, others = positive.sum(axis=1), (ranked.mask & ~positive).sum(axis=1)
    above = ((ranked.before + (ranked.tied - 1) / 2.0) * positive).sum(axis=1) - count * (count - 1) / 2.0
    return 1.0 - _ratio(above, count * others)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of flat arrays, ties one half; NaN when one class is absent."""
    area, _ = group_auc(scores, positive, np.zeros(len(scores), dtype=np.int64), 1)
    return float(area[0])


def group_auc(
    scores: np.ndarray, positive: np.ndarray, group: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each group and the group's size.

    scores: (m,) float; positive: (m,) bool; group: (m,) int in [0, groups). Returns (groups,) float64 with NaN where
    a class is absent, (groups,) int64 sizes.
    """
    _refuse_nan(scores)
    order = np.lexsort((scores, group))
    s, y, g = scores[order], positive[order].astype(np.float64), group[order]
    sizes = np.bincount(group, minlength=groups)
    ranks = _mean_rank(s, g) - (np.cumsum(sizes) - sizes)[g]
    count = np.bincount(g, weights=y, minlength=groups)
    rank_sum = np.bincount(g, weights=ranks * y, minlength=groups)
    return _ratio(rank_sum - count * (count - 1) / 2, count * (sizes - count)), sizes


def gauc(scores: np.ndarray, positive: np.ndarray, user: np.ndarray) -> float:
    """AUC by user, averaged with the number of exposures as weight; users with one class only are left out.

    scores: (m,); positive: (m,) bool; user: (m,) int. NaN when no user has both classes. Zhu et al., KDD 2017.
    """
    names, group = np.unique(user, return_inverse=True)
    area, sizes = group_auc(scores, positive, group.ravel(), len(names))
    known = ~np.isnan(area)
    return float(np.average(area[known], weights=sizes[known])) if known.any() else float("nan")


def bootstrap(
    columns: Mapping[str, np.ndarray],
    user: np.ndarray,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Mean of each column's numbers, with a percentile interval from resampling users with replacement.

    columns: name -> (L,) float, NaN is left out; user: (L,) int, resampled together and alike for all columns;
    weights: name -> (L,), 1 where not given.
    """
    users, group = np.unique(user, return_inverse=True)
    total, mass = np.zeros((2, len(users), len(columns)))
    for place, (name, values) in enumerate(columns.items()):
        weight = np.where(np.isnan(values), 0.0, (weights or {}).get(name, np.ones(len(values))))
        total[:, place] = np.bincount(group.ravel(), np.nan_to_num(values) * weight, len(users))
        mass[:, place] = np.bincount(group.ravel(), weight, len(users))
    means = _resampled_means(total, mass, samples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    found = {}
    for place, (name, values) in enumerate(columns.items()):
        known = int((~np.isnan(values)).sum())
        mean = float(total[:, place].sum() / mass[:, place].sum()) if known else float("nan")
        ends = {"low": float(low[place]), "high": float(high[place])} if known else {"low": mean, "high": mean}
        found[name] = Interval(mean=mean, **ends, lists=known, left_out=len(values) - known)
    return found


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, user: np.ndarray, *, samples: int = 1000) -> Interval:
    """Interval of the mean difference ours - theirs (L,) over the same lists, users (L,) resampled together."""
    return bootstrap({"difference": ours - theirs}, user, samples=samples)["difference"]


def calibrate(scores: np.ndarray, positive: np.ndarray, rounds: int = 50) -> Calibration:
    """Platt's a, b by Newton steps on the smoothed log loss, a kept above 0 so that the order never turns.

    scores: (m,) float; positive: (m,) bool. Platt 1999 with the target smoothing of Lin, Lin & Weng 2007.
    """
    _refuse_nan(scores)
    s, y = scores.astype(np.float64), positive.astype(np.float64)
    if len(s) == 0:
        return Calibration(a=1.0, b=0.0, ece=0.0, base_rate=0.0)
    target = np.where(positive, (y.sum() + 1) / (y.sum() + 2), 1 / (len(y) - y.sum() + 2))
    shift, spread = float(s.mean()), max(float(s.std()), 1e-6)
    a, b = _newton((s - shift) / spread, target, rounds)
    if a <= 0.0:  # scores order this sample worse than chance: keep the order, say almost nothing
        a, b = 1e-3, float(np.log(target.mean() / (1 - target.mean())))
    slope, offset = a / spread, b - a * shift / spread
    return Calibration(
        a=slope,
        b=offset,
        ece=expected_calibration_error(sigmoid(slope * s + offset), positive),
        base_rate=float(y.mean()),
    )


def expected_calibration_error(probability: np.ndarray, positive: np.ndarray, bins: int = 15) -> float:
    """Mean absolute gap of probability and frequency over bins of equal mass. Both (m,)."""
    if len(probability) == 0:
        return 0.0
    order = np.argsort(probability, kind="stable")
    which = np.arange(len(order)) * bins // len(order)
    gap = np.bincount(which, weights=probability[order] - positive[order].astype(np.float64), minlength=bins)
    return float(np.abs(gap).sum() / len(order))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def _places(scores: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each item of a list: how many score higher, and how many score the same, itself included; (L, n) int64."""
    _refuse_nan(scores[mask])
    key = np.where(mask, -scores.astype(np.float64), np.inf)
    order = np.argsort(key, axis=1, kind="stable")
    ranked = np.take_along_axis(key, order, axis=1)
    width = scores.shape[1]
    place = np.broadcast_to(np.arange(width), ranked.shape)
    new = np.ones(ranked.shape, dtype=bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    ends = np.ones_like(new)
    ends[:, :-1] = new[:, 1:]
    last = np.minimum.accumulate(np.where(ends, place, width)[:, ::-1], axis=1)[:, ::-1]
    before, tied = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(before, order, first, axis=1)
    np.put_along_axis(tied, order, last - first + 1, axis=1)
    return before, tied


def _mean_rank(scores: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Rank from 0 of each entry of arrays sorted by (group, score), ties sharing their mean rank; (m,) float64."""
    if len(scores) == 0:
        return np.zeros(0)
    new = np.concatenate([[True], (scores[1:] != scores[:-1]) | (group[1:] != group[:-1])])
    starts = np.flatnonzero(new)
    stops = np.append(starts[1:], len(scores))
    return np.repeat((starts + stops - 1) / 2.0, stops - starts)


def _resampled_means(total: np.ndarray, mass: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Weighted means (samples, C) of resamples of the users, each counted Poisson(1) times: the multinomial's limit.

    total, mass: (U, C), each user's sum and weight. A resample without weight takes the mean of the whole.
    """
    rng = np.random.default_rng(seed)
    whole = total.sum(axis=0) / np.maximum(mass.sum(axis=0), 1e-12)
    means = []
    for start in range(0, samples, CHUNK):
        times = rng.poisson(1.0, (min(CHUNK, samples - start), len(total))).astype(np.float64)
        drawn = times @ mass
        means.append(np.where(drawn > 0, times @ total / np.maximum(drawn, 1e-12), whole))
    return np.concatenate(means)


def _newton(x: np.ndarray, target: np.ndarray, rounds: int) -> tuple[float, float]:
    """Minimise the log loss of sigmoid(a x + b) against soft targets; x standardised, so a small ridge is harmless."""
    theta = np.array([0.0, float(np.log(target.mean() / (1 - target.mean())))])
    for _ in range(rounds):
        p = sigmoid(theta[0] * x + theta[1])
        weight = np.maximum(p * (1 - p), 1e-9)
        gradient = np.array([np.mean((p - target) * x), np.mean(p - target)])
        cross = np.mean(weight * x)
        hessian = np.array([[np.mean(weight * x * x), cross], [cross, np.mean(weight)]]) + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        theta = theta - np.clip(step, -4.0, 4.0)
        if np.abs(step).max() < 1e-10:
            break
    return float(theta[0]), float(theta[1])


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where bottom is 0; (L,) float64."""
    ratio: np.ndarray = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)
    return ratio


def _refuse_nan(scores: np.ndarray) -> None:
    """A NaN compares false with everything and would rank anywhere."""
    if np.isnan(scores).any():
        raise DataError(
            f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN: check the loss of the last epochs"
        )


ListMetric = Callable[[Ranked, int], np.ndarray]

METRICS: dict[str, ListMetric] = {"recall": recall, "ndcg": ndcg, "auc": list_auc}
