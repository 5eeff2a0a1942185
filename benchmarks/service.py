"""Benchmark of the whole service: real HTTP on loopback, RankTower beside what others would write or take.

Closed loop: one connection, contestants take turns in rounds, so a slow minute of a shared machine hits all of them; a
figure is the median over rounds, a ratio the median of ratios within a round. Open loop: requests leave at rising rates
whether or not earlier ones were answered, and beside it stands what chance alone does to a server that is perfectly
even. Every request is another user with other candidates. Every contestant's answers are checked against a float64
reference first; a wrong one ends the benchmark with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.arrow import arrow_body
from benchmarks.client import ARROW, JSON, AnswerError, Timings
from benchmarks.contestants import Contestant, Course, Ranking
from benchmarks.lineup import ENTRIES, Lineup, Options, start
from benchmarks.made import SIZES
from benchmarks.processes import end_in_order, on, pinning
from benchmarks.report import (
    RESULTS,
    Bar,
    Report,
    machine,
    machine_line,
    median,
    median_ratio,
    print_bars,
    quantile,
    table,
)
from kernel.record import DTYPES
from loadtest.open_loop import TOLERANCE, Limits, Schedule, run_open_loop
from loadtest.report import stage_times
from loadtest.serving import HOST

SHARES = (0.25, 0.5, 0.75, 0.9)  # of the capacity of one connection
COURSES = {
    "full": Course(lengths=(500, 2_000, 5_000), rounds=5, count=200, warm_up=20),
    "tiny": Course(lengths=(50, 200), rounds=2, count=20, warm_up=4),
}
OVER_RATES = ("ours", "ours-arrow", "plain", "plain-local")
OPEN_RUNS, OPEN_LEAST = 3, 300  # of each rate, for RankTower; requests of one
EQUAL = "equal server"
SECONDS = {"full": 4.0, "tiny": 0.2}  # of one: less than the 5 s after which the server closes an idle connection
CATALOGUES = {"full": (10_000, 100_000), "tiny": ()}  # measured beside the whole one, for the plot
OVER_CATALOGUES = ("ours", "ours-cross", "plain-local", "empty")

Arrivals = Literal["poisson", "even"]
Rounds = dict[tuple[str, int], list[Timings]]  # by contestant and number of candidates


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    course = COURSES[given.size]
    items = given.items or SIZES[given.size]
    options = Options(items=items, dtype=given.dtype, course=course, folder=given.out / "made")
    report = Report("service" if given.size == "full" else f"service-{given.size}", _settings(options))
    print(machine_line(machine()))
    try:
        with ExitStack() as stack:
            measure(Lineup(options, stack), given.contestants, SECONDS[given.size], report)
        for smaller in CATALOGUES[given.size] if given.catalogues is None else given.catalogues:
            report.rows += catalogue(replace(options, items=smaller), given.contestants)
    except AnswerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nwritten: {report.write(given.out).name}")
    return 0


def measure(lineup: Lineup, names: Sequence[str], seconds: float, report: Report) -> None:
    """Check everybody, run both loops, print and fill the report."""
    contestants, absent = start(lineup, names)
    report.notes += [f"{name}: n/a: {reason}" for name, reason in absent.items()]
    report.notes.append(pinning(lineup.cores))
    with on(lineup.client_core):
        for contestant in contestants:
            checked = contestant.check()
            print(f"{contestant.name}: {checked} answers checked" if checked else f"{contestant.name}: constant answer")
        rounds = closed(contestants, lineup.course)
        report.rows += closed_rows(rounds, lineup.options.items)
        print_closed(report)
        if any(contestant.name == "ours" for contestant in contestants):
            report.rows += open_rows(contestants, rounds, seconds, lineup.options.items)
            print_open(report)
    report.bars += bars(rounds, report.rows, max(lineup.course.lengths))
    print()
    print_bars(report.bars)
    print("\n" + "\n".join(report.notes))


def catalogue(options: Options, names: Sequence[str]) -> list[dict[str, Any]]:
    """The closed loop with the longest lists over another size of catalogue."""
    course = replace(options.course, lengths=(max(options.course.lengths),))
    with ExitStack() as stack:
        lineup = Lineup(replace(options, course=course), stack)
        contestants, _ = start(lineup, [name for name in OVER_CATALOGUES if name in names])
        with on(lineup.client_core):
            for contestant in contestants:
                contestant.check()
            rows = closed_rows(closed(contestants, course), options.items)
    print(f"\n{options.items:,} items\n" + table(CLOSED_HEADS, closed_cells(rows)))
    return [row for row in rows if row["kind"] == "closed"]


# --- closed loop -----------------------------------------------------------------------------------------------------


def closed(contestants: Sequence[Contestant], course: Course) -> Rounds:
    """Every contestant in every round, every second round in the opposite order."""
    rounds: Rounds = defaultdict(list)
    for number in range(course.rounds):
        turn = contestants if number % 2 == 0 else contestants[::-1]
        for length in course.lengths:
            for contestant in turn:
                rounds[contestant.name, length].append(contestant.run(length, number))
    return rounds


def closed_rows(rounds: Rounds, items: int) -> list[dict[str, Any]]:
    """One row a contestant and length, and one for each of its stages."""
    rows: list[dict[str, Any]] = []
    for (name, length), timings in rounds.items():
        same = {"contestant": name, "items": items, "candidates": length}
        medians = _round_medians(timings)
        rows.append(
            {
                "kind": "closed",
                **same,
                "requests": sum(len(one.round_trips_us) for one in timings),
                "p50_us": median(medians),
                "p99_us": median([quantile(one.round_trips_us, 0.99) for one in timings]),
                "lowest_p50_us": min(medians),
                "highest_p50_us": max(medians),
            }
        )
        rows += [{"kind": "stage", **same, "stage": stage, "p50_us": us} for stage, us in _stages(timings).items()]
    return rows


def _round_medians(timings: Sequence[Timings]) -> list[float]:
    return [quantile(one.round_trips_us, 0.5) for one in timings]


def _stages(timings: Sequence[Timings]) -> dict[str, float]:
    """Median microseconds by stage over all rounds, from Server-Timing; none where a server sends none."""
    spent: dict[str, list[float]] = defaultdict(list)
    for one in timings:
        for header in one.server_timings:
            for stage, time_ms in stage_times(header).items():
                spent[stage].append(time_ms * 1e3)
    return {stage: quantile(times, 0.5) for stage, times in spent.items()}


# --- open loop -------------------------------------------------------------------------------------------------------


def open_rows(contestants: Sequence[Contestant], rounds: Rounds, seconds: float, items: int) -> list[dict[str, Any]]:
    """Poisson arrivals at rising rates at the longest lists, each contestant at shares of its own capacity; RankTower
    once with even arrivals, too, and beside it a server that takes equally long for every request."""
    rows = []
    for contestant in contestants:
        if contestant.name not in OVER_RATES or not isinstance(contestant, Ranking):
            continue
        name, length = contestant.name, max(contestant.bodies)
        ours, arrow = name == "ours", name == "ours-arrow"
        capacity = 1e6 / median(_round_medians(rounds[name, length]))  # of one connection: its round trips end to end
        bodies = [arrow_body(body) for body in contestant.bodies[length]] if arrow else contestant.bodies[length]
        same = {"kind": "open", "contestant": name, "items": items, "candidates": length}
        arrivals: list[tuple[float, Arrivals]] = [(share, "poisson") for share in SHARES]
        for share, kind in [*arrivals, (0.5, "even")] if ours else arrivals:
            rate, count = share * capacity, OPEN_RUNS if ours else 1
            long_s = max(seconds, OPEN_LEAST / rate) if seconds >= 1 else seconds
            schedules = [Schedule(rate=rate, seconds=long_s, arrivals=kind, seed=number) for number in range(count)]
            url, media_type = f"http://{HOST}:{contestant.port}", ARROW if arrow else JSON
            runs = [_open_run(url, bodies, schedule, media_type) for schedule in schedules]
            rows.append({**same, "arrivals": kind, "share": share, "runs": count, **_middle(runs)})
        if ours:
            rows += [{**same, "contestant": EQUAL, **equal_server(share, capacity)} for share in SHARES]
    return rows


def equal_server(share: float, capacity: float, requests: int = 200_000) -> dict[str, Any]:
    """Percentiles behind one server that takes exactly 1/capacity for each request: computed, nothing is measured.

    A request waits for what is left of the one before it: w' = max(w + 1 - gap, 0), in units of a request.
    """
    gaps = np.random.default_rng(7).exponential(1 / share, requests)
    walk = np.cumsum(1 - gaps)
    waits = walk - np.minimum(np.minimum.accumulate(walk), 0)
    p50, p99 = (float(quantile) * 1e6 / capacity for quantile in np.quantile(waits + 1, (0.5, 0.99)))
    rate = share * capacity
    same = {"arrivals": "poisson", "share": share, "runs": 0, "target_rate": rate, "achieved_rate": rate}
    return {**same, "requests": requests, "p50_us": p50, "p99_us": p99, "send_lag_p99_us": 0.0, "valid": True}


def _open_run(url: str, bodies: Sequence[bytes], schedule: Schedule, media_type: str) -> dict[str, float]:
    """The figures of one run. Raises AnswerError when a request failed."""
    limits = Limits(connections=32)
    found = run_open_loop(url, bodies, schedule, release="", limits=limits, media_type=media_type)
    whole, lag = found.row("rank"), found.row("send lag")
    if whole is None or lag is None or whole.failures:
        raise AnswerError(f"{url} fails at {schedule.rate:.0f} requests/s: {dict(found.failures)}")
    return {
        "target_rate": found.target_rate,
        "achieved_rate": found.achieved_rate,
        "requests": whole.count,
        "p50_us": whole.p50_ms * 1e3,
        "p99_us": whole.p99_ms * 1e3,
        "send_lag_p99_us": lag.p99_ms * 1e3,
    }


def _middle(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over runs; valid where that of the achieved rates is."""
    middle: dict[str, Any] = {name: median([run[name] for run in runs]) for name in runs[0]}
    return {**middle, "valid": middle["achieved_rate"] >= (1 - TOLERANCE) * middle["target_rate"]}


# --- bars ------------------------------------------------------------------------------------------------------------


def bars(rounds: Rounds, rows: Sequence[Any], length: int) -> list[Bar]:
    """The must-show figures, at the longest candidate lists."""

    def ratio(above: str, below: str) -> float | None:
        return median_ratio(
            _round_medians(rounds.get((above, length), [])), _round_medians(rounds.get((below, length), []))
        )

    return [
        Bar(name="JSON MaxSim / empty", value=ratio("ours", "empty"), side="at most", limit=2.5, stretch=2.0),
        Bar(name="plain / JSON MaxSim", value=ratio("plain", "ours"), side="at least", limit=20),
        Bar(name="plain-local / JSON MaxSim", value=ratio("plain-local", "ours"), side="at least", limit=5),
        Bar(
            name="JSON cross-attention / empty", value=ratio("ours-cross", "empty"), side="at most", limit=4, stretch=3
        ),
        Bar(name="p99 / p50 at half capacity", value=_tail(rows), side="at most", limit=3),
        Bar(name="Arrow / JSON MaxSim", value=ratio("ours-arrow", "ours"), side="at most", limit=0.85, stretch=0.7),
    ]


def _tail(rows: Sequence[Any]) -> float | None:
    """p99 / p50 of RankTower's valid open-loop run at half of capacity."""
    for row in rows:
        if (
            row["kind"] == "open"
            and row["contestant"] == "ours"
            and (row["share"], row["arrivals"], row["valid"]) == (0.5, "poisson", True)
        ):
            return float(row["p99_us"] / row["p50_us"])
    return None


# --- text ------------------------------------------------------------------------------------------------------------

CLOSED_HEADS = ("closed loop", "candidates", "p50 us", "p99 us", "p50 over rounds", "what it is")
OPEN_HEADS = (
    "open loop",
    "share of capacity",
    "arrivals",
    "wanted/s",
    "achieved/s",
    "p50 us",
    "p99 us",
    "p99/p50",
    "lag p99 us",
    "",
)


def closed_cells(rows: Sequence[Any]) -> list[list[Any]]:
    """Cells of the closed loop over the largest catalogue, by number of candidates, then as contestants are listed."""
    measured = [row for row in rows if row["kind"] == "closed"]
    largest = max((row["items"] for row in measured), default=0)
    found = sorted(
        (row for row in measured if row["items"] == largest),
        key=lambda row: (row["candidates"], list(ENTRIES).index(row["contestant"])),
    )
    return [
        [
            row["contestant"],
            row["candidates"],
            row["p50_us"],
            row["p99_us"],
            f"{row['lowest_p50_us']:,.0f}-{row['highest_p50_us']:,.0f}",
            ENTRIES[row["contestant"]].meaning,
        ]
        for row in found
    ]


def stage_cells(rows: Sequence[Any]) -> tuple[list[str], list[list[Any]]]:
    """Heads and cells of the stages: a line a contestant and number of candidates."""
    lines: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "stage":
            lines[row["candidates"], row["contestant"]][row["stage"]] = row["p50_us"]
    stages = list(next(iter(lines.values()))) if lines else []
    cells = [[name, length, *(line[stage] for stage in stages)] for (length, name), line in sorted(lines.items())]
    return ["stages, median us", "candidates", *stages], cells


def open_cells(rows: Sequence[Any]) -> list[list[Any]]:
    """Cells of the open loop."""
    return [
        [
            row["contestant"],
            f"{row['share']:.0%}",
            row["arrivals"],
            row["target_rate"],
            row["achieved_rate"],
            row["p50_us"],
            row["p99_us"],
            row["p99_us"] / row["p50_us"],
            row["send_lag_p99_us"],
            "" if row["valid"] else "INVALID: below 98 % of its rate",
        ]
        for row in rows
        if row["kind"] == "open"
    ]


def print_closed(report: Report) -> None:
    print("\n" + table(CLOSED_HEADS, closed_cells(report.rows)))
    print("\n" + table(*stage_cells(report.rows)))


def print_open(report: Report) -> None:
    print("\n" + table(OPEN_HEADS, open_cells(report.rows)))


# --- command line ----------------------------------------------------------------------------------------------------


def _settings(options: Options) -> dict[str, Any]:
    course = options.course
    return {
        "items": options.items,
        "dtype": options.dtype,
        "candidates": list(course.lengths),
        "rounds": course.rounds,
        "requests_a_round": course.count,
        "head": "4x4 heads of 32",
        "user": "20 fields and 50 items of history in every request",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-service", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--items", type=int, help="items of the catalogue, in place of the size's")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="how RankTower stores records")
    parser.add_argument("--contestants", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    parser.add_argument("--catalogues", type=int, nargs="*", help="further sizes, for the plot by catalogue")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results and made releases")
    return parser


if __name__ == "__main__":
    sys.exit(main())
