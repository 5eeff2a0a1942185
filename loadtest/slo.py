"""Service level objectives: read them from TOML, hold a report against them, say what was missed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loadtest.errors import ObjectiveError
from loadtest.report import Report, Row

DEFAULT = Path(__file__).with_name("slo.toml")
BOUNDS = ("at_most", "at_least")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One line of slo.toml: a measure of a row of the report, and its bound."""

    row: str
    measure: str
    bound: Literal["at_most", "at_least"]
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a measured value is within the bound."""
        return value <= self.limit if self.bound == "at_most" else value >= self.limit


def read_objectives(path: Path) -> tuple[Objective, ...]:
    """Objectives in the order of the file. Raises ObjectiveError naming the line's key and the remedy."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ObjectiveError(f"{path}: {error}") from error
    rows = [(row, measures) for row, measures in document.items() if _is_table(measures, f"{path}: {row}")]
    return tuple(_objective(path, row, *line) for row, measures in rows for line in measures.items())


def applicable(report: Report, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
    """The objectives that a run can be held to."""
    if report.target_rate:
        return objectives
    return tuple(objective for objective in objectives if objective.measure in AT_CAPACITY)


def misses(report: Report, objectives: tuple[Objective, ...]) -> list[str]:
    """A sentence for each objective that the report misses."""
    return [miss for objective in objectives if (miss := _miss(report, objective))]


def _miss(report: Report, objective: Objective) -> str | None:
    row = report.row(objective.row)
    if row is None or row.count == 0:
        return f"{objective.row}: nothing was measured, so {objective.measure} cannot hold"
    value = MEASURES[objective.measure](report, row)
    if objective.holds(value):
        return None
    bound = objective.bound.replace("_", " ")
    return f"{objective.row} {objective.measure} is {value:,.4g}, objective {bound} {objective.limit:,.4g}"


MEASURES: dict[str, Callable[[Report, Row], float]] = {
    "failures": lambda _, row: row.failures / row.count,
    "rate_of_target": lambda report, _: report.achieved_rate / report.target_rate,
    "p50_ms": lambda _, row: row.p50_ms,
    "p90_ms": lambda _, row: row.p90_ms,
    "p99_ms": lambda _, row: row.p99_ms,
    "max_ms": lambda _, row: row.max_ms,
}
AT_CAPACITY = {"failures"}  # what can be asked of a run without a rate: its latencies only tell how many users wait


def _objective(path: Path, row: str, measure: str, line: Any) -> Objective:
    where = f"{path}: {row}.{measure}"
    if measure not in MEASURES:
        raise ObjectiveError(f"{where}: unknown measure, use one of {', '.join(MEASURES)}")
    if not _is_table(line, where) or len(line) != 1 or next(iter(line)) not in BOUNDS:
        raise ObjectiveError(f"{where}: write {{ at_most = NUMBER }} or {{ at_least = NUMBER }}")
    ((bound, limit),) = line.items()
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise ObjectiveError(f"{where}: the limit is {limit!r}, write a number")
    return Objective(row=row, measure=measure, bound=bound, limit=float(limit))


def _is_table(value: object, where: str) -> bool:
    if not isinstance(value, dict):
        raise ObjectiveError(f"{where}: is {value!r}, write a table")
    return True
