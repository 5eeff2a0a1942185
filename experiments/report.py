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
LIFTS = (("RankTower", "Two-Tower"), ("RankTower+", "Two-Tower+"), ("RankTower+", "Two-Tower"))  # rows, where present
SAMPLES = 1000  # of a bootstrap
COSTS = {"parameters": "parameters", "item_bytes": "bytes an item", "macs": "MACs a candidate", "ms": "ms of 5,000"}

ByList = dict[str, np.ndarray]  # metric -> (L,), NaN where a list has nothing to measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row on one list set."""

    means: dict[str, np.ndarray]  # metric -> (seeds,)
    by_list: ByList  # averaged over seeds
    weights: ByList  # of metrics that have any
    user: np.ndarray  # (L,)
    seed: tuple[int, ...] = ()  # those tested; none of a baseline, which has one test

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

    def deviation_from(self, reference: Measured, metric: str) -> float:
        """Of the difference to the reference, seed by seed, over the seeds that both have; NaN for one."""
        seeds = [seed for seed in self.seed or reference.seed if seed in (reference.seed or self.seed)]
        difference = [self.mean(metric, seed) - reference.mean(metric, seed) for seed in seeds]
        return float(np.std(difference, ddof=1)) if len(seeds) > 1 else float("nan")

    def mean(self, metric: str, seed: int) -> float:
        """With one seed; a baseline's is the same with any."""
        return float(self.means[metric][self.seed.index(seed) if self.seed else 0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What is known of a row: nothing, if it was not run."""

    row: Row
    measured: dict[str, Measured] = field(default_factory=dict)  # by list set
    chosen: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Trial] = ()  # those done, in the order of the search
    asked: int = 0  # trials of the whole search
    best: Sequence[int] = ()  # the best epoch of each seed tested
    epochs: int = 0  # there are
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
        names = options.tables or sorted(tables.names(), key=lambda name: name != "models")  # the headline first
        wanted = [tables.read_table(name) for name in names]
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
below its table, learning rate first; the recipe that they chose was trained with each seed and tested once. Recall@K
divides by min(K, positives), the gain of NDCG is 2^grade - 1, relevant is a grade above 0, ties take their expected
value, lists without a positive are left out. Numbers are means over seeds ± their standard deviation. Differences (Δ)
are to the reference row (in bold), over the same lists, ± their standard deviation over seeds, each seed beside the
same one of the reference. Intervals are of 95 %, from a bootstrap over users of what is averaged over seeds; a lift is
a ratio of means less 1, users drawn for both together. The paper's numbers have another K, split and lists than ours:
compare orders and lifts, not values. Best epoch: of each seed, of those of the budget; still rising: the last was the
best of a seed. n/a: not run; –: no list has anything to measure.
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
    blocks += [lifts(study, lines), orders(study, lines)]
    for file, svg in plots(table, study.data, lines).items():
        (target / "plots" / file).write_text(svg, encoding="utf-8")
        blocks.append(f"![{table.title}, {study.data}](plots/{file})\n")
    return "\n".join(part for part in [*blocks, trainings(lines), searches(lines)] if part)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_line(study: Study, table: Table, budget: Budget, row: Row) -> Line:
    """What was measured of a row so far."""
    if row.baseline is not None:
        tested = study.baseline(row.baseline)
        return Line(row=row, measured=read_sets(study, [tested]) if (tested / RESULT).is_file() else {})
    trials, wanted = study.search(row, budget)
    asked = tables.trials_of(row, budget)
    if wanted:
        return Line(row=row, trials=trials, asked=asked)
    changes = chosen(trials).changes
    recipes = [recipe_of(row, budget, study.data, changes, seed) for seed in range(budget.seeds)]
    folders = {recipe.seed: study.test(recipe, row.view) for recipe in recipes}
    tests = {seed: test for seed, test in folders.items() if (test / RESULT).is_file()}
    cost = study.cost(recipes[0], row.view) / RESULT
    results = [json.loads((test / RESULT).read_text()) for test in tests.values()]
    return Line(
        row=row,
        measured=read_sets(study, [*tests.values()], (*tests,)) if tests else {},
        chosen=changes,
        trials=trials,
        asked=asked,
        best=[result["best_epoch"] for result in results],
        epochs=recipes[0].epochs,
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


def read_sets(study: Study, tests: Sequence[Path], seeds: tuple[int, ...] = ()) -> dict[str, Measured]:
    """Metrics of the tests of a row, one a seed, by list set."""
    return {name: measured([metrics_of(study, test, name) for test in tests], seeds) for name in study.list_sets()}


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


def measured(tests: Sequence[Metrics], seeds: tuple[int, ...]) -> Measured:
    """Tests of a row together."""
    metrics, weights, user = tests[0]
    means = {name: np.array([mean_of(by[name], weight.get(name)) for by, weight, _ in tests]) for name in metrics}
    by_list = {name: np.mean([by[name] for by, _, _ in tests], axis=0) for name in metrics}
    return Measured(means=means, by_list=by_list, weights=weights, user=user, seed=seeds)


def relative(ours: Measured, theirs: Measured, metrics: Sequence[str]) -> dict[str, Interval]:
    """One mean over the other, less 1, of the same lists; 95 % by resampling users, for both and all metrics alike.

    Users count Poisson(1) times, as in model.metrics.bootstrap. NaN where the other's mean is 0; so drawn it is the
    lift of the whole.
    """
    users, user = np.unique(ours.user, return_inverse=True)
    sums = np.array(  # (metrics, 2, users)
        [
            [np.bincount(user.ravel(), np.nan_to_num(one.by_list[metric]), len(users)) for one in (ours, theirs)]
            for metric in metrics
        ]
    )
    rng = np.random.default_rng(0)
    drawn = [sums @ rng.poisson(1.0, len(users)) for _ in range(SAMPLES)]
    whole, resampled = ratio(sums.sum(axis=2)), ratio(np.array(drawn))
    low, high = np.quantile(np.where(np.isnan(resampled), whole, resampled), [0.025, 0.975], axis=0)
    lists = [int((~np.isnan(ours.by_list[metric])).sum()) for metric in metrics]
    return {
        metric: Interval(mean=mean, low=a, high=b, lists=known, left_out=len(ours.user) - known)
        for metric, mean, a, b, known in zip(metrics, whole, low, high, lists, strict=True)
    }


def ratio(sums: np.ndarray) -> np.ndarray:
    """First over second, less 1: (..., metrics, 2) to (..., metrics)."""
    top, bottom = sums[..., 0], sums[..., 1]
    found: np.ndarray = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)
    return found - 1.0


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
        *(
            [f"{log['new']:.1%} of the test's positives are items that training never saw: no list has such items."]
            if log["new"] >= 0.0005 and not about["stages"]
            else []
        ),
        "Candidates are those that were logged." if about["stages"] else CANDIDATES,
        f"Budget `{budget.name}`: {spent}, {counted(budget.seeds, 'seed')}.",
        *([f"Trained on {'; '.join(trained_on)}."] if trained_on else []),
        tests_said(study),
    ]
    return " ".join(said) + "\n"


CANDIDATES = (
    "Candidates of the test are simulated, half by co-visitation with the history and half by popularity within the "
    "scenario, from training alone; no network resembles either. They were frozen before anything was trained. The row "
    "`popularity` is by construction near the second source, a quarter of a list, as are random items of training "
    "lists, drawn by popularity^0.75 unless a recipe says otherwise; lists of random negatives only are free of that."
)


def block(study: Study, table: Table, budget: Budget, lines: Sequence[Line], name: str) -> str:
    """One list set: what the lists are, and the table."""
    metrics = METRICS[name]
    paper = any(study.data in line.row.paper for line in lines) and name == "full"
    costs = COSTS if table.cost and name == "full" else {}
    columns = [title(metric) for metric in metrics] + [f"{title(MAIN[name])}, 95 %"]
    columns += [f"Δ {title(metric)}" for metric in metrics[:2]]
    columns += [*(["paper, R@K / N@K"] if paper else []), *costs.values()]
    text = [f"#### {SET_NAMES[name]}\n", lists_of(study, name) + "\n"]
    text += [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    reference = next(line for line in lines if line.row.name == table.reference)
    for line in lines:
        cells = [*metric_cells(line, name, budget), *difference_cells(line, reference, name)]
        cells += [in_paper(line.row, study.data)] if paper else []
        cells += [f"{line.costs[key]:,}" if line.costs else NOT_HERE for key in costs]
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
    ours, theirs = line.measured[name], reference.measured[name]
    return [difference_cell(ours.compared(theirs, metric), ours.deviation_from(theirs, metric)) for metric in wanted]


def difference_cell(at: Interval, deviation: float) -> str:
    """Mean ± deviation over seeds, if there are several, and the interval."""
    spread = "" if deviation != deviation else f" ± {deviation:.4f}"
    return f"{at.mean:+.4f}{spread} [{at.low:+.4f}, {at.high:+.4f}]" if at.lists else NOTHING


def lifts(study: Study, lines: Sequence[Line]) -> str:
    """What one row is ahead of another by, in percent, on both list sets alike."""
    rows = {line.row.name: line for line in lines}
    pairs = [(rows[ours], rows[theirs]) for ours, theirs in LIFTS if ours in rows and theirs in rows]
    paper = any(lift_in_paper(ours.row, theirs.row, study.data) for ours, theirs in pairs)
    columns = [*(title(metric) for metric in METRICS["full"]), *(["paper, R@K / N@K"] if paper else [])]
    text = ["#### lifts\n", f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for name in (name for name in study.list_sets() if name != "exposed"):
        for ours, theirs in pairs:
            cells = lift_cells(ours, theirs, name)
            cells += [lift_in_paper(ours.row, theirs.row, study.data)] if paper else []
            text.append(f"| {ours.row.name} over {theirs.row.name}, {SET_NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join([*text, ""]) if pairs else ""


def lift_cells(ours: Line, theirs: Line, name: str) -> list[str]:
    if name not in ours.measured or name not in theirs.measured:
        return [NOT_HERE] * len(METRICS[name])
    found = relative(ours.measured[name], theirs.measured[name], METRICS[name]).values()
    return [f"{at.mean:+.1%} [{at.low:+.1%}, {at.high:+.1%}]" if at.mean == at.mean else NOTHING for at in found]


def lift_in_paper(ours: Row, theirs: Row, data: str) -> str:
    if data not in ours.paper or data not in theirs.paper:
        return ""
    return " / ".join(
        f"{one / other - 1:+.1%}" for one, other in zip(ours.paper[data], theirs.paper[data], strict=True)
    )


def orders(study: Study, lines: Sequence[Line]) -> str:
    """The order of the rows on each list set, and the paper's of the same rows."""
    sets = {name: order_on(lines, name) for name in study.list_sets()}
    said = {
        name: f"- {SET_NAMES[name]}, by {title(MAIN[name])}: {ordered(of)}" for name, of in sets.items() if len(of) > 1
    }
    text = [said[name] for name in ("full", "random") if name in said]
    full, random = sets["full"], sets.get("random", {})
    pairs = [(a, b) for a in full for b in full if a < b and a in random and b in random]
    if pairs:
        same = sum((full[a] > full[b]) == (random[a] > random[b]) for a, b in pairs)
        text.append(f"- these two agree on {same} of {len(pairs)} pairs of rows")
    theirs = {line.row.name: line.row.paper[study.data][1] for line in lines if study.data in line.row.paper}
    text += [f"- the paper's: {ordered(theirs)}"] if len(theirs) > 1 else []
    text += [said["exposed"]] if "exposed" in said else []
    return "\n".join(["Order of the rows:\n", *text, ""]) if text else ""


def order_on(lines: Sequence[Line], name: str) -> dict[str, float]:
    """What rows are ordered by, of those that have it."""
    found = {line.row.name: line.measured[name].means[MAIN[name]].mean() for line in lines if name in line.measured}
    return {row: float(value) for row, value in found.items() if value == value}


def trainings(lines: Sequence[Line]) -> str:
    """What each row spent, what its search chose, and whether its budget ended it."""
    trained = [line for line in lines if line.row.baseline is None]
    text = ["| | trials | chosen | best epoch | training, s |", "|---|--:|---|---|--:|"]
    for line in trained:
        done = str(line.asked) if len(line.trials) == line.asked else f"{len(line.trials)} of {line.asked}"
        seconds = NOT_HERE if line.seconds != line.seconds else f"{line.seconds:.0f}"
        text.append(f"| {line.row.name} | {done} | {described(dict(line.chosen))} | {best_epochs(line)} | {seconds} |")
    return "\n".join(["#### trainings\n", *text, ""]) if trained else ""


def best_epochs(line: Line) -> str:
    if not line.best:
        return NOT_HERE
    rising = ", still rising" if line.epochs in line.best else ""
    return f"{', '.join(map(str, line.best))} of {line.epochs}{rising}"


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
    """SVGs by file name: the rows' quality on both list sets, and of the cost table what it costs."""
    files = {}
    for name in ("full", "random"):
        if rows := qualities(lines, name):
            what = f"{table.title}, {data}, {SET_NAMES[name]}: {title(MAIN[name])}"
            files[f"{table.name}-{data}-{name}.svg"] = dots(what, rows, reference=table.reference)
    full = qualities(lines, "full")
    paid = {line.row.name: [(line.costs["ms"], full[line.row.name][0])] for line in lines if line.costs}
    if paid and min(point[0][1] for point in paid.values()) > 0:
        what = f"{data}: quality and the time of 5,000 candidates, one thread"
        files[f"{table.name}-{data}-frontier.svg"] = chart(what, "ms", title(MAIN["full"]), paid)
    return files


def qualities(lines: Sequence[Line], name: str) -> dict[str, tuple[float, float]]:
    """Mean and deviation by row, of those that were measured."""
    found = {line.row.name: line.measured[name] for line in lines if name in line.measured}
    main = MAIN[name]
    return {row: (float(of.means[main].mean()), of.deviation(main)) for row, of in found.items()}


if __name__ == "__main__":
    sys.exit(main())
