"""What a load test measured, as values, as JSON and as one compact table. All times are milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the report: a route, a stage inside it, or a property of the load generator itself."""

    name: str
    kind: Literal["route", "stage", "client"]
    count: int
    failures: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run."""

    loop: Literal["closed", "open"]
    url: str
    release: str
    seconds: float  # from the first intended send to the last answer
    target_rate: float  # requests per second; 0: as fast as the users can
    rows: tuple[Row, ...]
    failures: Mapping[str, int] = field(default_factory=dict)  # occurrences by message

    @property
    def achieved_rate(self) -> float:
        """Answered requests per second; failed ones do not count."""
        return sum(row.count - row.failures for row in self.rows if row.kind == "route") / max(self.seconds, 1e-9)

    def row(self, name: str) -> Row | None:
        """The row of that name, None when nothing of it was measured."""
        return next((row for row in self.rows if row.name == name), None)


def bucket_ms(time_ms: float) -> float:
    """Round to three significant digits: keeps histograms small and stages of some microseconds apart."""
    if time_ms <= 0.0:
        return 0.0
    return round(time_ms, 2 - math.floor(math.log10(time_ms)))


def row_of_histogram(
    name: str, kind: Literal["route", "stage", "client"], histogram: Mapping[float, int], failures: int, max_ms: float
) -> Row:
    """A row from occurrences by time; quantiles are as exact as the histogram's buckets."""
    times = np.array(sorted(histogram), np.float64)
    counts = np.array([histogram[time] for time in times.tolist()], np.int64)
    p50, p90, p99 = (_weighted_quantile(times, counts, share) for share in QUANTILES)
    return Row(
        name=name, kind=kind, count=int(counts.sum()), failures=failures, p50_ms=p50, p90_ms=p90, p99_ms=p99,
        max_ms=max_ms,
    )  # fmt: skip


def row_of_times(
    name: str, kind: Literal["route", "stage", "client"], times_ms: npt.NDArray[np.float64], failures: int = 0
) -> Row:
    """A row from every single time, (n,) float64."""
    histogram = dict(zip(*(part.tolist() for part in np.unique(times_ms, return_counts=True)), strict=True))
    return row_of_histogram(name, kind, histogram, failures, float(times_ms.max(initial=0.0)))


def table(report: Report) -> str:
    """The report as text: a head line, a row per route, stage and client property, then the failures."""
    lines = [_headline(report), _HEADER, *(_line(row) for row in report.rows)]
    lines += [f"  failed {count:,} times: {message}" for message, count in report.failures.items()]
    return "\n".join(lines)


def to_json(report: Report) -> str:
    """The report as JSON, which `from_json` reads back."""
    return json.dumps(asdict(report), indent=1)


def from_json(text: str) -> Report:
    """The report that `to_json` wrote."""
    document: dict[str, Any] = json.loads(text)
    rows = tuple(Row(**row) for row in document.pop("rows"))
    return Report(rows=rows, **document)


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON beside its final place, then rename: a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(to_json(report), encoding="utf-8")
    part.replace(path)


_HEADER = f"{'':24}{'count':>9}{'failed':>8}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'max ms':>10}"
_INDENT = {"route": "", "stage": "  ", "client": "  "}


def _headline(report: Report) -> str:
    target = f"of {report.target_rate:,.1f}/s wanted" if report.target_rate else "as fast as the users can"
    return (
        f"{report.loop} loop on {report.url}, release {report.release}: "
        f"{report.achieved_rate:,.1f} requests/s {target}, {report.seconds:.1f} s"
    )


def _line(row: Row) -> str:
    times = "".join(f"{time:>10.3f}" for time in (row.p50_ms, row.p90_ms, row.p99_ms, row.max_ms))
    return f"{_INDENT[row.kind] + row.name:24}{row.count:>9,}{row.failures:>8,}{times}"


def _weighted_quantile(times: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], share: float) -> float:
    """The smallest time that at least `share` of all occurrences do not exceed; 0 when there are none."""
    if not len(times):
        return 0.0
    return float(times[np.searchsorted(np.cumsum(counts), share * counts.sum())])


def stage_rows(times_ms: Mapping[str, Sequence[float]]) -> tuple[Row, ...]:
    """Rows of stages in the order in which they were first seen, which is that of Server-Timing."""
    return tuple(row_of_times(name, "stage", np.array(times, np.float64)) for name, times in times_ms.items())


def stage_times(header: str) -> dict[str, float]:
    """Milliseconds by stage from a Server-Timing header: `decode;dur=0.11, score;dur=0.42`."""
    timings = {}
    for metric in header.split(","):
        name, _, parameter = metric.strip().partition(";dur=")
        if name and parameter:
            timings[name] = float(parameter)
    return timings
