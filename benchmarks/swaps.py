"""Benchmark of swaps: the current release is switched again and again while a replica answers at half of its capacity.

Three releases of other weights and other records lie in Redis. A replica keeps the one that it serves and the one
before, so with three in turn each swap downloads a whole release, as a refresh does; now and then one goes back to the
release before, as a rollback does, whose hashes alone are checked again. Both are reported apart.

A swap window begins with the activation and ends MARGIN_S after the first answer that names the new release; a steady
window of the same length follows it after a pause. Requests leave at a constant rate and are timed from when they were
meant to leave. Every answer is checked: the scores, items and positions must be those of the release that it names.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import orjson

from benchmarks.checks import TOLERANCE, Referee, Stored, json_items
from benchmarks.client import AnswerError, Line, closed_loop, request_bytes
from benchmarks.made import SIZES, Made, Plan, make, stored_records
from benchmarks.processes import end_in_order, redis, server
from benchmarks.report import (
    RESULTS,
    Bar,
    Report,
    machine,
    machine_line,
    median,
    no_collection,
    print_bars,
    quantile,
    table,
)
from benchmarks.traffic import bodies
from cache.store import ReleaseStore, open_store
from loadtest.open_loop import Exchange, Limits, Schedule, invalid, run_open_loop
from loadtest.serving import HOST, free_port, serve_command

RELEASES = 3  # fewer, and the replica would have the next one on its disk
SHARE = 0.5  # of the capacity
CLOSED_LINES = 2  # connections that find the capacity: while one answer is read, the service has the other request
MARGIN_S = 0.25  # a swap window goes on for so long after the new release is seen
PAUSE_S = 0.25  # between two windows
SEEN_WITHIN_S = 30.0
SLOPE = 1.5  # bar, p99 of the swap windows / steady ones
NEW, BACK, STEADY = "new", "back", "steady"
MEANING = {
    STEADY: "between the swaps",
    NEW: "swaps to a release that is downloaded",
    BACK: "swaps to the release before, which lies here",
}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How much of everything."""

    swaps: int  # to a release that has to be downloaded
    back_every: int  # of those, one swap back
    candidates: int
    requests: int  # distinct ones, sent in turn
    closed: int  # requests of a connection in the closed loop


COURSES = {
    "full": Course(swaps=50, back_every=10, candidates=5_000, requests=200, closed=2_000),
    "tiny": Course(swaps=3, back_every=3, candidates=200, requests=20, closed=100),
}


Waited = tuple[float, float, float]  # when a request was meant to leave, by `time.monotonic`; latency ms; of it lag ms


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    course, items = COURSES[given.size], given.items or SIZES[given.size]
    course = replace(course, swaps=given.swaps or course.swaps)
    name = "swaps" if given.size == "full" else f"swaps-{given.size}"
    settings = {"items": items, "candidates": course.candidates, "swaps": course.swaps, "margin_s": MARGIN_S}
    report = Report(name, settings)
    print(machine_line(machine()))
    made = [make(Plan(items=items, seed=seed), given.out / "made") for seed in range(RELEASES)]
    try:
        with running(made, given.out) as line:
            measure(line, course, report)
    except AnswerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for heads, cells in tables(report.rows):
        print("\n" + table(heads, cells))
    print("\n" + "\n".join(report.notes) + "\n")
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 0


# --- the line --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replica:
    """A store with all releases, the first one current, and a replica that serves it."""

    store: ReleaseStore
    releases: Mapping[str, Made]
    port: int


@contextmanager
def running(made: Sequence[Made], home: Path) -> Iterator[Replica]:
    """The replica's cache is a folder below `home`: where releases lie on a disk, not in memory."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=home, prefix="swaps-")))
        store = open_store(f"redis://{HOST}:{stack.enter_context(redis(None))}/0")
        releases = {store.publish(each.release): each for each in made}
        store.activate(next(iter(releases)))
        port = free_port()
        command = [*serve_command(store.url, port), "--cache-dir", str(folder)]
        stack.enter_context(server(command, port, None, ready=b"/readyz"))
        yield Replica(store, releases, port)


def measure(line: Replica, course: Course, report: Report) -> None:
    """Fill the report. Raises AnswerError where a release does not come, or requests did not leave as planned."""
    first = next(iter(line.releases.values()))
    sent = bodies(first, course.requests, course.candidates, seed=0)
    capacity = capacity_of(line.port, sent, course.closed)
    rate = SHARE * capacity
    report.notes.append(
        f"closed loop: {capacity:,.0f} requests/s; open loop: {rate:,.0f}/s at even distances; service, Redis and "
        "client share the cores"
    )
    ears, windows, failures = press(line, sent, rate, turns([*line.releases], course))
    checked, wrong = check(line.releases, sent, ears.bodies)
    report.rows += [*window_rows(windows, ears.exchanges), *pooled_rows(windows, ears.exchanges)]
    report.notes.append(f"{checked:,} answers checked: {wrong or 'none'} wrong; failed: {dict(failures) or 'none'}")
    report.bars += bars(report.rows, sum(failures.values()), sum(wrong.values()))


def capacity_of(port: int, sent: Sequence[bytes], count: int) -> float:
    """Answers a second that the service gives to as many connections as keep it busy."""
    requests = [request_bytes(sent[k % len(sent)]) for k in range(count)]

    def ask(_: int) -> None:
        with Line(port) as line:
            closed_loop(line, requests, warm_up=0)

    with ThreadPoolExecutor(CLOSED_LINES) as pool:
        begun = monotonic()
        list(pool.map(ask, range(CLOSED_LINES)))
        return CLOSED_LINES * count / (monotonic() - begun)


# --- swaps under load ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time, by `time.monotonic`."""

    kind: str
    begun_s: float
    ended_s: float
    seen_s: float | None = None  # from the activation to the first answer that names the release


def turns(releases: Sequence[str], course: Course) -> list[tuple[str, str]]:
    """What to activate, and which kind of swap that is; the first release is current.

    New is whichever is neither served nor the one before: of those the replica has no copy.
    """
    found, serving, before = [], releases[0], ""
    for number in range(1, course.swaps + 1):
        away = next(name for name in _after(releases, serving) if name != before)
        found.append((NEW, away))
        serving, before = away, serving
        if number % course.back_every == 0:
            found.append((BACK, before))
            serving, before = before, serving
    return found


def _after(releases: Sequence[str], name: str) -> list[str]:
    at = releases.index(name) + 1
    return [*releases[at:], *releases[:at]]


@dataclass(slots=True)
class Ears:
    """Hears every exchange; tells when an answer names the release that is awaited."""

    exchanges: list[Waited] = field(default_factory=list)
    bodies: Counter[tuple[int, bytes]] = field(default_factory=Counter)  # answers by the number of their request
    awaited: bytes = b"\0"
    seen: threading.Event = field(default_factory=threading.Event)

    def await_(self, release: str) -> None:
        self.seen.clear()
        self.awaited = f'"{release}"'.encode()

    def hear(self, exchange: Exchange) -> None:
        self.exchanges.append((exchange.intended_at_s, exchange.latency_ms, exchange.lag_ms))
        if exchange.answer is None or exchange.answer.status != 200:
            return
        body = exchange.answer.body
        self.bodies[exchange.number, body] += 1
        if self.awaited in body[:100]:
            self.seen.set()


def press(
    line: Replica, sent: Sequence[bytes], rate: float, order: Sequence[tuple[str, str]]
) -> tuple[Ears, list[Window], Mapping[str, int]]:
    """Requests from here, swaps from another thread, until that has done all of them."""
    ears, done = Ears(), threading.Event()

    def swap() -> list[Window]:
        windows: list[Window] = []
        try:
            time.sleep(2 * PAUSE_S)
            for kind, release in order:
                if done.is_set():  # interrupted
                    break
                windows += one_swap(line.store, ears, kind, release)
        finally:
            done.set()
        return windows

    seconds = 2 * SEEN_WITHIN_S * len(order)  # more than it takes
    with ThreadPoolExecutor(1) as pool, no_collection():
        swapping = pool.submit(swap)
        try:
            found = run_open_loop(
                f"http://{HOST}:{line.port}",
                sent,
                Schedule(rate=rate, seconds=seconds, arrivals="even"),
                release="",
                limits=Limits(connections=32),
                hear=ears.hear,
                enough=done.is_set,
            )
        finally:
            done.set()
            ears.seen.set()
        windows = swapping.result()
    if (why := invalid(found)) is not None and not found.failures:
        raise AnswerError(why)
    return ears, windows, found.failures


def one_swap(store: ReleaseStore, ears: Ears, kind: str, release: str) -> list[Window]:
    """The window of the swap and the steady one after it."""
    ears.await_(release)
    begun = monotonic()
    store.activate(release)
    if not ears.seen.wait(SEEN_WITHIN_S):
        raise AnswerError(f"no answer names release {release} {SEEN_WITHIN_S:g} s after its activation")
    seen = monotonic()
    time.sleep(MARGIN_S)
    ended = monotonic()
    time.sleep(PAUSE_S)
    again = monotonic()
    time.sleep(ended - begun)
    steady = Window(STEADY, again, monotonic())
    time.sleep(PAUSE_S)
    return [Window(kind, begun, ended, seen - begun), steady]


# --- the answers -----------------------------------------------------------------------------------------------------


def check(
    releases: Mapping[str, Made], sent: Sequence[bytes], answers: Mapping[tuple[int, bytes], int]
) -> tuple[int, Counter[str]]:
    """How many answers were looked at, and how many of them were wrong, by why. The same answer is checked once."""
    judges = {name: judge(made) for name, made in releases.items()}
    wrong: Counter[str] = Counter()
    for (number, body), count in answers.items():
        name = orjson.loads(body)["release"]
        try:
            if name not in judges:
                raise AnswerError(f"release {name} was never published")
            judges[name](sent[number], body)
        except AnswerError as error:
            wrong[str(error)] += count
    return sum(answers.values()), wrong


def judge(made: Made) -> Callable[[bytes, bytes], None]:
    """Raises AnswerError unless the body answers the request as this release does, by a float64 reference."""
    referee = Referee(made)
    stored = Stored(lambda rows: stored_records(made, rows), TOLERANCE[made.plan.dtype])
    name = made.release.name
    return lambda request, body: referee.check(name, request, json_items(body), stored)


# --- the result ------------------------------------------------------------------------------------------------------


def window_rows(windows: Sequence[Window], exchanges: Sequence[Waited]) -> list[dict[str, Any]]:
    """One row a window: its kind, how long until the release was seen, and the latencies of what was meant to leave."""
    rows = []
    for window in windows:
        inside = [latency for at, latency, _ in exchanges if window.begun_s <= at < window.ended_s]
        seen = {} if window.seen_s is None else {"seen_s": window.seen_s}
        rows.append({"kind": "window", "window": window.kind, **seen, "requests": len(inside), **_quantiles(inside)})
    return rows


def pooled_rows(windows: Sequence[Window], exchanges: Sequence[Waited]) -> list[dict[str, Any]]:
    """One row a kind of window: all latencies of all of them."""
    latencies: dict[str, list[float]] = defaultdict(list)
    lags: dict[str, list[float]] = defaultdict(list)
    times = sorted(exchanges)
    at = 0
    for window in sorted(windows, key=lambda window: window.begun_s):
        while at < len(times) and times[at][0] < window.begun_s:
            at += 1
        while at < len(times) and times[at][0] < window.ended_s:
            latencies[window.kind].append(times[at][1])
            lags[window.kind].append(times[at][2])
            at += 1
    return [
        {
            "kind": "pooled",
            "window": kind,
            "windows": sum(window.kind == kind for window in windows),
            "seen_p50_s": median(seen)
            if (seen := [w.seen_s for w in windows if w.kind == kind and w.seen_s])
            else None,
            "requests": len(latencies[kind]),
            **_quantiles(latencies[kind]),
            "lag_p99_us": 1e3 * quantile(lags[kind], 0.99),
        }
        for kind in MEANING
        if latencies[kind]
    ]


def _quantiles(latencies_ms: Sequence[float]) -> dict[str, float]:
    """In microseconds."""
    found = {name: 1e3 * quantile(latencies_ms, share) for name, share in (("p50_us", 0.5), ("p99_us", 0.99))}
    return {**found, "max_us": 1e3 * max(latencies_ms)}


def bars(rows: Sequence[Row], failed: int, wrong: int) -> list[Bar]:
    p99 = {row["window"]: row["p99_us"] for row in rows if row["kind"] == "pooled"}

    def ratio(kind: str) -> float | None:
        return p99[kind] / p99[STEADY] if {kind, STEADY} <= p99.keys() else None

    return [
        Bar(name="failed requests", value=failed, side="at most", limit=0),
        Bar(name="answers that mix releases, or are wrong otherwise", value=wrong, side="at most", limit=0),
        Bar(name="p99, swaps with a download / steady", value=ratio(NEW), side="at most", limit=SLOPE),
        Bar(name="p99, swaps back / steady", value=ratio(BACK), side="at most", limit=SLOPE),
    ]


HEADS = ("windows", "how many", "until seen, s", "requests", "p50 us", "p99 us", "most us", "lag p99 us", "what it is")


def tables(rows: Sequence[Row]) -> Iterator[tuple[Sequence[str], list[list[Any]]]]:
    fields = ("window", "windows", "seen_p50_s", "requests", "p50_us", "p99_us", "max_us", "lag_p99_us")
    pooled = [row for row in rows if row["kind"] == "pooled"]
    yield HEADS, [[*(row[name] for name in fields), MEANING[row["window"]]] for row in pooled]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-swaps", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny to try this command")
    parser.add_argument("--items", type=int, help="items of the catalogue, in place of the size's")
    parser.add_argument("--swaps", type=int, help="swaps with a download, in place of the size's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results and made releases")
    return parser


if __name__ == "__main__":
    sys.exit(main())
