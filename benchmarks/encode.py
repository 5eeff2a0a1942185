"""Benchmark of encoding: microseconds from a user's fields and history to the input of the user tower."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from benchmarks.report import RESULTS, Bar, Report, machine, machine_line, median, print_bars, quantile, table
from model.features import FeatureSpec, Field

VALUES = 1000  # of a vocabulary
ITEMS = 100_000  # of the history's
KNOWN = 0.9  # of the values sent
HISTORIES = (1, 10, 50, 200)
MEASURED_HISTORY = 50  # of the bar
BAR_US, STRETCH_US = 60.0, 30.0
SLICE = 64  # rows a measurement takes the mean of

Row = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    report = Report("encode", {"rows": given.rows, "rounds": given.rounds, "known": KNOWN, "vocabulary": VALUES})
    print(machine_line(machine()))
    for length in HISTORIES:
        spec = made_spec(length)
        rows = made_rows(spec, given.rows, seed=0)
        times = timed(partial(spec.encode_row, "user"), rows, given.rounds)
        report.rows.append(
            {
                "kind": "encode",
                "fields": len(spec.user_fields),
                "history": length,
                "columns": spec.user_width,
                "median_us": median(times),
                "p99_us": quantile(times, 0.99),
            }
        )
    found = next(row["median_us"] for row in report.rows if row["history"] == MEASURED_HISTORY)
    name = f"encoding a user: 20 fields, a history of {MEASURED_HISTORY}, us"
    report.bars.append(Bar(name=name, value=found, side="at most", limit=BAR_US, stretch=STRETCH_US))
    print("\n" + table(("fields", "history", "columns", "median, us", "p99, us"), cells(report.rows)))
    print()
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 0


def made_spec(history: int) -> FeatureSpec:
    """12 categorical fields, half of them text, 5 numeric, 2 lists of 5, and a history of that length."""
    texts, numbers = tuple(f"value-{k}" for k in range(VALUES)), tuple(range(VALUES))
    fields = [
        Field(name=f"category{k}", side="context" if k < 4 else "user", kind="categorical",
              values="string" if k % 2 else "int", vocabulary=texts if k % 2 else numbers)
        for k in range(12)
    ]  # fmt: skip
    edges = tuple(np.linspace(-2, 2, 31).tolist())
    fields += [Field(name=f"number{k}", side="user", kind="numeric", edges=edges) for k in range(5)]
    fields += [
        Field(name=f"list{k}", side="user", kind="multi", length=5, values="string", vocabulary=texts) for k in range(2)
    ]
    fields.append(Field(name="item_id", side="item", kind="categorical", vocabulary=tuple(range(ITEMS))))
    fields.append(Field(name="history", side="user", kind="sequence", length=history, shares="item_id"))
    return FeatureSpec(tuple(fields), "int", "int")


def made_rows(spec: FeatureSpec, count: int, seed: int) -> list[dict[str, Any]]:
    """Users who have a value in every field, as a decoded request gives them."""
    rng = np.random.default_rng(seed)

    def values(field: Field, size: int) -> list[Any]:
        most = ITEMS if field.name == "history" else VALUES
        drawn = rng.integers(0, int(most / KNOWN), size).tolist()
        return [f"value-{k}" for k in drawn] if field.values == "string" else drawn

    def value(field: Field) -> Any:
        if field.kind == "numeric":
            return float(rng.normal())
        return values(field, field.length) if field.is_list else values(field, 1)[0]

    return [{field.name: value(field) for field in spec.user_fields} for _ in range(count)]


def timed(encode: Callable[[Row], Any], rows: Sequence[Row], rounds: int) -> list[float]:
    """Microseconds a row, one figure for every SLICE rows; a first round warms up."""
    times = []
    for number in range(rounds + 1):
        for start in range(0, len(rows) - SLICE + 1, SLICE):
            begun = perf_counter_ns()
            for row in rows[start : start + SLICE]:
                encode(row)
            if number:
                times.append((perf_counter_ns() - begun) / SLICE / 1e3)
    return times


def cells(rows: Sequence[Row]) -> list[list[Any]]:
    return [[row[name] for name in ("fields", "history", "columns", "median_us", "p99_us")] for row in rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-encode", description=__doc__)
    parser.add_argument("--rows", type=int, default=512, help="users to encode, all of them different")
    parser.add_argument("--rounds", type=int, default=20, help="times that all of them are encoded")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
