"""The report of the paper's tables from results made by hand, whose answers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from experiments import report
from experiments.dots import dots
from experiments.report import Measured, exposed, relative, write_report
from experiments.study import RESULT, FrozenLists, Study, save_scores
from experiments.tables import Budget, Row, Table, recipe_of
from model.checkpoint import write_json
from model.datasets.log import IMPRESSION, PADDING, RANDOM, TRAIN
from model.sampling import Lists
from model.train import Recipe
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
        spent = {"train_seconds": 10.0 + 2 * seed, "device": "cpu", "threads": 1 + seed}
        write_json(folder / RESULT, {**spent, "best_epoch": Recipe().epochs - 1 + seed})


def perfect(study: Study) -> dict[str, np.ndarray]:
    return {name: study.test_set(name).lists.grade.astype(float) for name in study.sets()}


def trained(text: str, row: str) -> list[str]:
    """Of the first table of trainings."""
    return cells(text[text.index("#### trainings") :], row)


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
    # every list loses one half on average over seeds: the interval has no width; one seed loses 0, the other 1
    assert theirs[6] == "-0.5000 ± 0.7071 [-0.5000, -0.5000]"
    assert theirs[8:] == ["0.5000 / 0.3000"]
    assert trained(text, "theirs")[1:] == ["1", "lr 0.1", "11, 12 of 12, still rising", "11"]
    assert set(absent[1:8]) == {"n/a"}
    assert absent[8:] == ["0.5000 / 0.2000"]
    assert trained(text, "absent")[1:] == ["0 of 1", "", "n/a", "n/a"]
    assert text.count("by NDCG@10: ours > theirs\n") == 2
    assert "- these two agree on 1 of 1 pairs of rows" in text
    assert "- the paper's: ours > theirs > absent" in text
    assert "#### random negatives only" in text
    assert study.about()["sets"]["full"]["digest"][:16] in text
    for name in ("full", "random"):
        assert f"(plots/t-tiny-{name}.svg)" in text
        assert (tmp_path / "out" / "plots" / f"t-tiny-{name}.svg").read_text().startswith("<svg")


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


def two(ours: np.ndarray, theirs: np.ndarray, user: np.ndarray) -> list[Measured]:
    return [Measured(means={}, by_list={"m": values}, weights={}, user=user) for values in (ours, theirs)]


def test_a_lift_is_a_ratio_of_means_over_users_drawn_for_both() -> None:
    rng = np.random.default_rng(3)
    user = rng.integers(0, 150, 500)
    ours, theirs = rng.random(500) + 0.5, rng.random(500)
    ours[:20] = theirs[:20] = np.nan  # lists without a positive
    found = relative(*two(ours, theirs, user), ["m"])["m"]
    assert found.mean == pytest.approx(ours[20:].mean() / theirs[20:].mean() - 1)
    assert (found.lists, found.left_out) == (480, 20)
    ratios = []
    for _ in range(4000):
        drawn = rng.integers(0, 150, 150)  # whole users, by the multinomial
        times = np.bincount(drawn, minlength=150)[user[20:]]
        ratios.append((times @ ours[20:]) / (times @ theirs[20:]) - 1)
    assert [found.low, found.high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.03)


def test_a_row_that_is_a_tenth_better_on_every_list_has_a_lift_without_width() -> None:
    values = np.random.default_rng(4).random(60)
    found = relative(*two(1.1 * values, values, np.arange(60) % 7), ["m"])["m"]
    assert [found.mean, found.low, found.high] == pytest.approx([0.1] * 3)
    found = relative(*two(values, 0 * values, np.arange(60)), ["m"])["m"]
    assert np.isnan([found.mean, found.low, found.high]).all()


def test_lifts_stand_on_both_list_sets_beside_the_papers(study: Study, tmp_path: Path) -> None:
    rows = tuple(replace(row, name=name) for row, name in zip(ROWS, ("RankTower", "Two-Tower", "LR"), strict=True))
    table = replace(TABLE, rows=rows, reference="RankTower")
    best = perfect(study)
    put(study, rows[0], [best])
    write_report(tmp_path, tmp_path / "out", [table], BUDGET, ["tiny"])
    assert "Two-Tower, full stage | n/a | n/a | n/a | n/a |" in (tmp_path / "out" / "TABLES.md").read_text()
    put(study, rows[1], [{name: np.zeros_like(scores) for name, scores in best.items()}])
    write_report(tmp_path, tmp_path / "out", [table], BUDGET, ["tiny"])
    text = (tmp_path / "out" / "TABLES.md").read_text()
    lifts = text[text.index("#### lifts") :].split("\n\n")[1].splitlines()[2:]
    assert [line.split(" | ")[0] for line in lifts] == [
        "| RankTower over Two-Tower, full stage",
        "| RankTower over Two-Tower, random negatives only",
    ]
    assert all(line.endswith(" | +0.0% / +33.3% |") for line in lifts)
    mean = float(cells(text, "Two-Tower")[1].split()[0])  # of chance
    assert float(lifts[0].split(" | ")[1].split("%")[0]) == pytest.approx(100 * (1 / mean - 1), rel=0.01)


def test_a_difference_deviates_over_the_seeds_that_both_rows_have() -> None:
    def row(means: list[float], seed: tuple[int, ...]) -> Measured:
        return Measured(means={"m": np.array(means)}, by_list={}, weights={}, user=np.zeros(0), seed=seed)

    ours, theirs = row([0.5, 0.6, 0.9], (0, 1, 2)), row([0.4, 0.7], (0, 2))
    assert theirs.deviation_from(ours, "m") == pytest.approx(np.std([-0.1, -0.2], ddof=1))
    baseline = row([0.1], ())
    assert baseline.deviation_from(ours, "m") == pytest.approx(np.std([0.5, 0.6, 0.9], ddof=1))
    assert ours.deviation_from(baseline, "m") == pytest.approx(np.std([0.5, 0.6, 0.9], ddof=1))
    assert np.isnan(baseline.deviation_from(baseline, "m"))
    assert np.isnan(row([0.5], (0,)).deviation_from(ours, "m"))


def test_a_row_rises_still_if_its_last_epoch_is_its_best_with_any_seed(study: Study, tmp_path: Path) -> None:
    put(study, ROWS[0], [perfect(study)])
    put(study, ROWS[1], [perfect(study)] * 2)
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, ["tiny"])
    text = (tmp_path / "out" / "TABLES.md").read_text()
    assert trained(text, "ours")[3] == "11 of 12"
    assert trained(text, "theirs")[3] == "11, 12 of 12, still rising"


def test_a_row_with_seeds_missing_says_so(study: Study, tmp_path: Path) -> None:
    put(study, ROWS[0], [perfect(study)])
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, ["tiny"])
    assert cells((tmp_path / "out" / "TABLES.md").read_text(), "ours")[1] == "1.0000 (1 of 2 seeds)"


def test_only_data_that_no_recipe_names_is_not_here_and_the_rest_was_not_run(tmp_path: Path) -> None:
    rows = (
        Row(name="ours", search={"lr": [0.1]}, paper={"tiny": (0.5, 0.4), "elsewhere": (0.6, 0.3)}),
        Row(name="theirs", search={"lr": [0.1]}),
    )
    write_report(tmp_path, tmp_path / "out", [replace(TABLE, rows=rows)], BUDGET, None)
    tiny, elsewhere = (tmp_path / "out" / "TABLES.md").read_text().split("### tiny")[1].split("### elsewhere")
    assert "n/a: not run\n" in tiny
    assert cells(tiny, "ours") == ["ours", "n/a", "0.5000 / 0.4000"]
    assert cells(tiny, "theirs") == ["theirs", "n/a"]  # and no number of the paper
    assert "Adapter ready, data not here." not in tiny
    assert "Adapter ready, data not here." in elsewhere
    assert cells(elsewhere, "ours") == ["ours", "n/a", "0.6000 / 0.3000"]
    assert "theirs" not in elsewhere


def test_a_log_that_this_code_did_nothing_on_has_all_its_rows(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "logs" / "tiny", users=20, items=30)
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, ["tiny"])
    text = (tmp_path / "out" / "TABLES.md").read_text()
    assert "n/a: not run by this code" in text
    assert cells(text, "absent") == ["absent", "n/a", "0.5000 / 0.2000"]


def test_a_log_that_no_recipe_names_is_reported_once_a_row_was_tested(study: Study, tmp_path: Path) -> None:
    other = replace(TABLE, data=("movielens",))
    put(study, ROWS[0], [perfect(study)])
    test = {"table": "t", "budget": "b", "data": "tiny", "code": "old"}
    for changes, there in (({"table": "u"}, 0), ({"budget": "c"}, 0), ({}, 1)):
        (tmp_path / "tests.jsonl").write_text(json.dumps({**test, **changes}) + "\n")
        write_report(tmp_path, tmp_path / "out", [other], BUDGET, None)
        text = (tmp_path / "out" / "TABLES.md").read_text()
        assert text.count("Log `tiny`") == there
        assert text.count("### movielens") == 1


def test_every_time_that_test_lists_were_scored_is_counted(study: Study, tmp_path: Path) -> None:
    code = study.folder.name.rpartition("-")[2]
    lines = [("tiny", code), ("tiny", code), ("tiny", "old"), ("other", code)]
    text = "".join(json.dumps({"data": data, "code": by}) + "\n" for data, by in lines)
    (tmp_path / "tests.jsonl").write_text(text)
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, ["tiny"])
    assert "scored 2 times by this code, 3 times by any." in (tmp_path / "out" / "TABLES.md").read_text()


def test_budgets_have_reports_of_their_own(tmp_path: Path) -> None:
    for budget in ("look", "tiny"):
        assert report.main(["--budget", budget, "--out", str(tmp_path)]) == 0
    look, tiny = ((tmp_path / "report" / budget / "TABLES.md").read_text() for budget in ("look", "tiny"))
    assert "### cascade" in tiny
    assert "### kuairand" in look


def test_the_head_says_what_the_log_is_and_what_was_spent(study: Study, tmp_path: Path) -> None:
    put(study, ROWS[0], [perfect(study)] * 2)
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, ["tiny"])
    text = (tmp_path / "out" / "TABLES.md").read_text()
    train = int((study.log.split == TRAIN).sum())
    assert f"Log `tiny`: 60 users, 80 items, {len(study.log):,} rows, of which {train:,} in " in text
    assert "split by time. Candidates of the test are simulated" in text  # nothing odd about this log
    assert "Budget `b`: at most 1 trial a row, 2 seeds. Trained on cpu, 1 thread; cpu, 2 threads." in text
    assert "| ours | lr 0.1 | **0.5000** |" in text


def test_the_head_says_what_a_log_lacks_and_a_metric_without_lists_is_a_dash(tmp_path: Path) -> None:
    """As Taobao: no times, no history, nothing shown that was not taken."""
    folder = write_tiny_log(tmp_path / "logs" / "tiny", users=40, items=60, history=0)
    events = pq.read_table(folder / "events.parquet")
    bare = np.arange(len(events)) % 4 == 0
    columns = {
        "click": pa.array(np.ones(len(events), bool)),
        "device": pc.if_else(pa.array(bare), None, events["device"].fill_null("phone")),
        "hour": pc.if_else(pa.array(bare), None, events["hour"]),
    }
    for name, values in columns.items():
        events = events.drop_columns(name).append_column(name, values)
    events = events.drop_columns("time")
    pq.write_table(events, folder / "events.parquet")
    (folder / "log.toml").write_text(
        (folder / "log.toml").read_text().replace('time = "time"\n', "").replace("time", "hash")
    )
    study = Study(tmp_path, "tiny")
    study.freeze()
    put(study, ROWS[0], [perfect(study)] * 2)
    put(study, ROWS[1], [perfect(study)] * 2)
    write_report(tmp_path, tmp_path / "out", [TABLE], BUDGET, ["tiny"])
    text = (tmp_path / "out" / "TABLES.md").read_text()
    assert "split by a hash of user and item. It has no times. No field holds a sequence. " in text
    share = np.isnan(study.log.context["hour"])[study.log.split == TRAIN].mean()
    assert f"sequence. {share:.0%} of the training rows have no context. Nothing is logged of" in text
    exposed_only = text[text.index("#### exposed") :]
    assert exposed_only.splitlines()[2].startswith("0 users;")
    assert cells(exposed_only, "theirs")[1:] == ["–"] * 6
    assert cells(exposed_only, "absent")[1:] == ["n/a"] * 6
    assert "nan" not in text


def test_a_difference_in_gauc_weighs_users_as_gauc_does() -> None:
    """A user with nine exposures counts nine times as much as one with one."""
    user, weight = np.array([0, 1]), np.array([9.0, 1.0])
    both = [
        Measured(means={}, by_list={"gauc": np.array(values)}, weights={"gauc": weight}, user=user)
        for values in ([0.9, 0.5], [0.8, 0.9])
    ]
    assert both[0].compared(both[1], "gauc").mean == pytest.approx(0.9 * 0.1 - 0.1 * 0.4)
    assert both[0].interval("gauc").mean == pytest.approx(0.86)


def test_a_search_that_is_not_over_shows_its_trials(study: Study, tmp_path: Path) -> None:
    row = replace(ROWS[0], search={"lr": [0.1, 0.2, 0.3], "loss_options.weights": [{"a": 1.0}, {"a": 0.3}]})
    for lr, score in ((0.1, 0.4), (0.3, -1.0)):
        folder = study.run(recipe_of(row, BUDGET, "tiny", {"lr": lr, "loss_options.weights": {"a": 1.0}}, 0))
        folder.mkdir(parents=True)
        write_json(folder / RESULT, {"valid_ndcg@10": score})
    write_report(tmp_path, tmp_path / "out", [replace(TABLE, rows=(row,))], replace(BUDGET, trials=4), ["tiny"])
    text = (tmp_path / "out" / "TABLES.md").read_text()
    assert trained(text, "ours")[1:] == ["2 of 4", "", "n/a", "n/a"]
    assert "| ours | lr 0.1, weights a 1 | 0.4000 |\n| ours | lr 0.3 | diverged |" in text


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
