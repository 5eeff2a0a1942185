"""The closed loop: Locust users who each send a request, wait for its answer, and keep their share of the rate.

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8080 --users 4 --run-time 15s --rate 50

Stage times of the service (Server-Timing) get rows of their own and stay out of Locust's totals. Locust rounds times
to whole milliseconds, which would make every stage 0, so its documented hook is set to three significant digits.
"""

# mypy: allow-untyped-calls
# (Locust says that it is typed; its event hooks are not.)

from __future__ import annotations

import itertools
import random
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import gevent
import locust.stats
from locust import FastHttpUser, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner
from locust.stats import RequestStats, StatsEntry

from loadtest.corpus import Traffic, build_corpus, fetch_sample
from loadtest.errors import LoadTestError
from loadtest.report import Report, Row, bucket_ms, row_of_histogram, stage_times, write_report

HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
ROUTE = "rank"
STAGE = "stage"  # stands where Locust has the HTTP method

locust.stats.bucket_response_time = bucket_ms  # type: ignore[assignment]  # its keys need not be whole


class RankUser(FastHttpUser):
    """One caller of the service: draws ready-made bodies in an order of its own."""

    bodies: ClassVar[list[bytes]] = []
    release: ClassVar[str] = ""

    def on_start(self) -> None:
        """Take a place in the corpus and in time, and a share of the wanted rate."""
        options = options_of(self.environment)
        start = random.randrange(len(self.bodies))
        self._next: Iterator[Any] = itertools.cycle(self.bodies[start:] + self.bodies[:start])
        self._period_s = options.num_users / options.rate if options.rate else 0.0
        self._due_at = time.perf_counter() + random.uniform(0.0, self._period_s)
        gevent.sleep(self._left_s())

    def wait_time(self) -> float:
        """Seconds until this user sends again. With half a period of jitter: users that met once would meet always."""
        self._due_at += self._period_s * random.uniform(0.5, 1.5)
        return self._left_s()

    def _left_s(self) -> float:
        return max(0.0, self._due_at - time.perf_counter())

    @task
    def rank(self) -> None:
        """Send one request; an answer that is not a ranking counts as failed."""
        with self.client.post(
            "/v1/rank", data=next(self._next), headers=HEADERS, name=ROUTE, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}: {(answer.content or b'')[:200].decode(errors='replace')}")
            elif b'"items":[' not in answer.content:
                answer.failure(f"status 200 without items: {answer.content[:200].decode(errors='replace')}")
            else:
                self._count_stages(answer.headers.get("server-timing") or "")

    def _count_stages(self, server_timing: str) -> None:
        for name, time_ms in stage_times(server_timing).items():
            self.environment.stats.get(name, STAGE).log(time_ms, 0)


def add_options(parser: ArgumentParser) -> None:
    """The options of this scenario, beside Locust's own."""
    usual = Traffic()
    group = parser.add_argument_group("RankTower")
    group.add_argument("--rate", type=float, default=0.0, help="requests/s of all users together; 0: no limit")
    group.add_argument("--candidates", type=int, default=usual.median_candidates, help="median candidates a request")
    group.add_argument("--top-k", type=int, default=usual.top_k, help="items asked for")
    group.add_argument("--zipf", type=float, default=usual.zipf, help="exponent of user popularity; 0: uniform")
    group.add_argument("--bodies", type=int, default=512, help="different requests to prepare")
    group.add_argument("--sample-items", type=int, default=20_000, help="items to draw candidates from")
    group.add_argument("--sample-users", type=int, default=5_000, help="users to draw from")
    group.add_argument("--seed", type=int, default=usual.seed, help="of every draw")
    group.add_argument("--report", default="", help="write the report as JSON to this file")


def prepare(environment: Environment, **_: Any) -> None:
    """Build the corpus before the first user starts; a service that gives no sample ends the run."""
    if isinstance(environment.runner, MasterRunner):
        return
    options = options_of(environment)
    traffic = Traffic(median_candidates=options.candidates, top_k=options.top_k, zipf=options.zipf, seed=options.seed)
    try:
        sample = fetch_sample(options.host, items=options.sample_items, users=options.sample_users, seed=options.seed)
    except LoadTestError as error:
        raise SystemExit(f"error: {error}") from error
    RankUser.bodies = build_corpus(sample, traffic, options.bodies)
    RankUser.release = sample.release


def write(environment: Environment, **_: Any) -> None:
    """Leave the report where `--report` says."""
    path = options_of(environment).report
    if path and not isinstance(environment.runner, WorkerRunner):
        write_report(report_of(environment), Path(path))


def options_of(environment: Environment) -> Namespace:
    """The command line of this run."""
    if environment.parsed_options is None:
        raise LoadTestError("this scenario takes its options from Locust's command line: run it with `locust -f`")
    options: Namespace = environment.parsed_options
    return options


def report_of(environment: Environment) -> Report:
    """Locust's statistics as a report."""
    stats: RequestStats = environment.stats
    ended_at = stats.last_request_timestamp or stats.start_time
    return Report(
        loop="closed",
        url=options_of(environment).host,
        release=RankUser.release,
        seconds=max(ended_at - stats.start_time, 0.0),
        target_rate=options_of(environment).rate,
        rows=tuple(sorted((_row(entry) for entry in stats.entries.values()), key=lambda row: row.kind != "route")),
        failures={str(error.error): error.occurrences for error in stats.errors.values()},
    )


def _row(entry: StatsEntry) -> Row:
    histogram = {float(time_ms): count for time_ms, count in entry.response_times.items()}
    kind: Literal["stage", "route"] = "stage" if entry.method == STAGE else "route"
    return row_of_histogram(entry.name, kind, histogram, entry.num_failures, entry.max_response_time)


events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(prepare)
events.quitting.add_listener(write)
