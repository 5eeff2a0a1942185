"""Benchmark of outages: what requests, metrics and verbs do while Redis is killed, frozen, slow, cut, full or replaced.

Every outage has a Redis of its own that persists, two replicas in processes of their own (one worker; two workers and
a refresher) under steady load, and the verbs `publish` and `update`, run once before and once within it. In the end, or
behind a proxy halfway, another release is activated: a replica has recovered with its last answer from the old one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from redis import Redis

from benchmarks.made import Made, Plan, make, stored_records
from benchmarks.observed import Oracle, Replica, observed, p99_ms
from benchmarks.processes import end_in_order, python, redis_binary, server
from benchmarks.proxy import Proxy, proxy
from benchmarks.report import RESULTS, Bar, Report, machine, machine_line, print_bars, table
from benchmarks.traffic import bodies
from cache.changes import CHANGES
from cache.redis_store import RedisStore
from cache.release import ITEMS, read_release, seal_release
from cache.snapshot import SnapshotWriter
from kernel.record import RecordLayout
from loadtest.serving import HOST, free_port, serve_command

SIZES = {"tiny": 2_000, "full": 20_000}
SECONDS = {"tiny": 2.0, "full": 10.0}  # of an outage, and of the time before it
VERBS = {
    "publish": "publish --bundle {bundle} --items {items} --no-activate --dtype int8 --work {home}/work "
    "--cache {home}/cache --store {url}",
    "update": f"update --delete-ids {1 << 50} --cache {{home}}/cache --store {{url}}",  # an id that no item has
    "prune": "releases prune --keep 9 --store {url}",
}
CATEGORIES = 300  # as benchmarks.made has them
CANDIDATES, BODIES = 500, 20
WORKERS = (1, 2)  # of each replica
DELAY_S = 0.2  # of every answer of a slow Redis
ROOM_BYTES = 6 << 20  # beside half a release, for what is on its way
SERVICE, DOWN_MS = "releases", 1_000  # the master's name among the sentinels, and when they hold it for down
RECOVERS_WITHIN_S = 5.0  # bar
GIVE_UP_S = 90.0  # on a replica that does not recover, or a verb that does not end
CALM_S = 1.0  # so long all answers must name the new release
Row = Mapping[str, Any]
COLUMNS = ("outage", "replica", "asked", "failed", "wrong", "p99 before, ms", "within, ms", "ratio", "stale before, s",
           "stale within, s", "reason after, s", "recovered, s", "calm again, s")  # fmt: skip
VERB_COLUMNS = ("outage", "verb", "exit", "s", "its last words")


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    items, seconds = given.items or SIZES[given.size], given.seconds or SECONDS[given.size]
    name = "outages" if given.size == "full" else f"outages-{given.size}"
    report = Report(name, {"items": items, "seconds": seconds, "candidates": CANDIDATES, "delay_s": DELAY_S})
    print(machine_line(machine()))
    course = prepare(items, given.out)
    with TemporaryDirectory(prefix="ranktower-bench-") as folder:
        other = Path(folder, "other")
        shutil.copytree(course.first, other)
        course.second = another(course, other)
        for outage in given.outages or OUTAGES:
            with TemporaryDirectory(dir=folder) as home, ThreadPoolExecutor(2) as pool:
                report.rows += Scene(course, outage, Path(home), seconds, pool).measure()
            print(f"{outage}: done", flush=True)
    for heads, cells in tables(report.rows):
        print("\n" + table(heads, cells))
    report.bars += bars(report.rows)
    print()
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 1 if any(bar.verdict == "MISSED" for bar in report.bars) else 0


# --- releases --------------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """Two releases of the same items and bundle, and what is asked of them."""

    made: Made
    items: Path  # the catalogue, for `publish`
    oracle: Oracle
    second: Path = Path()

    @property
    def first(self) -> Path:
        return self.made.release


def prepare(items: int, out: Path) -> Course:
    made = make(Plan(items=items), out / "made")
    path = out / f"items-{items}.parquet"
    columns = {"category": np.arange(items) % CATEGORIES, "price": np.full(items, 30.0)}
    pq.write_table(pa.table({"item_id": made.ids, **columns}), path)
    course = Course(made, path, Oracle(bodies(made, BODIES, CANDIDATES, seed=5)))
    course.oracle.know(course.first)
    return course


def another(course: Course, folder: Path) -> Path:
    """Turn a copy of the first release into one where each item has the record of the next."""
    made, bundle = course.made, course.made.bundle
    records = np.roll(stored_records(made, np.arange(made.plan.items)), 1, axis=0)
    (folder / ITEMS).unlink()
    layout = RecordLayout(bundle.head, made.plan.dtype)
    with SnapshotWriter(folder / ITEMS, kind="items", owner=bundle.id, id_type=made.plan.ids, layout=layout) as writer:
        writer.append(made.ids.tolist(), records)
        writer.finish()
    seal_release(folder, bundle_id=bundle.id, head=bundle.head)
    course.oracle.know(folder)
    return folder


# --- servers that fail -----------------------------------------------------------------------------------------------


@dataclass
class Servers:
    """What an outage has to do with."""

    stack: ExitStack
    folder: Path
    url: str  # that replicas and verbs are given
    pid: int = 0
    port: int = 0
    proxy: Proxy | None = None
    sentinel: int = 0
    room: int = 0  # octets that a Redis has left whose memory ends
    orphans: int = 0  # chunks that a refused publish had sent

    @property
    def direct(self) -> str:
        """Past a proxy; to another server after a failover."""
        return f"redis://{HOST}:{self.port}/0"

    def client(self, port: int = 0) -> Redis:
        return Redis(host=HOST, port=port or self.port)

    def start(self, *options: str, port: int | None = None, name: str = "data") -> tuple[int, int]:
        """The pid and port of a redis-server that writes down what it is told before it answers."""
        port, home = port or free_port(), self.folder / name
        home.mkdir(exist_ok=True)
        command = [redis_binary(), "--bind", HOST, "--port", str(port), "--dir", str(home), "--save", ""]
        command += ["--appendonly", "yes", "--repl-diskless-sync-delay", "0", *options]
        pid = self.stack.enter_context(server(command, port, None))
        self.stack.callback(os.kill, pid, signal.SIGCONT)  # one that is frozen cannot end
        return pid, port


def alone(stack: ExitStack, folder: Path) -> Servers:
    """One server."""
    servers = Servers(stack, folder, "")
    servers.pid, servers.port = servers.start()
    servers.url = servers.direct
    return servers


def behind_a_proxy(stack: ExitStack, folder: Path) -> Servers:
    servers = alone(stack, folder)
    servers.proxy = stack.enter_context(proxy(servers.port))
    servers.url = f"redis://{HOST}:{servers.proxy.port}/0"
    return servers


def watched(stack: ExitStack, folder: Path) -> Servers:
    """A master, its replica, and a sentinel that replaces one by the other."""
    servers = alone(stack, folder)
    _, replica = servers.start("--replicaof", HOST, str(servers.port), name="replica")
    until(lambda: servers.client(replica).info("replication")["master_link_status"] == "up")
    conf, servers.sentinel = folder / "sentinel.conf", free_port()
    conf.write_text(
        f"sentinel monitor {SERVICE} {HOST} {servers.port} 1\n"
        f"sentinel down-after-milliseconds {SERVICE} {DOWN_MS}\n"
        f"sentinel failover-timeout {SERVICE} 10000\n"
    )
    command = [redis_binary(), str(conf), "--bind", HOST, "--port", str(servers.sentinel), "--dir", str(folder)]
    stack.enter_context(server([*command, "--sentinel"], servers.sentinel, None))
    client = servers.client(servers.sentinel)
    until(lambda: [each["master-link-status"] for each in client.sentinel_slaves(SERVICE)] == ["ok"])
    servers.url = f"redis+sentinel://{HOST}:{servers.sentinel}/{SERVICE}/0"
    return servers


def until(reached: Callable[[], Any]) -> None:
    """Ask until it is so. Raises TimeoutError."""
    give_up_s = time.monotonic() + GIVE_UP_S
    while not reached():
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"an outage did not come about, or did not end, within {GIVE_UP_S:g} s")
        time.sleep(0.02)


# --- outages ---------------------------------------------------------------------------------------------------------


class During(Protocol):
    """What an outage may do while it lasts."""

    def begin(self, *verbs: str) -> None:
        """Start these verbs of VERBS, each in a process of its own."""

    def wait(self) -> None:
        """As long as an outage lasts."""

    def until_ended(self) -> None:
        """Wait for the verbs."""


Outage = Callable[[Servers, During], None]  # returns at its end


def killed(servers: Servers, during: During) -> None:
    """SIGKILL, and a start on what it had written."""
    os.kill(servers.pid, signal.SIGKILL)
    during.begin("publish", "update")
    during.wait()
    servers.pid, _ = servers.start(port=servers.port)


def paused(servers: Servers, during: During) -> None:
    """SIGSTOP and SIGCONT: connections stay open, nobody answers."""
    os.kill(servers.pid, signal.SIGSTOP)
    during.begin("publish", "update")
    during.wait()
    os.kill(servers.pid, signal.SIGCONT)


def slow(servers: Servers, during: During) -> None:
    """Every answer takes 200 ms longer."""
    assert servers.proxy is not None
    servers.proxy.delay_s = DELAY_S
    during.begin("publish", "update")
    during.wait()
    servers.proxy.delay_s = 0.0


def resetting(servers: Servers, during: During) -> None:
    """Connections are accepted, and reset as soon as something is sent."""
    assert servers.proxy is not None
    servers.proxy.resetting = True
    during.begin("publish", "update")
    during.wait()
    servers.proxy.resetting = False


def full(servers: Servers, during: During) -> None:
    """maxmemory is reached in the middle of a publish; then nothing is taken at all, but for what frees memory."""
    with servers.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + servers.room)
        during.begin("publish")
        during.until_ended()
        servers.orphans = orphans(servers.direct)
        client.config_set("maxmemory", 1)
        during.begin("update")
        during.until_ended()
        during.begin("prune")
        during.until_ended()
        during.wait()
        client.config_set("maxmemory", 0)


def failing_over(servers: Servers, during: During) -> None:
    """SIGKILL of the master; ends when the sentinel has promoted its replica, however long that takes."""
    os.kill(servers.pid, signal.SIGKILL)
    during.begin("publish", "update")
    _promoted(servers)


def failing_over_frozen(servers: Servers, during: During) -> None:
    """SIGSTOP of the master, for good: its connections stay open and nobody says that it has gone."""
    os.kill(servers.pid, signal.SIGSTOP)
    during.begin("publish", "update")
    _promoted(servers)


def _promoted(servers: Servers) -> None:
    with servers.client(servers.sentinel) as sentinel:
        until(lambda: sentinel.sentinel_get_master_addr_by_name(SERVICE)[1] != servers.port)
        servers.port = int(sentinel.sentinel_get_master_addr_by_name(SERVICE)[1])
    until(lambda: servers.client().info("replication")["role"] == "master")


OUTAGES: dict[str, tuple[Callable[[ExitStack, Path], Servers], Outage]] = {
    "killed": (alone, killed),
    "paused": (alone, paused),
    "slow": (behind_a_proxy, slow),
    "resetting": (behind_a_proxy, resetting),
    "out of memory": (alone, full),
    "failing over, killed": (watched, failing_over),
    "failing over, frozen": (watched, failing_over_frozen),
}
ANSWERING = ("slow", "out of memory")  # who reads is answered all the time: staleness has no reason to rise by seconds


# --- one of them -----------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """One outage, from the start of its servers to their end."""

    course: Course
    outage: str
    home: Path
    seconds: float
    pool: ThreadPoolExecutor
    jobs: list[Future[dict[str, Any]]] = field(default_factory=list)
    servers: Servers = field(init=False)
    second: str = ""  # the release that is activated
    when: str = "before"  # for the verbs

    def measure(self) -> list[dict[str, Any]]:
        start, fail = OUTAGES[self.outage]
        with ExitStack() as stack:
            self.servers = servers = start(stack, self.home)
            store = RedisStore(servers.direct)
            store.activate(store.publish(self.course.first))
            self.second = store.publish(self.course.second)
            store.close()
            servers.room = read_release(self.course.first).size_bytes // 2 + ROOM_BYTES
            replicas = [stack.enter_context(serving(servers.url, workers, self.home)) for workers in WORKERS]
            with observed(replicas, self.course.oracle):
                time.sleep(CALM_S)
                begun_s = time.monotonic()
                self.begin("publish", "update")
                self.until_ended()
                time.sleep(max(0.0, begun_s + self.seconds - time.monotonic()))
                before = stored(servers.direct)
                self.when, outage_s = "within", time.monotonic()
                fail(servers, self)
                end_s = time.monotonic()
                activate(servers.direct, self.second)
                recovered(replicas, self.second, end_s)
                self.until_ended()
            rows = [self._row(each, begun_s, outage_s, end_s) for each in replicas]
            rows += [job.result() for job in self.jobs]
            return [*rows, self._left(before, stored(servers.direct))]

    # --- what an outage may do

    def begin(self, *verbs: str) -> None:
        self.jobs += [self.pool.submit(self._run, verb, self.when) for verb in verbs]

    def until_ended(self) -> None:
        for job in self.jobs:
            job.result()

    def wait(self) -> None:
        """Behind a proxy the other release is activated halfway: who gets through may see it."""
        time.sleep(self.seconds / 2)
        if self.servers.proxy is not None:
            activate(self.servers.direct, self.second)
        time.sleep(self.seconds / 2)

    def _run(self, verb: str, when: str) -> dict[str, Any]:
        """Run a verb, and what became of it. What is published is not activated."""
        with TemporaryDirectory(dir=self.home) as folder:
            bundle, items = str(self.course.made.bundle_folder), str(self.course.items)
            given = VERBS[verb].format(bundle=bundle, items=items, url=self.servers.url, home=folder).split()
            command = ["nice", "-n", "19", *python("service.cli", *given)]  # what is asked meanwhile goes first
            begun_s = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIVE_UP_S)
            seconds = time.monotonic() - begun_s
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return {"kind": "verb", "outage": self.outage, "when": when, "verb": verb, "exit": done.returncode,
                "s": seconds, "words": words[-1] if words else ""}  # fmt: skip

    def _left(self, before: Stored, after: Stored) -> dict[str, Any]:
        """Whether refused verbs have left something that a reader could take for whole."""
        went = [
            row["verb"] for row in (job.result() for job in self.jobs) if row["when"] == "within" and not row["exit"]
        ]
        more = len(after.releases - before.releases), int(after.position > before.position)
        wanted = int("publish" in went), int("update" in went)
        words = f"{more[0]} more releases, {wanted[0]} published; {more[1]} more updates, {wanted[1]} appended"
        if self.servers.orphans:
            words += f"; {self.servers.orphans} chunks of no release before prune, {orphans(self.servers.direct)} after"
        return {"kind": "left", "outage": self.outage, "good": more == wanted, "words": words}

    def _row(self, replica: Replica, begun_s: float, outage_s: float, end_s: float) -> dict[str, Any]:
        before, within = replica.asked_within(begun_s, outage_s), replica.asked_within(outage_s, end_s)
        said = replica.said_within(outage_s, end_s)
        reasons = [each for each in said if each.failure is not None]
        calm = [each.at_s for each in replica.said if each.at_s > end_s and not _troubled(each)]
        return {
            "kind": "replica",
            "outage": self.outage,
            "replica": replica.name,
            "seconds": end_s - outage_s,
            "asked": len(replica.asked),
            "failed": sum(each.release is None for each in replica.asked),
            "wrong": sum(each.release is not None and each.wrong is not None for each in replica.asked),
            "p99_before_ms": p99_ms(before),
            "p99_within_ms": p99_ms(within),
            "p99_ratio": p99_ms(within) / p99_ms(before),
            "stale_before_s": max(each.staleness_s for each in replica.said_within(begun_s, outage_s)),
            "stale_within_s": max(each.staleness_s for each in said),
            "reason_after_s": reasons[0].at_s - outage_s if reasons else None,
            "reason": reasons[-1].failure if reasons else None,
            "recovered_s": max(0.0, replica.last_other_s(self.second) - end_s),
            "calm_s": calm[0] - end_s if calm else None,
        }


def _troubled(said: Any) -> bool:
    return said.failure is not None or said.staleness_s > 1.0


@contextmanager
def serving(url: str, workers: int, home: Path) -> Iterator[Replica]:
    port, name = free_port(), f"{workers} worker{'s' * (workers > 1)}"
    flags = ("--workers", str(workers), "--cache-dir", str(home / f"replica-{workers}"))
    with server([*serve_command(url, port), *flags], port, None, ready=b"/readyz"):
        yield Replica(name, port)


def activate(url: str, release: str) -> None:
    store = RedisStore(url)
    store.activate(release)
    store.close()


class Stored(NamedTuple):
    """What readers find."""

    releases: set[str]
    position: int  # the last of the log of changes


def stored(url: str) -> Stored:
    store = RedisStore(url)
    found = Stored({info.id for info in store.list()}, store.log(CHANGES).last())
    store.close()
    return found


def orphans(url: str) -> int:
    """How many chunks belong to no release."""
    listed = stored(url).releases
    with Redis.from_url(url) as client:
        return sum(key.decode().split(":")[2] not in listed for key in client.scan_iter("ranktower:release:*"))


def recovered(replicas: Sequence[Replica], release: str, since_s: float) -> None:
    """Wait until all answers of all replicas name the release, and no replica knows of trouble, or give up."""
    while time.monotonic() < since_s + GIVE_UP_S:
        now_s = time.monotonic()
        late = [each for each in replicas if each.last_other_s(release) > now_s - CALM_S or _troubled(each.said[-1])]
        if not late and now_s > since_s + CALM_S:
            return
        time.sleep(0.05)


# --- the result ------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[Row]) -> list[Bar]:
    found = [row for row in rows if row["kind"] == "replica"]
    away = [row for row in found if row["outage"] not in ANSWERING]
    rise = min((row["stale_within_s"] / row["seconds"] for row in away), default=None)
    half = sum(not row["good"] for row in rows if row["kind"] == "left")
    late = max(row["recovered_s"] for row in found)
    return [
        Bar(name="rank requests that failed", value=sum(row["failed"] for row in found), side="at most", limit=0),
        Bar(name="answers that were wrong", value=sum(row["wrong"] for row in found), side="at most", limit=0),
        Bar(name="staleness / length of the outage, least", value=rise, side="at least", limit=0.5),
        Bar(name="outages after which there is half of something", value=half, side="at most", limit=0),
        Bar(name="recovered after the end, most, s", value=late, side="at most", limit=RECOVERS_WITHIN_S),
    ]


def tables(rows: Sequence[Row]) -> Iterator[tuple[Sequence[str], list[list[Any]]]]:
    fields = ("outage", "replica", "asked", "failed", "wrong", "p99_before_ms", "p99_within_ms", "p99_ratio",
              "stale_before_s", "stale_within_s", "reason_after_s", "recovered_s", "calm_s")  # fmt: skip
    yield COLUMNS, [[row[name] for name in fields] for row in rows if row["kind"] == "replica"]
    yield (
        ("outage", "/readyz in the end"),
        [[row["outage"], row["reason"]] for row in rows if row["kind"] == "replica" and row["reason"]],
    )
    told = [row for row in rows if row["kind"] == "verb" and row["when"] != "before"]
    yield VERB_COLUMNS, [[row[name] for name in ("outage", "verb", "exit", "s", "words")] for row in told]
    yield ("outage", "what is left"), [[row["outage"], row["words"]] for row in rows if row["kind"] == "left"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-outages", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny to try this command")
    parser.add_argument("--items", type=int, help="items of the catalogue, in place of the size's")
    parser.add_argument("--seconds", type=float, help="of each outage")
    parser.add_argument("--outages", nargs="+", choices=list(OUTAGES), help="these alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result and made releases")
    return parser


if __name__ == "__main__":
    sys.exit(main())
