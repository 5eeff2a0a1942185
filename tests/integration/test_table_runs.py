"""Making a table: what is there is skipped, a killed process goes on, no search sees the test, results repeat."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from experiments import report, run, tables
from experiments.study import RESULT, BusyError, Study, filled, load_scores
from experiments.tables import recipe_of
from model.datasets.log import TEST, Log
from model.errors import DivergedError, TrainError
from tests.logs import write_tiny_log

ROWS = ("full", "without both")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_log(tmp_path_factory.mktemp("data") / "tiny", users=40, items=60)


def make(log: Path, out: Path, table: str = "sampling", rows: tuple[str, ...] = ROWS, jobs: int = 1) -> Study:
    asked = [table, "--data", str(log), "--budget", "tiny", "--out", str(out), "--jobs", str(jobs), "--rows", *rows]
    assert run.main(asked) == 0
    return Study(out, log.name)


@pytest.fixture(scope="module")
def made(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make(log, tmp_path_factory.mktemp("made"))


def files(study: Study) -> dict[str, int]:
    """When each result was written."""
    return {str(path): path.stat().st_mtime_ns for path in study.folder.rglob("*") if path.suffix not in ("", ".lock")}


def weights(study: Study) -> dict[str, bytes]:
    """Of every finished training."""
    return {path.parent.name: path.read_bytes() for path in study.folder.glob("runs/[!.]*/weights.safetensors")}


def scores(study: Study) -> dict[tuple[str, str], bytes]:
    found = [(folder, name) for folder in study.folder.glob("tests/[!.]*") for name in study.sets()]
    return {(folder.name, name): load_scores(folder, name).tobytes() for folder, name in found}


def test_a_row_leaves_its_trials_its_choice_and_one_test(made: Study) -> None:
    runs = [json.loads(path.read_text()) for path in made.folder.glob(f"runs/[!.]*/{RESULT}")]
    assert len(runs) == 4  # two rows, two trials; the chosen one is also the only seed
    assert len(list(made.folder.glob(f"tests/[!.]*/{RESULT}"))) == 2
    budget = tables.read_budget("tiny")
    for row in run.only(tables.read_table("sampling"), ROWS).rows:
        trials, wanted = made.search(row, budget)
        assert len(trials) == 2
        assert not wanted
        best = max(trials, key=lambda trial: trial.score)
        assert (made.test(recipe_of(row, budget, made.data, best.changes, 0)) / RESULT).is_file()
    tests = [json.loads(line) for line in (made.root / "tests.jsonl").read_text().splitlines()]
    assert {test["scored"] for test in tests} == {path.name for path in made.folder.glob("tests/[!.]*")}
    assert {(test["table"], test["budget"], test["data"]) for test in tests} == {("sampling", "tiny", made.data)}
    assert all(made.folder.name.endswith("-" + test["code"]) for test in tests)
    digests = {name: about["digest"] for name, about in made.about()["sets"].items()}
    assert all(digests[name].startswith(test["lists"][name]) for test in tests for name in digests)
    assert scores(made).keys() == {(name, kind) for name, _ in scores(made) for kind in ("full", "random")}


def test_what_is_there_is_not_done_again(
    made: Study, log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    before = files(made)
    monkeypatch.setattr(run, "train", refuse)
    monkeypatch.setattr(run, "score_network", refuse)
    make(log, made.root)
    assert "0 of 4 trainings left" in capsys.readouterr().out
    assert files(made) == before


def test_a_process_killed_in_a_training_goes_on_to_the_same_result(made: Study, log: Path, tmp_path: Path) -> None:
    """SIGKILL after the first epoch of the second trial; the process waits there, so that the kill cannot be late."""
    script = (
        "import sys, model.train as t, experiments.run as r\n"
        "keep, kept = t._keep, []\n"
        "def waiting(*a):\n"
        "    kept.append(keep(*a))\n"
        "    print('kept', len(kept), flush=True)\n"
        "    if len(kept) == 3: sys.stdin.read()\n"
        "    return kept[-1]\n"
        "t._keep = waiting\n"
        "r.main(sys.argv[1:])\n"
    )
    arguments = ["sampling", "--data", str(log), "--budget", "tiny", "--out", str(tmp_path), "--rows", ROWS[0]]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums come out alike only with as many
    ) as process:
        assert process.stdout is not None
        assert any(line == "kept 3\n" for line in process.stdout)
        process.kill()
    assert process.returncode == -9
    study = Study(tmp_path, log.name)
    assert len(list(study.folder.glob(f"runs/[!.]*/{RESULT}"))) == 1
    (part,) = study.folder.glob("runs/.*.part")
    assert not (part / RESULT).exists()
    lines = (part / "epochs.jsonl").read_text()
    make(log, tmp_path, rows=ROWS[:1])
    assert not list(study.folder.glob("runs/.*.part"))
    finished = study.folder / "runs" / part.name.removeprefix(".").removesuffix(".part")
    assert (finished / "epochs.jsonl").read_text().startswith(lines)  # the first epoch was not trained again
    done = weights(study)
    assert len(done) == 2
    assert done == {name: weights(made)[name] for name in done}
    assert scores(study).items() <= scores(made).items()


def test_the_same_recipe_gives_the_same_result(made: Study, log: Path, tmp_path: Path) -> None:
    again = make(log, tmp_path, rows=ROWS[1:])
    assert len(weights(again)) == 2
    assert weights(again).items() <= weights(made).items()
    assert scores(again).items() <= scores(made).items()


def test_processes_that_share_the_work_make_what_one_makes(
    made: Study, log: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = make(log, tmp_path, jobs=2)
    said = capfd.readouterr().out
    assert scores(shared).keys() == scores(made).keys()
    assert len(weights(shared)) == 4
    assert len(re.findall(r"\btraining (full|without both),", said)) == 4  # none twice
    assert "failed" not in said
    assert said.count("fitting the teacher") == 1
    assert not list(shared.folder.rglob("*.part"))
    if torch.get_num_threads() == 1:  # sums come out alike only with as many
        assert weights(shared) == weights(made)


def test_what_another_process_does_is_passed_over_and_the_rest_is_done(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process trains the first trial until all else is done."""
    begun, held = [], []
    real = run.train

    def watched(*given: Any, **named: Any) -> Any:
        begun.append(given[1].name)
        return real(*given, **named)

    def ends(_: float) -> None:
        assert len(begun) == 3  # the other row with its two trials, and the other trial of the first
        held.pop().close()

    monkeypatch.setattr(run, "train", watched)
    monkeypatch.setattr(run.time, "sleep", ends)
    study = make(log, tmp_path, rows=ROWS[1:])
    begun.clear()
    row, budget = tables.read_table("sampling").rows[0], tables.read_budget("tiny")
    folder = study.run(recipe_of(row, budget, study.data, study.search(row, budget)[1][0], 0))
    held.append(folder.with_name(f".{folder.name}.lock").open("w"))
    fcntl.flock(held[0], fcntl.LOCK_EX)
    make(log, tmp_path, rows=(*ROWS, "without random"))
    assert len(begun) == 4
    assert begun[-1] == f".{folder.name}.part"
    assert not study.search(row, budget)[1]


def test_workers_end_with_the_process_that_started_them(log: Path, tmp_path: Path) -> None:
    """SIGKILL for the parent: the worker's training goes no further, and its locks are free."""
    script = (
        "import sys, experiments.run as r\n"
        "r.end_with_parent()\n"
        "print('up', flush=True)\n"
        "import threading; threading.Event().wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdin is not None
        assert worker.stdout.readline() == "up\n"
        worker.stdin.close()  # what the system does to a killed parent's pipe
        assert worker.wait(timeout=30) == 1


def test_a_search_is_the_same_whatever_happens_in_the_test(made: Study, log: Path, tmp_path: Path) -> None:
    other = tmp_path / log.name
    shutil.copytree(log, other)
    events = pq.read_table(other / "events.parquet")
    time = events["time"].to_numpy()
    late = time > np.quantile(time, 0.9)  # within the last 15 %
    for rung in ("click", "cart", "buy"):
        given = np.where(late, 1, events[rung].to_numpy())
        events = events.set_column(events.column_names.index(rung), rung, pa.array(given))
    pq.write_table(events, other / "events.parquet")
    changed = make(other, tmp_path / "out")
    assert changed.about()["sets"]["full"]["digest"] != made.about()["sets"]["full"]["digest"]
    assert weights(changed) == weights(made)
    row, budget = run.only(tables.read_table("sampling"), ROWS).rows[0], tables.read_budget("tiny")
    assert changed.search(row, budget) == made.search(row, budget)


def test_no_training_and_no_teacher_gets_a_test_event(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Log] = []
    real = run.train

    def watched(seen: Log, *rest: Any, **named: Any) -> Any:
        given.append(seen)
        assert named["teacher"] is None or len(named["teacher"].soft) == len(seen)
        return real(seen, *rest, **named)

    monkeypatch.setattr(run, "train", watched)
    study = make(log, tmp_path, rows=ROWS[:1])
    assert len(given) == 2
    assert (study.log.split == TEST).any()
    assert not any((seen.split == TEST).any() for seen in given)


def test_the_time_left_is_known_after_the_first_training(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(log, tmp_path, rows=ROWS[:1])
    said = capsys.readouterr().out
    assert "2 of 2 trainings left, time unknown before the first" in said
    assert "1 of 2 trainings left, about " in said
    assert "0 of 2 trainings left" in said


def test_the_time_of_all_data_sets_is_said_first_with_what_is_known_of_others_for_those_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows with two trials on each log; one was done, of another network, in 60 s."""
    for name in ("a", "b"):
        write_tiny_log(tmp_path / name, users=40, items=60, seed=ord(name))
    options = run.parser().parse_args(["sampling", "--out", str(tmp_path / "out")])
    table, budget = run.only(tables.read_table("sampling"), ROWS), tables.read_budget("tiny")
    runners = [
        run.Runner(study, table, budget, options)
        for name in ("a", "b")
        if (study := run.open_study(options, str(tmp_path / name), budget)) is not None
    ]
    assert run.in_all(runners, 1) == "in all 8 trainings left, time unknown before the first"
    recipe = recipe_of(table.rows[0], budget, "a", runners[0].study.search(table.rows[0], budget)[1][0], 0)
    folder = runners[0].study.run(recipe)
    folder.mkdir(parents=True)
    (folder / RESULT).write_text(json.dumps({"recipe": {"network": "lr"}, "valid_ndcg@10": 0.1, "seconds": 60}))
    assert runners[0].left() == "3 of 4 trainings left, about 3 min"
    assert runners[1].left() == "4 of 4 trainings left, time unknown before the first"
    assert run.in_all(runners, 2) == "in all 7 trainings left, about 4 min"  # 210 s
    both = [str(tmp_path / name) for name in ("a", "b")]
    assert run.main(["models", "--data", *both, "--rows", "popularity", "--out", str(tmp_path / "out")]) == 0
    assert "in all 0 trainings left\n" in capsys.readouterr().out


def test_a_row_whose_trials_all_diverge_is_not_tested(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise DivergedError("the loss became nan: lower the learning rate")

    monkeypatch.setattr(run, "train", diverge)
    study = make(log, tmp_path, rows=ROWS[:1])
    assert "full: every trial diverged" in capsys.readouterr().out
    assert not (study.folder / "tests").exists()
    assert report.main(["sampling", "--data", str(log), "--budget", "tiny", "--out", str(tmp_path)]) == 0
    assert "| **full** | n/a |" in (tmp_path / "report" / "tiny" / "TABLES.md").read_text()


@pytest.mark.parametrize("error", [TrainError("no list has a positive"), RuntimeError("not enough memory [16 GB]")])
def test_a_row_that_fails_is_named_and_the_others_are_done(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    real, tried = run.train, []

    def failing(*given: Any, **named: Any) -> Any:
        if given[2].sampler == "full":
            tried.append(given[2].lr)
            raise error
        return real(*given, **named)

    monkeypatch.setattr(run, "train", failing)
    asked = ["sampling", "--data", str(log), "--budget", "tiny", "--out", str(tmp_path), "--rows", *ROWS]
    assert run.main(asked) == 1
    said = capsys.readouterr().out
    assert f"full: failed, {type(error).__name__}: {error} (" in said
    assert f"failed: {log.name} full; the same command tries them again" in said
    assert len(tried) == len(set(tried)) == 2  # each trial once
    study = Study(tmp_path, log.name)
    assert len(list(study.folder.glob(f"tests/[!.]*/{RESULT}"))) == 1
    kept = list(study.folder.glob("runs/.*.failed"))
    assert len(kept) == 2
    assert all(str(error) in path.read_text() for path in kept)
    monkeypatch.setattr(run, "train", real)
    make(log, tmp_path)
    assert len(list(study.folder.glob(f"tests/[!.]*/{RESULT}"))) == 2
    assert not list(study.folder.glob("runs/.*.failed"))


def test_what_fails_in_one_process_is_tried_by_no_other_and_seen_by_the_parent(
    made: Study, log: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A training cannot go on from a state that is cut."""
    (tmp_path / "logs").mkdir()
    shutil.copytree(made.source, tmp_path / "logs" / log.name)
    study, row, budget = Study(tmp_path, log.name), tables.read_table("sampling").rows[0], tables.read_budget("tiny")
    run_folder = study.run(recipe_of(row, budget, study.data, study.search(row, budget)[1][0], 0))
    part = run_folder.with_name(f".{run_folder.name}.part")
    part.mkdir(parents=True)
    (part / "state.safetensors").write_bytes(b"")
    asked = ["sampling", "--data", str(log), "--budget", "tiny", "--out", str(tmp_path), "--rows", *ROWS, "--jobs", "2"]
    assert run.main(asked) == 1
    said = capfd.readouterr().out
    assert said.count("going on with full,") == 1
    assert f"failed: {log.name} full;" in said
    assert "processes failed" not in said
    assert len(list(study.folder.glob(f"tests/[!.]*/{RESULT}"))) == 1  # the other row
    assert run_folder.with_name(f".{run_folder.name}.failed").is_file()


def test_a_table_of_costs_is_made_and_reported(log: Path, tmp_path: Path) -> None:
    make(log, tmp_path, "cost", ("RankTower", "COLD"))
    assert report.main(["cost", "--data", str(log), "--budget", "tiny", "--out", str(tmp_path)]) == 0
    costs = [json.loads(path.read_text()) for path in (Study(tmp_path, log.name).folder / "costs").glob("[!.]*/*")]
    by_kind = {cost["head"]["kind"]: cost for cost in costs}
    assert by_kind["cross_attention"]["macs"] == 5 * 4 * 4 * 32
    assert by_kind["onnx"]["macs"] > 500_000
    assert all(cost["ms"] > 0 and cost["parameters"] > cost["parameters_of_tables"] > 0 for cost in costs)
    assert (tmp_path / "report" / "tiny" / "plots" / "cost-tiny-frontier.svg").is_file()


def test_views_share_the_test_lists_and_nothing_else(log: Path, tmp_path: Path) -> None:
    rows = ("Two-Tower", "Two-Tower, no context fields")
    study = make(log, tmp_path, "context", rows)
    assert {path.name for path in study.folder.glob("teacher*")} == {"teacher", "teacher-no-context"}
    tests = sorted(path.name for path in study.folder.glob("tests/[!.]*"))
    assert [name.count("no-context") for name in tests] == [1, 0]
    spec = json.loads((study.folder / "runs" / tests[0] / "spec.json").read_text())
    assert not [field for field in spec["fields"] if field["side"] == "context"]
    assert report.main(["context", "--data", str(log), "--budget", "tiny", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "tiny" / "TABLES.md").read_text()
    assert "| Two-Tower, no context fields | 0." in text
    assert "| Two-Tower, rows with context | n/a" in text


def test_baselines_are_rows(log: Path, tmp_path: Path) -> None:
    study = make(log, tmp_path, "models", ("popularity", "random"))
    lists = study.test_set("full").lists
    assert np.ptp(load_scores(study.baseline("random"), "full")[lists.mask]) == 0
    assert np.ptp(load_scores(study.baseline("popularity"), "full")[lists.mask]) > 0


def test_an_unknown_row_is_refused_with_those_there_are(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["sampling", "--data", str(log), "--rows", "half"]) == 2
    assert "no row half: rows are full, without random" in capsys.readouterr().out


def test_a_folder_that_another_process_fills_is_not_waited_for(tmp_path: Path) -> None:
    with filled(tmp_path / "a") as part:
        assert part is not None
        with pytest.raises(BusyError), filled(tmp_path / "a", wait=False):
            pass
    with filled(tmp_path / "a", wait=False) as part:
        assert part is None


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with filled(tmp_path / "a") as part:
            assert part is not None
            (part / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (tmp_path / "a").exists()
    with filled(tmp_path / "a") as part:
        assert part is not None
        assert not list(part.iterdir())
    with filled(tmp_path / "a") as part:
        assert part is None


def test_a_log_that_an_earlier_command_converted_needs_its_files_no_more(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["sampling", "--data", "retailrocket", "--budget", "tiny", "--out", str(tmp_path), "--rows", ROWS[0]]
    assert run.main(asked) == 0
    assert "retailrocket: not here" in capsys.readouterr().out
    shutil.copytree(log, tmp_path / "logs" / "retailrocket")
    assert run.main(asked) == 0
    assert len(list(tmp_path.glob("retailrocket-*/tests/[!.]*"))) == 1


def test_a_folder_of_sources_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent"
    assert run.main(["sampling", "--from", str(absent), "--out", str(tmp_path)]) == 2
    assert f"{absent} is no folder: give --from" in capsys.readouterr().out.replace("\n", "")
