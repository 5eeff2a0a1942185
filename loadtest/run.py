"""Run a load test from start to verdict: serve the store, send the load, print the table, hold it to the objectives.

Exit code: 0 every objective held; 1 one was missed or the run is invalid; 2 the run could not be made.
"""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest import slo
from loadtest.corpus import Traffic, build_corpus, fetch_sample
from loadtest.errors import LoadTestError
from loadtest.open_loop import Schedule, invalid, run_open_loop
from loadtest.report import Report, from_json, table, write_report
from loadtest.serving import served

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SAMPLE_ITEMS, SAMPLE_USERS, BODIES = 20_000, 5_000, 512
MAX_USERS, MAX_SECONDS = 1_000, 3_600
LOCUST_GRACE_S = 60.0  # start, corpus, last answers
TICK_S = 0.2

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much to send, how, and what of."""

    users: int
    seconds: float
    rate: float  # requests per second; 0: as fast as the users can
    traffic: Traffic
    open_loop: bool


@app.command()
def main(  # the command line of `make load`
    store: Annotated[str, typer.Option(help="store to serve from (docs/stores.md)")] = "file://./var/releases",
    url: Annotated[str, typer.Option(help="test the service that runs here instead of starting one")] = "",
    seconds: Annotated[float, typer.Option(min=1, max=MAX_SECONDS, help="how long to send")] = 15,
    users: Annotated[int, typer.Option(min=1, max=MAX_USERS, help="callers of the closed loop")] = 4,
    rate: Annotated[float, typer.Option(min=0, help="requests/s in all; 0: as fast as the users can")] = 20,
    candidates: Annotated[int, typer.Option(min=1, help="median candidates a request")] = 1000,
    top_k: Annotated[int, typer.Option(min=1, help="items asked for")] = 200,
    open_loop: Annotated[bool, typer.Option("--open-loop", help="fixed send times instead of waiting users")] = False,
    seed: Annotated[int, typer.Option(help="of users, candidates and send times")] = 7,
    objectives: Annotated[Path, typer.Option("--slo", help="objectives to hold the run against")] = slo.DEFAULT,
    report: Annotated[Path | None, typer.Option(help="write the report as JSON here")] = None,
    allow_remote: Annotated[bool, typer.Option(help="let --url name another machine")] = False,
) -> None:
    """Load-test a service and print rate, percentiles, failures and stage times."""
    traffic = Traffic(median_candidates=candidates, top_k=top_k, seed=seed)
    load = Load(users=users, seconds=seconds, rate=rate, traffic=traffic, open_loop=open_loop)
    try:
        goals = slo.read_objectives(objectives)
        check_loopback(url, allow_remote)
        with nullcontext(url) if url else _starting(store) as target:
            result = measure(target, load)
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    if report:
        write_report(result, report)
    print(table(result))
    raise typer.Exit(_verdict(result, goals))


def measure(url: str, load: Load) -> Report:
    """Send the load at `url` and return what was measured."""
    with _progress(load) as on_time:
        return _measure_open(url, load, on_time) if load.open_loop else _measure_closed(url, load, on_time)


def check_loopback(url: str, allow_remote: bool) -> None:
    """Raises LoadTestError when `url` is another machine and that was not asked for."""
    host = urlsplit(url).hostname or ""
    if not url or allow_remote or host == "localhost":
        return
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise LoadTestError(f"{url} is another machine: add --allow-remote if you may load it")


def locust_command(url: str, load: Load, report: Path) -> list[str]:
    """Locust, headless, bounded in users and time, judged by us and not by its own exit code."""
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", "--reset-stats"),
        *("--host", url, "--users", str(load.users), "--spawn-rate", str(load.users)),
        *("--run-time", f"{load.seconds:g}s", "--stop-timeout", "10", "--exit-code-on-error", "0"),
        *("--loglevel", "WARNING", "--report", str(report), "--rate", str(load.rate)),
        *("--candidates", str(load.traffic.median_candidates), "--top-k", str(load.traffic.top_k)),
        *("--bodies", str(BODIES), "--sample-items", str(SAMPLE_ITEMS), "--sample-users", str(SAMPLE_USERS)),
        *("--seed", str(load.traffic.seed)),
    ]


def _measure_open(url: str, load: Load, on_time: Callable[[float], None]) -> Report:
    if not load.rate:
        raise LoadTestError("an open loop needs a rate: give --rate, in requests per second")
    sample = fetch_sample(url, items=SAMPLE_ITEMS, users=SAMPLE_USERS, seed=load.traffic.seed)
    bodies = build_corpus(sample, load.traffic, BODIES)
    schedule = Schedule(rate=load.rate, seconds=load.seconds, seed=load.traffic.seed)
    return run_open_loop(url, bodies, schedule, release=sample.release, on_time=on_time)


def _measure_closed(url: str, load: Load, on_time: Callable[[float], None]) -> Report:
    with TemporaryDirectory(prefix="ranktower-locust-") as folder:
        report, log = Path(folder, "report.json"), Path(folder, "locust.log")
        with log.open("wb") as sink:
            process = subprocess.Popen(locust_command(url, load, report), stdout=sink, stderr=subprocess.STDOUT)
        try:
            _follow(process, load.seconds + LOCUST_GRACE_S, on_time)
        finally:
            process.kill()  # no effect on one that has ended
            process.wait()
        if process.returncode != 0 or not report.exists():
            words = log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise LoadTestError(f"locust ended with code {process.returncode}; its last words:\n{words}")
        return from_json(report.read_text(encoding="utf-8"))


def _follow(process: subprocess.Popen[bytes], at_most_s: float, on_time: Callable[[float], None]) -> None:
    """Wait for the process, telling the seconds as they pass."""
    waited_s = 0.0
    while waited_s < at_most_s:
        try:
            process.wait(TICK_S)
            return
        except subprocess.TimeoutExpired:
            waited_s += TICK_S
            on_time(waited_s)
    raise LoadTestError(f"locust did not end within {at_most_s:g} s: fewer --users, or a service that answers")


@contextmanager
def _starting(store: str) -> Iterator[str]:
    console = Console(stderr=True)
    console.print(f"starting a service on {store}", highlight=False)
    with served(store) as url:
        yield url


@contextmanager
def _progress(load: Load) -> Iterator[Callable[[float], None]]:
    """A bar of the seconds to send, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        what = f"{load.rate:g} requests/s" if load.rate else "no rate limit"
        kind = "open loop" if load.open_loop else f"{load.users} users"
        task = bar.add_task(f"{kind}, {what}, {load.seconds:g} s", total=load.seconds)
        yield lambda seconds: bar.update(task, completed=min(seconds, load.seconds))
        bar.update(task, completed=load.seconds)


def _verdict(report: Report, goals: tuple[slo.Objective, ...]) -> int:
    """Print what was missed; the exit code."""
    held_to = slo.applicable(report, goals)
    unfit = invalid(report) if report.loop == "open" else None
    sentences = [*([unfit] if unfit else []), *(f"missed: {miss}" for miss in slo.misses(report, held_to))]
    for sentence in sentences:
        print(sentence)
    if not sentences:
        rest = "" if len(held_to) == len(goals) else f"; {len(goals) - len(held_to)} need a --rate"
        print(f"all of {len(held_to)} objectives held{rest}")
    return 1 if sentences else 0
