"""Reports on held-out lists: rows beside each other, on the same lists, equal for a checkpoint and its bundle."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from model.datasets.log import IMPRESSION, TEST, TRAIN, VALID, Log, all_to_test, read_log
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
        ('name = "price"\nside = "item"', 'name = "price"\nside = "context"',
         "'price' is a numeric context field, the model reads it as a numeric item field"),
        ('"category"\nside = "item"\nkind = "categorical"', '"category"\nside = "item"\nkind = "numeric"',
         "'category' is a numeric item field, the model reads it as a categorical item field: declare it so"),
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


def test_fields_that_the_log_lacks_are_missing_and_named(run: Path, log: Log, tmp_path: Path) -> None:
    document = (write_tiny_log(tmp_path) / "log.toml").read_text()
    for old, new in (('name = "age"', 'name = "size"'), ('name = "hour"', 'name = "minute"')):
        assert old in document
        document = document.replace(old, new)
    columns = {**log.users.columns, "size": log.users.columns["age"]}
    del columns["age"]
    other = replace(
        log,
        schema=parse_schema(tomllib.loads(document), "log.toml"),
        users=replace(log.users, columns=columns),
        context={("minute" if name == "hour" else name): column for name, column in log.context.items()},
    )
    report = evaluate_checkpoint(run, other)
    assert report["missing"] == ["age", "hour"]
    assert report["rows"]["ranktower"] != evaluate_checkpoint(run, log)["rows"]["ranktower"]


def test_every_request_of_a_log_can_be_measured(run: Path, tmp_path: Path) -> None:
    folder = changed_log(tmp_path, no_test)
    log = all_to_test(read_log(folder, trainable=False))
    report = evaluate_checkpoint(run, log)
    assert report["lists"]["lists"] + report["lists"]["left_out"] == log.request[-1] + 1
    assert report["rows"]["popularity"] == report["rows"]["random"]  # nothing was trained on


def test_a_log_without_history_and_with_more_fields_fits(log: Log) -> None:
    known = tuple(field for field in log.schema.fields if field.name != "history")
    bare = replace(log, schema=replace(log.schema, fields=known))
    fewer = tuple(field for field in known if field.name not in ("age", "user_id", "item_id"))
    assert check_fit(bare, fit_log_spec(log)) == []
    check_fit(log, fit_log_spec(replace(log, schema=replace(log.schema, fields=fewer))))
    check_fit(replace(log, schema=replace(log.schema, fields=tuple(f for f in known if f.name != "user_id"))),
              fit_log_spec(log))  # fmt: skip


Tables = dict[str, pa.Table]


def put(tables: Tables, name: str, **columns: pa.Array) -> None:
    """Replace columns of a table."""
    for column, values in columns.items():
        tables[name] = tables[name].drop_columns(column).append_column(column, values)


def nothing_known_of_items(tables: Tables, document: str) -> str:
    put(tables, "items", **{name: pa.nulls(len(tables["items"])) for name in ("category", "tags", "price")})
    return document


def ids_never_seen(tables: Tables, document: str) -> str:
    for side in ("user", "item"):
        for name in (f"{side}s", "events"):
            put(tables, name, **{f"{side}_id": pc.add(tables[name][f"{side}_id"], 1_000_000)})
    return document


def users_that_users_lacks(tables: Tables, document: str) -> str:
    tables["users"] = tables["users"].slice(0, 25)
    return document


def a_context_value_never_seen(tables: Tables, document: str) -> str:
    put(tables, "events", device=pa.array(["fridge"] * len(tables["events"])))
    return document


def other_rungs(tables: Tables, document: str) -> str:
    tables["events"] = tables["events"].rename_columns({"click": "seen", "cart": "kept"}).drop_columns(["buy"])
    return document.replace('"click", "cart", "buy"', '"seen", "kept"').replace(
        "click + 3*cart + 10*buy", "seen + kept"
    )


def other_types(tables: Tables, document: str) -> str:
    put(
        tables,
        "items",
        price=tables["items"]["price"].cast(pa.float32()),
        category=tables["items"]["category"].cast("int8"),
    )
    put(tables, "users", age=pc.round(tables["users"]["age"]).cast("int16"))
    put(tables, "users", segment=tables["users"]["segment"].dictionary_encode())
    put(
        tables, "events", hour=tables["events"]["hour"].cast("uint8"), user_id=tables["events"]["user_id"].cast("int32")
    )
    put(tables, "events", click=tables["events"]["click"].cast("bool"), cart=tables["events"]["cart"].cast("float64"))
    put(tables, "events", time=tables["events"]["time"].cast(pa.timestamp("ms")))
    return document


def nothing_left_out(tables: Tables, document: str) -> str:
    tables["events"] = tables["events"].filter(pc.equal(tables["events"]["click"], 1))
    return document


def text_for_numbers(tables: Tables, document: str) -> str:
    put(tables, "items", category=tables["items"]["category"].cast("string"))
    return document


def numbers_for_text(tables: Tables, document: str) -> str:
    put(tables, "events", device=pa.array([7] * len(tables["events"])))
    return document


def numbers_in_lists(tables: Tables, document: str) -> str:
    put(tables, "items", tags=pa.array([[], [3], *([[4, 5]] * (len(tables["items"]) - 2))]))
    return document


def no_test(tables: Tables, document: str) -> str:
    return document.replace("valid = 0.15\ntest = 0.15", "valid_from = 2024-01-05\ntest_from = 2030-01-01")


Change = Callable[[Tables, str], str]


def changed_log(folder: Path, change: Change, **options: bool) -> Path:
    write_tiny_log(folder, users=50, items=70, seed=3, **options)
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("users", "items", "events")}
    document = change(tables, (folder / "log.toml").read_text())
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    (folder / "log.toml").write_text(document)
    return folder


@pytest.mark.parametrize("change", [nothing_known_of_items, ids_never_seen, users_that_users_lacks, other_rungs,
                                    a_context_value_never_seen, other_types, nothing_left_out])  # fmt: skip
@pytest.mark.parametrize("stages", [False, True])
def test_odd_logs_are_measured(run: Path, tmp_path: Path, change: Change, stages: bool) -> None:
    log = read_log(changed_log(tmp_path, change, stages=stages))
    report = evaluate_checkpoint(run, log, ks=(5, 10))
    assert report["lists"]["lists"] > 0
    found = report["rows"]["ranktower"]
    assert 0 <= found["recall@5"]["low"] <= found["recall@5"]["mean"] <= found["recall@5"]["high"] <= 1
    assert 0 <= found["ndcg@10"]["mean"] <= 1
    assert (found["gauc"]["mean"] is None) == (change is nothing_left_out)
    assert (report["dropped"]["unknown_user"] > 0) == (change is users_that_users_lacks)
    assert (report["new"]["users"] > 0) == (change is ids_never_seen)
    json.dumps(report, allow_nan=False)


def test_what_is_new_to_the_model_is_counted(run: Path, tmp_path: Path) -> None:
    log = read_log(changed_log(tmp_path, ids_never_seen))
    held = held_out(log)
    new = evaluate_checkpoint(run, log)["new"]
    assert new == {
        "users": len(np.unique(held.requests.user)),
        "items": len(np.unique(held.lists.item[held.lists.mask])),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            text_for_numbers,
            "item field 'category' holds text, such as '[0-3]', the model was trained on integers: write",
        ),
        (numbers_for_text, "context field 'device' holds integers, such as 7, the model was trained on text: write"),
        (numbers_in_lists, "item field 'tags' holds integers, such as 3, the model was trained on text: write"),
        (no_test, r"log.toml: \[split\]: no event falls into test .*: change valid_from and test_from"),
    ],
)
def test_logs_that_cannot_be_measured_are_refused(run: Path, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_checkpoint(run, read_log(changed_log(tmp_path, change)))


def test_a_split_without_a_positive_is_refused(log: Log) -> None:
    empty = replace(log, grade=np.where(log.split == TEST, 0, log.grade).astype(np.int8))
    with pytest.raises(DataError, match="no test list has a positive: widen the split"):
        held_out(empty)
