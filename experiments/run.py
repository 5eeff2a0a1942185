"""Make one of the paper's tables: search on validation, train the chosen recipe with several seeds, test each once.

What was done before is skipped, by its path (experiments/study.py); a process that was killed goes on from its last
epoch. Of a row that fails the reason is kept and the other rows are done. Searches and trainings get a log without test
events. With --jobs several processes, of one command or of many, share the work: each does what no other does, one
training after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from experiments import tables
from experiments.cost import measure_cost
from experiments.study import RESULT, BusyError, Study, filled, save_scores
from experiments.tables import DIVERGED, Budget, Row, Table, Trial, chosen, described, recipe_name, recipe_of
from kernel.training import available
from model.checkpoint import load_checkpoint, write_json
from model.cli import convert, progress_bars
from model.datasets import DATASETS
from model.datasets.schema import FILE
from model.errors import DataError, DivergedError, RankTowerError
from model.requests import encode_items, encode_users
from model.sampling import popularity
from model.scoring import score_network
from model.train import Recipe, train

OUT = Path("var/tables")
TESTS = "tests.jsonl"  # beside the logs: a line for each time that test lists were scored, by whatever code
FAILED = "failed"  # ends the name of a file beside a folder that could not be filled
PAUSE_S = 0.5  # between looks at what other processes do
console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    try:
        budget = tables.read_budget(options.budget)
        table = only(tables.read_table(options.table), options.rows)
        asked = data_sets(table, budget, options.data)
        studies = [open_study(options, data, budget) for data in asked]
        runners = [Runner(study, table, budget, options) for study in studies if study is not None]
        for runner in runners:
            runner.begin()
            if not options.worker:
                runner.forget_failures()
        if len(runners) > 1 and not options.worker:
            console.print(in_all(runners, options.jobs))
        if options.worker:
            end_with_parent()
        elif options.jobs > 1 and any(runner.tasks() for runner in runners):
            share(arguments, options.jobs)
        with on_threads(threads(options.jobs)) if options.jobs > 1 else nullcontext():
            work(runners)  # after workers: what they left, if they were killed
        failed = [] if options.worker else [name for runner in runners for name in runner.end()]
    except RankTowerError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    if failed:
        console.print(f"failed: {'; '.join(failed)}; the same command tries them again", soft_wrap=True)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("table", choices=tables.names())
    made.add_argument("--data", nargs="+", help="data sets of the recipe, or folders; by default all of the recipe")
    made.add_argument("--from", dest="source", type=Path, help="folder with a folder for each data set's files")
    made.add_argument("--budget", default="full")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--rows", nargs="+", help="names of rows; by default all")
    made.add_argument("--out", type=Path, default=OUT)
    made.add_argument("--jobs", type=int, default=1, help="processes that share the work, and the cores")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of these processes
    return made


def only(table: Table, wanted: Sequence[str] | None) -> Table:
    """The table with some of its rows."""
    unknown = set(wanted or ()) - {row.name for row in table.rows}
    if unknown:
        known = ", ".join(row.name for row in table.rows)
        raise tables.RecipeError(f"table {table.name} has no row {', '.join(sorted(unknown))}: rows are {known}")
    return replace(table, rows=tuple(row for row in table.rows if wanted is None or row.name in wanted))


def data_sets(table: Table, budget: Budget, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Those asked for; else a simulated one where the budget makes one, else those of the recipe."""
    return tuple(asked or (("cascade",) if budget.made else table.data))


def data_name(data: str) -> str:
    """What a data set, or a folder with one, is called among results."""
    return data if data in DATASETS else Path(data).resolve().name


def open_study(options: argparse.Namespace, data: str, budget: Budget) -> Study | None:
    """Bring the log into the documented form unless it is; None, with a line that says so, where there is no data."""
    root: Path = options.out
    found: Path | None = None
    kept = root / "logs" / data_name(data)
    if options.source is not None and not options.source.is_dir():
        raise DataError(f"{options.source} is no folder: give --from a folder with a folder for each data set's files")
    if data in DATASETS:
        found = options.source / data if options.source is not None and (options.source / data).is_dir() else None
        if data == "cascade" and budget.made:
            found = made_settings(root, budget.made)
    try:
        convert(data, found, kept)
    except DataError as error:
        if data not in DATASETS or found is not None:
            raise
        if (kept / FILE).is_file():
            return Study(root, data_name(data))  # an earlier command had its files
        if not options.worker:
            console.print(f"{data}: not here ({error})", soft_wrap=True)
        return None
    return Study(root, data_name(data))


def made_settings(root: Path, made: Mapping[str, Any]) -> Path:
    """The file with the settings of a simulated log; one that says the same stays, for workers may read it."""
    path, text = root / "cascade.toml", "".join(f"{key} = {value}\n" for key, value in made.items())
    if not path.is_file() or path.read_text() != text:
        root.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


# --- processes -------------------------------------------------------------------------------------------------------


class FailedError(Exception):
    """A folder could not be filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A folder of results that can be filled now."""

    row: str
    folder: Path
    fill: Callable[[Path], None]
    keep: bool = False  # go on with what a killed process left
    then: Callable[[], None] = lambda: None  # once the folder is there

    @property
    def failure(self) -> Path:
        """Where it says why the folder could not be filled, until the next command."""
        return self.folder.with_name(f".{self.folder.name}.{FAILED}")

    def done(self) -> bool:
        """Fill the folder unless it is there or that failed; False where another process is at it."""
        try:
            with filled(self.folder, keep=self.keep, wait=False) as part:
                if part is None:
                    return True
                self.tried(part)
        except BusyError:
            return False
        except FailedError as error:
            console.print(f"{error}", soft_wrap=True, markup=False)
            return True
        self.then()
        return True

    def tried(self, part: Path) -> None:
        """Fill the part. Whatever goes wrong is of this row alone: it is written down, under the folder's lock."""
        if self.failure.is_file():
            raise FailedError(f"{self.row}: failed in another process")
        try:
            self.fill(part)
        except Exception as error:
            self.failure.write_text(traceback.format_exc(), encoding="utf-8")
            raise FailedError(f"{self.row}: failed, {type(error).__name__}: {error} ({self.failure})") from error


def work(runners: Sequence[Runner]) -> None:
    """Do what can be done and no other process does, until nothing is left; pause while others do all of it."""
    while tasks := [task for runner in runners for task in runner.tasks()]:
        if not any(task.done() for task in tasks):
            time.sleep(PAUSE_S)


def threads(jobs: int) -> int:
    """Of each process."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let torch use so many, as workers do: sums come out alike only with as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share(arguments: Sequence[str], jobs: int) -> None:
    """The same command in `jobs` processes that share the cores; returns when all have ended."""
    command = [
        "env",
        f"OMP_NUM_THREADS={threads(jobs)}",
        sys.executable,
        "-m",
        "experiments.run",
        *arguments,
        "--worker",
    ]
    with ExitStack() as running:
        workers = [running.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE)) for _ in range(jobs)]
        codes = [worker.wait() for worker in workers]
    if any(codes):
        console.print(f"{sum(code != 0 for code in codes)} of {jobs} processes failed")


def end_with_parent() -> None:
    """A worker whose parent dies sees the end of its input, and ends; what it did so far is kept."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock would be held when Python ends
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- one table on one data set ---------------------------------------------------------------------------------------


class Runner:
    """What is to be done of a table on a data set."""

    def __init__(self, study: Study, table: Table, budget: Budget, options: argparse.Namespace) -> None:
        self.study, self.table, self.budget = study, table, budget
        self.device: str = options.device
        self.jobs: int = options.jobs
        self.alone = not options.worker

    def begin(self) -> None:
        """Freeze the test lists, and say what is left."""
        self.study.freeze()
        if self.alone:
            self.say(f"{self.table.title}: {self.left()}")

    def forget_failures(self) -> None:
        """What failed in an earlier command may have been mended since."""
        for path in self.study.folder.rglob(f".*.{FAILED}"):
            path.unlink(missing_ok=True)

    def end(self) -> list[str]:
        """Name rows without a result; returns those that failed, other than by divergence."""
        for row in self.table.rows:
            trials, wanted = self.study.search(row, self.budget) if row.baseline is None else ([], [])
            if trials and not wanted and chosen(trials).score == DIVERGED:
                self.say(f"{row.name}: every trial diverged")
        return list(dict.fromkeys(f"{self.study.data} {task.row}" for task in self.left_tasks()))

    def say(self, what: str) -> None:
        console.print(f"[bold]{self.study.data}[/] {what}", soft_wrap=True)

    def left(self) -> str:
        """Trainings left of all, and about how long they take."""
        done, missing = self.counted()
        about = f", {about_time(self.seconds_left() / self.jobs)}" if missing else ""
        return f"{len(missing)} of {done + len(missing)} trainings left{about}"

    def seconds_left(self, otherwise: float = float("nan")) -> float:
        """Of one process; a network that was not trained on this data yet takes as long as any other here did."""
        known = mean_seconds(self.study)
        return float(sum(known.get(network, known.get("", otherwise)) for network in self.counted()[1]))

    def counted(self) -> tuple[int, list[str]]:
        """Trainings that are done, and the networks of those left. A trial that is chosen is also the first seed."""
        done, missing = 0, list[str]()
        for row in self.table.rows:
            if row.baseline is not None:
                continue
            total = tables.trials_of(row, self.budget) + self.budget.seeds - 1
            trials, wanted = self.study.search(row, self.budget)
            known = len(trials)
            if not wanted:
                scores = [self.study.score(self.recipe(row, trials, seed), row.view) for seed in self.seeds[1:]]
                known += sum(score is not None for score in scores)
            done += known
            missing += [self.recipe(row, trials).network] * (total - known)
        return done, missing

    @property
    def seeds(self) -> range:
        return range(self.budget.seeds)

    def recipe(self, row: Row, trials: Sequence[Trial], seed: int = 0) -> Recipe:
        """Of the best trial."""
        return recipe_of(row, self.budget, self.study.data, chosen(trials).changes if trials else {}, seed)

    # what can be done now

    def tasks(self) -> list[Task]:
        """All that can be done, in the order of the rows."""
        return [task for task in self.left_tasks() if not task.failure.is_file()]

    def left_tasks(self) -> list[Task]:
        """All that is left and waits for nothing else, with what failed."""
        tasks = [task for row in self.table.rows for task in self.row_tasks(row)]
        return [task for task in tasks if not task.folder.is_dir()]

    def row_tasks(self, row: Row) -> list[Task]:
        """The trials that a search asks for, or the seeds of what it chose, each with its test."""
        if row.baseline is not None:
            fill = partial(self.test_baseline, row.baseline)
            return [Task(row=row.name, folder=self.study.baseline(row.baseline), fill=fill)]
        trials, wanted = self.study.search(row, self.budget)
        trial = partial(recipe_of, row, self.budget, self.study.data, seed=0)
        if wanted:
            return [self.training(row, trial(changes), described(changes)) for changes in wanted]
        if chosen(trials).score == DIVERGED:
            return []
        tasks = []
        for seed in self.seeds:
            recipe = self.recipe(row, trials, seed)
            score = self.study.score(recipe, row.view)
            if score is None:
                tasks.append(self.training(row, recipe, f"seed {seed}"))
            elif score != DIVERGED:
                folder, fill = self.study.test(recipe, row.view), partial(self.test, row, recipe)
                tasks.append(Task(row=row.name, folder=folder, fill=fill))
                if self.table.cost and seed == 0 and self.alone:  # times are taken when no worker runs
                    folder, fill = self.study.cost(recipe, row.view), partial(self.cost, row, recipe)
                    tasks.append(Task(row=row.name, folder=folder, fill=fill))
        return tasks

    def training(self, row: Row, recipe: Recipe, what: str) -> Task:
        """Of a recipe, or of its teacher if that comes first."""
        teacher = self.study.teacher_folder(row.view)
        if recipe.teacher and not teacher.is_dir():
            return Task(row=row.name, folder=teacher, fill=partial(self.fit_teacher, row))
        what = f"{row.name}, {what}"
        return Task(
            row=row.name,
            folder=self.study.run(recipe, row.view),
            fill=partial(self.train, row, recipe, what),
            keep=True,
            then=lambda: self.say(
                f"{what}: validation NDCG@10 {self.study.score(recipe, row.view):.4f}; {self.left()}"
            ),
        )

    # train, test

    def fit_teacher(self, row: Row, part: Path) -> None:
        self.say("fitting the teacher")
        self.study.fit_teacher(row.view, part)

    def train(self, row: Row, recipe: Recipe, what: str, part: Path) -> None:
        """Train, going on from the last whole epoch of a process that was killed."""
        begun = (part / "state.safetensors").is_file()
        if not begun:
            shutil.rmtree(part)  # half of a first epoch
            part.mkdir()
        self.say(f"{'going on with' if begun else 'training'} {what}: {self.study.run(recipe, row.view).name}")
        started = time.monotonic()
        result = self.trained(part, row, recipe, begun)
        write_json(part / RESULT, {**result, "seconds": round(time.monotonic() - started, 3)})
        for name in ("state.safetensors", "state.json", "teacher.safetensors"):
            (part / name).unlink(missing_ok=True)

    def trained(self, part: Path, row: Row, recipe: Recipe, resume: bool) -> dict[str, Any]:
        """Train in a folder; what is kept of it."""
        self.study.claim({"device": self.device, "threads": torch.get_num_threads(), "native": available()})
        with progress_bars() if self.alone else nullcontext() as progress:
            try:
                metrics = train(
                    self.study.seen(row.view),
                    part,
                    replace(recipe, device=self.device),
                    resume=resume,
                    progress=progress,
                    teacher=self.study.teacher(row.view) if recipe.teacher else None,
                    material=self.study.material(recipe.valid_lists, row.view, teacher=recipe.teacher),
                    test=False,
                )
            except DivergedError as error:
                return {"recipe": asdict(recipe), "valid_ndcg@10": DIVERGED, "diverged": str(error)}
        kept = {key: metrics[key] for key in ("valid_ndcg@10", "best_epoch", "train_seconds", "teacher")}
        return {"recipe": asdict(recipe), "device": self.device, "threads": torch.get_num_threads(), **kept}

    def test(self, row: Row, recipe: Recipe, part: Path) -> None:
        """Score the frozen test lists with a finished training, once."""
        self.note(recipe_name(recipe, row.view))
        run = self.study.run(recipe, row.view)
        network, spec, _ = load_checkpoint(run)
        users = encode_users(spec, self.study.log, self.study.requests)
        items = encode_items(spec, self.study.log)
        sets = {name: self.study.test_set(name).lists for name in self.study.sets()}
        save_scores(part, {name: score_network(network, users, items, lists) for name, lists in sets.items()})
        write_json(part / RESULT, json.loads((run / RESULT).read_text()))

    def test_baseline(self, name: str, part: Path) -> None:
        """Scores of what needs no training: popularity in training, or a constant."""
        self.note(name)
        taken = popularity(self.study.log)
        values = taken if name == "popularity" else np.zeros(len(taken))
        sets = {kind: self.study.test_set(kind).lists for kind in self.study.sets()}
        save_scores(part, {kind: values[lists.item] for kind, lists in sets.items()})
        write_json(part / RESULT, {"baseline": name})

    def note(self, name: str) -> None:
        """Put on record, for all data and code together, that test lists are about to be scored."""
        line = {
            "time": round(time.time()),
            "table": self.table.name,
            "budget": self.budget.name,
            "data": self.study.data,
            "code": code_of(self.study),
            "lists": {name: about["digest"][:16] for name, about in self.study.about()["sets"].items()},
            "scored": name,
        }
        with (self.study.root / TESTS).open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def cost(self, row: Row, recipe: Recipe, part: Path) -> None:
        write_json(part / RESULT, measure_cost(self.study.run(recipe, row.view), self.study.log))


def code_of(study: Study) -> str:
    """The version of the code that a study's results are of."""
    return study.folder.name.rpartition("-")[2]


def mean_seconds(study: Study) -> dict[str, float]:
    """Seconds of a training, by network, and of any as "": the mean of the finished ones."""
    found: dict[str, list[float]] = {}
    for path in study.folder.glob(f"runs/[!.]*/{RESULT}"):
        result = json.loads(path.read_text())
        for network in (result["recipe"]["network"], ""):
            found.setdefault(network, []).append(result["seconds"])
    return {network: float(np.mean(seconds)) for network, seconds in found.items()}


def in_all(runners: Sequence[Runner], jobs: int) -> str:
    """About how long all data sets take together; one without trainings yet takes what the others take a training."""
    means = [known[""] for runner in runners if (known := mean_seconds(runner.study))]
    otherwise = float(np.mean(means)) if means else float("nan")
    trainings = sum(len(runner.counted()[1]) for runner in runners)
    seconds = sum(runner.seconds_left(otherwise) for runner in runners)
    return f"in all {trainings} trainings left" + (f", {about_time(seconds / jobs)}" if trainings else "")


def about_time(seconds: float) -> str:
    """For people; NaN is not known."""
    return "time unknown before the first" if seconds != seconds else f"about {duration(seconds)}"


def duration(seconds: float) -> str:
    """90 as 2 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
