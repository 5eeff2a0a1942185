"""Reports on held-out lists: rows beside each other, on the same lists, equal for a checkpoint and its bundle."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.datasets.log import IMPRESSION, TEST, TRAIN, VALID, Log, read_log
from model.datasets.schema import parse_schema
from model.errors import DataError
from model.evaluate import HeldOut, baselines, check_fit, evaluate_bundle, evaluate_checkpoint, held_out, measure
from model.export import export_bundle
from model.metrics import METRICS, gauc, rank
from model.requests import fit_log_spec
from model.train import Recipe, train
from tests.logs import write_tiny_log

RECIPE = Recipe(
    options={"user_heads": 2, "item_heads": 2, "dim": 8, "hidden": 16},
    sampler_options={"candidates": 5, "random": 10},
    loss="softmax",
    teacher=False,
    batch=32,
    epochs=1,
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("log"), users=60, items=80))


@pytest.fixture(scope="module")
def run(log: Log, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(log, folder, RECIPE)
    return folder


@pytest.fixture(scope="module")
def held(log: Log) -> HeldOut:
    return held_out(log)


def test_an_oracle_is_perfect_and_its_reverse_is_not(held: HeldOut) -> None:
    truth = held.lists.grade.astype(np.float64)
    best, worst = measure(truth, held), measure(-truth, held)
    for name in ("recall@10", "ndcg@10", "gauc"):
        assert best[name].mean == pytest.approx(1.0)
        assert worst[name].mean < 0.2


def test_random_is_the_expected_value_of_chance(log: Log, held: HeldOut) -> None:
    chance = measure(baselines(log, held)["random"], held)
    assert chance["gauc"].mean == pytest.approx(0.5)
    assert chance["recall@50"].mean == pytest.approx(np.mean(50 / held.lists.mask.sum(axis=1)), abs=0.02)


def test_popularity_counts_training_alone(log: Log, held: HeldOut) -> None:
    later = replace(log, grade=np.where(log.split == TRAIN, log.grade, 3).astype(np.int8))
    np.testing.assert_array_equal(baselines(later, held)["popularity"], baselines(log, held)["popularity"])


def test_gauc_looks_at_impressions_by_user(held: HeldOut) -> None:
    scores = np.random.default_rng(0).random(held.lists.item.shape)
    shown = held.lists.stage == IMPRESSION
    user = np.repeat(held.requests.user, shown.sum(axis=1))
    expected = gauc(scores[shown], held.lists.grade[shown] > 0, user)
    assert measure(scores, held)["gauc"].mean == pytest.approx(expected)


def test_every_cut_off_asked_for_is_measured(held: HeldOut) -> None:
    scores = np.random.default_rng(1).random(held.lists.item.shape)
    found = measure(scores, held, (5, 20))
    assert set(found) == {"recall@5", "ndcg@5", "recall@20", "ndcg@20", "gauc"}
    ranked = rank(scores, held.lists.grade, held.lists.mask)
    assert found["recall@5"].mean == pytest.approx(np.nanmean(METRICS["recall"](ranked, 5)))
    assert found["recall@5"].low <= found["recall@5"].mean <= found["recall@5"].high


def test_a_report_holds_all_rows_on_one_set_of_lists(run: Path, log: Log, held: HeldOut) -> None:
    report = evaluate_checkpoint(run, log)
    assert list(report["rows"]) == ["ranktower", "popularity", "random"]
    assert report["lists"]["digest"] == held.digest
    counts = {row[name]["lists"] for row in report["rows"].values() for name in ("recall@10", "ndcg@50")}
    assert counts == {report["lists"]["lists"]}
    assert report["lists"]["lists"] + report["lists"]["left_out"] == len(held.lists)


def test_a_bundle_measures_as_its_checkpoint(run: Path, log: Log, tmp_path: Path) -> None:
    export_bundle(run, tmp_path / "bundle")
    a, b = evaluate_checkpoint(run, log), evaluate_bundle(tmp_path / "bundle", log)
    for name, value in a["rows"]["ranktower"].items():
        assert b["rows"]["ranktower"][name]["mean"] == pytest.approx(value["mean"], abs=1e-3)
    assert a["rows"]["popularity"] == b["rows"]["popularity"]


def test_a_bundle_with_a_head_of_its_own_measures_as_its_checkpoint(log: Log, tmp_path: Path) -> None:
    train(log, tmp_path / "run", replace(RECIPE, network="cold", options={"hidden": [16, 8]}))
    export_bundle(tmp_path / "run", tmp_path / "bundle")
    a, b = evaluate_checkpoint(tmp_path / "run", log), evaluate_bundle(tmp_path / "bundle", log)
    for name, value in a["rows"]["cold"].items():
        assert b["rows"]["cold"][name]["mean"] == pytest.approx(value["mean"], abs=1e-3)


def test_random_only_lists_and_other_splits_can_be_asked_for(run: Path, log: Log) -> None:
    digests = {
        evaluate_checkpoint(run, log, **options)["lists"]["digest"]
        for options in ({}, {"random_only": True}, {"split": VALID}, {"size": 30})
    }
    assert len(digests) == 4


def test_a_log_never_seen_can_be_measured(run: Path, tmp_path: Path) -> None:
    other = read_log(write_tiny_log(tmp_path, users=30, items=50, seed=9))
    assert np.isfinite(evaluate_checkpoint(run, other)["rows"]["ranktower"]["ndcg@10"]["mean"])


def test_a_log_with_ids_of_another_type_is_refused(run: Path, tmp_path: Path) -> None:
    other = read_log(write_tiny_log(tmp_path, users=30, string_ids=True))
    with pytest.raises(DataError, match=r"has string user ids .* the model was trained on int and int"):
        evaluate_checkpoint(run, other)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"user_id"', '"uid"', "user id is column 'uid', .* trained with 'user_id': rename"),
        ('"item_id"', '"sku"', "item id is column 'sku', the model was trained with 'item_id'"),
        ('name = "age"', 'name = "size"', "'age' is no user field, the model reads it as a numeric user field"),
        ('name = "hour"', 'name = "minute"', "'hour' is no context field"),
        ('name = "price"\nside = "item"', 'name = "price"\nside = "context"', "'price' is no item field"),
        ('"category"\nside = "item"\nkind = "categorical"', '"category"\nside = "item"\nkind = "numeric"',
         "'category' is numeric, the model reads it as a categorical item field: declare it so"),
    ],
)  # fmt: skip
def test_a_log_that_the_model_does_not_fit_is_refused(
    run: Path, log: Log, tmp_path: Path, old: str, new: str, message: str
) -> None:
    document = (write_tiny_log(tmp_path) / "log.toml").read_text()
    assert old in document
    other = replace(log, schema=parse_schema(tomllib.loads(document.replace(old, new)), "log.toml"))
    with pytest.raises(DataError, match=message):
        evaluate_checkpoint(run, other)


def test_a_log_without_history_and_with_more_fields_fits(log: Log) -> None:
    known = tuple(field for field in log.schema.fields if field.name != "history")
    bare = replace(log, schema=replace(log.schema, fields=known))
    fewer = tuple(field for field in known if field.name not in ("age", "user_id", "item_id"))
    check_fit(bare, fit_log_spec(log))
    check_fit(log, fit_log_spec(replace(log, schema=replace(log.schema, fields=fewer))))
    check_fit(replace(log, schema=replace(log.schema, fields=tuple(f for f in known if f.name != "user_id"))),
              fit_log_spec(log))  # fmt: skip


def test_a_split_without_a_positive_is_refused(log: Log) -> None:
    empty = replace(log, grade=np.where(log.split == TEST, 0, log.grade).astype(np.int8))
    with pytest.raises(DataError, match="no test list has a positive: widen the split"):
        held_out(empty)
