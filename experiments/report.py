"""Write TABLES.md and its plots from the raw scores that runs left: nothing is trained, nothing is scored again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.svg import chart
from experiments import tables
from experiments.dots import dots
from experiments.run import OUT, data_name, data_sets
from experiments.study import RESULT, FrozenLists, Study, load_scores
from experiments.tables import Budget, Row, Table, Trial, chosen, recipe_of
from model.datasets.log import IMPRESSION, PADDING
from model.errors import RankTowerError
from model.evaluate import list_metrics
from model.metrics import Interval, paired_bootstrap
from model.sampling import Lists

NOT_HERE = "n/a"
METRICS = {  # of each list set; the first two are compared with the reference
    "full": ("recall@10", "ndcg@10", "recall@50", "ndcg@50"),
    "random": ("recall@10", "ndcg@10", "recall@50", "ndcg@50"),
    "exposed": ("ndcg@1", "ndcg@3", "gauc"),
}
SET_NAMES = {
    "full": "full stage",
    "random": "random negatives only",
    "exposed": "exposed items only, a list a user, of users with a positive and a negative",
}
PLOTTED = "ndcg@10"
COSTS = {"parameters": "parameters", "item_bytes": "bytes an item", "macs": "MACs a candidate", "ms": "ms of 5,000"}

ByList = dict[str, np.ndarray]  # metric -> (L,), NaN where a list has nothing to measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row on one list set."""

    means: dict[str, np.ndarray]  # metric -> (seeds,)
    by_list: ByList  # averaged over seeds
    user: np.ndarray  # (L,)

    @property
    def seeds(self) -> int:
        return len(next(iter(self.means.values())))

    def deviation(self, metric: str) -> float:
        """Over seeds; NaN for one."""
        return float(self.means[metric].std(ddof=1)) if self.seeds > 1 else float("nan")

    def compared(self, reference: Measured, metric: str) -> Interval:
        """This row less the reference, averaged over seeds; 95 % by resampling users."""
        return paired_bootstrap(self.by_list[metric], reference.by_list[metric], self.user)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What is known of a row: nothing, if it was not run."""

    row: Row
    measured: dict[str, Measured] = field(default_factory=dict)  # by list set
    chosen: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Trial] = ()
    seconds: float = float("nan")  # of training, mean over seeds
    costs: Mapping[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", help="by default all")
    parser.add_argument("--data", nargs="+", help="data sets of the recipes, or folders; by default all of them")
    parser.add_argument("--budget", default="full")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs")
    parser.add_argument("--report", type=Path, help="folder of TABLES.md and plots; by default report/ beside the runs")
    options = parser.parse_args(arguments)
    target = options.report or options.out / "report"
    try:
        budget = tables.read_budget(options.budget)
        wanted = [tables.read_table(name) for name in options.tables or tables.names()]
        write_report(options.out, target, wanted, budget, options.data)
    except RankTowerError as error:
        Console().print(f"error: {error}", soft_wrap=True)
        return 2
    Console(highlight=False).print(f"{target / 'TABLES.md'}", soft_wrap=True)
    return 0


def write_report(root: Path, target: Path, wanted: Sequence[Table], budget: Budget, data: Sequence[str] | None) -> None:
    """TABLES.md in `target`, a section a table, and a plot for each table and data set that has results."""
    (target / "plots").mkdir(parents=True, exist_ok=True)
    text, studies = [HEAD], dict[str, Study]()
    for table in wanted:
        text.append(f"## {table.title}\n")
        for name in map(data_name, data_sets(table, budget, data)):
            text.append(f"### {name}\n")
            if not (root / "logs" / name).is_dir():
                text.append(f"{NOT_HERE}: the adapter is there, the data is not.\n")
                continue
            study = studies.setdefault(name, Study(root, name))
            text.append(section(study, target, table, budget))
    (target / "TABLES.md").write_text("\n".join(text), encoding="utf-8")


HEAD = """# Tables

Written by `python -m experiments.report` from the raw scores of every run. Each row had the same number of trials on
validation, learning rate first; the recipe that they chose was trained with each seed and tested once. Recall@K divides
by min(K, positives), the gain of NDCG is 2^grade - 1, relevant is a grade above 0, ties take their expected value,
lists without a positive are left out. Numbers are means over seeds ± their standard deviation; a difference is to the
reference row (in bold), averaged over seeds, with its 95 % interval from a paired bootstrap over users. The paper's
numbers have another K, split and lists than ours: compare orders and lifts, not values. n/a: not run.
"""


def section(study: Study, target: Path, table: Table, budget: Budget) -> str:
    """A table on one data set: a block for each list set, and plots."""
    if not (study.folder / "lists" / RESULT).is_file():
        return f"{NOT_HERE}: nothing was run on this log by this code.\n"
    lines = [read_line(study, table, budget, row) for row in table.rows]
    blocks = [block(study, table, budget, lines, name) for name in study.list_sets()]
    for file, svg in plots(table, study.data, lines).items():
        (target / "plots" / file).write_text(svg, encoding="utf-8")
        blocks.append(f"![{table.title}, {study.data}](plots/{file})\n")
    return "\n".join(blocks)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_line(study: Study, table: Table, budget: Budget, row: Row) -> Line:
    """What was measured of a row so far."""
    if row.baseline is not None:
        return Line(row=row, measured=read_sets(study, [study.baseline(row.baseline)]))
    trials, wanted = study.search(row, budget)
    if wanted:
        return Line(row=row, trials=trials)
    changes = chosen(trials).changes
    recipes = [recipe_of(row, budget, study.data, changes, seed) for seed in range(budget.seeds)]
    tests = [study.test(recipe) for recipe in recipes if (study.test(recipe) / RESULT).is_file()]
    cost = study.cost(recipes[0]) / RESULT
    took = [json.loads((test / RESULT).read_text())["train_seconds"] for test in tests]
    return Line(
        row=row,
        measured=read_sets(study, tests),
        chosen=changes,
        trials=trials,
        seconds=float(np.mean(took)) if took else float("nan"),
        costs=json.loads(cost.read_text()) if table.cost and cost.is_file() else {},
    )


def read_sets(study: Study, tests: Sequence[Path]) -> dict[str, Measured]:
    """Metrics of the seeds of a row, by list set; none where no seed was tested."""
    tests = [test for test in tests if (test / RESULT).is_file()]
    if not tests:
        return {}
    return {name: measured([metrics_of(study, test, name) for test in tests]) for name in study.list_sets()}


Metrics = tuple[ByList, dict[str, np.ndarray], np.ndarray]  # by list, weights, user


@cache
def metrics_of(study: Study, test: Path, name: str) -> Metrics:
    """Every metric of one test by list; several tables share a test."""
    lists = study.test_set("full" if name == "exposed" else name)
    scores = load_scores(test, "full" if name == "exposed" else name)
    if name == "exposed":
        lists, spread = exposed(lists)
        scores = spread(scores)
    ks = sorted({int(metric.partition("@")[2]) for metric in METRICS[name] if "@" in metric})
    by_list, weights = list_metrics(scores, lists.lists, lists.user, ks)
    return {metric: by_list[metric] for metric in METRICS[name]}, weights, lists.user


def measured(seeds: Sequence[Metrics]) -> Measured:
    """Seeds of a row together."""
    metrics = list(seeds[0][0])
    means = {name: np.array([mean_of(by[name], weights.get(name)) for by, weights, _ in seeds]) for name in metrics}
    by_list = {name: np.mean([by[name] for by, _, _ in seeds], axis=0) for name in metrics}
    return Measured(means=means, by_list=by_list, user=seeds[0][2])


def mean_of(values: np.ndarray, weight: np.ndarray | None) -> float:
    """Mean of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    if not known.any():
        return float("nan")
    return float(np.average(values[known], weights=None if weight is None else weight[known]))


def exposed(test: FrozenLists) -> tuple[FrozenLists, Callable[[np.ndarray], np.ndarray]]:
    """The impressions of each user as one list, of users who took some and left some; and how scores follow."""
    row, column = np.nonzero(test.lists.stage == IMPRESSION)
    order = np.argsort(test.user[row], kind="stable")
    row, column = row[order], column[order]
    users, first, count = np.unique(test.user[row], return_index=True, return_counts=True)
    line = np.repeat(np.arange(len(users)), count)
    place = np.arange(len(row)) - np.repeat(first, count)
    positives = np.bincount(line, test.lists.grade[row, column] > 0, len(users))
    both = (positives > 0) & (positives < count)

    def spread(values: np.ndarray, fill: int = 0) -> np.ndarray:
        wide = np.full((len(users), int(count.max(initial=1))), fill, values.dtype)
        wide[line, place] = values[row, column]
        return wide[both]

    item, grade = spread(test.lists.item), spread(test.lists.grade)
    stage = spread(test.lists.stage, PADDING)
    lists = Lists(item=item, grade=grade, stage=stage, soft=np.zeros(item.shape, np.float32))
    return FrozenLists(lists=lists, user=users[both]), spread


# --- writing ---------------------------------------------------------------------------------------------------------


def block(study: Study, table: Table, budget: Budget, lines: Sequence[Line], name: str) -> str:
    """One list set: what the lists are, the table, and the order by NDCG beside the paper's."""
    metrics = METRICS[name]
    paper = any(study.data in line.row.paper for line in lines) and name == "full"
    costs = COSTS if table.cost and name == "full" else {}
    columns = [*(title(metric) for metric in metrics), *(f"Δ {title(metric)}" for metric in metrics[:2])]
    columns += [*(["paper, R@K / N@K"] if paper else []), *costs.values()]
    columns += ["chosen", "training, s"] if name == "full" else []
    text = [f"#### {SET_NAMES[name]}\n", protocol(study, budget, name) + "\n"]
    text += [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    reference = next(line for line in lines if line.row.name == table.reference)
    for line in lines:
        cells = [*metric_cells(line, name, budget), *difference_cells(line, reference, name)]
        if paper:
            known = line.row.paper.get(study.data)
            cells.append("" if known is None else f"{known[0]:.4f} / {known[1]:.4f}")
        cells += [f"{line.costs[key]:,}" if line.costs else NOT_HERE for key in costs]
        if name == "full":
            cells.append(", ".join(f"{key} {value}" for key, value in line.chosen.items()))
            cells.append("" if line.seconds != line.seconds else f"{line.seconds:.0f}")
        label = f"**{line.row.name}**" if line is reference else line.row.name
        text.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*text, "", *orders(study, lines, name), ""])


def protocol(study: Study, budget: Budget, name: str) -> str:
    """What the lists are, in a sentence or three."""
    about = study.about()
    log, sets = about["log"], about["sets"]
    split = {"time": "by time", "order": "by the order of each user's events", "hash": "by a hash of user and item"}
    said = f"Log {log['name']}, {log['events']:,} events, split {split.get(log['split'], log['split'])}. "
    if name == "exposed":
        test, _ = exposed(study.test_set("full"))
        return said + f"{len(test.user):,} users."
    lists = sets[name]
    source = "as logged" if about["stages"] else "simulated from the past by sources that no row resembles"
    return said + (
        f"{lists['lists']:,} test lists `{lists['digest'][:16]}` of up to {lists['size']} items, "
        f"{lists['users']:,} users, {lists['left_out']:,} lists without a positive left out; "
        + (f"candidates {source}. " if name == "full" else "impressions and random items. ")
        + f"At most {budget.trials} trials and {budget.seeds} seed{'s' * (budget.seeds > 1)} a row."
    )


def metric_cells(line: Line, name: str, budget: Budget) -> list[str]:
    """Mean ± deviation; a row with seeds missing says how many it has."""
    if name not in line.measured:
        return [NOT_HERE] * len(METRICS[name])
    found = line.measured[name]
    short = "" if line.row.baseline or found.seeds == budget.seeds else f" ({found.seeds} of {budget.seeds} seeds)"
    cells = []
    for metric in METRICS[name]:
        mean, deviation = float(found.means[metric].mean()), found.deviation(metric)
        spread = "" if deviation != deviation else f" ± {deviation:.4f}"
        cells.append(NOT_HERE if mean != mean else f"{mean:.4f}{spread}{short}")
    return cells


def difference_cells(line: Line, reference: Line, name: str) -> list[str]:
    wanted = METRICS[name][:2]
    if line is reference:
        return [""] * len(wanted)
    if name not in line.measured or name not in reference.measured:
        return [NOT_HERE] * len(wanted)
    found = [line.measured[name].compared(reference.measured[name], metric) for metric in wanted]
    return [f"{at.mean:+.4f} [{at.low:+.4f}, {at.high:+.4f}]" if at.lists else NOT_HERE for at in found]


def orders(study: Study, lines: Sequence[Line], name: str) -> list[str]:
    """The order of the rows by NDCG, and the paper's of the same rows."""
    metric = METRICS[name][1]
    ours = {line.row.name: float(line.measured[name].means[metric].mean()) for line in lines if name in line.measured}
    theirs = {line.row.name: line.row.paper[study.data][1] for line in lines if study.data in line.row.paper}
    said = [f"Order by {title(metric)}: {ordered(ours)}.\n"] if len(ours) > 1 else []
    if name == "full" and len(theirs) > 1:
        said.append(f"The paper's: {ordered(theirs)}.\n")
    return said


def ordered(values: Mapping[str, float]) -> str:
    return " > ".join(f"{name}" for name in sorted(values, key=lambda name: -values[name]))


def title(metric: str) -> str:
    return metric.replace("ndcg", "NDCG").replace("recall", "Recall").replace("gauc", "GAUC")


def plots(table: Table, data: str, lines: Sequence[Line]) -> dict[str, str]:
    """SVGs by file name: the rows' quality, and of the cost table what it costs."""
    known = [line for line in lines if "full" in line.measured]
    rows = {
        line.row.name: (
            float(line.measured["full"].means[PLOTTED].mean()),
            line.measured["full"].deviation(PLOTTED),
        )
        for line in known
    }
    if not rows:
        return {}
    files = {
        f"{table.name}-{data}.svg": dots(f"{table.title}, {data}: {title(PLOTTED)}", rows, reference=table.reference)
    }
    paid = {line.row.name: [(line.costs["ms"], rows[line.row.name][0])] for line in known if line.costs}
    if paid and min(point[0][1] for point in paid.values()) > 0:
        what = f"{data}: quality and the time of 5,000 candidates, one thread"
        files[f"{table.name}-{data}-frontier.svg"] = chart(what, "ms", title(PLOTTED), paid)
    return files


if __name__ == "__main__":
    sys.exit(main())
