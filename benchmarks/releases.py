"""Benchmark of a release's way: embedded items to a folder and to Redis, and from Redis to a replica that is ready.

The item tower is measured by itself: in the builds its output is there already. Rounds take builds, stores, downloads
and towers in turns; figures are medians over rounds. A replica is a process of its own, its cache empty.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from redis import Redis

from benchmarks.made import PART, SIZES, Plan, catalogue_spec, draw_records, item_ids, write_bundle
from benchmarks.processes import end_in_order, redis
from benchmarks.report import RESULTS, Bar, Report, machine, machine_line, median, print_bars, table
from cache import embed
from cache.catalogue import open_catalogue
from cache.file_store import FileStore
from cache.parallel import in_order
from cache.redis_store import RedisStore
from cache.release import Release, read_chunk, read_release, sha256
from loadtest.serving import HOST
from model.bundle import open_bundle
from model.features import FeatureSpec
from model.tower import EMBED_BATCH, Tower

ROOT = Path(__file__).resolve().parents[1]
GROUP_ROWS = 1 << 17  # of the items file
TOWER_ROWS = 8_192  # embedded at a time while towers are measured
TORCH_BATCHES = (EMBED_BATCH, 2_048)
PREFIX = "bench"

REPLICA = """
import json, sys, time
times, at = {}, time.perf_counter()

def lap(name):
    global at
    now = time.perf_counter()
    times[name], at = now - at, now

import service.app
from cache.redis_store import RedisStore
from cache.release import verify_files, read_release
from pathlib import Path
from service.ranker import Ranker
lap("import_s")
url, cache = sys.argv[1], Path(sys.argv[2])
store = RedisStore(url)
folder = store.fetch(store.current(), cache)
lap("download_s")
verify_files(folder, read_release(folder))
lap("verify_s")
ranker = Ranker.open(folder)
ranker.check()
lap("map_s")
ranker.warm_up()
lap("warm_s")
print(json.dumps(times))
"""

Row = Mapping[str, Any]
Embed = Callable[[np.ndarray], Any]  # (n, item width) int32 -> records


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    items = given.items or SIZES[given.size]
    name = "releases" if given.size == "full" else f"releases-{given.size}"
    report = Report(name, {"items": items, "rounds": given.rounds, "cores": len(os.sched_getaffinity(0))})
    print(machine_line(machine()))
    given.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=given.out, prefix="releases-") as folder, redis(None) as port:
        course = prepare(items, Path(folder), f"redis://{HOST}:{port}/0?prefix={PREFIX}")
        towers = {"onnx": onnx_tower(course.spec, course.home), **torch_towers(course.spec)}
        for number in range(given.rounds):
            report.rows += [{"round": number, **row} for row in one_round(course, towers, port, number)]
            print(f"round {number + 1} of {given.rounds}", flush=True)
    report.bars += bars(report.rows)
    load = os.getloadavg()[0]
    report.notes.append(f"other processes had the cores, too: the load was {load:.1f} in the last minute")
    for heads, cells in tables(report.rows):
        print("\n" + table(heads, cells))
    print()
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 0


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What all rounds read."""

    items: int
    home: Path
    url: str
    spec: FeatureSpec
    records: np.ndarray  # (PART, item size) float32, what the tower would write

    @property
    def bundle(self) -> Path:
        return self.home / "bundle"

    @property
    def catalogue(self) -> Path:
        return self.home / "items.parquet"


def prepare(items: int, home: Path, url: str) -> Course:
    """A bundle of 4x4x32 MaxSim and the Parquet file of its catalogue."""
    plan = Plan(items=items)
    spec = catalogue_spec(plan)
    write_bundle(plan, spec, home / "run", home / "bundle")
    rng = np.random.default_rng(0)
    columns = {"category": rng.integers(0, 300, items), "price": rng.uniform(0, 200, items)}
    catalogue = pa.table({"item_id": item_ids(plan), **columns})
    pq.write_table(catalogue, home / "items.parquet", row_group_size=GROUP_ROWS)
    _, records = next(draw_records(open_bundle(home / "bundle").head, PART))
    return Course(items, home, url, spec, records)


def one_round(course: Course, towers: Mapping[str, Embed], port: int, number: int) -> Iterator[dict[str, Any]]:
    built, build_s = timed(lambda: build(course))
    release = read_release(built)
    order = np.random.default_rng(number).permutation(2).tolist()
    for kind in [("file", "redis")[place] for place in order]:
        store_s, memory = publish(course, kind, built, port)
        rate = course.items / (build_s + store_s)
        yield {"kind": "publish", "store": kind, "build_s": build_s, "store_s": store_s, "items_per_s": rate}
        if memory is not None:
            yield {"kind": "memory", "release_mb": release.size_bytes / 1e6, "ratio": memory / release.size_bytes}
    yield {"kind": "replica", **replica(course)}
    yield {"kind": "limits", **limits(course, built, release)}
    features = sampled(course)
    for name in np.random.default_rng(number).permutation(sorted(towers)).tolist():
        yield {"kind": "tower", "tower": name, "items_per_s_core": speed(towers[name], features)}
    shutil.rmtree(built)


def build(course: Course) -> Path:
    """A release folder: everything that `ranktower publish` does before it stores, but for the tower."""
    with ready_records(course.records):
        out = course.home / "release"
        return embed.build_release(course.bundle, course.catalogue, out, dtype="int8")


@contextmanager
def ready_records(records: np.ndarray) -> Iterator[None]:
    """In place of the tower's output."""
    real = embed.run_parallel
    embed.run_parallel = lambda tower, pool, workers, features: records[: len(features)]
    try:
        yield
    finally:
        embed.run_parallel = real


def publish(course: Course, kind: str, built: Path, port: int) -> tuple[float, int | None]:
    """Seconds to store a built release and make it current; and what Redis takes for it, in bytes."""
    if kind == "file":
        folder = course.home / "store"
        store = FileStore(f"file://{folder}")
        _, seconds = timed(lambda: store.activate(store.publish(built, owned=True)))
        shutil.rmtree(folder)
        return seconds, None
    with Redis(host=HOST, port=port) as admin:
        admin.flushall()
        before = admin.info("memory")["used_memory_dataset"]
        remote = RedisStore(course.url)
        _, seconds = timed(lambda: remote.activate(remote.publish(built)))
        remote.close()
        taken = sum(admin.memory_usage(key, samples=0) or 0 for key in admin.scan_iter())
        return seconds, max(taken, admin.info("memory")["used_memory_dataset"] - before)


def replica(course: Course) -> dict[str, float]:
    """Seconds of a process from its start to a ranker that has answered."""
    cache = course.home / "cache"
    command = [sys.executable, "-c", REPLICA, course.url, str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shutil.rmtree(cache)
    times: dict[str, float] = json.loads(done.stdout)
    return {**times, "ready_s": times["download_s"] + times["map_s"] + times["warm_s"]}


def limits(course: Course, built: Path, release: Release) -> dict[str, float]:
    """What hashing, the socket and the disk let through, each alone: MB/s on as many threads as a download has."""
    chunks = list(release.chunks())
    mb = release.size_bytes / 1e6
    contents = [read_chunk(built, chunk) for chunk in chunks]
    _, hashing = timed(lambda: list(in_order(sha256, contents)))
    with Redis.from_url(course.url.partition("?")[0]) as client:
        keys = [f"{PREFIX}:release:{release.id}:{chunk.path}:{chunk.number}" for chunk in chunks]
        _, receiving = timed(lambda: list(in_order(client.strlen, keys)))  # connections are open
        _, receiving = timed(lambda: list(in_order(lambda key: len(client.get(key)), keys)))

    def write() -> None:
        with (course.home / "written").open("wb") as stream:
            for content in contents:
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    _, writing = timed(write)
    return {"hash_mb_s": mb / hashing, "socket_mb_s": mb / receiving, "disk_mb_s": mb / writing}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds on the wall."""
    begun = perf_counter()
    found = work()
    return found, perf_counter() - begun


# --- towers ----------------------------------------------------------------------------------------------------------


def onnx_tower(spec: FeatureSpec, home: Path) -> Embed:
    """The item tower of the default recipe's network as `publish` runs it: ONNX Runtime, one thread, batches of 256."""
    import torch  # it is exported here, and beside it the same in torch

    from model.checkpoint import build_network
    from model.export import write_graph
    from model.fused import fused

    torch.manual_seed(0)
    network = build_network("ranktower", spec, {}).eval()
    write_graph(fused(network), "item", spec.item_width, home / "item.onnx")
    return Tower(home / "item.onnx").embed


def torch_towers(spec: FeatureSpec) -> dict[str, Embed]:
    """The same network run by torch as it is written, one thread."""
    import torch

    from model.checkpoint import build_network

    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = build_network("ranktower", spec, {}).eval()

    def embedded(batch: int) -> Embed:
        def run(features: np.ndarray) -> None:
            with torch.inference_mode():
                for start in range(0, len(features), batch):
                    network.item(torch.from_numpy(features[start : start + batch]))

        return run

    return {f"torch, batches of {batch}": embedded(batch) for batch in TORCH_BATCHES}


def sampled(course: Course) -> np.ndarray:
    """(TOWER_ROWS, item width) int32, or as many as there are."""
    return open_catalogue(course.catalogue, course.spec).sample(TOWER_ROWS, 0)


def speed(tower: Embed, features: np.ndarray) -> float:
    """Items a second of one core: the time is the process's on the processor. One call to warm up."""
    tower(features[:EMBED_BATCH])
    begun = process_time()
    tower(features)
    return len(features) / (process_time() - begun)


# --- text ------------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[Row]) -> list[Bar]:
    towers = {row["tower"] for row in rows if row["kind"] == "tower"} - {"onnx"}
    eager = max(middle(rows, "tower", "items_per_s_core", tower=name) for name in towers)
    onnx = middle(rows, "tower", "items_per_s_core", tower="onnx")
    rates = {kind: middle(rows, "publish", "items_per_s", store=kind) for kind in ("file", "redis")}
    return [
        Bar(name="publish to a folder, items/s", value=rates["file"], side="at least", limit=500_000),
        Bar(name="publish to Redis, items/s", value=rates["redis"], side="at least", limit=300_000),
        Bar(name="item tower, ONNX Runtime / torch", value=onnx / eager, side="at least", limit=1.2),
        Bar(name="replica ready after import, s", value=middle(rows, "replica", "ready_s"), side="at most", limit=3.0),
        Bar(name="memory in Redis / release", value=middle(rows, "memory", "ratio"), side="at most", limit=1.05),
    ]


def middle(rows: Sequence[Row], kind: str, field: str, **chosen: Any) -> float:
    """The median over rounds."""
    wanted = {"kind": kind, **chosen}
    return median([row[field] for row in rows if wanted.items() <= row.items()])


PUBLISH_HEADS = ("publish, tower apart", "build, s", "store, s", "items/s")
REPLICA_HEADS = ("replica", "median over rounds")
TOWER_HEADS = ("item tower, default recipe", "items/s/core")
REPLICA_LINES = {
    "import_s": "import, s",
    "download_s": "download, every hash checked, and fsync, s",
    "map_s": "open, map, probe checked, s",
    "warm_s": "recorded requests answered, s",
    "ready_s": "ready after import, s",
    "verify_s": "every hash again, as a restart does, s",
}
LIMIT_LINES = {
    "hash_mb_s": "hashing alone, MB/s",
    "socket_mb_s": "receiving alone, MB/s",
    "disk_mb_s": "writing and fsync alone, MB/s",
}


def tables(rows: Sequence[Row]) -> Iterator[tuple[Sequence[str], list[list[Any]]]]:
    fields = ("build_s", "store_s", "items_per_s")
    yield PUBLISH_HEADS, [[k, *(middle(rows, "publish", f, store=k) for f in fields)] for k in ("file", "redis")]
    lines = [[text, middle(rows, "replica", field)] for field, text in REPLICA_LINES.items()]
    yield REPLICA_HEADS, lines + [[text, middle(rows, "limits", field)] for field, text in LIMIT_LINES.items()]
    names = dict.fromkeys(row["tower"] for row in rows if row["kind"] == "tower")
    yield TOWER_HEADS, [[name, middle(rows, "tower", "items_per_s_core", tower=name)] for name in sorted(names)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-releases", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny to try this command")
    parser.add_argument("--items", type=int, help="items of the catalogue, in place of the size's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
