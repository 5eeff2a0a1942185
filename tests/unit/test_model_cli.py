"""The verbs between raw logs and a bundle: what they refuse, what they say, and that their help is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from model.cli import LOSS_NAMES, NETWORK_NAMES, app, interval, progress_bars, with_settings
from model.errors import TrainError
from model.losses import LOSSES
from model.networks import NETWORKS
from model.train import Recipe
from tests.logs import write_tiny_log


def ranktower(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_the_help_of_train_names_every_network_and_loss() -> None:
    assert set(NETWORK_NAMES.split(", ")) == set(NETWORKS)
    assert set(LOSS_NAMES.split(", ")) == set(LOSSES)


@pytest.mark.parametrize(
    ("loss", "settings", "options"),
    [
        ("arf", ["m=50", "weighting=both"], {"m": 50, "weighting": "both"}),
        ("dftopk", ["k=10", "tau=0.5"], {"k": 10, "tau": 0.5}),
        ("distillation", ["kind=pairwise"], {"kind": "pairwise"}),
        ("hybrid", ["distill=none", 'weights={"ranknet": 1}'], {"distill": "none", "weights": {"ranknet": 1}}),
    ],
)
def test_settings_reach_the_loss(loss: str, settings: list[str], options: dict[str, object]) -> None:
    assert with_settings(Recipe(loss=loss), settings).loss_options == options


def test_a_loss_is_not_asked_for_what_the_log_tells_it() -> None:
    with pytest.raises(TrainError, match="--set soft_top: nothing takes it"):
        with_settings(Recipe(loss="distillation"), ["soft_top=3"])


def test_a_folder_is_not_converted_from_another_one(tmp_path: Path) -> None:
    log = write_tiny_log(tmp_path / "log", users=20, items=20)
    said = ranktower("data", log, "--from", tmp_path / "other", "--out", tmp_path / "out")
    assert said.exit_code == 2
    assert "goes with a named data set (alimama, cascade, kuairand, movielens, " in said.stderr
    assert not (tmp_path / "out").exists()


def test_a_cascade_is_simulated_by_its_settings_file(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("users = 30\nitems = 300\nrequests = 100\nretrieved = 50\n")
    said = ranktower("data", "cascade", "--from", tmp_path / "small.toml", "--out", tmp_path / "log")
    assert said.exit_code == 0, said.stderr
    assert "log cascade, 30 users, 300 items" in said.stdout
    (tmp_path / "small.toml").write_text("usrs = 30\n")
    said = ranktower("data", "cascade", "--from", tmp_path / "small.toml", "--out", tmp_path / "other")
    assert said.exit_code == 2
    assert "small.toml: unknown key 'usrs': did you mean 'users'?" in said.stderr


@pytest.mark.parametrize("flags", [("--k", 0), ("--k", -3), ("--size", 0), ("--size", 1)])
def test_cut_offs_and_sizes_that_measure_nothing_are_refused(tmp_path: Path, flags: tuple[str, int]) -> None:
    said = ranktower("evaluate", "--log", tmp_path, "--checkpoint", tmp_path, *flags)
    assert said.exit_code == 2
    assert f"Invalid value for '{flags[0]}'" in said.stderr


def test_off_a_terminal_an_epoch_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as show:
        for what in ("teacher", "epoch 1", "epoch 2"):
            for done in (0, 1, 1200):
                show(what, done, 1200)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert [line.partition(" in ")[0] for line in lines] == ["epoch 1: 1,200 steps", "epoch 2: 1,200 steps"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log and a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    log = write_tiny_log(folder / "log", users=20, items=30)
    small = [f"--set={setting}" for setting in ("dim=8", "hidden=8", "user_heads=1", "item_heads=1", "teacher=false")]
    said = ranktower("train", "--log", log, "--out", folder / "run", "--epochs", 1, "--loss", "softmax", *small)
    assert said.exit_code == 0, said.output
    assert said.stderr.count("epoch 1: ") == 1
    return folder


def test_a_size_below_the_logged_lists_is_said(trained: Path, tmp_path: Path) -> None:
    asked = (
        "evaluate",
        "--log",
        trained / "log",
        "--checkpoint",
        trained / "run",
        "--out",
        tmp_path / "out.json",
        "--size",
    )
    assert "--size 4 is below the longest list of logged rows: lists hold up to 8 items" in ranktower(*asked, 4).stdout
    assert "is below" not in ranktower(*asked, 20).stdout


def test_a_bundle_is_measured_at_five_cut_offs_printed_and_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ranktower("export", "--run", trained / "run", "--out", "bundle").exit_code == 0
    said = ranktower("evaluate", "--bundle", "bundle", "--log", trained / "log")
    assert said.exit_code == 0, said.output
    report = json.loads((tmp_path / "evaluation.json").read_text())
    names = [f"{name}@{k}" for k in (5, 10, 20, 50, 100) for name in ("recall", "ndcg")] + ["gauc"]
    assert list(report["rows"]) == ["ranktower", "popularity", "random"]
    for row in report["rows"].values():
        assert list(row) == names
        assert all(found["low"] <= found["mean"] <= found["high"] for found in row.values())
    found = report["rows"]["ranktower"]["ndcg@10"]
    assert f"ndcg@10     {found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]" in said.stdout
    assert "new to the model: 0 users and 0 items" in said.stdout
    assert f"lists hold up to {report['lists']['size']} items: Recall@K says nothing from there on" in said.stdout
    assert said.stdout.endswith("evaluation.json: the same as JSON\n")


def test_a_log_without_training_events_says_what_its_lists_lack(trained: Path, tmp_path: Path) -> None:
    asked = ("evaluate", "--log", trained / "log", "--checkpoint", trained / "run", "--out", tmp_path / "r.json")
    whole, lists = (ranktower(*asked, "--split", split) for split in ("all", "test"))
    assert "popularity is not known, and lists hold random items beside impressions, no candidates" in whole.stdout
    assert "no training events" not in lists.stdout
    assert list(json.loads((tmp_path / "r.json").read_text())["rows"]) == ["ranktower", "popularity", "random"]
    ranktower(*asked, "--split", "all")
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["rows"]) == ["ranktower", "random"]
    assert (report["training_events"], report["candidates"]) == (0, False)


def test_where_a_report_goes_can_be_said(trained: Path, tmp_path: Path) -> None:
    asked = ("evaluate", "--log", trained / "log", "--checkpoint", trained / "run", "--k", 3, "--out")
    assert ranktower(*asked, tmp_path / "new" / "r.json").exit_code == 0
    assert "recall@3" in json.loads((tmp_path / "new" / "r.json").read_text())["rows"]["ranktower"]
    refused = ranktower(*asked, tmp_path / "new")
    assert refused.exit_code == 2
    assert "new is a folder: name a file" in refused.stderr


def test_what_nothing_was_measured_of_is_a_dash() -> None:
    assert interval({"mean": None, "low": None, "high": None, "lists": 0}) == "–"
    assert interval({"mean": 0.5, "low": 0.25, "high": 0.75, "lists": 3}) == "0.5000 [0.2500, 0.7500]"


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("dat", ["hidden=[8]", "mimic=0.1", "category=tags"]),
        ("inttower", ["hidden=[8, 8]", "user_heads=2", "cir=0.5"]),
        ("cold", ["hidden=[8]", 'groups=["user_id", "item_id", "history*item_id"]']),
    ],
)
def test_the_rivals_take_their_options_by_set(tmp_path: Path, network: str, settings: list[str]) -> None:
    log = write_tiny_log(tmp_path / "log", users=20, items=30)
    flags = [f"--set={setting}" for setting in (*settings, "teacher=false", "steps=2")]
    asked = ("train", "--log", log, "--out", tmp_path / "run", "--network", network, "--epochs", 1, *flags)
    trained = ranktower(*asked, "--loss", "bce")
    assert trained.exit_code == 0, trained.output
    refused = ranktower(*asked, "--loss", "bce", "--set=dropout=1")
    assert refused.exit_code == 2
    assert "network option dropout is 1: it is a share from 0 to below 1" in refused.stderr
