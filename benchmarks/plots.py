"""Turn the JSON files of the benchmarks into the plots and tables of docs/performance.md: no figure there is typed.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->` and is replaced as a whole. What has not been measured here
stays as it is, and is named.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import kernel, large, memory, releases, report, scoring, service, swaps, train
from benchmarks.lineup import ENTRIES
from benchmarks.svg import Points, chart

Document = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

FEWEST = 2  # points that make a line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of performance.md and of plots/")
    parser.add_argument("--size", default="full", help="full, or tiny to try this command")
    given = parser.parse_args(arguments)
    page = given.docs / "performance.md"
    text = page.read_text()
    for name in ("service", "memory", "kernel", "train", "releases", "swaps", "large"):
        path = given.results / (f"{name}.json" if given.size == "full" else f"{name}-{given.size}.json")
        if not path.is_file():
            print(f"{path.name} is not there: its tables and plots stay as they are (make bench-{name})")
            continue
        found = report.read(path)
        for block, content in blocks(name, found):
            text = fill(text, block, content)
        images = []
        for plot, drawing in plots(name, found["rows"]):
            (given.docs / "plots").mkdir(exist_ok=True)
            (given.docs / "plots" / f"{plot}.svg").write_text(drawing)
            images.append(f"![{plot.replace('-', ' by ')}](plots/{plot}.svg)")
            print(f"drawn: plots/{plot}.svg")
        if images:
            text = fill(text, f"{name}-plots", "\n\n".join(images))
    page.write_text(text)
    print(f"filled: {page.name}")
    return 0


def fill(text: str, block: str, content: str) -> str:
    """The page with other content between the marks of a block. Raises ValueError where the page has no such marks."""
    marks = re.compile(rf"(<!-- {re.escape(block)} -->\n).*?(<!-- /{re.escape(block)} -->)", re.DOTALL)
    if not marks.search(text):
        raise ValueError(f"the page has no block {block}: add <!-- {block} --> and <!-- /{block} --> where it belongs")
    return marks.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


# --- tables ----------------------------------------------------------------------------------------------------------


def blocks(name: str, found: Document) -> Iterable[tuple[str, str]]:
    """Blocks of the page that a document fills: names and Markdown."""
    rows: Rows = found["rows"]
    notes = "".join(f"\n- {note}" for note in found.get("notes", []))
    yield f"{name}-machine", f"{report.machine_line(found['machine'])}.\n{notes}"
    yield f"{name}-bars", report.markdown(report.BAR_HEADS, report.bar_rows(found["bars"]))
    for block, heads, cells in TABLES[name](rows):
        yield block, report.markdown(heads, cells)


Tables = Iterable[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]


def _service_tables(rows: Rows) -> Tables:
    yield "service-closed", service.CLOSED_HEADS, service.closed_cells(rows)
    yield "service-stages", *service.stage_cells(rows)
    yield "service-open", service.OPEN_HEADS, service.open_cells(rows)


def _memory_tables(rows: Rows) -> Tables:
    yield "memory-disk", memory.DISK_HEADS, memory.disk_cells(rows)
    yield "memory-workers", memory.MEMORY_HEADS, memory.memory_cells(rows)


def _train_tables(rows: Rows) -> Tables:
    yield "train-rows", train.HEADS, train.cells(rows)


def _releases_tables(rows: Rows) -> Tables:
    for block, (heads, cells) in zip(("publish", "replica", "towers"), releases.tables(rows), strict=True):
        yield f"releases-{block}", heads, cells


def _swaps_tables(rows: Rows) -> Tables:
    for heads, cells in swaps.tables(rows):
        yield "swaps-windows", heads, cells


def _large_tables(rows: Rows) -> Tables:
    for block, (heads, cells) in zip(large.COLUMNS, large.tables(rows), strict=True):
        yield f"large-{block}", heads, cells


TABLES: dict[str, Callable[[Rows], Tables]] = {
    "service": _service_tables,
    "memory": _memory_tables,
    "kernel": kernel.tables,
    "train": _train_tables,
    "releases": _releases_tables,
    "swaps": _swaps_tables,
    "large": _large_tables,
}


# --- plots -----------------------------------------------------------------------------------------------------------


def plots(name: str, rows: Rows) -> Iterable[tuple[str, str]]:
    """Names and drawings: latency by number of candidates, and by size of the catalogue."""
    if name in ("memory", "train", "releases", "swaps", "large"):
        return
    rows = kernel.plotted(rows) if name == "kernel" else [row for row in rows if row["kind"] == "closed"]
    time = "p50_us" if name == "service" else "median_us"
    what = "Whole request" if name == "service" else "MaxSim"
    for axis, other, words in (
        ("candidates", "items", "candidates of a request"),
        ("items", "candidates", "items of the catalogue"),
    ):
        largest = max((row[other] for row in rows), default=0)
        lines = _lines([row for row in rows if row[other] == largest], axis, time)
        if lines:
            title = f"{what} by {words}, {largest:,} {other}"
            order = list(ENTRIES) if name == "service" else []
            drawing = chart(title, words, "microseconds, median", lines, dashed=_rivals(lines), order=order)
            yield f"{name}-{axis}", drawing


def _lines(rows: Rows, axis: str, time: str) -> dict[str, Points]:
    """Points by label, of those that have several; a kernel's label tells its shape, dtype and level, too."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        label = " ".join(str(row[part]) for part in ("contestant", "shape", "dtype", "level") if row.get(part))
        points[label].append((row[axis], row[time]))
    return {label: line for label, line in points.items() if len({x for x, _ in line}) >= FEWEST}


def _rivals(lines: Iterable[str]) -> frozenset[str]:
    """Of the service by its lineup; of the kernel all but ours, whose labels tell more than the name."""
    return frozenset(
        name for name in lines if not (ENTRIES[name].ours if name in ENTRIES else name.startswith(f"{scoring.OURS} "))
    )


if __name__ == "__main__":
    sys.exit(main())
