"""Two processes under torchrun against one: equal curves, weights alike everywhere, resume, errors that end all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load_checkpoint
from model.datasets.log import read_log
from model.distributed import ALONE
from model.train import Recipe, train
from tests.logs import write_tiny_log
from tests.processes import ROOT, TIMEOUT_S, eventually
from tests.training_processes import RUNS, STEPS, stepped

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")
TIMED = {"seconds", "lists_per_s", "samples_per_s", "shares"}


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A job, killed at the end if it has not ended."""
    with torchrun(*arguments) as job:
        try:
            yield job
        finally:
            job.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/training_processes.py leaves, and beside it the same by one process."""
    folder = tmp_path_factory.mktemp("processes")
    log = read_log(write_tiny_log(folder / "log", users=40, items=60))
    with running("tests.training_processes", folder) as job:
        said, _ = job.communicate(timeout=2 * TIMEOUT_S)
        assert job.returncode == 0, said
    stepped(log, folder / "steps-alone", ALONE)
    for name in ("curve", "single"):
        train(log, folder / "alone" / name, RUNS[name])
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found]


@pytest.mark.parametrize("name", ["curve", "single"])
def test_two_processes_give_the_curve_of_one(folder: Path, name: str) -> None:
    two, one = lines(folder / "runs" / name), lines(folder / "alone" / name)
    assert len(two) == len(one) == RUNS[name].epochs
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=1e-3)
        assert ours["ndcg@10"] == pytest.approx(theirs["ndcg@10"], abs=0.01)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "dat"])
def test_the_gradient_of_two_processes_is_that_of_one(folder: Path, name: str) -> None:
    two, one = load_file(folder / "steps-0" / name), load_file(folder / "steps-alone" / name)
    assert two.keys() == one.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("name", STEPS)
def test_every_process_has_the_same_weights_bit_for_bit(folder: Path, name: str) -> None:
    first, second = load_file(folder / "steps-0" / name), load_file(folder / "steps-1" / name)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_a_term_of_the_network_s_own_is_that_of_the_shares(folder: Path) -> None:
    two, one = (load_file(folder / steps / "dat") for steps in ("steps-0", "steps-alone"))
    for key in one:  # entries weigh otherwise, by the length of the lists in either share
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-3)


def test_every_process_returns_the_metrics_of_the_first(folder: Path) -> None:
    for name in RUNS:
        written = json.loads((folder / "runs" / name / "metrics.json").read_text())
        for rank in (0, 1):
            assert json.loads((folder / f"{name}-{rank}.json").read_text()) == written


def test_a_resumed_run_equals_one_that_never_stopped(folder: Path) -> None:
    for name in ("weights", "state"):
        whole, parts = (load_file(folder / "runs" / run / f"{name}.safetensors") for run in ("dropout", "parts"))
        assert whole.keys() == parts.keys()
        for key in whole:
            assert torch.equal(whole[key], parts[key]), key
    assert lines(folder / "runs" / "dropout") == lines(folder / "runs" / "parts")


def test_what_goes_wrong_in_one_process_ends_all(folder: Path) -> None:
    lead, other = (json.loads((folder / f"refused-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("weights", "term"):
        assert lead[name] == other[name] == "DivergedError: the loss became nan: lower the learning rate"
    assert other["agree"].startswith("TrainError: process 1 has lr 1.1, process 0 has 0.1: give every process")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_and_the_run_goes_on_from_its_last_epoch(tmp_path: Path, rank: int) -> None:
    log = write_tiny_log(tmp_path / "log", users=20, items=30)
    flags = [f"--set={setting}" for setting in ("dim=8", "hidden=8", "teacher=false", "patience=900", "steps=2")]
    arguments = ("train", "--log", log, "--out", tmp_path / "run", "--loss", "softmax", *flags, "--epochs")
    with running("service.cli", *arguments, 900) as job:
        eventually((tmp_path / "run" / "state.json").exists)
        workers = {place: pid for pid in children(job.pid) if (place := rank_of(pid)) is not None}
        assert workers.keys() == {0, 1}
        os.kill(workers[rank], signal.SIGKILL)
        said, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode != 0
    assert "SIGKILL" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    load_checkpoint(tmp_path / "run")
    reached = json.loads((tmp_path / "run" / "state.json").read_text())["epoch"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    recipe = Recipe(**{field.name: config[field.name] for field in fields(Recipe)})
    train(read_log(log), tmp_path / "run", replace(recipe, epochs=reached + 1), resume=True)  # by one process
    assert lines(tmp_path / "run")[-1]["epoch"] == reached + 1


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> int | None:
    for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if pair.startswith(b"RANK="):
            return int(pair.removeprefix(b"RANK="))
    return None
