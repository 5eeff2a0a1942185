"""List metrics against a brute-force expectation over orders, known values, ties, padding, intervals, calibration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from model.errors import DataError
from model.metrics import (
    METRICS,
    Interval,
    Ranked,
    auc,
    bootstrap,
    calibrate,
    expected_calibration_error,
    gauc,
    list_auc,
    ndcg,
    paired_bootstrap,
    rank,
    recall,
    sigmoid,
)


def one(scores: list[float], grade: list[int]) -> Ranked:
    return rank(np.array([scores], dtype=np.float32), np.array([grade], dtype=np.int8), np.ones((1, len(grade)), bool))


def interval_of(values: np.ndarray, user: np.ndarray) -> Interval:
    return bootstrap({"value": values}, user)["value"]


def brute_force(name: str, scores: list[float], grade: list[int], k: int) -> float:
    """The mean of the plain metric over every order that the scores allow."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        ranked = [scores[i] for i in order]
        if any(a < b for a, b in itertools.pairwise(ranked)):
            continue
        if name == "recall":
            values.append(sum(grade[i] > 0 for i in order[:k]) / min(k, sum(g > 0 for g in grade)))
        else:
            gain = [2.0**g - 1 for g in grade]
            dcg = sum(gain[i] / math.log2(place + 2) for place, i in enumerate(order[:k]))
            values.append(dcg / sum(g / math.log2(place + 2) for place, g in enumerate(sorted(gain, reverse=True)[:k])))
    return float(np.mean(values))


@pytest.mark.parametrize("name", ["recall", "ndcg"])
@pytest.mark.parametrize("k", [1, 2, 3, 6, 10])
def test_ties_take_the_expected_value_over_their_orders(name: str, k: int) -> None:
    scores, grade = [2.0, 1.0, 1.0, 1.0, 0.5, 0.5], [0, 2, 0, 1, 1, 0]
    got = METRICS[name](one(scores, grade), k)[0]
    assert got == pytest.approx(brute_force(name, scores, grade, k))


@pytest.mark.parametrize("name", ["recall", "ndcg"])
def test_a_constant_scorer_equals_random(name: str) -> None:
    rng = np.random.default_rng(0)
    grade = (rng.random((40, 30)) < 0.15).astype(np.int8) * rng.integers(1, 4, (40, 30)).astype(np.int8)
    mask = np.ones((40, 30), dtype=bool)
    constant = np.nanmean(METRICS[name](rank(np.zeros((40, 30)), grade, mask), 10))
    random = np.mean([np.nanmean(METRICS[name](rank(rng.random((40, 30)), grade, mask), 10)) for _ in range(300)])
    assert constant == pytest.approx(random, abs=0.01)


def test_recall_divides_by_what_k_allows() -> None:
    assert recall(one([5, 4, 3, 2], [1, 1, 1, 1]), 2)[0] == 1.0
    assert recall(one([5, 4, 3, 2], [0, 1, 0, 1]), 2)[0] == 0.5


def test_ndcg_of_the_perfect_order_is_one_and_counts_grades() -> None:
    assert ndcg(one([3, 2, 1], [3, 1, 0]), 3)[0] == pytest.approx(1.0)
    wrong = ndcg(one([2, 3, 1], [3, 1, 0]), 3)[0]
    assert wrong == pytest.approx((1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3)))


@pytest.mark.parametrize("name", METRICS)
def test_padding_has_no_influence(name: str) -> None:
    scores, grade = np.array([[3.0, 1.0, 2.0, 1.0]]), np.array([[0, 1, 2, 0]])
    wide = rank(
        np.concatenate([scores, [[99.0, 99.0, -5.0]]], axis=1),
        np.concatenate([grade, [[3, -1, 3]]], axis=1),
        np.arange(7)[None, :] < 4,
    )
    assert METRICS[name](wide, 2)[0] == pytest.approx(METRICS[name](rank(scores, grade, grade >= 0), 2)[0])


@pytest.mark.parametrize("name", METRICS)
def test_lists_without_positives_are_left_out_and_counted(name: str) -> None:
    scores = np.array([[2.0, 1.0], [2.0, 1.0]])
    grade = np.array([[1, 0], [0, 0]])
    values = METRICS[name](rank(scores, grade, np.ones((2, 2), dtype=bool)), 1)
    assert not np.isnan(values[0])
    assert np.isnan(values[1])
    interval = interval_of(values, np.array([0, 1]))
    assert (interval.lists, interval.left_out) == (1, 1)


def test_auc_counts_pairs_and_ties_as_half() -> None:
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert math.isnan(auc(scores, np.ones(60, dtype=bool)))


def test_gauc_weighs_users_by_their_exposures_and_leaves_out_one_class() -> None:
    scores = np.array([2.0, 1.0, 1.0, 2.0, 3.0, 9.0])
    positive = np.array([True, False, True, False, False, True])
    user = np.array([7, 7, 8, 8, 8, 9])
    assert gauc(scores, positive, user) == pytest.approx((2 * 1.0 + 3 * 0.0) / 5)
    assert math.isnan(gauc(scores[:1], positive[:1], user[:1]))


def test_list_auc_equals_auc_of_each_list() -> None:
    rng = np.random.default_rng(2)
    scores, grade = rng.integers(0, 5, (6, 12)).astype(float), rng.integers(0, 3, (6, 12))
    mask = rng.random((6, 12)) < 0.8
    got = list_auc(rank(scores, grade, mask))
    want = [auc(s[m], g[m] > 0) for s, g, m in zip(scores, grade, mask, strict=True)]
    np.testing.assert_allclose(got, want)


def test_scores_that_are_nan_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        one([float("nan"), 1.0], [1, 0])


def test_bootstrap_interval_holds_the_mean_and_shrinks_with_users() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0.3, 0.2, 4000)
    few, many = interval_of(values[:100], np.arange(100)), interval_of(values, np.arange(4000))
    assert many.low < many.mean < many.high
    assert many.high - many.low < 0.4 * (few.high - few.low)
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.2 / math.sqrt(4000), rel=0.15)


def test_bootstrap_resamples_users_not_lists() -> None:
    values = np.repeat(np.random.default_rng(4).normal(size=50), 20)
    by_user = interval_of(values, np.repeat(np.arange(50), 20))
    by_list = interval_of(values, np.arange(1000))
    assert by_user.high - by_user.low > 3 * (by_list.high - by_list.low)


def test_bootstrap_weighs_values_and_measures_columns_alone() -> None:
    columns = {"a": np.array([1.0, 0.0, np.nan]), "b": np.array([0.5, 0.5, 0.5])}
    found = bootstrap(columns, np.array([0, 1, 2]), {"a": np.array([3.0, 1.0, 9.0])})
    assert found["a"].mean == pytest.approx(0.75)
    assert found["b"].mean == pytest.approx(0.5)
    assert found["b"].low == pytest.approx(0.5)
    assert (found["a"].lists, found["b"].lists) == (2, 3)


def test_paired_bootstrap_sees_a_small_steady_lift() -> None:
    base = np.random.default_rng(5).random(500)
    lift = paired_bootstrap(base + 0.01, base, np.arange(500))
    assert lift.low == pytest.approx(0.01)
    assert lift.high == pytest.approx(0.01)


def test_nothing_measured_is_no_number_but_valid_json() -> None:
    interval = interval_of(np.array([np.nan, np.nan]), np.array([0, 1]))
    assert math.isnan(interval.mean)
    assert interval.to_json() == {"mean": None, "low": None, "high": None, "lists": 0, "left_out": 2}


def test_calibration_recovers_the_line_that_made_the_labels() -> None:
    rng = np.random.default_rng(6)
    scores = rng.normal(3.0, 2.0, 40_000)
    positive = rng.random(40_000) < sigmoid(0.8 * scores - 3.0)
    fitted = calibrate(scores, positive)
    assert fitted.a == pytest.approx(0.8, abs=0.03)
    assert fitted.b == pytest.approx(-3.0, abs=0.1)
    assert fitted.ece < 0.01


def test_calibration_never_turns_the_order() -> None:
    scores = np.linspace(-1, 1, 200)
    fitted = calibrate(scores, scores < 0)
    assert fitted.a > 0
    assert sigmoid(fitted.a * scores + fitted.b).mean() == pytest.approx(0.5, abs=0.02)


def test_calibration_of_nothing_or_of_one_class_stays_finite() -> None:
    assert calibrate(np.zeros(0), np.zeros(0, dtype=bool)).a == 1.0
    fitted = calibrate(np.ones(20), np.ones(20, dtype=bool))
    assert np.isfinite([fitted.a, fitted.b, fitted.ece]).all()


def test_calibration_error_is_the_gap_of_probability_and_frequency() -> None:
    assert expected_calibration_error(np.full(1000, 0.7), np.arange(1000) % 2 == 0) == pytest.approx(0.2, abs=0.01)
