"""The report of the paper's tables from results made by hand, whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from experiments.dots import dots
from experiments.report import exposed, write_report
from experiments.study import RESULT, FrozenLists, Study, save_scores
from experiments.tables import Budget, Row, Table, recipe_of
from model.checkpoint import write_json
from model.datasets.log import IMPRESSION, PADDING, RANDOM
from model.sampling import Lists
from tests.logs import write_tiny_log

BUDGET = Budget(name="b", trials=1, seeds=2, recipe={}, data={})
ROWS = tuple(
    Row(name=name, changes={"network": network}, search={"lr": [0.1]}, paper={"tiny": (0.5, value)})
    for name, network, value in (("ours", "ranktower", 0.4), ("theirs", "two_tower", 0.3), ("absent", "lr", 0.2))
)
TABLE = Table(name="t", title="A table", data=("tiny",), reference="ours", rows=ROWS)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    write_tiny_log(tmp_path / "logs" / "tiny", users=60, items=80)
    made = Study(tmp_path, "tiny")
    made.freeze()
    return made


def put(study: Study, row: Row, scores: list[dict[str, np.ndarray]]) -> None:
    """What a run leaves of a row: its search and a test for each seed."""
    trial = study.run(recipe_of(row, BUDGET, study.data, {"lr": 0.1}, 0))
    trial.mkdir(parents=True)
    write_json(trial / RESULT, {"valid_ndcg@10": 0.5})
    for seed, sets in enumerate(scores):
        folder = study.test(recipe_of(row, BUDGET, study.data, {"lr": 0.1}, seed))
        folder.mkdir(parents=True)
        save_scores(folder, sets)
        write_json(folder / RESULT, {"train_seconds": 10.0 + 2 * seed})


def perfect(study: Study) -> dict[str, np.ndarray]:
    return {name: study.test_set(name).lists.grade.astype(float) for name in study.sets()}


def cells(text: str, row: str) -> list[str]:
    """Of the first table."""
    line = next(line for line in text.splitlines() if line.startswith((f"| {row} ", f"| **{row}** ")))
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_a_perfect_row_beats_its_reverse_by_all_there_is(study: Study, tmp_path: Path) -> None:
    best = perfect(study)
    worst = {name: -scores for name, scores in best.items()}
    put(study, ROWS[0], [best, best])
    put(study, ROWS[1], [best, worst])
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, ["tiny"])
    text = (tmp_path / "out" / "TABLES.md").read_text()
    ours, theirs, absent = (cells(text, name) for name in ("ours", "theirs", "absent"))
    assert ours[1:3] == ["1.0000 ± 0.0000"] * 2
    # of 200 places for 80 items the worst ten hold no positive: recall 0 with one seed, 1 with the other
    assert theirs[1] == "0.5000 ± 0.7071"
    assert theirs[5] == "-0.5000 [-0.5000, -0.5000]"  # every list loses one half: the interval has no width
    assert theirs[-1] == "11"
    assert set(absent[1:7]) == {"n/a"}
    assert "Order by NDCG@10: ours > theirs." in text
    assert "The paper's: ours > theirs > absent." in text
    assert "#### random negatives only" in text
    assert study.about()["sets"]["full"]["digest"][:16] in text
    assert "(plots/t-tiny.svg)" in text
    assert (tmp_path / "out" / "plots" / "t-tiny.svg").read_text().startswith("<svg")


def test_the_interval_of_a_difference_is_that_of_users_drawn_again(study: Study, tmp_path: Path) -> None:
    """Lists of half of the users lose everything: the mean loss of a resample is a share of Poisson counts."""
    best = perfect(study)
    sides = {name: np.where(study.test_set(name).user % 2, 1, -1)[:, None] for name in best}
    put(study, ROWS[0], [best])
    put(study, ROWS[1], [{name: scores * sides[name] for name, scores in best.items()}])
    lines = {row.name: report.read_line(study, TABLE, BUDGET, row) for row in ROWS[:2]}
    found = lines["theirs"].measured["full"].compared(lines["ours"].measured["full"], "recall@10")
    lists = study.test_set("full")
    counted = (lists.lists.grade > 0).any(axis=1)
    odd = lists.user[counted] % 2
    assert found.mean == pytest.approx(-(1 - odd.mean()))
    size = np.bincount(lists.user[counted])
    lost = np.bincount(lists.user[counted], 1 - odd)
    drawn = np.random.default_rng(1).poisson(1.0, (4000, len(size)))
    means = -(drawn @ lost) / (drawn @ size)
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_a_row_with_seeds_missing_says_so(study: Study, tmp_path: Path) -> None:
    put(study, ROWS[0], [perfect(study)])
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, ["tiny"])
    assert cells((tmp_path / "out" / "TABLES.md").read_text(), "ours")[1] == "1.0000 (1 of 2 seeds)"


def test_data_that_is_not_here_is_not_applicable(tmp_path: Path) -> None:
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, None)
    assert "n/a: the adapter is there, the data is not." in (tmp_path / "out" / "TABLES.md").read_text()


def test_exposed_lists_are_the_impressions_of_users_who_took_some_and_left_some() -> None:
    stage = np.array([[IMPRESSION, RANDOM, IMPRESSION], [IMPRESSION, PADDING, PADDING], [IMPRESSION, IMPRESSION, -1]])
    item = np.array([[1, 2, 3], [4, 0, 0], [5, 6, 0]], np.int32)
    grade = np.array([[0, 0, 0], [2, 0, 0], [1, 1, 0]], np.int8)
    lists = Lists(item=item, grade=grade, stage=stage.astype(np.int8), soft=np.zeros((3, 3), np.float32))
    made, spread = exposed(FrozenLists(lists=lists, user=np.array([7, 7, 3])))
    assert made.user.tolist() == [7]  # user 3 took all
    assert made.lists.item.tolist() == [[1, 3, 4]]
    assert made.lists.grade.tolist() == [[0, 0, 2]]
    assert spread(item * 1.5).tolist() == [[1.5, 4.5, 6.0]]


def test_a_plot_names_its_rows_and_has_no_line_without_a_deviation() -> None:
    svg = dots("t", {"a & b": (0.5, float("nan")), "c": (0.4, 0.1)}, reference="c")
    assert "a &amp; b" in svg
    assert svg.count('class="line"') == 1


def test_results_hold_plain_numbers(study: Study) -> None:
    put(study, ROWS[0], [perfect(study)])
    folder = study.test(recipe_of(ROWS[0], BUDGET, study.data, {"lr": 0.1}, 0))
    assert {path.suffix for path in folder.iterdir()} == {".npz", ".json"}
    assert json.loads((folder / RESULT).read_text())["train_seconds"] == 10.0
