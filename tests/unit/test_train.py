"""Training end to end on a tiny log: what it learns, what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import OURS
from model.datasets.log import TEST, TRAIN, Log, read_log, without
from model.errors import DivergedError, TrainError
from model.evaluate import held_out
from model.layers import Tables
from model.losses import Listwise
from model.requests import encode_items, encode_users, fit_log_spec
from model.sampling import item_factors
from model.scoring import score_network
from model.teacher import fit_teacher
from model.train import PARTS, Learner, Recipe, _set_up, load_checkpoint, train
from tests.logs import write_tiny_log

TINY = Recipe(
    options={"user_heads": 2, "item_heads": 2, "dim": 8, "hidden": 16},
    sampler_options={"candidates": 5, "random": 10},
    batch=32,
    average=0.9,
    lr=3e-3,
    embedding_lr=1e-2,
    epochs=2,
    teacher=False,
    loss="softmax",
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("log"), users=60, items=80))


@pytest.fixture(scope="module")
def hybrid(log: Log, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A RankTower run with everything on."""
    run = tmp_path_factory.mktemp("runs") / "hybrid"
    return run, train(log, run, replace(TINY, loss="hybrid", teacher=True, epochs=12, patience=12))


def weights(run: Path, name: str = "weights.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run / name)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def lines(run: Path) -> list[dict[str, Any]]:
    timed = {"seconds", "lists_per_s", "samples_per_s", "shares"}
    found = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


def test_ranktower_learns_what_popularity_cannot_know(hybrid: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = hybrid
    ours, popular, chance = (metrics[row]["ndcg@10"]["mean"] for row in ("model", "popularity", "random"))
    assert ours > 1.05 * popular
    assert ours > 2.5 * chance
    assert metrics["model"]["gauc"]["mean"] > 0.6


def test_a_run_holds_every_artefact(hybrid: tuple[Path, dict[str, Any]], log: Log) -> None:
    run, metrics = hybrid
    assert {path.name for path in run.iterdir()} == set(OURS)
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert metrics["calibration"].keys() == {"a", "b"}
    assert metrics["calibration"]["a"] > 0
    assert metrics["teacher"]["auc"].keys() <= set(log.schema.rungs)
    assert metrics["lists"]["digest"] == held_out(log, TEST).digest
    config = json.loads((run / "config.json").read_text())
    assert config["network"] == "ranktower"
    assert config["options"] == TINY.options
    network, _, _ = load_checkpoint(run)
    assert config["head"] == network.head().to_json()


def test_every_epoch_has_a_line_with_terms_metrics_and_speed(hybrid: tuple[Path, dict[str, Any]]) -> None:
    found = [json.loads(line) for line in (hybrid[0] / "epochs.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in found] == list(range(1, len(found) + 1))
    for line in found:
        assert line["terms"].keys() == {"distillation", "softsort", "am_rankmax"}
        assert {"loss", "ndcg@10", "recall@50", "seconds", "samples_per_s", "scale"} <= line.keys()
        assert tuple(line["shares"]) == PARTS
        assert sum(line["shares"].values()) == pytest.approx(1, abs=1e-3)
    best = max(found, key=lambda line: line["ndcg@10"])
    assert best["epoch"] == hybrid[1]["best_epoch"]


def test_a_loaded_checkpoint_gives_the_reported_metrics(hybrid: tuple[Path, dict[str, Any]], log: Log) -> None:
    network, spec, _ = load_checkpoint(hybrid[0])
    held = held_out(log, TEST)
    scores = score_network(network, encode_users(spec, log, held.requests), encode_items(spec, log), held.lists)
    from model.evaluate import measure

    assert measure(scores, held)["ndcg@10"].mean == pytest.approx(hybrid[1]["model"]["ndcg@10"]["mean"])


def test_held_out_requests_carry_their_grades_and_no_future(hybrid: tuple[Path, dict[str, Any]], log: Log) -> None:
    requests = json.loads((hybrid[0] / "heldout.json").read_text())
    known = {int(item): row for row, item in enumerate(log.items.ids)}
    rows = {int(user): row for row, user in enumerate(log.users.ids)}
    test = log.split == TEST
    for entry in requests:
        body, grades = entry["request"], entry["grades"]
        assert len(body["candidates"]) == len(grades) == len(set(body["candidates"]))
        assert max(grades) > 0
        user = rows[body["user_id"]]
        positive = {known[item] for item, grade in zip(body["candidates"], grades, strict=True) if grade > 0}
        taken = set(log.item[test & (log.user == user) & (log.grade > 0)].tolist())
        assert positive <= taken
        before = log.time[(log.user == user) & test].max()
        past = set(log.item[(log.user == user) & (log.grade > 0) & (log.time < before)].tolist())
        assert {known[item] for item in body["history"]} <= past
        assert set(body["context"]) <= {"device", "hour"}


def test_warmup_bodies_name_a_user_or_carry_features(hybrid: tuple[Path, dict[str, Any]]) -> None:
    bodies = json.loads((hybrid[0] / "warmup.json").read_text())
    assert 10 < len(bodies) <= 50
    assert {("user_id" in body, "user" in body) for body in bodies} == {(True, False), (False, True)}
    assert all(body["candidates"] for body in bodies)


@pytest.mark.parametrize("loss", ["softmax", "hybrid", "arf"])
def test_two_epochs_and_a_resume_equal_four(log: Log, tmp_path: Path, loss: str) -> None:
    recipe = replace(TINY, loss=loss, teacher=loss == "hybrid", options={**TINY.options, "dropout": 0.1}, patience=9)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(log, whole, replace(recipe, epochs=4))
    train(log, parts, replace(recipe, epochs=2))
    metrics = train(log, parts, replace(recipe, epochs=4), resume=True)
    assert_same(weights(whole), weights(parts))
    assert_same(weights(whole, "state.safetensors"), weights(parts, "state.safetensors"))
    assert lines(whole) == lines(parts)
    assert metrics["best_epoch"] == json.loads((whole / "metrics.json").read_text())["best_epoch"]


def test_what_a_loss_learns_is_trained_kept_and_said(log: Log, tmp_path: Path) -> None:
    train(log, tmp_path / "run", replace(TINY, loss="arf", loss_options={"weighting": "both", "m": 5}))
    kept = weights(tmp_path / "run", "state.safetensors")["loss.log_w"]
    assert (kept != 0).all()
    said = lines(tmp_path / "run")[-1]
    assert said["learned"]["log_w"] == pytest.approx(kept.tolist(), abs=1e-5)
    assert said["terms"].keys() == {"relax", "global"}


def test_logloss_is_told_the_greatest_soft_label_of_the_log(log: Log) -> None:
    learner = _set_up(replace(TINY, loss="distillation", loss_options={"kind": "logloss"}), fit_log_spec(log), log)
    assert isinstance(learner.loss, Listwise)
    assert learner.loss.function.keywords["soft_top"] == 14  # click + 3*cart + 10*buy


def item_table(log: Log, **changes: Any) -> np.ndarray:
    """The table of item ids before the first step, a row per item of the log."""
    spec = fit_log_spec(log)
    network = _set_up(replace(TINY, **changes), spec, log).network
    tables = next(module for module in network.modules() if isinstance(module, Tables))
    rows = encode_items(spec, log)[:, spec.columns("item")[spec.item_id_name].start]
    return tables[tables.owners.index(spec.item_id_name)].weight.detach().numpy()[rows]


def test_item_ids_start_as_factors_of_what_was_taken_in_training(log: Log) -> None:
    table, drawn = item_table(log), item_table(log, item_start="random")
    taken = (log.split == TRAIN) & (log.grade > 0)
    factors = item_factors(log.user[taken], log.item[taken], len(log.items), dim=table.shape[1])
    known = factors.any(axis=1)
    np.testing.assert_allclose(table[known], factors[known] * (0.2 / factors[known].std()), rtol=1e-5)
    assert (known != np.isin(np.arange(len(known)), log.item[taken])).sum() == 0
    np.testing.assert_array_equal(table[~known], drawn[~known])  # and the random draws are those of any other start


def test_a_start_knows_nothing_of_later_events(log: Log) -> None:
    later = log.split != TRAIN
    np.testing.assert_array_equal(item_table(log), item_table(replace(log, grade=np.where(later, 0, log.grade))))


def test_single_weights_do_not_start_as_factors(log: Log) -> None:
    factors, drawn = (item_table(log, network="lr", options={}, item_start=start) for start in ("factors", "random"))
    np.testing.assert_array_equal(factors, drawn)


def test_a_step_that_leaves_weights_that_are_no_numbers_is_told_as_divergence(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of an epoch's last step is a number still; what the step made of the weights is not."""
    recipe = replace(TINY, epochs=1, steps=1, loss="softmax", teacher=False)

    def spoil(learner: Learner, *_: object) -> None:
        for parameter in learner.best.parameters():
            parameter.data.fill_(torch.nan)

    monkeypatch.setattr("model.train._step", spoil)
    with pytest.raises(DivergedError, match="no numbers: lower the learning"):
        train(log, tmp_path / "run", recipe)


def test_a_killed_training_leaves_its_last_epoch_and_goes_on(log: Log, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what == "epoch 2" and done == 3:
            raise KilledError

    recipe = replace(TINY, epochs=3, patience=9)
    with pytest.raises(KilledError):
        train(log, tmp_path / "killed", recipe, progress=kill)
    load_checkpoint(tmp_path / "killed")
    assert len(lines(tmp_path / "killed")) == 1
    journal = tmp_path / "killed" / "epochs.jsonl"
    journal.write_text(journal.read_text() + '{"epoch": 2}\n')  # killed between a line and its state
    train(log, tmp_path / "killed", recipe, resume=True)
    train(log, tmp_path / "whole", recipe)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def test_one_seed_gives_one_network_and_another_seed_another(log: Log, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(log, tmp_path / name, replace(TINY, seed=seed, epochs=1))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    theirs = weights(tmp_path / "c")
    assert any(not torch.equal(value, theirs[name]) for name, value in weights(tmp_path / "a").items())


def test_early_stopping_keeps_the_best_epoch(log: Log, tmp_path: Path) -> None:
    metrics = train(log, tmp_path / "run", replace(TINY, epochs=30, patience=1, lr=0.05))
    found = lines(tmp_path / "run")
    assert len(found) < 30
    assert metrics["best_epoch"] == len(found) - 1


def test_fixed_steps_bound_an_epoch(log: Log, tmp_path: Path) -> None:
    seen = []
    train(log, tmp_path / "run", replace(TINY, epochs=1, steps=3), progress=lambda w, d, t: seen.append((w, t)))
    assert ("epoch 1", 3) in seen


@pytest.mark.parametrize("network", ["lr", "two_tower", "dat", "inttower", "cold"])
def test_the_other_networks_train_too(log: Log, tmp_path: Path, network: str) -> None:
    metrics = train(log, tmp_path / "run", replace(TINY, network=network, options={}, epochs=1))
    assert np.isfinite(metrics["model"]["ndcg@10"]["mean"])
    line = lines(tmp_path / "run")[0]
    assert ("regulariser" in line) == (network in ("dat", "inttower"))
    assert ("importance" in line) == (network == "cold")


def test_a_network_s_own_term_is_added_to_the_loss(log: Log, tmp_path: Path) -> None:
    recipe = replace(TINY, network="dat", epochs=1, steps=1)
    options = {"hidden": [16], "dim": 8, "align": 0.0}
    found = {}
    for name, weight in (("off", 0.0), ("on", 50.0)):
        train(log, tmp_path / name, replace(recipe, options={**options, "mimic": weight}))
        found[name] = lines(tmp_path / name)[0]
    assert found["on"]["regulariser"] > 0
    assert found["on"]["loss"] == pytest.approx(found["off"]["loss"] + found["on"]["regulariser"], abs=1e-5)
    on, off = weights(tmp_path / "on"), weights(tmp_path / "off")
    assert not torch.equal(on["user_augmented.vectors.weight"], off["user_augmented.vectors.weight"])


@pytest.mark.parametrize("form", [{"stages": True}, {"string_ids": True}, {"history": 0}, {"teacher": True}])
def test_every_form_of_log_trains(tmp_path: Path, form: dict[str, Any]) -> None:
    log = read_log(write_tiny_log(tmp_path / "log", users=40, **form))
    recipe = replace(TINY, epochs=1, loss="hybrid", teacher=True)
    metrics = train(log, tmp_path / "run", recipe)
    assert metrics["teacher"]["logged"] == form.get("teacher", False)
    body = json.loads((tmp_path / "run" / "heldout.json").read_text())[0]["request"]
    assert isinstance(body["user_id"], str if form.get("string_ids") else int)


def test_an_earlier_run_is_replaced_and_other_files_are_not(log: Log, tmp_path: Path) -> None:
    train(log, tmp_path / "run", replace(TINY, epochs=1))
    train(log, tmp_path / "run", replace(TINY, epochs=1, seed=3))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(TrainError, match="holds files but no training run"):
        train(log, tmp_path / "other", TINY)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_a_training_that_is_interrupted_leaves_the_earlier_run(log: Log, tmp_path: Path) -> None:
    train(log, tmp_path / "run", replace(TINY, epochs=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "epoch 1" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(log, tmp_path / "run", replace(TINY, seed=5), progress=interrupt)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resuming_with_another_recipe_or_without_a_run_is_refused(log: Log, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="is not a training run"):
        train(log, tmp_path / "none", TINY, resume=True)
    run = tmp_path / "run"
    train(log, run, replace(TINY, epochs=1))
    with pytest.raises(TrainError, match=r"was trained with lr 0\.003, this run asks 0\.5"):
        train(log, run, replace(TINY, epochs=2, lr=0.5), resume=True)
    (run / "state.safetensors").write_bytes((run / "state.safetensors").read_bytes()[:-100])
    with pytest.raises(TrainError, match="cannot be resumed"):
        train(log, run, replace(TINY, epochs=2), resume=True)
    (run / "state.safetensors").unlink()
    with pytest.raises(TrainError, match="has no state to resume from"):
        train(log, run, replace(TINY, epochs=2), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "transformer"}, "network 'transformer' is not known: use one of"),
        ({"loss": "magic"}, "loss 'magic' is not known: use one of"),
        ({"item_start": "warm"}, "item_start is 'warm': use factors or random"),
        ({"sampler": "none"}, "sampler 'none' is not known: use one of"),
        ({"options": {"depth": 3}}, "does not take these options.*depth"),
        ({"sampler_options": {"width": 3}}, "sampler 'full' does not take these options.*width"),
        ({"loss_options": {"width": 3}}, "loss softmax.*width"),
        ({"lr": 0.0}, "lr is 0.0: it must be a number from 1e-08 to 10"),
        ({"lr": "fast"}, "lr is 'fast': it must be a number"),
        ({"batch": 2.5}, "batch is 2.5: it must be a whole number"),
        ({"steps": -1}, "steps is -1"),
        ({"unknown_items": 2.0}, "unknown_items is 2.0: it must be a number from 0 to 1"),
        ({"options": {"hidden": 0}}, "does not take these options"),
        ({"sampler_options": {"random": "many"}}, "sampler 'full' does not take these options"),
        ({"device": "tpu"}, "device is 'tpu': use cpu or cuda"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(log: Log, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        train(log, tmp_path / "run", replace(TINY, **change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_refused(log: Log, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="torch sees no GPU"):
        train(log, tmp_path / "run", replace(TINY, device="cuda"))


def test_a_log_without_test_events_trains_with_a_shared_teacher_and_reports_no_test(log: Log, tmp_path: Path) -> None:
    seen = without(log, TEST)
    teacher = fit_teacher(seen, fit_log_spec(seen))
    recipe = replace(TINY, loss="hybrid", teacher=True)
    metrics = train(seen, tmp_path / "shared", recipe, teacher=teacher, test=False)
    assert "model" not in metrics
    assert not (tmp_path / "shared" / "heldout.json").exists()
    train(seen, tmp_path / "own", recipe, test=False)  # its own has the same seed
    assert_same(weights(tmp_path / "shared"), weights(tmp_path / "own"))
