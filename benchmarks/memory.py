"""Benchmark of memory: bytes an item on disk, and what 1, 2 and 4 workers of `ranktower serve` keep of one table.

PSS divides a page by the number of processes that map it, so the sum over workers is what the table really takes. It is
read from /proc after every row of the table has been asked for in every worker.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.client import AnswerError, Line, request_bytes
from benchmarks.made import DIM, HEADS, SIZES, Made, Plan, make, write_items
from benchmarks.processes import end_in_order, server
from benchmarks.report import RESULTS, Bar, Report, machine, machine_line, print_bars, table
from cache.release import ITEMS
from kernel.head import HeadSpec
from kernel.record import DTYPES, RecordLayout
from loadtest.serving import free_port, serve_command

WORKERS = (1, 2, 4)
A_REQUEST = 20_000  # candidates of one request; the service's default limit
CONNECTIONS = 64  # at most, until every worker has answered on one
TOUCHED = 0.99  # of the table resident in a worker
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    items = given.items or SIZES[given.size]
    report = Report(
        "memory" if given.size == "full" else f"memory-{given.size}", {"items": items, "dtype": given.dtype}
    )
    print(machine_line(machine()))
    if not Path("/proc/self/smaps_rollup").is_file():
        print("error: this system has no /proc/PID/smaps_rollup: run it on Linux", file=sys.stderr)
        return 2
    report.rows += disk(items, given.out)
    print("\n" + table(DISK_HEADS, disk_cells(report.rows)))
    made = make(Plan(items=items, dtype=given.dtype), given.out / "made")
    for workers in given.workers:
        try:
            report.rows.append({"kind": "memory", "workers": workers, **measure(made, workers)})
        except AnswerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print("\n" + table(MEMORY_HEADS, memory_cells(report.rows)))
    report.bars += [bar(report.rows), disk_bar(report.rows)]
    print()
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 0


# --- disk ------------------------------------------------------------------------------------------------------------


def disk(items: int, folder: Path) -> list[dict[str, Any]]:
    """Bytes an item by head, dtype and type of id, the index and hashes included."""
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"disk-{ITEMS}"
    for kind, ids in (("maxsim", "int"), ("maxsim", "string"), ("cross_attention", "int")):
        for dtype in DTYPES:
            plan = Plan(kind=kind, ids=ids, dtype=dtype, items=items)  # type: ignore[arg-type]
            head = HeadSpec(kind=plan.kind, user_heads=HEADS, item_heads=HEADS, dim=DIM, scale=1.0)
            write_items(path, plan, "0" * 16, head)
            size, stride = path.stat().st_size, RecordLayout(head, dtype).stride
            path.unlink()
            rows.append(
                {
                    "kind": "disk",
                    "head": kind,
                    "ids": ids,
                    "dtype": dtype,
                    "items": items,
                    "record_bytes": stride,
                    "bytes_per_item": size / items,
                    "file_mib": size / MIB,
                }
            )
    return rows


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """What one process holds, in bytes: of the table, and in all."""

    table_size: int
    table_rss: int
    table_pss: int
    whole_rss: int
    whole_pss: int


def measure(made: Made, workers: int) -> dict[str, Any]:
    """Sums over all processes of one service. Raises AnswerError when some worker never answers."""
    port = free_port()
    command = [*serve_command(made.store, port), "--workers", str(workers), "--max-candidates", str(A_REQUEST)]
    with ExitStack() as stack:
        pid = stack.enter_context(server(command, port, None, ready=b"/readyz"))
        for _ in range(CONNECTIONS):
            line = stack.enter_context(Line(port))
            _sweep(line, made)
            shares = [share for process in family(pid) if (share := share_of(process)) is not None]
            touched = sum(share.table_size > 0 and share.table_rss >= TOUCHED * share.table_size for share in shares)
            if touched >= workers:
                break
        else:
            raise AnswerError(f"{touched} of {workers} workers have answered on {CONNECTIONS} connections")
    return {
        "items": made.plan.items,
        "processes": len(shares),
        "table_mib": max(share.table_size for share in shares) / MIB,
        "table_rss_mib": sum(share.table_rss for share in shares) / MIB,
        "table_pss_mib": sum(share.table_pss for share in shares) / MIB,
        "whole_rss_mib": sum(share.whole_rss for share in shares) / MIB,
        "whole_pss_mib": sum(share.whole_pss for share in shares) / MIB,
    }


def _sweep(line: Line, made: Made) -> None:
    """Ask for every item once, on one connection, which is one worker's."""
    for start in range(0, made.plan.items, A_REQUEST):
        body = orjson.dumps({"candidates": made.ids[start : start + A_REQUEST].tolist(), "top_k": 1})
        answer = line.ask(request_bytes(body))
        while answer.status == 503:  # this worker has not opened the release yet
            time.sleep(0.1)
            answer = line.ask(request_bytes(body))
        if answer.status != 200:
            raise AnswerError(f"ours answers {answer.status}: {answer.body[:300].decode(errors='replace')}")


def family(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from family(int(child))


def share_of(pid: int) -> Share | None:
    """What a process holds; None when it has just ended."""
    try:
        maps = Path(f"/proc/{pid}/smaps").read_text()
        whole = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE)
    tables = [entry for entry in entries if entry.partition("\n")[0].endswith(f"/{ITEMS}")]
    size, rss, pss = (sum(_bytes(entry, name) for entry in tables) for name in ("Size", "Rss", "Pss"))
    return Share(size, rss, pss, _bytes(whole, "Rss"), _bytes(whole, "Pss"))


def _bytes(entry: str, name: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB$", entry, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def bar(rows: Sequence[Any]) -> Bar:
    """The table's PSS summed over 4 workers, against 1."""
    sums = {row["workers"]: row["table_pss_mib"] for row in rows if row["kind"] == "memory"}
    value = sums[4] / sums[1] if {1, 4} <= sums.keys() else None
    return Bar(name="table's PSS, 4 workers / 1", value=value, side="at most", limit=1.05)


def disk_bar(rows: Sequence[Any]) -> Bar:
    """Bytes an item of int8 MaxSim with index and int64 ids."""
    wanted = {"kind": "disk", "head": "maxsim", "ids": "int", "dtype": "int8"}
    value = next((row["bytes_per_item"] for row in rows if wanted.items() <= row.items()), None)
    return Bar(name="bytes an item, int8 MaxSim, int64 ids", value=value, side="at most", limit=190)


# --- text ------------------------------------------------------------------------------------------------------------

DISK_HEADS = ("on disk", "ids", "dtype", "record, bytes", "bytes an item", "file, MiB")
MEMORY_HEADS = ("workers", "processes", "table, MiB", "its RSS summed", "its PSS summed", "all RSS", "all PSS")


def disk_cells(rows: Sequence[Any]) -> list[list[Any]]:
    names = ("head", "ids", "dtype", "record_bytes", "bytes_per_item", "file_mib")
    return [[row[name] for name in names] for row in rows if row["kind"] == "disk"]


def memory_cells(rows: Sequence[Any]) -> list[list[Any]]:
    names = ("table_mib", "table_rss_mib", "table_pss_mib", "whole_rss_mib", "whole_pss_mib")
    found = (row for row in rows if row["kind"] == "memory")
    return [[row["workers"], row["processes"], *(row[name] for name in names)] for row in found]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-memory", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--items", type=int, help="items of the catalogue, in place of the size's")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="of the table that is served")
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results and made releases")
    return parser


if __name__ == "__main__":
    sys.exit(main())
