"""Recipes of the paper's tables: what the files say, what a search tries, and what names a result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import tables
from experiments.study import NO_PART, NO_PART_ADAPTERS, ROOT, code_version
from experiments.tables import Budget, Changes, RecipeError, Row, chosen, recipe_name, recipe_of, search, trials_of
from model.losses import LOSSES
from model.networks import NETWORKS
from model.sampling import SAMPLERS
from model.train import Recipe

BUDGET = Budget(name="b", trials=5, seeds=3, recipe={"batch": 8}, data={"movielens": {"batch": 16}})
ROW = Row(
    name="r",
    changes={"network": "two_tower", "options": {"dim": 8}},
    search={"lr": [0.1, 0.2, 0.3], "options.dropout": [0.5, 0.1], "clip": [1.0, 2.0]},
)


@pytest.mark.parametrize("name", tables.names())
@pytest.mark.parametrize("budget", ["full", "look", "tiny"])
def test_every_row_of_every_table_names_what_there_is(name: str, budget: str) -> None:
    table, spend = tables.read_table(name), tables.read_budget(budget)
    for row in table.rows:
        recipe = recipe_of(row, spend, table.data[0], {key: values[0] for key, values in row.search.items()}, 0)
        assert recipe.network in NETWORKS
        assert recipe.loss in LOSSES
        assert recipe.sampler in SAMPLERS


def test_all_rows_have_the_same_trials_but_two_that_say_so() -> None:
    budget = tables.read_budget("full")
    rows = [row for name in tables.names() for row in tables.read_table(name).rows if row.baseline is None]
    assert {trials_of(row, budget) for row in rows if not row.trials} == {budget.trials}
    assert {next(iter(row.search)) for row in rows} == {"lr"}
    longer = [row for row in rows if row.trials]
    assert [row.name for row in longer] == ["RankTower+", "Two-Tower+", "IntTower+", "DAT+"]
    assert len({trials_of(row, budget) for row in longer}) == 1
    assert all(trials_of(row, budget) == row.trials > budget.trials for row in longer)


@pytest.mark.parametrize(("own", "asked", "got"), [(True, 6, 6), (True, 2, 5), (True, 99, 6), (False, 6, 5)])
def test_a_row_gets_the_trials_it_asks_for_never_fewer_than_others_nor_more_than_there_are(
    own: bool, asked: int, got: int
) -> None:
    """The budget has five, the search six values to try; small budgets hold for all."""
    row = replace(ROW, trials=asked, search={**ROW.search, "lr": [0.1, 0.2, 0.3, 0.4]})
    assert trials_of(row, replace(BUDGET, own_trials=own)) == got


def test_a_search_takes_the_best_of_one_key_to_the_next() -> None:
    asked: list[Changes] = []

    def score(changes: Changes) -> float:
        asked.append(changes)
        return changes["lr"] - changes["options.dropout"] - abs(changes["clip"] - 2)

    trials, wanted = search(ROW, BUDGET, score)
    start = {"options.dropout": 0.5, "clip": 1.0}
    assert not wanted
    assert asked[:3] == [{"lr": lr, **start} for lr in (0.1, 0.2, 0.3)]
    assert asked[3] == {"lr": 0.3, "options.dropout": 0.1, "clip": 1.0}
    assert asked[4] == {"lr": 0.3, "options.dropout": 0.1, "clip": 2.0}
    assert chosen(trials).changes == asked[4]


def test_a_search_asks_at_once_for_the_trials_that_need_not_wait_for_one_another() -> None:
    known: dict[str, float] = {}
    rounds = []

    def score(changes: Changes) -> float | None:
        return known.get(str(changes))

    while wanted := search(ROW, BUDGET, score)[1]:
        rounds.append([(changes["lr"], changes["options.dropout"], changes["clip"]) for changes in wanted])
        known.update({str(changes): changes["lr"] for changes in wanted[::-1][:2]})  # the last two get done first
    assert rounds == [[(0.1, 0.5, 1.0), (0.2, 0.5, 1.0), (0.3, 0.5, 1.0)], [(0.1, 0.5, 1.0)], [(0.3, 0.1, 1.0)],
                      [(0.3, 0.5, 2.0)]]  # fmt: skip


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_a_search_ends_with_its_trials(most: int) -> None:
    budget = replace(BUDGET, trials=most)
    trials, _ = search(ROW, budget, lambda changes: 0.0)
    assert len(trials) == trials_of(ROW, budget) == most
    assert chosen(trials).changes["lr"] == 0.1  # of equals the first


def test_a_row_changes_what_the_data_set_changes_in_the_budgets_recipe() -> None:
    recipe = recipe_of(ROW, BUDGET, "movielens", {"options.dropout": 0.1, "lr": 0.2}, 2)
    assert recipe == Recipe(
        network="two_tower", options={"dim": 8, "dropout": 0.1}, batch=16, lr=0.2, seed=2, loss=Recipe().loss
    )
    assert recipe_of(ROW, BUDGET, "taobao", {}, 0).batch == 8


def test_a_name_tells_recipes_apart_but_not_devices() -> None:
    recipe = Recipe()
    others = [replace(recipe, lr=0.1), replace(recipe, options={"dim": 8}), replace(recipe, seed=1)]
    assert len({recipe_name(one) for one in [recipe, *others]}) == 4
    assert recipe_name(replace(recipe, device="cuda")) == recipe_name(recipe)
    assert recipe_name(recipe, "no-context") != recipe_name(recipe)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('name = "a"\nlearning_rate = 1', "no recipe has 'learning_rate'"),
        ('name = "a"\nseed = 1', "no recipe has 'seed'"),
        ('name = "a"\ntrials = "many"', "trials is 'many': write a whole number"),
        ('name = "a"\nview = "half"', "view 'half' is not known: use one of whole, with-context, no-context"),
        ('name = "a"\nbaseline = "popular"', "a baseline is one of"),
        ('name = "b"', "the reference must be one of the rows"),
        ('name = "a"\n[[rows]]\nname = "a"', "no two may share a name"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "base.toml").write_text("[search]\nlr = [0.1]\n")
    (tmp_path / "t.toml").write_text(f'title = "t"\ndata = ["movielens"]\nreference = "a"\n[[rows]]\n{rows}\n')
    with pytest.raises(RecipeError, match=message):
        tables.read_table("t", tmp_path)


def test_results_are_those_of_the_code_that_makes_them(tmp_path: Path) -> None:
    (tmp_path / "losses.py").write_text("x = 1\n")
    before = code_version(tmp_path)
    (tmp_path / "losses.py").write_text("x = 1  # one\n")
    (tmp_path / "cli.py").write_text("y = 1\n")
    assert code_version(tmp_path) == before
    (tmp_path / "losses.py").write_text("x = 2\n")
    assert code_version(tmp_path) != before


def test_what_is_spared_of_the_code_is_there() -> None:
    for name in (*NO_PART, *(f"datasets/{adapter}.py" for adapter in NO_PART_ADAPTERS)):
        assert (ROOT / "model" / name).is_file(), name
