"""Read the recipes of the paper's tables: TOML in, rows of training recipes with their search and budget out."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from experiments.views import VIEWS, WHOLE
from model.errors import RankTowerError
from model.train import Recipe

RECIPES = Path(__file__).parent / "recipes"
BASE = "base"  # what all tables share: budgets, and the search
BASELINES = ("popularity", "random")
OPTIONS = ("options", "loss_options", "sampler_options")
DIVERGED = -1.0  # the score of a training whose loss is no number

Changes = dict[str, Any]  # of a recipe, by name of a field or `options.name`


class RecipeError(RankTowerError):
    """A recipe file says something that no training takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contestant of a table: what it changes in the base recipe, or a baseline that needs no training."""

    name: str
    baseline: str | None = None
    changes: Changes = field(default_factory=dict)
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # in the order of search
    trials: int = 0  # that it asks for, beyond those of the budget
    view: str = WHOLE  # what it gets to train on
    paper: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # data set -> Recall@K, NDCG@K


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows to be measured alike on some data sets."""

    name: str
    title: str
    data: tuple[str, ...]
    reference: str  # the row that the others are compared with
    rows: tuple[Row, ...]
    cost: bool = False  # also measure what serving a row costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What every row may spend."""

    name: str
    trials: int  # trainings of the search, at most
    seeds: int
    recipe: Changes  # for every row on every data set
    data: Mapping[str, Changes]  # and on some data sets
    own_trials: bool = False  # a row that asks for more trials gets them
    made: Mapping[str, Any] | None = None  # settings of a simulated log that stands for all data


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training of a search."""

    changes: Changes
    score: float  # NDCG@10 on validation; DIVERGED where the loss became no number


def names() -> tuple[str, ...]:
    """The tables there are."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.toml") if path.stem != BASE))


def read_table(name: str, folder: Path = RECIPES) -> Table:
    """A table by name. Raises RecipeError where a row is not a recipe."""
    base, text = _read(folder / f"{BASE}.toml"), _read(folder / f"{name}.toml")
    common = text.pop("recipe", {})
    rows = tuple(_row(name, dict(entry), common, base["search"]) for entry in text.pop("rows"))
    known = {row.name for row in rows}
    table = Table(name=name, rows=rows, **{**text, "data": tuple(text["data"])})
    if table.reference not in known or len(known) < len(rows):
        raise RecipeError(f"recipes/{name}.toml: the reference must be one of the rows, and no two may share a name")
    return table


def read_budget(name: str, folder: Path = RECIPES) -> Budget:
    """A budget of base.toml by name."""
    budgets = _read(folder / f"{BASE}.toml")["budget"]
    if name not in budgets:
        raise RecipeError(f"budget {name!r} is not known: use one of {', '.join(budgets)}")
    return Budget(name=name, **{"recipe": {}, "data": {}, **budgets[name]})


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist: tables are {', '.join(names())}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _row(table: str, entry: dict[str, Any], common: Changes, search: Mapping[str, Sequence[Any]]) -> Row:
    """A row of a file; what is neither its name nor about it is a change of the recipe."""
    name, baseline, paper = entry.pop("name"), entry.pop("baseline", None), entry.pop("paper", {})
    own, trials = entry.pop("search", {}), entry.pop("trials", 0)
    if not isinstance(trials, int) or trials < 0:
        raise RecipeError(f"recipes/{table}.toml, {name}: trials is {trials!r}: write a whole number")
    if baseline is not None:
        if baseline not in BASELINES or entry:
            raise RecipeError(f"recipes/{table}.toml, {name}: a baseline is one of {', '.join(BASELINES)} and no more")
        return Row(name=name, baseline=baseline, paper=paper)
    view = entry.pop("view", WHOLE)
    if view not in VIEWS:
        raise RecipeError(f"recipes/{table}.toml, {name}: view {view!r} is not known: use one of {', '.join(VIEWS)}")
    parts = {key: {**common[key], **entry.get(key, {})} for key in OPTIONS if key in common}
    entry = {**common, **entry, **parts}
    row = Row(
        name=name,
        changes=entry,
        search={key: values for key, values in {**search, **own}.items() if values},
        trials=trials,
        view=view,
        paper=paper,
    )
    for key in {**entry, **row.search}:
        if key.partition(".")[0] not in {known.name for known in fields(Recipe)} - {"seed"}:
            raise RecipeError(f"recipes/{table}.toml, {name}: no recipe has {key!r}")
    return row


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe_of(row: Row, budget: Budget, data: str, changes: Changes, seed: int) -> Recipe:
    """The training of a row: the budget's recipe, the data set's, the row's own, then what the search changed."""
    recipe = Recipe(seed=seed)
    for part in (budget.recipe, budget.data.get(data, {}), row.changes, changes):
        recipe = changed(recipe, part)
    return recipe


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with fields replaced; options are added to those there, also one by one as `options.name`."""
    for key, value in changes.items():
        place, _, option = key.partition(".")
        if place in OPTIONS:
            value = {**getattr(recipe, place), **({option: value} if option else value)}
        recipe = replace(recipe, **{place: value})
    return recipe


def identity(value: Any) -> str:
    """16 hex digits that name plain data by its content. Order counts: a hybrid loss balances its terms by the last."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def recipe_name(recipe: Recipe, view: str = WHOLE) -> str:
    """What a recipe is called among files: readable first, then the hash of all of it but the device."""
    content = {key: value for key, value in asdict(recipe).items() if key != "device"}
    if content["loss_options"].get("distill") == "softmax":  # as it is when nobody says so
        content["loss_options"] = {key: value for key, value in recipe.loss_options.items() if key != "distill"}
    parts = [recipe.network, recipe.loss, recipe.sampler, *([] if view == WHOLE else [view]), f"seed{recipe.seed}"]
    return "-".join([*parts, identity(content)])


def described(changes: Changes) -> str:
    """Changes for people: the last part of each name, of a table its numbers with theirs."""
    values = {
        key: " ".join(f"{name} {number:g}" for name, number in value.items()) if isinstance(value, Mapping) else value
        for key, value in changes.items()
    }
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())


# --- search ----------------------------------------------------------------------------------------------------------


def trials_of(row: Row, budget: Budget) -> int:
    """How many trainings the search of a row takes."""
    most = max(budget.trials, row.trials) if budget.own_trials else budget.trials
    return min(most, 1 + sum(len(values) - 1 for values in row.search.values()))


def search(row: Row, budget: Budget, score: Callable[[Changes], float | None]) -> tuple[list[Trial], list[Changes]]:
    """The trials so far, and those to do next, which do not depend on one another: none when the search is over.

    Tries the values of one key after the other, each time keeping the best so far; the first of equals wins. A key that
    waits for its turn stands at its first value. `score` is None for what was not trained yet.
    """
    best: Changes = {key: values[0] for key, values in row.search.items()}
    most = trials_of(row, budget)
    trials: list[Trial] = []
    for key, values in row.search.items():
        known = [trial.changes for trial in trials]
        new = [changes for value in values if (changes := {**best, key: value}) not in known]
        scores = [(changes, score(changes)) for changes in new[: most - len(trials)]]
        trials += [Trial(changes=changes, score=value) for changes, value in scores if value is not None]
        wanted = [changes for changes, value in scores if value is None]
        if wanted:
            return trials, wanted
        best = chosen(trials).changes
    return trials, []


def chosen(trials: Sequence[Trial]) -> Trial:
    """The best on validation, the first of equals."""
    return max(trials, key=lambda trial: trial.score)
