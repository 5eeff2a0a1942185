"""One data set under study: its log, its frozen test lists, and where each result of it lies.

<root>/tests.jsonl                                a line for each time that test lists were scored, by whatever code
<root>/logs/<data>/                               the log in the documented form
<root>/<data>-<content of the log>-<code>/        all results of one log by one version of the code that makes them
    lists/<set>.npz, result.json                  the test lists, made before anything is trained, and what they are
    teacher/                                      soft labels, fitted once for all runs of a view (views.py)
    runs/<recipe>/                                a finished training: weights, epochs, result.json
    tests/<recipe>/                               scores of the test lists, and result.json
    costs/<recipe>/result.json                    what serving costs

Whatever is there is whole: folders are filled as `.<name>.part`, one process a folder, and renamed. What a search chose
follows from the trainings.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from experiments import tables
from experiments.tables import Budget, Changes, Row, Trial, recipe_name, recipe_of
from experiments.views import VIEWS, WHOLE, bare
from model.checkpoint import write_json
from model.datasets.log import IMPRESSION, TEST, TRAIN, Log, read_log, without
from model.datasets.schema import FILE
from model.errors import RankTowerError
from model.evaluate import held_out
from model.requests import SplitRequests, fit_log_spec
from model.sampling import Lists, on_offer
from model.teacher import Teacher, fit_teacher
from model.train import Material, Recipe, prepare

ROOT = Path(__file__).resolve().parents[1]
RESULT = "result.json"
SETS = {"full": False, "random": True}  # list sets: random negatives only?
TRAINS = ("differentiate.h", "level.h", "training.cpp", "training.h")
OTHERS = (ROOT / "experiments" / "views.py", ROOT / "kernel" / "training.py")  # decide results and lie elsewhere
# Files of model/ that decide no result: adapters (the log's content is in the path), what serves, what prints.
NO_PART = (
    "cli.py",
    "export.py",
    "bundle.py",
    "tower.py",
    "fused.py",
    "folders.py",
    "errors.py",
    "datasets/__init__.py",
)
NO_PART_ADAPTERS = (
    *("alimama", "cascade", "csv_files", "form", "kuairand", "movielens", "own", "retailrocket", "taobao"),
    *("userbehavior", "world"),
)


class RunError(RankTowerError):
    """Results of two machines would meet in one table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenLists:
    """Frozen test lists with their users: all that a metric needs beside scores."""

    lists: Lists
    user: np.ndarray  # (L,) int32


class Study:
    """The log of one data set and the places of its results; what is expensive is made when it is first asked for."""

    def __init__(self, root: Path, data: str, folder: Path | None = None) -> None:
        self.root, self.data, self.source = root, data, root / "logs" / data
        self.folder = folder or root / f"{data}-{log_digest(self.source)}-{code_version()}"

    @cached_property
    def log(self) -> Log:
        """The whole log. Only the test lists and their scores come from it."""
        return read_log(self.source)

    @cache  # noqa: B019 (a study lives as long as its process)
    def seen(self, view: str = WHOLE) -> Log:
        """The log without its test events, as rows of a view see it: all that teachers, searches and trainings get."""
        return VIEWS[view](without(self.log, TEST))

    def teacher_folder(self, view: str = WHOLE) -> Path:
        return self.folder / ("teacher" if view == WHOLE else f"teacher-{view}")

    def fit_teacher(self, view: str, folder: Path) -> None:
        """Soft labels of the training impressions, the same for all runs of a view."""
        fitted = fit_teacher(self.seen(view), fit_log_spec(self.seen(view)))
        save_file({"soft": fitted.soft}, folder / "soft.safetensors")
        write_json(folder / RESULT, fitted.to_json())

    @cache  # noqa: B019
    def teacher(self, view: str = WHOLE) -> Teacher:
        """The one that was fitted."""
        folder = self.teacher_folder(view)
        kept = json.loads((folder / RESULT).read_text())
        soft = load_file(folder / "soft.safetensors")["soft"]
        return Teacher(soft=soft, auc=kept["auc"], logged=kept["logged"])

    @cache  # noqa: B019
    def material(self, valid_lists: int, view: str = WHOLE, *, teacher: bool = True) -> Material:
        """What trainings read, made once for all of them."""
        log = self.seen(view)
        return prepare(log, fit_log_spec(log), self.teacher(view) if teacher else None, valid_lists)

    def claim(self, machine: Mapping[str, Any]) -> None:
        """Say what trains here: device, threads and kernel level decide the last digits, so that nothing else may."""
        path = self.folder / "machine.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            ours = path.with_name(f".{path.name}.{os.getpid()}")
            write_json(ours, machine)
            with suppress(FileExistsError):  # another process was first, and whole: its word counts
                os.link(ours, path)
            ours.unlink()
        before = json.loads(path.read_text())
        if before != machine:
            raise RunError(f"{self.folder} was made with {before}, this command has {machine}: use the same, or --out")

    def run(self, recipe: Recipe, view: str = WHOLE) -> Path:
        return self.folder / "runs" / recipe_name(recipe, view)

    def test(self, recipe: Recipe, view: str = WHOLE) -> Path:
        return self.folder / "tests" / recipe_name(recipe, view)

    def cost(self, recipe: Recipe, view: str = WHOLE) -> Path:
        return self.folder / "costs" / recipe_name(recipe, view)

    def baseline(self, name: str) -> Path:
        return self.folder / "tests" / name

    def search(self, row: Row, budget: Budget) -> tuple[list[Trial], list[Changes]]:
        """The trials of a row that were trained, and those to train next: none when its search is over."""
        trial = partial(recipe_of, row, budget, self.data, seed=0)
        return tables.search(row, budget, lambda changes: self.score(trial(changes), row.view))

    def score(self, recipe: Recipe, view: str = WHOLE) -> float | None:
        """Validation NDCG@10 of a finished training, DIVERGED of one that diverged; None where there is none."""
        path = self.run(recipe, view) / RESULT
        return float(json.loads(path.read_text())["valid_ndcg@10"]) if path.is_file() else None

    def freeze(self) -> None:
        """Write the test lists and what they are, unless that was done; before anything is trained."""
        with filled(self.folder / "lists") as part:
            if part is None:
                return
            about = {}
            for name in self.sets():
                held = held_out(self.log, TEST, random_only=SETS[name], new_items=False)
                save_lists(part / f"{name}.npz", held.lists, held.requests.user)
                about[name] = held.describe()
            write_json(part / RESULT, {"log": facts(self.log), "sets": about, "stages": self.log.has_stages})

    def sets(self) -> tuple[str, ...]:
        """The list sets there are: a log with its own stages has one, as logged."""
        return ("full",) if self.log.has_stages else tuple(SETS)

    def list_sets(self) -> tuple[str, ...]:
        """What is reported: the sets that were frozen, and the impressions of the first alone."""
        return (*self.about()["sets"], "exposed")

    def about(self) -> dict[str, Any]:
        """What the log and its test lists are."""
        found: dict[str, Any] = json.loads((self.folder / "lists" / RESULT).read_text())
        return found

    def test_set(self, name: str) -> FrozenLists:
        """The frozen lists of a set."""
        with np.load(self.folder / "lists" / f"{name}.npz", allow_pickle=False) as kept:
            item = kept["item"]
            lists = Lists(item=item, grade=kept["grade"], stage=kept["stage"], soft=np.zeros(item.shape, np.float32))
            return FrozenLists(lists=lists, user=kept["user"])

    @cached_property
    def requests(self) -> SplitRequests:
        """The requests of the test lists of every set, in their order."""
        return held_out(self.log, TEST).requests


def facts(log: Log) -> dict[str, Any]:
    """What a reader of a table has to know of a log, as plain numbers and words."""
    train = log.split == TRAIN
    shown = train & (log.stage == IMPRESSION)
    tested = log.item[(log.split == TEST) & (log.grade > 0)]
    return {
        "name": log.schema.name,
        "split": log.schema.split.by,
        "timed": log.schema.columns.time is not None,
        "history": log.schema.history is not None,
        "users": len(log.users),
        "items": len(log.items),
        "events": len(log),
        "train": int(train.sum()),
        "train_lists": len(np.unique(log.request[train])),
        "bare": int((train & bare(log)).sum()),
        "new": float(np.mean(~np.isin(tested, on_offer(log)))) if len(tested) else 0.0,  # share of test positives
        "left": int((shown & (log.grade == 0)).sum()),  # shown in training and not taken
    }


def save_lists(path: Path, lists: Lists, user: np.ndarray) -> None:
    np.savez_compressed(path, item=lists.item, grade=lists.grade, stage=lists.stage, user=user.astype(np.int32))


def save_scores(folder: Path, scores: Mapping[str, np.ndarray]) -> None:
    """Scores (L, n) of each list set; NaN never, whatever stands on padding.

    Of the full set as they are; of the other the places alone, which is all that a metric of one list reads, in a
    quarter of the size: 11 and 3 MB for KuaiRand's 15,327 lists, so that 50 rows with three seeds take 2 GB.
    """
    for name, values in scores.items():
        kept = values.astype(np.float32) if name == "full" else places(values.astype(np.float32))
        np.savez_compressed(folder / f"{name}.npz", scores=kept)


def load_scores(folder: Path, name: str) -> np.ndarray:
    """What was kept of one list set, (L, n): float32 scores, or whole numbers in their order, ties included."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as kept:
        scores: np.ndarray = kept["scores"]
        return scores


def places(values: np.ndarray) -> np.ndarray:
    """How many distinct lower values each value of a row has: (L, n), the smallest unsigned type that holds them."""
    order = np.argsort(values, axis=1)
    ascending = np.take_along_axis(values, order, axis=1)
    steps = np.zeros(values.shape, np.min_scalar_type(max(values.shape[1] - 1, 0)))
    steps[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    found = np.empty_like(steps)
    np.put_along_axis(found, order, np.cumsum(steps, axis=1, dtype=steps.dtype), axis=1)
    return found


def log_digest(folder: Path) -> str:
    """12 hex digits of a log's content."""
    content = hashlib.sha256()
    for name in (FILE, "users.parquet", "items.parquet", "events.parquet"):
        with (folder / name).open("rb") as stream:
            content.update(hashlib.file_digest(stream, "sha256").digest())
    return content.hexdigest()[:12]


def code_version(
    folder: Path = ROOT / "model", native: Path = ROOT / "kernel" / "cpp", others: Sequence[Path] = OTHERS
) -> str:
    """12 hex digits of the code that decides results: of its syntax without docstrings and what errors say.

    Of native code, only what trains; it counts as it stands.
    """
    content = hashlib.sha256()
    for name in TRAINS:
        content.update((native / name).read_bytes())
    for path in others:
        content.update(ast.dump(wordless(ast.parse(path.read_text(encoding="utf-8")))).encode())
    spared = {*NO_PART, *(f"datasets/{name}.py" for name in NO_PART_ADAPTERS)}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if name not in spared:
            content.update(name.encode() + ast.dump(wordless(ast.parse(path.read_text(encoding="utf-8")))).encode())
    return content.hexdigest()[:12]


def wordless(tree: ast.Module) -> ast.Module:
    """The same syntax without docstrings and without the arguments of what is raised."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = []
    return tree


class BusyError(Exception):
    """Another process fills the folder."""


@contextmanager
def filled(folder: Path, *, keep: bool = False, wait: bool = True) -> Iterator[Path | None]:
    """Give `.<name>.part` beside `folder` to fill, and rename it to `folder` at the end; None if that is there already.

    What a killed process left in the part goes, or stays with `keep`. Of several processes one fills; the others wait,
    or get BusyError. On an error the part stays where it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:  # the system lets go of the lock when the process ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(str(folder)) from error
        if folder.is_dir():
            yield None
            return
        if not keep:
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(exist_ok=True)
        yield part
        os.replace(part, folder)
