"""The teacher: it learns what there is, nothing from noise, only from the past, and it is no label in disguise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.datasets.log import IMPRESSION, TRAIN, Log, read_log
from model.errors import TrainError
from model.requests import fit_log_spec, requests_of
from model.teacher import Teacher, cross_features, fit_teacher
from tests.logs import write_tiny_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("log"), users=150, items=60, days=8))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("logged"), teacher=True))


@pytest.fixture(scope="module")
def teacher(log: Log) -> Teacher:
    return fit_teacher(log, fit_log_spec(log))


def training_impressions(log: Log) -> np.ndarray:
    return np.flatnonzero((log.split == TRAIN) & (log.stage == IMPRESSION))


def noise(log: Log) -> Log:
    feedback = np.random.default_rng(0).random(log.feedback.shape) < 0.3
    return replace(log, feedback=feedback, grade=(feedback * np.arange(1, 4)).max(axis=1).astype(np.int8))


def test_a_teacher_orders_impressions_better_than_chance(teacher: Teacher, log: Log) -> None:
    assert teacher.auc.keys() == set(log.schema.rungs)
    assert 0.65 < teacher.auc["click"] < 0.95
    assert not teacher.logged


def test_pure_noise_teaches_nothing(log: Log) -> None:
    noisy = noise(log)
    auc = fit_teacher(noisy, fit_log_spec(noisy)).auc
    assert all(abs(value - 0.5) < 0.03 for value in auc.values()), auc


def test_the_soft_label_is_the_expression_and_only_on_training_impressions(teacher: Teacher, log: Log) -> None:
    rows = training_impressions(log)
    assert (teacher.soft[rows] > 0).all()
    rest = np.ones(len(teacher.soft), dtype=bool)
    rest[rows] = False
    assert not teacher.soft[rest].any()
    rates = log.feedback[rows].mean(axis=0)
    assert teacher.soft[rows].mean() == pytest.approx(rates @ [1, 3, 10], rel=0.2)


def test_a_teacher_is_the_same_for_the_same_seed(teacher: Teacher, log: Log) -> None:
    np.testing.assert_array_equal(fit_teacher(log, fit_log_spec(log)).soft, teacher.soft)


def test_features_do_not_look_at_the_label_of_their_own_request_or_later(log: Log) -> None:
    """Flip every label from one moment on: features of requests up to that moment stay."""
    spec, rows = fit_log_spec(log), training_impressions(log)
    started = requests_of(log)
    start = np.repeat(started.time, started.end - started.first)
    moment = int(np.quantile(log.time[rows], 0.6))
    later = start >= moment
    flipped = replace(
        log,
        feedback=np.where(later[:, None], ~log.feedback, log.feedback),
        grade=np.where(later, 3 - log.grade, log.grade).astype(np.int8),
    )
    names, before = cross_features(log, spec, rows)
    _, after = cross_features(flipped, spec, rows)
    early = start[rows] <= moment
    assert early.any()
    for name, a, b in zip(names, before[early].T, after[early].T, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("by", ["time", "order", "hash"])
def test_labels_of_later_splits_change_nothing_of_training(tmp_path: Path, by: str) -> None:
    """In a split by order or hash, another user's validation event can lie before a training event."""
    folder = write_tiny_log(tmp_path, users=80, items=40, days=6)
    document = (folder / "log.toml").read_text()
    document = document.replace("max_impressions = 50", "max_impressions = 5").replace(
        '"time"\nvalid', f'"{by}"\nvalid'
    )
    (folder / "log.toml").write_text(document)
    log = read_log(folder)
    assert log.schema.split.by == by
    spec, rows = fit_log_spec(log), training_impressions(log)
    later = np.flatnonzero(log.split != TRAIN)
    order = np.arange(len(log))
    order[later] = np.random.default_rng(0).permutation(later)
    shuffled = replace(log, feedback=log.feedback[order], grade=log.grade[order])
    assert (shuffled.grade != log.grade).any()
    names, before = cross_features(log, spec, rows)
    _, after = cross_features(shuffled, fit_log_spec(shuffled), rows)
    for name, a, b in zip(names, before.T, after.T, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    soft = [fit_teacher(each, fit_log_spec(each), rounds=10).soft[rows] for each in (log, shuffled)]
    np.testing.assert_array_equal(*soft)


def test_features_cross_user_and_item(log: Log) -> None:
    rows = training_impressions(log)
    names, features = cross_features(log, fit_log_spec(log), rows)
    taken = log.grade[rows] > 0
    for name in ("history_category", "history_tags", "history_match", "item_rate_click", "user_rate_click"):
        values = features[:, names.index(name)]
        known = ~np.isnan(values)
        assert values[known & taken].mean() > values[known & ~taken].mean(), name
    assert not any(name in ("user.user_id", "item.item_id") for name in names)


def test_logged_scores_replace_the_teacher(logged: Log) -> None:
    teacher = fit_teacher(logged, fit_log_spec(logged))
    rows = training_impressions(logged)
    assert logged.teacher is not None
    assert teacher.logged
    np.testing.assert_allclose(teacher.soft[rows], logged.teacher[rows] @ [1.0, 3.0, 10.0], rtol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_logged_score_that_repeats_the_label_is_refused(logged: Log, sign: float) -> None:
    assert logged.teacher is not None
    copied = logged.teacher.copy()
    copied[:, 1] = 0.5 + sign * 0.4 * logged.feedback[:, 1]
    with pytest.raises(TrainError, match=r"'p_cart' of rung 'cart'.*label in disguise"):
        fit_teacher(replace(logged, teacher=copied), fit_log_spec(logged))


def test_a_feature_that_repeats_the_label_is_refused_by_name(log: Log) -> None:
    leaking = replace(log, context={**log.context, "hour": log.feedback[:, 0].astype(np.float64)})
    first = requests_of(leaking).first
    same = np.repeat(first, np.diff(np.append(first, len(log.user))))
    leaking = replace(leaking, feedback=log.feedback[same], grade=log.grade[same])  # a request's context is its label
    with pytest.raises(TrainError, match=r"rung 'click'.*feature 'user.hour' is the label in disguise"):
        fit_teacher(leaking, fit_log_spec(leaking))


def test_a_rung_that_never_happens_is_no_disguise(log: Log) -> None:
    feedback = log.feedback.copy()
    feedback[:, 2] = False
    teacher = fit_teacher(replace(log, feedback=feedback), fit_log_spec(log))
    assert np.isnan(teacher.auc["buy"])
    assert "buy" not in teacher.to_json()["auc"]  # type: ignore[operator]


def test_fewer_users_than_folds_are_refused_with_a_remedy(log: Log) -> None:
    alone = replace(log, user=np.zeros_like(log.user))
    with pytest.raises(TrainError, match="have 1 user: log at least 2 users, or train without it"):
        fit_teacher(alone, fit_log_spec(alone))
