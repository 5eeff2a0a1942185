"""Benchmark of a catalogue in shards: what scatter and gather on Ray Serve cost beside one service that holds it all.

One `ranktower serve` and one `ranktower gather`, over the same items, are asked the same requests in turns by one
client. Answers are compared item by item. All processes share this machine, so nothing is won here by spreading: the
difference is the price of the hops. With one shard it is that of Ray Serve alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.client import AnswerError, Line, refuse_failure, request_bytes
from benchmarks.made import Made, Plan, make
from benchmarks.processes import end_in_order, python, server
from benchmarks.report import RESULTS, Report, machine, machine_line, no_collection, quantile, table
from benchmarks.traffic import bodies
from cache.embed import build_release
from cache.shards import Shard, shard_url
from cache.store import open_store
from loadtest.serving import HOST, free_port, serve_command

SIZES = {"tiny": 2_000, "full": 100_000}
REQUESTS = {"tiny": 20, "full": 400}
WARM_UP = {"tiny": 2, "full": 50}
CANDIDATES = {"tiny": (500,), "full": (500, 5_000)}
SHARDS = (1, 4)
CATEGORIES = 300  # as benchmarks.made has them
COLUMNS = ("shards", "candidates", "serve p50, ms", "p99, ms", "gather p50, ms", "p99, ms", "p50 ratio", "p99 ratio")


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    items = given.items or SIZES[given.size]
    name = "shards" if given.size == "full" else f"shards-{given.size}"
    report = Report(name, {"items": items, "requests": REQUESTS[given.size]})
    print(machine_line(machine()))
    made = make(Plan(items=items), given.out / "made")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ranktower-bench-")))
        url = publish(made, folder)
        port = free_port()
        stack.enter_context(server(serve_command(f"{url}/whole", port), port, None, ready=b"/readyz"))
        for shards in SHARDS:
            report.rows += measure(made, url, shards, port, given.size)
    print("\n" + table(COLUMNS, [[*row.values()] for row in report.rows]) + "\n")
    print(f"written: {report.write(given.out).name}")
    return 0


def publish(made: Made, folder: Path) -> str:
    """The same items in a release each for the whole and for every shard, through the item tower."""
    rng = np.random.default_rng(5)
    count, items, url = len(made.ids), folder / "items.parquet", f"file://{folder}/store"
    columns = {
        "item_id": made.ids,
        "category": rng.integers(0, CATEGORIES, count),
        "price": rng.uniform(0, 200, count),
    }
    pq.write_table(pa.table(columns), items)
    parts = [Shard(number, shards) for shards in SHARDS for number in range(shards)]
    for part, place in [(None, f"{url}/whole"), *((part, shard_url(url, part)) for part in parts)]:
        store = open_store(place)
        built = folder / "built" / str(part)
        build_release(made.bundle_folder, items, built, dtype=made.plan.dtype, shard=part)
        store.activate(store.publish(built))
    return url


def measure(made: Made, url: str, shards: int, whole: int, size: str) -> list[dict[str, Any]]:
    """A row for each number of candidates. whole: port of the service that holds all."""
    port, rows = free_port(), []
    gather = ("gather", "--store", url, "--shards", str(shards), "--no-partial", "--deadline-ms", "60000")
    command = python("service.cli", *gather, "--host", HOST, "--port", str(port))
    with server(command, port, None, ready=b"/readyz"), Line(whole) as one, Line(port) as many:
        for candidates in CANDIDATES[size]:
            asked = bodies(made, WARM_UP[size] + REQUESTS[size], candidates, seed=shards)
            alone, gathered = in_turns(one, many, asked, WARM_UP[size])
            row = {
                "shards": shards,
                "candidates": candidates,
                "serve_p50_ms": quantile(alone, 0.5),
                "serve_p99_ms": quantile(alone, 0.99),
                "gather_p50_ms": quantile(gathered, 0.5),
                "gather_p99_ms": quantile(gathered, 0.99),
            }
            row["p50_ratio"] = row["gather_p50_ms"] / row["serve_p50_ms"]
            row["p99_ratio"] = row["gather_p99_ms"] / row["serve_p99_ms"]
            print(row, flush=True)
            rows.append(row)
    return rows


def in_turns(one: Line, many: Line, asked: Sequence[bytes], warm_up: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each answer, those of the warm-up left out. Raises AnswerError where the two answers differ."""
    times: tuple[list[float], list[float]] = ([], [])
    with no_collection():
        for body in asked:
            request, answers = request_bytes(body), []
            for line, spent in zip((one, many), times, strict=True):
                begun = perf_counter_ns()
                answer = line.ask(request)
                spent.append((perf_counter_ns() - begun) / 1e6)
                refuse_failure(answer)
                answers.append(orjson.loads(answer.body))
            if answers[0]["items"] != answers[1]["items"]:
                raise AnswerError("the shards answer otherwise than the service that holds all")
    return times[0][warm_up:], times[1][warm_up:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-shards", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny to try this command")
    parser.add_argument("--items", type=int, help="items of the catalogue, in place of the size's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results and made releases")
    return parser


if __name__ == "__main__":
    sys.exit(main())
