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
from experiments.run import OUT, TESTS, code_of, data_name, data_sets
from experiments.study import RESULT, FrozenLists, Study, load_scores
from experiments.tables import DIVERGED, Budget, Row, Table, Trial, chosen, described, recipe_of
from model.datasets.log import IMPRESSION, PADDING
from model.errors import RankTowerError
from model.evaluate import list_metrics
from model.metrics import Interval, bootstrap
from model.sampling import Lists

NOT_HERE = "n/a"  # was not run, or is not known yet
NOTHING = "–"  # was run, but no list has anything to measure
METRICS = {  # of each list set; the first two are compared with the reference
    "full": ("recall@10", "ndcg@10", "recall@50", "ndcg@50"),
    "random": ("recall@10", "ndcg@10", "recall@50", "ndcg@50"),
    "exposed": ("gauc", "ndcg@1", "ndcg@3"),
}
MAIN = {"full": "ndcg@10", "random": "ndcg@10", "exposed": "gauc"}  # what rows are ordered by
SET_NAMES = {
    "full": "full stage",
    "random": "random negatives only",
    "exposed": "exposed items only, a list a user, of users with a positive and a negative",
}
SPLITS = {
    "time": "by time",
    "order": "by the order of each user's events",
    "hash": "by a hash of user and item",
}
COSTS = {"parameters": "parameters", "item_bytes": "bytes an item", "macs": "MACs a candidate", "ms": "ms of 5,000"}

ByList = dict[str, np.ndarray]  # metric -> (L,), NaN where a list has nothing to measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row on one list set."""

    means: dict[str, np.ndarray]  # metric -> (seeds,)
    by_list: ByList  # averaged over seeds
    weights: ByList  # of metrics that have any
    user: np.ndarray  # (L,)

    @property
    def seeds(self) -> int:
        return len(next(iter(self.means.values())))

    def deviation(self, metric: str) -> float:
        """Over seeds; NaN for one."""
        return float(self.means[metric].std(ddof=1)) if self.seeds > 1 else float("nan")

    def interval(self, metric: str) -> Interval:
        """Averaged over seeds; 95 % by resampling users."""
        return bootstrap({metric: self.by_list[metric]}, self.user, self.weights)[metric]

    def compared(self, reference: Measured, metric: str) -> Interval:
        """This row less the reference, averaged over seeds; 95 % by resampling users."""
        difference = self.by_list[metric] - reference.by_list[metric]
        return bootstrap({metric: difference}, self.user, self.weights)[metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What is known of a row: nothing, if it was not run."""

    row: Row
    measured: dict[str, Measured] = field(default_factory=dict)  # by list set
    chosen: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Trial] = ()  # those done, in the order of the search
    asked: int = 0  # trials of the whole search
    seconds: float = float("nan")  # of training, mean over seeds
    costs: Mapping[str, Any] = field(default_factory=dict)
    trained_on: frozenset[str] = frozenset()  # devices, with their threads


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", help="by default all")
    parser.add_argument("--data", nargs="+", help="data sets of the recipes, or folders; by default all of them")
    parser.add_argument("--budget", default="full")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs")
    parser.add_argument("--report", type=Path, help="folder of TABLES.md and plots; by default report/BUDGET of --out")
    options = parser.parse_args(arguments)
    target = options.report or options.out / "report" / options.budget
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
    """TABLES.md in `target`, a section a table, and plots for each table and data set that has results."""
    (target / "plots").mkdir(parents=True, exist_ok=True)
    text = [HEAD]
    studies = {log.name: Study(root, log.name) for log in sorted((root / "logs").glob("[!.]*")) if log.is_dir()}
    for table in wanted:
        text.append(f"## {table.title}\n")
        names = [data_name(one) for one in data_sets(table, budget, data)]
        if data is None:  # other logs that the table was made of
            made = {
                line["data"] for line in scored(root) if (line["table"], line["budget"]) == (table.name, budget.name)
            }
            names += sorted(made & studies.keys() - set(names))
        for name in names:
            known = name in studies
            shown = section(studies[name], target, table, budget) if known else absent(table, name, NOT_RUN)
            text += [f"### {name}\n", shown]
        elsewhere = {name: None for row in table.rows for name in row.paper if name not in names}
        for name in elsewhere if data is None and not budget.made else ():
            text += [f"### {name}\n", absent(table, name, ELSEWHERE)]
    (target / "TABLES.md").write_text("\n".join(text), encoding="utf-8")


HEAD = """# Tables

Written by `make tables` from the scores that every run left. Each row had the trials on validation that are printed
beside it, learning rate first; the recipe that they chose was trained with each seed and tested once. Recall@K divides
by min(K, positives), the gain of NDCG is 2^grade - 1, relevant is a grade above 0, ties take their expected value,
lists without a positive are left out. Numbers are means over seeds ± their standard deviation. Intervals are of 95 %,
from a bootstrap over users of what is averaged over seeds; differences (Δ) are to the reference row (in bold), over the
same lists. The paper's numbers have another K, split and lists than ours: compare orders and lifts, not values.
n/a: not run; –: no list has anything to measure.
"""


ELSEWHERE = "Adapter ready, data not here."  # of a data set that no recipe names, only the paper's numbers
NOT_RUN = f"{NOT_HERE}: not run"


def absent(table: Table, data: str, why: str) -> str:
    """All rows of a data set without results, beside the paper's numbers; of one that no recipe names, the paper's."""
    rows = [row for row in table.rows if data in row.paper or why != ELSEWHERE]
    text = [f"{why}\n", "| | ours | paper, R@K / N@K |", "|---|--:|--:|"]
    return "\n".join([*text, *(f"| {row.name} | {NOT_HERE} | {in_paper(row, data)} |" for row in rows), ""])


def section(study: Study, target: Path, table: Table, budget: Budget) -> str:
    """A table on one data set: what it is about, a block for each list set, the orders, plots, and all searches."""
    if not (study.folder / "lists" / RESULT).is_file():
        return absent(table, study.data, f"{NOT_RUN} by this code")
    lines = [read_line(study, table, budget, row) for row in table.rows]
    blocks = [protocol(study, budget, lines)]
    blocks += [block(study, table, budget, lines, name) for name in study.list_sets()]
    blocks.append(orders(study, lines))
    for file, svg in plots(table, study.data, lines).items():
        (target / "plots" / file).write_text(svg, encoding="utf-8")
        blocks.append(f"![{table.title}, {study.data}](plots/{file})\n")
    return "\n".join([*blocks, searches(lines)])


# --- reading ---------------------------------------------------------------------------------------------------------


def read_line(study: Study, table: Table, budget: Budget, row: Row) -> Line:
    """What was measured of a row so far."""
    if row.baseline is not None:
        return Line(row=row, measured=read_sets(study, [study.baseline(row.baseline)]))
    trials, wanted = study.search(row, budget)
    asked = tables.trials_of(row, budget)
    if wanted:
        return Line(row=row, trials=trials, asked=asked)
    changes = chosen(trials).changes
    recipes = [recipe_of(row, budget, study.data, changes, seed) for seed in range(budget.seeds)]
    tests = [test for recipe in recipes if ((test := study.test(recipe, row.view)) / RESULT).is_file()]
    cost = study.cost(recipes[0], row.view) / RESULT
    results = [json.loads((test / RESULT).read_text()) for test in tests]
    return Line(
        row=row,
        measured=read_sets(study, tests),
        chosen=changes,
        trials=trials,
        asked=asked,
        seconds=float(np.mean([result["train_seconds"] for result in results])) if results else float("nan"),
        trained_on=frozenset(f"{result['device']}, {counted(result['threads'], 'thread')}" for result in results),
        costs=json.loads(cost.read_text()) if table.cost and cost.is_file() else {},
    )


def scored(root: Path) -> list[dict[str, Any]]:
    """The record of all tests."""
    path = root / TESTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def tests_said(study: Study) -> str:
    """How often test lists of this data were scored."""
    codes = [line["code"] for line in scored(study.root) if line["data"] == study.data]
    here = codes.count(code_of(study))
    return f"Test lists were scored {counted(here, 'time')} by this code, {counted(len(codes), 'time')} by any."


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


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
    return Measured(means=means, by_list=by_list, weights=seeds[0][1], user=seeds[0][2])


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


def protocol(study: Study, budget: Budget, lines: Sequence[Line]) -> str:
    """What a reader has to know of the data and of what each row may spend."""
    about = study.about()
    log = about["log"]
    longer = [f"{line.row.name} {line.asked}" for line in lines if line.row.baseline is None and line.row.trials]
    spent = f"at most {counted(budget.trials, 'trial')} a row" + (f" ({', '.join(longer)})" if longer else "")
    trained_on = sorted(set().union(*(line.trained_on for line in lines)))
    said = [
        f"Log `{log['name']}`: {log['users']:,} users, {log['items']:,} items, {log['events']:,} rows, of which "
        f"{log['train']:,} in {log['train_lists']:,} lists to train on; split {SPLITS[log['split']]}.",
        *([] if log["timed"] else ["It has no times."]),
        *([] if log["history"] else ["No field holds a sequence."]),
        *([f"{log['bare'] / log['train']:.0%} of the training rows have no context."] if log["bare"] else []),
        *([] if log["left"] else ["Nothing is logged of what was shown and not taken: impressions differ in grade."]),
        "Candidates are those that were logged." if about["stages"] else CANDIDATES,
        f"Budget `{budget.name}`: {spent}, {counted(budget.seeds, 'seed')}.",
        *([f"Trained on {'; '.join(trained_on)}."] if trained_on else []),
        tests_said(study),
    ]
    return " ".join(said) + "\n"


CANDIDATES = (
    "Candidates of the test are simulated, half by co-visitation with the history and half by popularity within the "
    "scenario, from training alone; no network resembles either. They were frozen before anything was trained. Random "
    "items of training lists are drawn by popularity^0.75 unless a recipe says otherwise, as that second half is."
)


def block(study: Study, table: Table, budget: Budget, lines: Sequence[Line], name: str) -> str:
    """One list set: what the lists are, and the table."""
    metrics = METRICS[name]
    paper = any(study.data in line.row.paper for line in lines) and name == "full"
    costs = COSTS if table.cost and name == "full" else {}
    columns = [title(metric) for metric in metrics] + [f"{title(MAIN[name])}, 95 %"]
    columns += [f"Δ {title(metric)}" for metric in metrics[:2]]
    columns += [*(["paper, R@K / N@K"] if paper else []), *costs.values()]
    columns += ["trials", "chosen", "training, s"] if name == "full" else []
    text = [f"#### {SET_NAMES[name]}\n", lists_of(study, name) + "\n"]
    text += [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    reference = next(line for line in lines if line.row.name == table.reference)
    for line in lines:
        cells = [*metric_cells(line, name, budget), *difference_cells(line, reference, name)]
        cells += [in_paper(line.row, study.data)] if paper else []
        cells += [f"{line.costs[key]:,}" if line.costs else NOT_HERE for key in costs]
        cells += search_cells(line) if name == "full" else []
        label = f"**{line.row.name}**" if line is reference else line.row.name
        text.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def lists_of(study: Study, name: str) -> str:
    """What the lists of a set are, and the hash that names them."""
    if name == "exposed":
        test, _ = exposed(study.test_set("full"))
        return f"{len(test.user):,} users; the others took all or nothing of what they were shown."
    lists = study.about()["sets"][name]
    content = "impressions, candidates and random items" if name == "full" else "impressions and random items"
    return (
        f"{lists['lists']:,} test lists `{lists['digest'][:16]}` of {content}, up to {lists['size']} a list, of "
        f"{lists['users']:,} users; {lists['left_out']:,} more lists without a positive are left out."
    )


def in_paper(row: Row, data: str) -> str:
    return f"{row.paper[data][0]:.4f} / {row.paper[data][1]:.4f}" if data in row.paper else ""


def search_cells(line: Line) -> list[str]:
    """Trials, what they chose, and seconds of a training."""
    if line.row.baseline is not None:
        return ["", "", ""]
    done = str(line.asked) if len(line.trials) == line.asked else f"{len(line.trials)} of {line.asked}"
    return [done, described(dict(line.chosen)), NOT_HERE if line.seconds != line.seconds else f"{line.seconds:.0f}"]


def metric_cells(line: Line, name: str, budget: Budget) -> list[str]:
    """Mean ± deviation of each metric, the interval of the main one; a row with seeds missing says how many it has."""
    if name not in line.measured:
        return [NOT_HERE] * (len(METRICS[name]) + 1)
    found = line.measured[name]
    short = "" if line.row.baseline or found.seeds == budget.seeds else f" ({found.seeds} of {budget.seeds} seeds)"
    cells = []
    for metric in METRICS[name]:
        mean, deviation = float(found.means[metric].mean()), found.deviation(metric)
        spread = "" if deviation != deviation else f" ± {deviation:.4f}"
        cells.append(NOTHING if mean != mean else f"{mean:.4f}{spread}{short}")
    at = found.interval(MAIN[name])
    return [*cells, f"[{at.low:.4f}, {at.high:.4f}]" if at.lists else NOTHING]


def difference_cells(line: Line, reference: Line, name: str) -> list[str]:
    wanted = METRICS[name][:2]
    if line is reference:
        return [""] * len(wanted)
    if name not in line.measured or name not in reference.measured:
        return [NOT_HERE] * len(wanted)
    found = [line.measured[name].compared(reference.measured[name], metric) for metric in wanted]
    return [f"{at.mean:+.4f} [{at.low:+.4f}, {at.high:+.4f}]" if at.lists else NOTHING for at in found]


def orders(study: Study, lines: Sequence[Line]) -> str:
    """The order of the rows on each list set, and the paper's of the same rows."""
    sets = {name: order_on(lines, name) for name in study.list_sets()}
    text = [f"- {SET_NAMES[name]}, by {title(MAIN[name])}: {ordered(of)}" for name, of in sets.items() if len(of) > 1]
    full, random = sets["full"], sets.get("random", {})
    pairs = [(a, b) for a in full for b in full if a < b and a in random and b in random]
    if pairs:
        same = sum((full[a] > full[b]) == (random[a] > random[b]) for a, b in pairs)
        text.append(f"- the first two orders agree on {same} of {len(pairs)} pairs of rows")
    theirs = {line.row.name: line.row.paper[study.data][1] for line in lines if study.data in line.row.paper}
    text += [f"- the paper's: {ordered(theirs)}"] if len(theirs) > 1 else []
    return "\n".join(["Order of the rows:\n", *text, ""]) if text else ""


def order_on(lines: Sequence[Line], name: str) -> dict[str, float]:
    """What rows are ordered by, of those that have it."""
    found = {line.row.name: line.measured[name].means[MAIN[name]].mean() for line in lines if name in line.measured}
    return {row: float(value) for row, value in found.items() if value == value}


def searches(lines: Sequence[Line]) -> str:
    """All trials of all rows, so that anyone can see that they had the same budget; the chosen one in bold."""
    text = [
        "<details><summary>All trials, validation NDCG@10</summary>\n",
        "| row | trial | NDCG@10 |",
        "|---|---|--:|",
    ]
    for line in lines:
        for place, trial in enumerate(line.trials):
            first = line.trials[0].changes
            new = trial.changes if not place else {k: v for k, v in trial.changes.items() if v != first[k]}
            score = "diverged" if trial.score == DIVERGED else f"{trial.score:.4f}"
            best = len(line.trials) == line.asked and trial == chosen(line.trials)
            text.append(f"| {line.row.name} | {described(new)} | {f'**{score}**' if best else score} |")
    return "\n".join([*text, "\n</details>\n"]) if len(text) > 3 else ""


def ordered(values: Mapping[str, float]) -> str:
    return " > ".join(f"{name}" for name in sorted(values, key=lambda name: -values[name]))


def title(metric: str) -> str:
    return metric.replace("ndcg", "NDCG").replace("recall", "Recall").replace("gauc", "GAUC")


def plots(table: Table, data: str, lines: Sequence[Line]) -> dict[str, str]:
    """SVGs by file name: the rows' quality, and of the cost table what it costs."""
    known = [line for line in lines if "full" in line.measured]
    rows = {
        line.row.name: (
            float(line.measured["full"].means[MAIN["full"]].mean()),
            line.measured["full"].deviation(MAIN["full"]),
        )
        for line in known
    }
    if not rows:
        return {}
    files = {
        f"{table.name}-{data}.svg": dots(
            f"{table.title}, {data}: {title(MAIN['full'])}", rows, reference=table.reference
        )
    }
    paid = {line.row.name: [(line.costs["ms"], rows[line.row.name][0])] for line in known if line.costs}
    if paid and min(point[0][1] for point in paid.values()) > 0:
        what = f"{data}: quality and the time of 5,000 candidates, one thread"
        files[f"{table.name}-{data}-frontier.svg"] = chart(what, "ms", title(MAIN["full"]), paid)
    return files


if __name__ == "__main__":
    sys.exit(main())
