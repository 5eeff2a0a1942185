"""Benchmark of updates: how long until a changed item is in the answers, and how many changes a second that lasts for.

A Redis that persists every second, `ranktower update --follow` and one replica, all in processes of their own, while
rankings are asked one after the other, with pauses of 10 ms. A change is visible once an answer names a watermark that
is not before it; its time begins before it is appended. In the end a sample of the changed items must have the scores
of their last rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.client import AnswerError, Line, request_bytes
from benchmarks.made import Made, Plan, make
from benchmarks.processes import end_in_order, python, redis_binary, server
from benchmarks.report import RESULTS, Bar, Report, machine, machine_line, print_bars, quantile, table
from cache.changes import CHANGES, Upserted, encode_change
from cache.intake import item_rows
from cache.overlay import Overlay, write_overlay
from cache.store import ReleaseStore, open_store
from kernel.plain import item_layout
from loadtest.serving import HOST, end, free_port, serve_command
from service.ranker import Ranker

SIZES = {"tiny": 2_000, "full": 100_000}
RATES = {"tiny": (500,), "full": (1_000, 10_000, 20_000)}
SECONDS = {"tiny": 1.0, "full": 20.0}
CATEGORIES = 300  # as benchmarks.made has them
TICK_S = 0.05  # between two appends
CANDIDATES = 500  # of the rankings that are asked meanwhile
CHECKED = 1_000  # changed items whose scores are compared
CAUGHT_UP_WITHIN_S = 60.0
LASTS_S = 2.0  # a rate lasts if all is visible so soon after the last append
UPSERTS_S = 10_000.0  # bar
VISIBLE_MS = 1_000.0  # bar, of the 99th percentile at that rate
Row = Mapping[str, Any]
COLUMNS = ("rate", "appended/s", "visible p50, ms", "p99, ms", "last, ms", "lasts", "rank p50, ms", "p99, ms", "lost")


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    items = given.items or SIZES[given.size]
    seconds = given.seconds or SECONDS[given.size]
    name = "changes" if given.size == "full" else f"changes-{given.size}"
    report = Report(name, {"items": items, "seconds": seconds, "candidates": CANDIDATES, "tick_s": TICK_S})
    print(machine_line(machine()))
    made = make(Plan(items=items), given.out / "made")
    with running(made) as line:
        for rate in given.rates or RATES[given.size]:
            report.rows.append(line.measure(rate, seconds))
            print(f"{rate:,} changes/s: {report.rows[-1]}", flush=True)
    print("\n" + table(COLUMNS, cells(report.rows)) + "\n")
    report.bars += bars(report.rows)
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 1 if any(row["lost"] for row in report.rows) else 0


# --- the line --------------------------------------------------------------------------------------------------------


@contextmanager
def running(made: Made) -> Iterator[Measured]:
    """A store in Redis with the release, an updater and a replica."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ranktower-bench-")))
        port = free_port()
        command = [redis_binary(), "--bind", HOST, "--port", str(port), "--dir", str(folder), "--save", ""]
        stack.enter_context(server([*command, "--appendonly", "yes", "--appendfsync", "everysec"], port, None))
        store = open_store(f"redis://{HOST}:{port}/0")
        store.activate(store.publish(made.release))
        follow = ("update", "--follow", "--workers", "1", "--store", store.url, "--cache", str(folder / "updater"))
        stack.enter_context(started(python("service.cli", *follow)))
        http = free_port()
        serve = [*serve_command(store.url, http), "--cache-dir", str(folder / "replica")]
        stack.enter_context(server(serve, http, None, ready=b"/readyz"))
        yield Measured(made, store, http)


@contextmanager
def started(command: Sequence[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        end(process)


@dataclass
class Measured:
    """What is measured, and what has been changed so far."""

    made: Made
    store: ReleaseStore
    port: int
    categories: dict[int, int] = field(default_factory=dict)  # of each changed item, the last one that it was given

    def measure(self, rate: int, seconds: float) -> dict[str, Any]:
        """The figures of one rate. Raises AnswerError where the replica does not catch up."""
        appended: list[tuple[float, int]] = []  # when an append began, and the position behind it
        seen: list[tuple[float, int]] = []  # when an answer came, and its watermark; only where that has risen
        ranked: list[float] = []
        payloads = self._payloads(rate, seconds)
        stopping = Event()
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(self._watch, seen, stopping), pool.submit(self._rank, ranked, stopping)]
            try:
                spent = self._append(payloads, appended)
                until = time.monotonic() + CAUGHT_UP_WITHIN_S
                while not (seen and seen[-1][1] >= appended[-1][1]):
                    if time.monotonic() > until:
                        raise AnswerError(f"{rate} changes/s: not all visible after {CAUGHT_UP_WITHIN_S:g} s")
                    time.sleep(TICK_S)
            finally:
                stopping.set()
            for job in jobs:
                job.result()
        visible = delays_ms(appended, seen)
        last_ms = visible[-1]
        return {
            "rate": rate,
            "appended_per_s": rate * TICK_S * len(payloads) / spent,
            "visible_p50_ms": quantile(visible, 0.5),
            "visible_p99_ms": quantile(visible, 0.99),
            "last_ms": last_ms,
            "lasts": spent < 1.05 * seconds and last_ms <= 1e3 * LASTS_S,
            "rank_p50_ms": quantile(ranked, 0.5),
            "rank_p99_ms": quantile(ranked, 0.99),
            "lost": self._wrong(),
        }

    def _payloads(self, rate: int, seconds: float) -> list[list[bytes]]:
        """Entries of each append, made before time is taken: rows of random items, with another category."""
        rng = np.random.default_rng(rate)
        count = max(1, round(rate * TICK_S))
        with TemporaryDirectory() as folder:
            path = Path(folder, "items.parquet")
            made = []
            for _ in range(round(seconds / TICK_S)):
                ids = rng.choice(self.made.ids, min(count, len(self.made.ids)), replace=False)
                categories = rng.integers(0, CATEGORIES, len(ids))
                pq.write_table(rows(ids, categories), path)
                made.append([encode_change(Upserted(part)) for part in item_rows(path, "item_id")])
                self.categories.update(zip(ids.tolist(), categories.tolist(), strict=True))
        return made

    def _append(self, payloads: list[list[bytes]], appended: list[tuple[float, int]]) -> float:
        """Append at an even pace; returns the seconds that it took."""
        log, begun = self.store.log(CHANGES), time.monotonic()
        for number, part in enumerate(payloads):
            time.sleep(max(0.0, begun + number * TICK_S - time.monotonic()))
            at = time.monotonic()
            appended.append((at, log.append(part)))
        return max(time.monotonic() - begun, len(payloads) * TICK_S)

    def _watch(self, seen: list[tuple[float, int]], stopping: Event) -> None:
        body = orjson.dumps({"candidates": self.made.ids[:1].tolist(), "top_k": 1})

        def look(answer: dict[str, Any], _: float) -> None:
            if not seen or answer["watermark"] > seen[-1][1]:
                seen.append((time.monotonic(), answer["watermark"]))

        self._ask(body, look, stopping, pause_s=0.005)

    def _rank(self, ranked: list[float], stopping: Event) -> None:
        """The load: rankings of the same candidates, a light one."""
        body = orjson.dumps({"candidates": self.made.ids[:CANDIDATES].tolist(), "top_k": 100})
        self._ask(body, lambda _, ms: ranked.append(ms), stopping, pause_s=0.01)

    def _ask(
        self, body: bytes, hear: Callable[[dict[str, Any], float], None], stopping: Event, *, pause_s: float
    ) -> None:
        with Line(self.port) as line:
            while not stopping.wait(pause_s):
                begun = time.monotonic()
                answer = line.ask(request_bytes(body))
                if answer.status != 200:
                    raise AnswerError(f"the replica answers {answer.status}")
                hear(orjson.loads(answer.body), 1e3 * (time.monotonic() - begun))

    def _wrong(self) -> int:
        """Changed items, of a sample, that have not the scores of their last rows."""
        rng = np.random.default_rng(0)
        known = np.array([*self.categories], np.int64)
        ids = rng.choice(known, min(CHECKED, len(known)), replace=False)
        body = orjson.dumps({"candidates": ids.tolist(), "top_k": len(ids)})
        with Line(self.port) as line:
            answer = orjson.loads(line.ask(request_bytes(body)).body)
        found = {item["id"]: item["score"] for item in answer["items"]}
        wanted = self._scores(body, ids, answer["watermark"])
        return sum(bool(np.float32(found.get(item, np.nan)) != np.float32(score)) for item, score in wanted.items())

    def _scores(self, body: bytes, ids: np.ndarray, watermark: int) -> dict[int, float]:
        """As the tower, run here, and the kernel have them."""
        bundle = self.made.bundle
        categories = np.array([self.categories[item] for item in ids.tolist()])
        columns: dict[str, Any] = rows(ids, categories).to_pydict()
        layout = item_layout(bundle.head, self.made.plan.dtype)
        with TemporaryDirectory() as folder:
            path = write_overlay(
                Path(folder),
                bundle_id=bundle.id,
                id_type="int",
                layout=layout,
                ids=ids,
                records=bundle.item_tower().embed(bundle.spec.encode("item", columns, len(ids))),
                deleted=ids[:0],
                watermark=watermark,
            )
            ranker = Ranker.open(self.made.release).with_overlay(Overlay.open(path))
            ranking = ranker.rank(ranker.decoders.rank(body))
        return dict(zip(ranking.ids, ranking.scores.tolist(), strict=True))


def rows(ids: np.ndarray, categories: np.ndarray) -> pa.Table:
    """Items of these categories; what else a bundle of `benchmarks.made` reads is the same for all."""
    return pa.table({"item_id": ids, "category": categories, "price": np.full(len(ids), 30.0)})


def delays_ms(appended: list[tuple[float, int]], seen: list[tuple[float, int]]) -> list[float]:
    """From before each append to the first answer that names it or a later one."""
    delays, number = [], 0
    for at, position in appended:
        while seen[number][1] < position:
            number += 1
        delays.append(1e3 * (seen[number][0] - at))
    return delays


# --- the result ------------------------------------------------------------------------------------------------------


def bars(found: Sequence[Row]) -> list[Bar]:
    most = max((row["rate"] for row in found if row["lasts"] and not row["lost"]), default=0)
    at = next((row["visible_p99_ms"] for row in found if row["rate"] == UPSERTS_S), None)
    return [
        Bar(name="changes a second that last, without loss", value=most, side="at least", limit=UPSERTS_S),
        Bar(name=f"visible at {UPSERTS_S:,.0f}/s, p99, ms", value=at, side="at most", limit=VISIBLE_MS),
    ]


def cells(found: Sequence[Row]) -> list[list[Any]]:
    return [[*row.values()] for row in found]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-changes", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny to try this command")
    parser.add_argument("--items", type=int, help="items of the catalogue, in place of the size's")
    parser.add_argument("--rates", type=int, nargs="+", help="changes a second, one after the other")
    parser.add_argument("--seconds", type=float, help="for each rate")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results and made releases")
    return parser


if __name__ == "__main__":
    sys.exit(main())
