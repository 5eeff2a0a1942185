"""The strong model that labels impressions: boosting with cross features, out of fold by user, one model a rung.

Its features may cross user and item, which the towers may not; its predictions become the soft label of the
distillation. Every statistic is expanding: it counts what happened in training strictly before the request (in a split
by order or hash, "before" alone would reach into the validation and test events of other users). Scores that the log
carries replace the whole of it. A teacher that merely repeats the label teaches nothing that the label does not, so
one that orders the impressions almost perfectly is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightgbm as lgb
import numpy as np

from model.datasets.log import IMPRESSION, TRAIN, Log
from model.errors import TrainError
from model.features import MISSING, FeatureSpec, Tower
from model.metrics import auc
from model.requests import NONE, SplitRequests, encode_items, encode_users, requests_of
from model.sampling import item_factors

DISGUISE_AUC = 0.995  # a teacher above it, on at least DISGUISE_ROWS rows of each class, is the label in disguise
DISGUISE_ROWS = 20
FOLDS = 2
ROWS = 150_000  # training rows of one boosted model
SMALL_ROWS = 20_000
ROUNDS = 80
PERIODS = 5  # the past is cut in so many parts; the factors of a part know only the parts before it
TAGS = 256  # buckets of an affinity profile; larger vocabularies wrap
BLOCK = 1 << 15  # requests handled at a time

Progress = Callable[[str], None]
Columns = dict[str, np.ndarray]  # by name, each (m,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Predicted rungs of every training impression, the soft label made of them, and how good they are."""

    soft: np.ndarray  # (e,) float32, 0 off training impressions
    auc: dict[str, float]  # by rung, out of fold; NaN where a rung never happens
    logged: bool  # the log's own scores, not a model of ours

    def to_json(self) -> dict[str, object]:
        """What metrics.json keeps."""
        known = {rung: round(value, 5) for rung, value in self.auc.items() if value == value}
        return {"auc": known, "logged": self.logged}


def fit_teacher(
    log: Log,
    spec: FeatureSpec,
    *,
    folds: int = FOLDS,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Teacher:
    """Label the training impressions from the logged scores where there are any, else by boosting out of fold.

    Raises TrainError when a rung's predictions are its label in disguise, naming the column that gives it away.
    """
    say = progress or (lambda _: None)
    rows = np.flatnonzero((log.split == TRAIN) & (log.stage == IMPRESSION))
    if log.teacher is not None:
        return _logged_teacher(log, rows)
    say("features")
    names, features = cross_features(log, spec, rows)
    fold = _folds(log.user[rows], folds, seed)
    predicted = np.zeros((len(rows), len(log.schema.rungs)), dtype=np.float32)
    quality = {}
    for place, rung in enumerate(log.schema.rungs):
        say(rung)
        label = log.feedback[rows, place]
        predicted[:, place], weights = _out_of_fold(features, label, fold, names, rounds, seed)
        quality[rung] = auc(predicted[:, place], label)
        if _is_disguise(quality[rung], label):
            leak = _clearest(features, label, names, weights)
            raise TrainError(
                f"teacher of rung {rung!r} orders impressions with AUC {quality[rung]:.4f}: feature {leak!r} is the "
                "label in disguise; remove its column from log.toml or log it before the outcome"
            )
    return Teacher(soft=_soft(log, rows, predicted), auc=quality, logged=False)


def _logged_teacher(log: Log, rows: np.ndarray) -> Teacher:
    """The scores that the log carries, after the same check."""
    assert log.teacher is not None
    quality = {}
    for place, rung in enumerate(log.schema.rungs):
        label = log.feedback[rows, place]
        quality[rung] = auc(log.teacher[rows, place], label)
        if _is_disguise(quality[rung], label):
            column = log.schema.columns.teacher[rung]
            raise TrainError(
                f"teacher column {column!r} of rung {rung!r} orders impressions with AUC {quality[rung]:.4f}: it is "
                "the label in disguise; log the ranker's score of before the outcome, or drop it from [columns.teacher]"
            )
    return Teacher(soft=_soft(log, rows, log.teacher[rows]), auc=quality, logged=True)


def _soft(log: Log, rows: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The log's expression over predictions (m, R), spread to all events; (e,) float32."""
    soft = np.zeros(len(log.grade), dtype=np.float32)
    soft[rows] = log.schema.soft_label.of(predicted)
    return soft


def _is_disguise(area: float, label: np.ndarray) -> bool:
    """Almost perfect in either direction, and not by the luck of a few rows."""
    enough = min(int(label.sum()), int((~label).sum())) >= DISGUISE_ROWS
    return enough and max(area, 1.0 - area) > DISGUISE_AUC


def _clearest(features: np.ndarray, label: np.ndarray, names: list[str], weights: np.ndarray) -> str:
    """The feature that gives the label away: of the five most used ones, the best alone."""
    used = np.argsort(-weights)[:5].tolist()
    alone = {place: auc(np.nan_to_num(features[:, place], nan=-1.0), label) for place in used}
    best: int = max(used, key=lambda place: max(alone[place], 1.0 - alone[place]))
    return names[best]


# --- boosting -------------------------------------------------------------------------------------------


def _folds(user: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each row; all rows of a user share one. (m,) int64."""
    users, code = np.unique(user, return_inverse=True)
    if 0 < len(users) < folds:
        raise TrainError(
            f"the teacher is fitted out of fold by user, in {folds} folds, but the training impressions have "
            f"{len(users)} user: log at least {folds} users, or train without it (--set teacher=false)"
        )
    shuffled = np.random.default_rng(seed).permutation(int(code.max(initial=0)) + 1)
    return np.asarray(shuffled[code.ravel()] % folds)


def _out_of_fold(
    features: np.ndarray, label: np.ndarray, fold: np.ndarray, names: list[str], rounds: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (m,) from models that never saw the row's user, and each feature's total gain (F,)."""
    predicted = np.full(len(label), label.mean() if len(label) else 0.0, dtype=np.float32)
    weights = np.zeros(len(names))
    for k in range(int(fold.max(initial=0)) + 1):
        inside, outside = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        outside = _thinned(outside, ROWS, seed + k)
        if not len(inside) or label[outside].min(initial=1) == label[outside].max(initial=0):
            continue
        model = lgb.train(_parameters(len(outside), seed), _dataset(features[outside], label[outside], names), rounds)
        predicted[inside] = model.predict(features[inside])
        weights += model.feature_importance("gain")
    return predicted, weights


def _thinned(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` rows, in order."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _dataset(features: np.ndarray, label: np.ndarray, names: list[str]) -> lgb.Dataset:
    return lgb.Dataset(features, label.astype(np.float32), feature_name=names, params={"max_bin": 63, "verbosity": -1})


def _parameters(rows: int, seed: int) -> dict[str, object]:
    """Small trees at a high rate: a minute on two cores is the budget of the whole training."""
    return {
        "objective": "binary",
        "learning_rate": 0.1,
        "num_leaves": min(31, max(4, rows // 300)),
        "min_data_in_leaf": max(20, rows // 1000),
        "feature_fraction": 0.8,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "lambda_l2": 5.0,
        "max_bin": 63,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 0 if rows > SMALL_ROWS else 1,  # below, threads cost more than they give
        "verbosity": -1,
    }


# --- features -------------------------------------------------------------------------------------------


def cross_features(log: Log, spec: FeatureSpec, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names and values (m, F) float32 of the features of events `rows` (m,); NaN where nothing is known yet.

    User, item and context fields as the towers see them, then what crosses: expanding counts and rates of the item
    and the user, affinity of the item's fields and factors with the history.
    """
    requests = requests_of(log)
    event_request = np.repeat(np.arange(len(requests)), requests.end - requests.first)
    own = event_request[rows]
    columns: Columns = {}
    columns |= _static("user", spec.user_id_name, spec, encode_users(spec, log, requests), own)
    items = encode_items(spec, log)
    columns |= _static("item", spec.item_id_name, spec, items, log.item[rows])
    columns |= _rates(log, requests.time[event_request], rows)
    columns |= _affinities(log, spec, items, requests, own, rows)
    columns["history_match"] = _factor_match(log, requests, own, rows)
    columns["history_size"] = (requests.history[own] != NONE).sum(axis=1).astype(np.float32)
    return list(columns), np.column_stack([column.astype(np.float32) for column in columns.values()])


def _static(tower: Tower, id_column: str, spec: FeatureSpec, encoded: np.ndarray, which: np.ndarray) -> Columns:
    """Single-valued fields but the id as table rows: a vocabulary is ordered by count, so a row is a useful number."""
    found = {}
    for field in spec.tower_fields(tower):
        if field.is_list or field.size < 3 or field.name == id_column:
            continue
        codes = encoded[:, spec.columns(tower)[field.name].start].astype(np.float32)
        found[f"{tower}.{field.name}"] = np.where(codes == MISSING, np.nan, codes)[which]
    return found


def _rates(log: Log, asked: np.ndarray, rows: np.ndarray) -> Columns:
    """Training exposures and smoothed rates per rung before the request, of the item and of the user.

    asked: (e,) int64 time of each event's request: events at or after it are not counted.
    """
    shown = np.flatnonzero((log.split == TRAIN) & (log.stage == IMPRESSION))
    values = np.column_stack([np.ones(len(shown)), log.feedback[shown]])
    found = {}
    everyone = np.zeros(len(log.time), dtype=np.int64)
    base = _before(everyone, log.time, shown, values, asked, rows)
    prior = (base[:, 1:] + 1.0) / (base[:, :1] + 10.0)
    for name, key in (("item", log.item.astype(np.int64)), ("user", log.user.astype(np.int64))):
        past = _before(key, log.time, shown, values, asked, rows)
        found[f"{name}_exposures"] = np.log1p(past[:, 0])
        for place, rung in enumerate(log.schema.rungs):
            found[f"{name}_rate_{rung}"] = (past[:, 1 + place] + 10.0 * prior[:, place]) / (past[:, 0] + 10.0)
        found[f"{name}_taken"] = np.log1p(past[:, 1])
    return found


def _before(
    key: np.ndarray, time: np.ndarray, counted: np.ndarray, values: np.ndarray, asked: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """For each of `rows` (m,), the sum of `values` over counted events of the same key with time < asked; (m, V).

    key, time, asked: (e,) int64; counted: (c,) event rows whose values (c, V) add up.
    """
    moments, moment = np.unique(np.concatenate([time[counted], asked[rows]]), return_inverse=True)
    moment = moment.ravel()
    span = len(moments) + 1
    keys = key[counted] * span + moment[: len(counted)]
    order = np.argsort(keys, kind="stable")
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values[order], axis=0)])
    keys = keys[order]
    own = key[rows] * span
    until = np.searchsorted(keys, own + moment[len(counted) :], side="left")
    return np.asarray(total[until] - total[np.searchsorted(keys, own, side="left")])


def _affinities(
    log: Log, spec: FeatureSpec, items: np.ndarray, requests: SplitRequests, own: np.ndarray, rows: np.ndarray
) -> Columns:
    """Per categorical or multi item field: the share of the history that has the item's value, NaN without history."""
    found = {}
    size = np.maximum((requests.history != NONE).sum(axis=1), 1).astype(np.float32)
    size[(requests.history == NONE).all(axis=1)] = np.nan
    for field in spec.item_fields:
        if field.kind not in ("categorical", "multi"):
            continue
        tags = items[:, spec.columns("item")[field.name]]  # (I, length)
        found[f"history_{field.name}"] = _profile_match(tags, requests.history, own, log.item[rows]) / size[own]
    return found


def _profile_match(tags: np.ndarray, history: np.ndarray, own: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Mean over the tags of an item of how many items of the history carry them; (m,) float32.

    tags: (I, k) int, MISSING where none; history: (L, H); own: (m,) row of history; item: (m,) row of tags.
    """
    buckets = min(int(tags.max(initial=0)) + 1, TAGS)
    bucket = np.where(tags == MISSING, NONE, tags % buckets)
    bucket = np.concatenate([bucket, np.full((1, tags.shape[1]), NONE)])  # the row that history's NONE reads
    matched = np.zeros(len(own), dtype=np.float32)
    order = np.argsort(own, kind="stable")
    for start in range(0, len(history), BLOCK):
        part = history[start : start + BLOCK]
        carried = bucket[part].reshape(len(part), -1)  # (l, H * k)
        flat = (np.arange(len(part))[:, None] * buckets + carried)[carried != NONE]
        profile = np.bincount(flat, minlength=len(part) * buckets).astype(np.float32)
        mine = order[slice(*np.searchsorted(own[order], [start, start + len(part)]))]
        wanted = bucket[item[mine]]
        counts = np.where(wanted != NONE, profile[(own[mine, None] - start) * buckets + np.maximum(wanted, 0)], 0.0)
        matched[mine] = counts.sum(axis=1) / np.maximum((wanted != NONE).sum(axis=1), 1)
    return matched


def _factor_match(log: Log, requests: SplitRequests, own: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cosine of item and mean history under factors of earlier training periods; (m,) float32, NaN without any."""
    match = np.full(len(rows), np.nan, dtype=np.float32)
    taken = np.flatnonzero((log.split == TRAIN) & (log.grade > 0))
    if not len(rows):
        return match
    edges = np.quantile(log.time[rows], np.arange(1, PERIODS) / PERIODS)
    period = np.searchsorted(edges, requests.time[own], side="right")
    for k in range(1, PERIODS):
        mine = np.flatnonzero(period == k)
        past = taken[log.time[taken] < edges[k - 1]]
        if len(mine) and len(past):
            factors = item_factors(log.user[past], log.item[past], len(log.items))
            match[mine] = _cosine_with_history(factors, requests.history, own[mine], log.item[rows[mine]])
    return match


def _cosine_with_history(factors: np.ndarray, history: np.ndarray, own: np.ndarray, item: np.ndarray) -> np.ndarray:
    """(m,) float32, NaN where the history or the item has no factors."""
    norm = np.linalg.norm(factors, axis=1, keepdims=True)
    unit = np.concatenate([factors / np.maximum(norm, 1e-6), np.zeros((1, factors.shape[1]), dtype=np.float32)])
    asked, place = np.unique(own, return_inverse=True)
    mean = np.empty((len(asked), factors.shape[1]), dtype=np.float32)
    for start in range(0, len(asked), BLOCK):
        mean[start : start + BLOCK] = unit[history[asked[start : start + BLOCK]]].sum(axis=1)
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-6)
    cosine = np.einsum("md,md->m", mean[place.ravel()], unit[item])
    return np.where(cosine == 0.0, np.nan, cosine).astype(np.float32)
