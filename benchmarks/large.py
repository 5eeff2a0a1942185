"""Benchmark of a large catalogue on one replica, beside one of a million items: publish, memory, latency.

Both are published as `ranktower publish` does it, with the tower's output there already, in a process of its own whose
memory is watched; into a folder, as Redis would need the memory that the replica is to have. Both are then served at
the same time, each by a process of its own, and asked in turns: bursts of requests, each another user with other
candidates drawn from the whole catalogue. So a slow minute of a shared machine hits both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks.checks import TOLERANCE, Referee, Stored, json_items
from benchmarks.client import AnswerError, Line, Timings, closed_loop, refuse_failure, request_bytes
from benchmarks.made import Made, Plan, stored_records
from benchmarks.memory import MIB, share_of
from benchmarks.processes import cores, end_in_order, on, pinning, server
from benchmarks.releases import Course, build, prepare
from benchmarks.report import (
    RESULTS,
    Bar,
    Report,
    machine,
    machine_line,
    median_ratio,
    print_bars,
    quantile,
    table,
)
from benchmarks.traffic import bodies
from cache.file_store import FileStore
from cache.release import read_release
from loadtest.report import stage_times
from loadtest.serving import free_port, serve_command

SIZES = {"tiny": (2_000, 4_000), "full": (1_000_000, 20_000_000)}
ROUNDS = {"tiny": 3, "full": 60}
BURST, WARM_UP = 20, 2  # requests of one size before those of the other, and as many before that without a clock
CANDIDATES = {"tiny": 200, "full": 5_000}
CHECKED = 3  # answers of each size that are compared with the reference
WATCH_S = 0.05  # between two looks at the memory of the publisher
PUBLISHER_MIB, REPLICA_MIB = 4 * 1024, 24 * 1024
LONGER = 1.5  # bar, median of the large one / small one

Row = Mapping[str, Any]
spawn = multiprocessing.get_context("spawn")


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    small, large = SIZES[given.size]
    sizes, rounds, candidates = (small, given.items or large), ROUNDS[given.size], CANDIDATES[given.size]
    name = "large" if given.size == "full" else f"large-{given.size}"
    report = Report(name, {"items": list(sizes), "candidates": candidates, "requests": rounds * BURST})
    print(machine_line(machine()))
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=given.out, prefix="large-") as folder:
            made = []
            for items in sizes:
                one, row = publish(items, Path(folder, str(items)))
                made.append(one)
                report.rows.append(row)
                print(f"{items:,} items published: {row}", flush=True)
            report.rows += serve(made, rounds, candidates, report)
    except AnswerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for heads, cells in tables(report.rows):
        print("\n" + table(heads, cells))
    report.bars += bars(report.rows, max(sizes))
    print()
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 0


# --- publish ---------------------------------------------------------------------------------------------------------


def publish(items: int, home: Path) -> tuple[Made, dict[str, Any]]:
    """The release of so many items in a store below `home`, current, and what that took."""
    home.mkdir()
    draft = home / "draft"
    draft.mkdir()
    course = prepare(items, draft, "")
    course = Course(items, draft, "", course.spec, course.records.copy())
    publisher = spawn.Process(target=_publish, args=(course, home / "store"), daemon=True)
    begun = perf_counter()
    publisher.start()
    anonymous, whole = _watch(publisher)
    taken = perf_counter() - begun
    if publisher.exitcode:
        raise AnswerError(f"the publisher of {items:,} items ended with code {publisher.exitcode}: see above")
    shutil.rmtree(draft)
    made = Made(Plan(items=items), home)
    return made, {
        "kind": "publish",
        "items": items,
        "publish_s": taken,
        "items_per_s": items / taken,
        "peak_anonymous_mib": anonymous / MIB,
        "peak_rss_mib": whole / MIB,
        "release_mib": read_release(made.release).size_bytes / MIB,
    }


def _publish(course: Course, root: Path) -> None:
    """In a process of its own."""
    store = FileStore(f"file://{root}")
    store.activate(store.publish(build(course)))


def _watch(process: Any) -> tuple[int, int]:
    """The most memory of its own that a process had, and the most with what it maps of files, which can be let go."""
    anonymous = whole = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.is_alive():
        try:
            found = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it has just ended
            break
        if "VmHWM" in found:
            anonymous = max(anonymous, int(found["RssAnon"].split()[0]) * 1024)
            whole = max(whole, int(found["VmHWM"].split()[0]) * 1024)
        process.join(WATCH_S)
    process.join()
    return anonymous, whole


# --- serve -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Served:
    """One catalogue and the replica that serves it."""

    made: Made
    port: int
    pid: int
    ready_s: float

    def draw(self, number: int, candidates: int) -> list[bytes]:
        """The requests of a round."""
        return bodies(self.made, WARM_UP + BURST, candidates, seed=number)

    def check(self, candidates: int) -> None:
        """Raises AnswerError where answers are not those of a float64 reference."""
        referee, plan = Referee(self.made), self.made.plan
        stored = Stored(lambda rows: stored_records(self.made, rows), TOLERANCE[plan.dtype])
        with Line(self.port) as line:
            for body in self.draw(-1 & 0xFFFF, candidates)[:CHECKED]:
                answer = line.ask(request_bytes(body))
                refuse_failure(answer)
                referee.check(f"the replica of {plan.items:,} items", body, json_items(answer.body), stored)
        self.made.__dict__.pop("snapshot")  # mapped here no longer, so that PSS is the replica's


def serve(made: Sequence[Made], rounds: int, candidates: int, report: Report) -> list[dict[str, Any]]:
    """Rows of memory and latency. Raises AnswerError where one answers wrongly."""
    pinned = cores()
    servers, client = pinned or (None, None)
    report.notes.append(pinning(pinned))
    with ExitStack() as stack:
        replicas = []
        for each in made:
            port, begun = free_port(), perf_counter()
            command = serve_command(each.store, port)
            pid = stack.enter_context(server(command, port, servers, ready=b"/readyz"))
            replicas.append(Served(each, port, pid, perf_counter() - begun))
        with on(client):
            for replica in replicas:
                replica.check(candidates)
            timings = in_turns(replicas, rounds, candidates)
        return [
            *(memory_row(replica) for replica in replicas),
            *latency_rows([replica.made.plan.items for replica in replicas], timings),
        ]


def in_turns(replicas: Sequence[Served], rounds: int, candidates: int) -> list[list[Timings]]:
    """For each replica, what each round measured; every second round in the opposite order."""
    found: list[list[Timings]] = [[] for _ in replicas]
    with ExitStack() as stack:
        lines = [stack.enter_context(Line(replica.port)) for replica in replicas]
        for number in range(rounds):
            sent = [[request_bytes(body) for body in replica.draw(number, candidates)] for replica in replicas]
            turn = range(len(replicas))
            for place in turn if number % 2 == 0 else reversed(turn):
                found[place].append(closed_loop(lines[place], sent[place], warm_up=WARM_UP))
    return found


def memory_row(replica: Served) -> dict[str, Any]:
    share = share_of(replica.pid)
    if share is None:
        raise AnswerError(f"the memory of the replica of {replica.made.plan.items:,} items cannot be read")
    return {
        "kind": "memory",
        "items": replica.made.plan.items,
        "ready_s": replica.ready_s,
        "table_mib": share.table_size / MIB,
        "table_rss_mib": share.table_rss / MIB,
        "huge": huge_bytes(replica.pid) / max(share.table_rss, 1),
        "rss_mib": share.whole_rss / MIB,
        "pss_mib": share.whole_pss / MIB,
    }


def huge_bytes(pid: int) -> int:
    """What a process maps of files in huge pages."""
    found = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(found["FilePmdMapped"].split()[0]) * 1024


def latency_rows(sizes: Sequence[int], timings: Sequence[Sequence[Timings]]) -> list[dict[str, Any]]:
    """One row a catalogue, with the median of each stage, and one for the ratio of the last to the first."""
    rows: list[dict[str, Any]] = []
    for items, rounds in zip(sizes, timings, strict=True):
        times = [time_us for one in rounds for time_us in one.round_trips_us]
        spent: dict[str, list[float]] = defaultdict(list)
        for one in rounds:
            for header in one.server_timings:
                for stage, time_ms in stage_times(header).items():
                    spent[stage].append(time_ms * 1e3)
        found = {"p50_us": quantile(times, 0.5), "p99_us": quantile(times, 0.99)}
        stages = {f"{stage}_us": quantile(each, 0.5) for stage, each in spent.items()}
        rows.append({"kind": "closed", "items": items, "requests": len(times), **found, **stages})
    medians = [[quantile(one.round_trips_us, 0.5) for one in rounds] for rounds in timings]
    rows.append({"kind": "ratio", "p50": median_ratio(medians[-1], medians[0])})
    return rows


# --- the result ------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[Row], items: int) -> list[Bar]:
    ratio = next(row["p50"] for row in rows if row["kind"] == "ratio")
    found = {row["kind"]: row for row in rows if row.get("items") == items}
    own, whole = found["publish"]["peak_anonymous_mib"], found["memory"]["rss_mib"]
    return [
        Bar(name="p50, large / small catalogue", value=ratio, side="at most", limit=LONGER),
        Bar(name="publisher's own memory at its peak, MiB", value=own, side="at most", limit=PUBLISHER_MIB),
        Bar(name="replica's memory, MiB", value=whole, side="at most", limit=REPLICA_MIB),
    ]


COLUMNS = {
    "publish": {
        "items": "published",
        "publish_s": "seconds",
        "items_per_s": "items/s",
        "peak_anonymous_mib": "own memory at peak, MiB",
        "peak_rss_mib": "with mapped files, MiB",
        "release_mib": "release, MiB",
    },
    "memory": {
        "items": "served",
        "ready_s": "ready after, s",
        "table_mib": "table, MiB",
        "table_rss_mib": "of it in memory",
        "huge": "in huge pages",
        "rss_mib": "all RSS, MiB",
        "pss_mib": "all PSS, MiB",
    },
    "closed": {
        "items": "asked",
        "requests": "requests",
        "p50_us": "p50 us",
        "p99_us": "p99 us",
        "queue_us": "queue",
        "decode_us": "decode",
        "encode_us": "encode",
        "user_us": "user",
        "score_us": "score",
        "topk_us": "topk",
        "respond_us": "respond",
    },
}


def tables(rows: Sequence[Row]) -> Iterator[tuple[Sequence[str], list[list[Any]]]]:
    for kind, columns in COLUMNS.items():
        yield [*columns.values()], [[row[name] for name in columns] for row in rows if row["kind"] == kind]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-large", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny to try this command")
    parser.add_argument("--items", type=int, help="items of the large catalogue, in place of the size's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result; the data goes there, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
