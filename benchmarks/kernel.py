"""Benchmark of the kernel: microseconds for lookup, scores and ranking, one thread on one core, beside its rivals.

Ours reads a snapshot mapped from its file, as the service does; rivals have the same vectors as a float32 array in
memory. Every call has another user and another list of candidates. Contestants take turns in rounds; a ratio is the
median of the ratios within a round. Who scores otherwise than the float64 reference is refused before being timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from benchmarks import operations, scoring
from benchmarks.client import AnswerError
from benchmarks.mapped import (
    Catalogue,
    Pool,
    Users,
    available_bytes,
    catalogue,
    id_pool,
    pool_bytes,
    row_pool,
    table_bytes,
    vectors_bytes,
)
from benchmarks.operations import Ground
from benchmarks.processes import on
from benchmarks.report import RESULTS, Bar, Report, machine, machine_line, median_ratio, print_bars, table
from benchmarks.rivals.scorers import RIVALS
from benchmarks.rounds import Entry, in_rounds
from benchmarks.scoring import FLOOR, OURS, Scorer
from kernel import engine
from kernel.head import HeadKind, HeadSpec
from kernel.record import DTYPES, Dtype

Row = Mapping[str, Any]
Shape = tuple[int, int, int]  # user heads, item heads, dim

KINDS: tuple[HeadKind, ...] = ("maxsim", "cross_attention")
HEADLINE: Shape = (4, 4, 32)
SHAPES: tuple[Shape, ...] = (HEADLINE, (1, 1, 64), (8, 8, 32), (4, 4, 64))
RANKED = 5_000  # candidates of the bars
LARGE = 2_000_000  # items above which only the records that are meant to be served are made, of one shape
MEMORY_SHARE = 0.65  # of what is available; the rest is for copies of rivals and for others on the machine
SLOW_LEVELS = (engine.NUMPY, "portable")  # measured with the candidates of the bars alone: half of a run otherwise
NARROW: tuple[Dtype, ...] = ("f16", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    items: tuple[int, ...]
    counts: tuple[int, ...]
    shapes: tuple[Shape, ...]
    cell_s: float  # for all contestants of one head, size and number of candidates
    bars_s: float  # for the contestants of the bars
    operation_s: float
    pool_bytes: int


def size_of(name: str) -> Size:
    if name == "tiny":
        return Size(items=(2_000,), counts=(50, 200), shapes=SHAPES[:2], cell_s=0.05, bars_s=0.2, operation_s=0.05,
                    pool_bytes=4 << 20)  # fmt: skip
    return Size(items=(1_000_000, 10_000_000), counts=(500, 2_000, 5_000, 20_000), shapes=SHAPES, cell_s=2.0,
                bars_s=12.0, operation_s=1.5, pool_bytes=pool_bytes())  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    size = size_of(given.size)
    size = replace(size, items=tuple(given.items or size.items), cell_s=given.seconds or size.cell_s)
    print(machine_line(machine()))
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(size, given.rivals, Report("kernel" if given.size == "full" else f"kernel-{given.size}", {}))
    try:
        with on(one_core()), threadpool_limits(1), TemporaryDirectory(prefix="kernel-", dir=given.out) as folder:
            for items in size.items:
                run.measure(items, Path(folder))
    except AnswerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        engine.select()
    report = run.finished()
    for title, heads, rows in tables(report.rows):
        if rows:
            print(f"\n{title}\n\n{table(heads, rows)}")
    print()
    print_bars(report.bars)
    print("\n" + "\n".join(report.notes))
    print(f"\nwritten: {report.write(given.out).name}")
    return 0


def one_core() -> set[int] | None:
    """The last one: the first is the one that systems disturb most."""
    return {max(os.sched_getaffinity(0))} if hasattr(os, "sched_getaffinity") else None


# --- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """What one run has measured so far."""

    def __init__(self, size: Size, rivals: Sequence[str], report: Report) -> None:
        self.size, self.rivals, self.report = size, rivals, report
        self.levels, self.absent = engine.levels(), dict[str, str]()
        self.rows: Pool | None = None
        self.begun = time.monotonic()

    def measure(self, items: int, folder: Path) -> None:
        """All heads over that many items. Raises AnswerError."""
        self.rows = None  # before the next is drawn
        self.rows = row_pool(items, self.size.pool_bytes)
        large = items > LARGE
        for shape in self.size.shapes:
            if large and shape != HEADLINE:
                continue
            with ExitStack() as stack:  # those of one shape are there together: the bars compare heads
                found = {}
                for kind in KINDS:
                    wanted = self._wanted(kind, shape, items)
                    if wanted is not None:
                        found[kind] = stack.enter_context(catalogue(*wanted[:3], folder, with_vectors=wanted[3]))
                        self._grid(found[kind])
                        if shape != HEADLINE or large:
                            found.clear()  # its vectors with it
                            stack.close()
                if shape == HEADLINE and not large:
                    self._bars_and_operations(found)

    def _wanted(self, kind: HeadKind, shape: Shape, items: int) -> tuple[HeadSpec, int, tuple[Dtype, ...], bool] | None:
        """What to make of a head: its dtypes that memory holds, and whether the vectors of rivals fit beside them."""
        head = HeadSpec(kind=kind, user_heads=shape[0], item_heads=shape[1], dim=shape[2], scale=1.0)
        left, dtypes = int(MEMORY_SHARE * available_bytes()), []
        for dtype in sorted(dtypes_of(kind, shape, items), key=lambda one: table_bytes(head, items, one)):
            if table_bytes(head, items, dtype) > left:
                why = "n/a: memory does not hold it"
                self.absent[f"{OURS} {dtype}, {kind} {shape_name(shape)}, {items:,} items"] = why
                continue
            left -= table_bytes(head, items, dtype)
            dtypes.append(dtype)
        return (head, items, tuple(dtypes), vectors_bytes(head, items) <= left) if dtypes else None

    def _grid(self, found: Catalogue) -> None:
        """One head over one catalogue, each number of candidates. Raises AnswerError."""
        print(
            f"{found.head.kind} {found.shape}, {len(found):,} items, after {time.monotonic() - self.begun:.0f} s",
            flush=True,
        )
        dtypes = tuple(found.snapshots)
        contestants = [
            *scoring.ours(found, dtypes, self.levels),
            *scoring.rivals(found, self.rivals, self.absent),
        ]
        scoring.check(found, contestants)
        contestants += scoring.floors(found, dtypes)
        users, rows = Users(found.head), self._row_pool
        for count in self.size.counts:
            slow = () if count == self.ranked else SLOW_LEVELS
            entries = [scoring.entry(one, rows, users, count) for one in contestants if one.level not in slow]
            same = {"kind": found.head.kind, "shape": found.shape, "items": len(found), "candidates": count}
            for entry, times in zip(entries, in_rounds(entries, self.size.cell_s), strict=True):
                self.report.rows.append({**same, **entry.fields, **times.row()})

    def _bars_and_operations(self, found: Mapping[HeadKind, Catalogue]) -> None:
        if len(found) < len(KINDS):
            return
        maxsim = found["maxsim"]
        ids = id_pool(maxsim.ids, self.size.pool_bytes)
        ground = Ground(
            catalogues=found, ids=ids, rows=self._row_pool, count=self.ranked, budget_s=self.size.operation_s
        )
        self.report.rows += ratios(ground, self.size.bars_s, self.levels, self.absent)
        self.report.rows += operations.all_rows(ground)

    @property
    def ranked(self) -> int:
        """Candidates of the bars."""
        return RANKED if RANKED in self.size.counts else max(self.size.counts)

    @property
    def _row_pool(self) -> Pool:
        assert self.rows is not None
        return self.rows

    def finished(self) -> Report:
        report = self.report
        report.settings = {
            "items": list(self.size.items),
            "candidates": list(self.size.counts),
            "shapes": [shape_name(shape) for shape in self.size.shapes],
            "levels": self.levels,
            "pool_bytes": self.size.pool_bytes,
            "blas": numpy_blas(),
            "seconds": round(time.monotonic() - self.begun),
        }
        report.notes.append(f"NumPy's BLAS has chosen its kernels for {report.settings['blas']}")
        report.notes += [f"{name}: {why}" for name, why in self.absent.items()]
        report.bars += bars(report.rows, self.levels)
        return report


def dtypes_of(kind: HeadKind, shape: Shape, items: int) -> tuple[Dtype, ...]:
    """f32 records only where small, or of the bars' shape: they take longest to write and are not for serving."""
    return NARROW if items > LARGE or (kind == "cross_attention" and shape != HEADLINE) else DTYPES


def numpy_blas() -> str:
    """The processor that NumPy's BLAS computes for: an environment that names an older one slows the rivals down."""
    found = [one for one in threadpool_info() if one["user_api"] == "blas" and "numpy" in one["filepath"]]
    return str(found[0].get("architecture", "unknown")) if found else "unknown"


def shape_name(shape: Shape) -> str:
    return "x".join(map(str, shape))


# --- bars ------------------------------------------------------------------------------------------------------------

BARS = {
    "MaxSim int8 / gather floor": Bar(name="", value=None, side="at most", limit=2.0, stretch=1.5),
    "gather + maxsim-cpu / MaxSim int8": Bar(name="", value=None, side="at least", limit=15, stretch=20),
    "NumPy cross-attention / cross-attention": Bar(name="", value=None, side="at least", limit=25, stretch=35),
    "cross-attention / MaxSim int8": Bar(name="", value=None, side="at most", limit=7, stretch=5),
    "np.searchsorted / lookup": Bar(name="", value=None, side="at least", limit=12),
}

Rounds = Mapping[tuple[Any, ...], list[float]]  # by kind, contestant, dtype and level


def ratios(ground: Ground, budget_s: float, levels: Sequence[str], absent: dict[str, str]) -> list[Row]:
    """The bars' ratios at every native level, all in the same rounds: they compare two heads and the lookup."""
    entries = list(_bar_entries(ground, levels, absent))
    times = in_rounds([entry for _, entry in entries], budget_s, most=200)
    rounds = {key: found.rounds for (key, _), found in zip(entries, times, strict=True)}
    maxsim = ground.maxsim
    same = {"kind": "ratio", "shape": maxsim.shape, "items": len(maxsim), "candidates": ground.count}
    return [
        {**same, "contestant": name, "level": level, "ratio": value}
        for level in levels
        if level != engine.NUMPY
        for name, value in _ratios_at(level, rounds)
        if value is not None
    ]


def _bar_entries(
    ground: Ground, levels: Sequence[str], absent: dict[str, str]
) -> Iterator[tuple[tuple[Any, ...], Entry]]:
    native = [level for level in levels if level != engine.NUMPY]
    for kind, found in ground.catalogues.items():
        dtypes: tuple[Dtype, ...] = ("int8",) if kind == "maxsim" else NARROW
        rivals = ("maxsim-cpu",) if kind == "maxsim" else ("NumPy",)
        scorers: list[Scorer] = [
            *scoring.ours(found, dtypes, native),
            *(scoring.floors(found, dtypes) if kind == "maxsim" else ()),
            *scoring.rivals(found, rivals, absent),
        ]
        users = Users(found.head)
        for one in scorers:
            yield (kind, one.contestant, one.dtype, one.level), scoring.entry(one, ground.rows, users, ground.count)
    ours, searchsorted, *_ = operations.lookup_entries(ground)
    yield ("lookup", OURS, None, None), ours
    yield ("lookup", "searchsorted", None, None), searchsorted


def _ratios_at(level: str, rounds: Rounds) -> Iterator[tuple[str, float | None]]:
    def ratio(above: tuple[Any, ...], below: tuple[Any, ...]) -> float | None:
        return median_ratio(rounds[above], rounds[below]) if above in rounds and below in rounds else None

    def best(choose: Callable[[Sequence[float]], float], found: Sequence[float | None]) -> float | None:
        values = [value for value in found if value is not None]
        return choose(values) if values else None

    maxsim = ("maxsim", OURS, "int8", level)
    cross = [("cross_attention", OURS, dtype, level) for dtype in NARROW]
    yield "MaxSim int8 / gather floor", ratio(maxsim, ("maxsim", FLOOR, "int8", None))
    yield "gather + maxsim-cpu / MaxSim int8", ratio(("maxsim", "maxsim-cpu", "f32", None), maxsim)
    numpy = ("cross_attention", "NumPy", "f32", None)
    yield "NumPy cross-attention / cross-attention", best(max, [ratio(numpy, one) for one in cross])
    yield "cross-attention / MaxSim int8", best(min, [ratio(one, maxsim) for one in cross])
    yield "np.searchsorted / lookup", ratio(("lookup", "searchsorted", None, None), ("lookup", OURS, None, None))


def bars(rows: Sequence[Row], levels: Sequence[str]) -> list[Bar]:
    """At the best level."""
    found = {row["contestant"]: row["ratio"] for row in rows if row["kind"] == "ratio" and row["level"] == levels[-1]}
    where = f", {levels[-1]}" if levels[-1] != engine.NUMPY else ""
    return [replace(bar, name=name + where, value=found.get(name)) for name, bar in BARS.items()]


# --- tables ----------------------------------------------------------------------------------------------------------

Cells = list[list[Any]]
FIELDS = ("kind", "contestant", "dtype", "level", "shape", "items", "candidates", "median_us", "p90_us")
HEADS = ("head", "contestant", "dtype", "level", "shape", "items", "candidates", "median, us", "p90, us")
OPERATION_HEADS = (
    "operation",
    "head",
    "contestant",
    "dtype",
    "level",
    "candidates",
    "median, us",
    "p90, us",
    "items/s",
)


def is_score(row: Row) -> bool:
    return row.get("kind", "maxsim") in KINDS


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[str], Cells]]:
    """Titles, heads and cells: what is printed, and what the page has under those names."""
    yield "kernel-rows", HEADS, headline_cells(rows)
    counts = sorted({row["candidates"] for row in rows if is_score(row)})
    yield (
        "kernel-grid",
        ("head", "shape", "items", "contestant", *(f"{n:,} candidates, us" for n in counts)),
        grid_cells(rows),
    )
    levels = list(dict.fromkeys(row["level"] for row in rows if row.get("kind") == "ratio"))[::-1]
    yield "kernel-levels", ("ratio", *levels), ratio_cells(rows, levels)
    yield "kernel-operations", OPERATION_HEADS, operation_cells(rows)


def headline(rows: Sequence[Row]) -> list[Row]:
    """Scores of one shape, size and number of candidates: the bars'."""
    found = [row for row in rows if is_score(row) and row["shape"] == shape_name(HEADLINE)]
    counts = {row["candidates"] for row in found}
    count = RANKED if RANKED in counts else max(counts, default=0)
    items = max((row["items"] for row in found if row["items"] <= LARGE), default=0)
    return [row for row in found if (row["items"], row["candidates"]) == (items, count)]


def headline_cells(rows: Sequence[Row]) -> Cells:
    ordered = sorted(headline(rows), key=lambda row: (KINDS.index(row.get("kind", "maxsim")), row["median_us"]))
    return [[row.get(field) for field in FIELDS] for row in ordered]


def grid_cells(rows: Sequence[Row]) -> Cells:
    """Ours at the best level beside the fastest of all rivals, by number of candidates."""
    found = [row for row in rows if is_score(row)]
    counts = sorted({row["candidates"] for row in found})
    cells = []
    for kind, shape, items in dict.fromkeys((row.get("kind"), row["shape"], row["items"]) for row in found):
        here = [row for row in found if (row.get("kind"), row["shape"], row["items"]) == (kind, shape, items)]
        lines: dict[str, dict[int, float]] = {}
        for row in here:
            if row["contestant"] == FLOOR and row["dtype"] != "int8":
                continue
            name = f"{row['contestant']} {row['dtype']}" if row["contestant"] in (OURS, FLOOR) else "fastest rival"
            line = lines.setdefault(name, {})
            before = np.inf if row["contestant"] == OURS else line.get(row["candidates"], np.inf)  # best level last
            line[row["candidates"]] = min(row["median_us"], before)
        cells += [[kind, shape, items, name, *(line.get(n) for n in counts)] for name, line in lines.items()]
    return cells


def ratio_cells(rows: Sequence[Row], levels: Sequence[str]) -> Cells:
    found = {(row["contestant"], row["level"]): row["ratio"] for row in rows if row.get("kind") == "ratio"}
    return [[name, *(found.get((name, level)) for level in levels)] for name in BARS]


def operation_cells(rows: Sequence[Row]) -> Cells:
    fields = ("kind", "head", "contestant", "dtype", "level", "candidates", "median_us", "p90_us", "items_per_s")
    return [[row.get(f) for f in fields] for row in rows if not is_score(row) and row["kind"] != "ratio"]


def plotted(rows: Sequence[Row]) -> list[Row]:
    """Rows that the plots draw: MaxSim of the bars' shape, ours at the best level."""
    found = [row for row in rows if is_score(row) and row.get("kind", "maxsim") == "maxsim"]
    found = [row for row in found if row["shape"] == shape_name(HEADLINE) and row["contestant"] != FLOOR]
    best = [row["level"] for row in found if row["contestant"] == OURS][-1:]
    return [row for row in found if row["contestant"] != OURS or row["level"] in best]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-kernel", description=__doc__)
    parser.add_argument("--size", choices=("tiny", "full"), default="full", help="tiny: 2,000 items, for a try")
    parser.add_argument(
        "--items", type=int, nargs="+", help="items of the catalogues, by default 1,000,000 and 10,000,000"
    )
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS), metavar="NAME",
                        help=f"of {', '.join(RIVALS)}")  # fmt: skip
    parser.add_argument("--seconds", type=float, help="for all contestants of one head, size and number of candidates")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result, and for tables while it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
