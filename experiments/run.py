"""Make one of the paper's tables: search on validation, train the chosen recipe with several seeds, test each once.

What was done before is skipped, by its path (experiments/study.py); a process that was killed goes on from its last
epoch. Searches and trainings get a log without test events.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from experiments import tables
from experiments.cost import measure_cost
from experiments.study import RESULT, Study, filled, save_scores
from experiments.tables import Budget, Changes, Row, Table, Trial, recipe_name, recipe_of
from model.checkpoint import load_checkpoint, write_json
from model.cli import convert, progress_bars
from model.datasets import DATASETS
from model.errors import DataError, DivergedError, RankTowerError
from model.requests import encode_items, encode_users
from model.sampling import popularity
from model.scoring import score_network
from model.train import Recipe, train

OUT = Path("var/tables")
DIVERGED = -1.0  # the score of a training whose loss is no number
console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=tables.names())
    parser.add_argument("--data", nargs="+", help="data sets of the recipe, or folders; by default all of the recipe")
    parser.add_argument("--from", dest="source", type=Path, help="folder with a folder for each data set's files")
    parser.add_argument("--budget", default="full")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rows", nargs="+", help="names of rows; by default all")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    try:
        budget = tables.read_budget(options.budget)
        table = only(tables.read_table(options.table), options.rows)
        for data in data_sets(table, budget, options.data):
            study = open_study(options.out, data, options.source, budget)
            if study is not None:
                Runner(study, table, budget, options.device).run()
    except RankTowerError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    return 0


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


def open_study(root: Path, data: str, source: Path | None, budget: Budget) -> Study | None:
    """Bring the log into the documented form unless it is; None, with a line that says so, where there is no data."""
    place, found = root / "logs" / data_name(data), None
    if data in DATASETS:
        found = source / data if source is not None and (source / data).is_dir() else None
        if data == "cascade" and budget.made:
            found = root / "cascade.toml"
            root.mkdir(parents=True, exist_ok=True)
            found.write_text("".join(f"{key} = {value}\n" for key, value in budget.made.items()))
    try:
        convert(data, found, place)
    except DataError as error:
        if data not in DATASETS or found is not None:
            raise
        console.print(f"{data}: not here ({error})", soft_wrap=True)
        return None
    return Study(root, data_name(data))


# --- one table on one data set ---------------------------------------------------------------------------------------


class MissingError(Exception):
    """A search needs a training that was not done yet."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe_name(recipe))
        self.recipe = recipe


class Runner:
    """Does what is missing of a table on a data set, one training after the other."""

    def __init__(self, study: Study, table: Table, budget: Budget, device: str = "cpu") -> None:
        self.study, self.table, self.budget, self.device = study, table, budget, device

    def run(self) -> None:
        self.study.freeze()
        self.say(f"{self.table.title}: {self.left()}")
        for row in self.table.rows:
            if row.baseline is not None:
                self.test_baseline(row.baseline)
                continue
            best = self.search(row)
            if best is None:
                self.say(f"{row.name}: every trial diverged")
                continue
            for seed in range(self.budget.seeds):
                recipe = recipe_of(row, self.budget, self.study.data, best, seed)
                self.train(recipe, f"{row.name}, seed {seed}")
                self.test(recipe)
                if self.table.cost and seed == 0:
                    self.cost(recipe)

    def say(self, what: str) -> None:
        console.print(f"[bold]{self.study.data}[/] {what}", soft_wrap=True)

    # what is left

    def left(self) -> str:
        """Trainings left of all, and about how long they take."""
        counts = [self.row_left(row) for row in self.table.rows if row.baseline is None]
        done, missing = sum(done for done, _ in counts), [name for _, names in counts for name in names]
        seconds = mean_seconds(self.study)
        known = [seconds.get(network, seconds.get("", np.nan)) for network in missing]
        about = "time unknown before the first" if np.isnan(known).any() else f"about {duration(sum(known))}"
        return f"{len(missing)} of {done + len(missing)} trainings left" + (f", {about}" if missing else "")

    def row_left(self, row: Row) -> tuple[int, list[str]]:
        """Trainings of a row: how many are done, and the network of each that is not.

        The trial that is chosen is also the first of the seeds.
        """
        trials = tables.trials_of(row, self.budget)
        total = trials + self.budget.seeds - 1
        done = 0

        def known(changes: Changes) -> float:
            nonlocal done
            value = self.known_score(self.recipe(row, changes))
            done += 1
            return value

        try:
            best = tables.chosen(tables.search(row, self.budget, known)).changes
        except MissingError as missing:
            return done, [missing.recipe.network] * (total - done)
        seeds = [recipe_of(row, self.budget, self.study.data, best, seed) for seed in range(1, self.budget.seeds)]
        done += sum((self.study.run(recipe) / RESULT).is_file() for recipe in seeds)
        return done, [self.recipe(row, best).network] * (total - done)

    # search

    def recipe(self, row: Row, changes: Changes) -> Recipe:
        """A trial: always seed 0."""
        return recipe_of(row, self.budget, self.study.data, changes, 0)

    def known_score(self, recipe: Recipe) -> float:
        """Validation NDCG@10 of a finished training. Raises MissingError where there is none."""
        path = self.study.run(recipe) / RESULT
        if not path.is_file():
            raise MissingError(recipe)
        score: float = json.loads(path.read_text())["valid_ndcg@10"]
        return score

    def search(self, row: Row) -> Changes | None:
        """The best changes on validation, and the record of how they were found; None where all trials diverged."""

        def score(changes: Changes) -> float:
            self.train(self.recipe(row, changes), f"{row.name}, {described(changes)}")
            return self.known_score(self.recipe(row, changes))

        trials = tables.search(row, self.budget, score)
        best = tables.chosen(trials)
        path = self.study.search(tables.search_name(row, self.budget, self.study.data))
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"table": self.table.name, "row": row.name, **record(trials, best)})
        return None if best.score == DIVERGED else best.changes

    # train, test

    def train(self, recipe: Recipe, what: str) -> None:
        """Train unless that was done, going on from the last whole epoch of a process that was killed."""
        folder = self.study.run(recipe)
        if (folder / RESULT).is_file():
            return
        with filled(folder, keep=True) as part:
            if part is None:
                return
            begun = (part / "state.safetensors").is_file()
            if not begun:
                shutil.rmtree(part)  # half of a first epoch
                part.mkdir()
            self.say(f"{'going on with' if begun else 'training'} {what}: {folder.name}")
            started = time.monotonic()
            result = self.trained(part, recipe, begun)
            write_json(part / RESULT, {**result, "seconds": round(time.monotonic() - started, 3)})
            for name in ("state.safetensors", "state.json", "teacher.safetensors"):
                (part / name).unlink(missing_ok=True)
        self.say(f"{what}: validation NDCG@10 {result['valid_ndcg@10']:.4f}; {self.left()}")

    def trained(self, part: Path, recipe: Recipe, resume: bool) -> dict[str, Any]:
        """Train in a folder; what is kept of it."""
        with progress_bars() as progress:
            try:
                metrics = train(
                    self.study.seen,
                    part,
                    replace(recipe, device=self.device),
                    resume=resume,
                    progress=progress,
                    teacher=self.study.teacher if recipe.teacher else None,
                    test=False,
                )
            except DivergedError as error:
                return {"recipe": asdict(recipe), "valid_ndcg@10": DIVERGED, "diverged": str(error)}
        kept = {key: metrics[key] for key in ("valid_ndcg@10", "best_epoch", "train_seconds", "teacher")}
        return {"recipe": asdict(recipe), "device": self.device, "threads": torch.get_num_threads(), **kept}

    def test(self, recipe: Recipe) -> None:
        """Score the frozen test lists with a finished training, once."""
        run = self.study.run(recipe)
        trained = json.loads((run / RESULT).read_text())
        if "diverged" in trained:
            return
        with filled(self.study.test(recipe)) as part:
            if part is None:
                return
            self.note(recipe_name(recipe))
            network, spec, _ = load_checkpoint(run)
            users = encode_users(spec, self.study.log, self.study.requests)
            items = encode_items(spec, self.study.log)
            sets = {name: self.study.test_set(name).lists for name in self.study.sets()}
            save_scores(part, {name: score_network(network, users, items, lists) for name, lists in sets.items()})
            write_json(part / RESULT, trained)

    def test_baseline(self, name: str) -> None:
        """Scores of what needs no training: popularity in training, or a constant."""
        with filled(self.study.baseline(name)) as part:
            if part is None:
                return
            self.note(name)
            taken = popularity(self.study.log)
            values = taken if name == "popularity" else np.zeros(len(taken))
            sets = {kind: self.study.test_set(kind).lists for kind in self.study.sets()}
            save_scores(part, {kind: values[lists.item] for kind, lists in sets.items()})
            write_json(part / RESULT, {"baseline": name})

    def note(self, name: str) -> None:
        """Put on record that test lists are about to be scored."""
        with (self.study.folder / "tests.jsonl").open("a") as stream:
            stream.write(json.dumps({"time": round(time.time()), "table": self.table.name, "scored": name}) + "\n")

    def cost(self, recipe: Recipe) -> None:
        with filled(self.study.cost(recipe)) as part:
            if part is not None:
                write_json(part / RESULT, measure_cost(self.study.run(recipe), self.study.log))


def described(changes: Changes) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items())


def record(trials: Sequence[Trial], best: Trial) -> dict[str, Any]:
    return {"chosen": best.changes, "trials": [asdict(trial) for trial in trials]}


def mean_seconds(study: Study) -> dict[str, float]:
    """Seconds of a training, by network, and of any as "": the mean of the finished ones."""
    found: dict[str, list[float]] = {}
    for path in study.folder.glob(f"runs/[!.]*/{RESULT}"):
        result = json.loads(path.read_text())
        for network in (result["recipe"]["network"], ""):
            found.setdefault(network, []).append(result["seconds"])
    return {network: float(np.mean(seconds)) for network, seconds in found.items()}


def duration(seconds: float) -> str:
    """90 as 2 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
