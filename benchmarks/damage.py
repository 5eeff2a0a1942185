"""Benchmark of damage: releases that are cut, flipped by a bit or swapped in the store, activated while another serves.

A replica in processes of its own answers all the time, every answer checked. Each damage is done to a whole release in
the store, then that is activated; where `activate` itself refuses, `current` is written past it, so that the replica,
too, must refuse. What was damaged is put back, and in the end the same release, whole, must be taken over.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
from redis import Redis

from benchmarks.client import Line
from benchmarks.made import Plan, make
from benchmarks.observed import Oracle, Replica, observed
from benchmarks.outages import BODIES, CANDIDATES, Course, another
from benchmarks.processes import end_in_order, redis, server
from benchmarks.report import RESULTS, Bar, Report, machine, machine_line, print_bars, table
from benchmarks.traffic import bodies
from cache.durable import replace_file
from cache.file_store import CURRENT, FileStore
from cache.redis_store import RedisStore
from cache.release import BUNDLE, ITEMS, RELEASE, read_release, seal_release
from cache.snapshot import Header
from cache.store import ReleaseStore
from loadtest.serving import HOST, free_port, serve_command
from model.errors import RankTowerError

SIZES = {"tiny": 2_000, "full": 20_000}
POINTS = {"tiny": 6, "full": 120}  # flips and cuts, of each
WITHIN_S = 30.0  # a replica must have said what it makes of a release
LOOK_S = 0.02
READYZ = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
PREFIX, CACHE = "bench", "replica"
WORKERS = {"file": 1, "redis": 2}  # one process; a refresher that fetches, and workers
DIGITS = re.compile(r"[0-9a-f]{12,}|\d+")
COLUMNS = ("store", "damage", "of", "points", "activate refused", "replica refused", "taken", "reason, one of them")
Row = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    end_in_order()
    items, points = given.items or SIZES[given.size], given.points or POINTS[given.size]
    name = "damage" if given.size == "full" else f"damage-{given.size}"
    report = Report(name, {"items": items, "points": points})
    print(machine_line(machine()))
    with TemporaryDirectory(prefix="ranktower-bench-") as folder:
        course = prepare(items, given.out, Path(folder))
        for kind, begin in PLACES.items():
            with TemporaryDirectory(dir=folder) as home, begin(Path(home)) as place:
                report.rows += Trial(course, kind, place, Path(home), points).run()
            print(f"{kind}: done", flush=True)
    print("\n" + table(COLUMNS, cells(report.rows)) + "\n")
    report.bars += bars(report.rows)
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 1 if any(bar.verdict == "MISSED" for bar in report.bars) else 0


@dataclass(frozen=True)
class Releases:
    """Folders of releases, and what is asked of them."""

    bodies: Sequence[bytes]
    first: Path  # serves
    second: Path  # of the same bundle and ids, with other records: is damaged
    foreign: Path  # of another bundle
    mixed: Path  # sealed as one, its bundle foreign to its items


def prepare(items: int, out: Path, home: Path) -> Releases:
    made = make(Plan(items=items), out / "made")
    second, mixed = home / "second", home / "mixed"
    shutil.copytree(made.release, second)
    another(Course(made, Path(), Oracle([])), second)
    foreign = make(Plan(items=items // 2), out / "made").release
    shutil.copytree(second, mixed)
    shutil.rmtree(mixed / BUNDLE)
    shutil.copytree(foreign / BUNDLE, mixed / BUNDLE)
    release = read_release(second)
    seal_release(mixed, bundle_id=release.bundle_id, head=release.head)
    return Releases(bodies(made, BODIES, CANDIDATES, seed=5), made.release, second, foreign, mixed)


# --- stores that can be damaged --------------------------------------------------------------------------------------


class Place(Protocol):
    """A store, and the ways past it."""

    url: str
    store: ReleaseStore

    def pieces(self, release_id: str) -> list[str]:
        """Names of what a release consists of, its manifest among them."""

    def get(self, release_id: str, piece: str) -> bytes: ...

    def put(self, release_id: str, piece: str, content: bytes | None) -> None:
        """None: it is gone."""

    def point(self, release_id: str) -> None:
        """Make it current without any check."""


class Folder:
    """A `file://` store: pieces are files."""

    def __init__(self, home: Path) -> None:
        self._root = home / "store"
        self.url = f"file://{self._root}"
        self.store = FileStore(self.url)
        self._pointers: dict[str, bytes] = {}

    def pieces(self, release_id: str) -> list[str]:
        home = self._root / "releases" / release_id
        return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())

    def get(self, release_id: str, piece: str) -> bytes:
        return (self._root / "releases" / release_id / piece).read_bytes()

    def put(self, release_id: str, piece: str, content: bytes | None) -> None:
        path = self._root / "releases" / release_id / piece
        if content is None:
            path.unlink()
        else:
            replace_file(path, content)

    def remember(self, release_id: str) -> None:
        """What the pointer to it looks like, which `activate` has written."""
        self._pointers[release_id] = (self._root / CURRENT).read_bytes()

    def point(self, release_id: str) -> None:
        replace_file(self._root / CURRENT, self._pointers[release_id])


class Server:
    """A Redis: pieces are chunks, and the manifest in its hash."""

    def __init__(self, port: int) -> None:
        self.url = f"redis://{HOST}:{port}/0?prefix={PREFIX}"
        self.store = RedisStore(self.url)
        self._client = Redis(host=HOST, port=port)

    def pieces(self, release_id: str) -> list[str]:
        start = f"{PREFIX}:release:{release_id}:"
        return sorted([key.decode()[len(start) :] for key in self._client.scan_iter(f"{start}*")] + [RELEASE])

    def get(self, release_id: str, piece: str) -> bytes:
        if piece == RELEASE:
            found: Any = self._client.hget(f"{{{PREFIX}}}:releases", release_id)
        else:
            found = self._client.get(f"{PREFIX}:release:{release_id}:{piece}")
        return bytes(found)

    def put(self, release_id: str, piece: str, content: bytes | None) -> None:
        key = f"{PREFIX}:release:{release_id}:{piece}"
        if piece == RELEASE:
            place = f"{{{PREFIX}}}:releases"
            if content is None:
                self._client.hdel(place, release_id)
            else:
                self._client.hset(place, release_id, content)
        elif content is None:
            self._client.delete(key)
        else:
            self._client.set(key, content)

    def remember(self, release_id: str) -> None:
        """Nothing: the pointer is the name."""

    def point(self, release_id: str) -> None:
        self._client.set(f"{{{PREFIX}}}:current", release_id)
        self._client.publish(f"{{{PREFIX}}}:notices", release_id)


@contextmanager
def _folder(home: Path) -> Iterator[Folder]:
    yield Folder(home)


@contextmanager
def _server(home: Path) -> Iterator[Server]:
    with redis(None) as port:
        yield Server(port)


PLACES: dict[str, Any] = {"file": _folder, "redis": _server}


# --- damage ----------------------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """What is done to a release: pieces and what they become, None where they go."""

    kind: str
    of: str
    pieces: Mapping[str, bytes | None]


def flips(place: Place, release_id: str, points: int, rng: np.random.Generator) -> Iterator[Damage]:
    """One bit of one piece: half of them anywhere, half in a part of the item table that is drawn first."""
    header = read_header_of(place, release_id)
    for number in range(points):
        if number % 2:
            piece = str(rng.choice(place.pieces(release_id)))
            content = place.get(release_id, piece)
            at = int(rng.integers(len(content)))
            of = part_of(piece)
        else:
            of = str(rng.choice(["header", *header]))
            start, size = header.get(of, (0, 1024))
            piece, at = table_piece(place, release_id, int(start + rng.integers(size)))
            content, of = place.get(release_id, piece), f"{ITEMS}, {of}"
        bit = 1 << int(rng.integers(8))
        yield Damage("bit flipped", of, {piece: content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]})


def read_header_of(place: Place, release_id: str) -> dict[str, tuple[int, int]]:
    """Sections of the item table that are not empty: where each lies."""
    sections = Header.unpack(Path(ITEMS), place.get(release_id, table_piece(place, release_id, 0)[0])).sections
    return {name: (section.offset, section.size) for name, section in sections.items() if section.size}


def table_piece(place: Place, release_id: str, at: int) -> tuple[str, int]:
    """The piece that holds an octet of the item table, and where in it."""
    for piece in sorted((piece for piece in place.pieces(release_id) if piece.startswith(ITEMS)), key=_number):
        size = len(place.get(release_id, piece))
        if at < size:
            return piece, at
        at -= size
    raise ValueError(f"{ITEMS} of {release_id} ends {at} octets before that one")


def _number(piece: str) -> int:
    return int(piece.rpartition(":")[2]) if ":" in piece else 0


def cuts(place: Place, release_id: str, points: int, rng: np.random.Generator) -> Iterator[Damage]:
    """One piece ends early, anywhere from nothing to one octet less, or is gone."""
    pieces = place.pieces(release_id)
    for number in range(points):
        piece = pieces[number % len(pieces)]
        content = place.get(release_id, piece)
        length = [len(content) - 1, 0, int(rng.integers(len(content)))][number % 3] if number % 7 else None
        yield Damage("cut" if length is not None else "gone", part_of(piece),
                     {piece: None if length is None else content[:length]})  # fmt: skip


def swaps(place: Place, release_id: str, others: Mapping[str, str]) -> Iterator[Damage]:
    """Pieces of other releases of the same store under the name of this one; `others`: who they are, and names."""
    mine = place.pieces(release_id)
    for whose, name in others.items():
        theirs = {piece: place.get(name, piece) for piece in place.pieces(name)}
        for piece in sorted({*mine} & theirs.keys()):
            if theirs[piece] != place.get(release_id, piece):
                yield Damage("swapped", f"{part_of(piece)} of {whose}", {piece: theirs[piece]})
        for part in (BUNDLE, ITEMS):
            whole = {piece: theirs.get(piece) for piece in {*mine, *theirs} if piece.startswith(part)}
            if any(content != place.get(release_id, piece) for piece, content in whole.items() if piece in mine):
                yield Damage("swapped", f"all of {part} of {whose}", whole)
        whole = {piece: theirs.get(piece) for piece in {*mine, *theirs}}
        yield Damage("swapped", f"everything of {whose}", whole)
    chunks = [piece for piece in mine if piece.startswith(f"{ITEMS}:")]
    for one, two in pairwise(chunks):
        pair = {one: place.get(release_id, two), two: place.get(release_id, one)}
        yield Damage("swapped", f"two chunks of {ITEMS}", pair)


def part_of(piece: str) -> str:
    """Without the number of a chunk."""
    return re.sub(r":\d+$", "", piece)


# --- the trial -------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """All damages in one store."""

    releases: Releases
    kind: str
    place: Any
    home: Path
    points: int

    def run(self) -> list[dict[str, Any]]:
        place, made, rng = self.place, self.releases, np.random.default_rng(7)
        store = place.store
        foreign, second = store.publish(made.foreign), store.publish(made.second)
        mixed = store.publish(made.mixed)
        for name in (mixed, second, store.publish(made.first)):
            store.activate(name)
            place.remember(name)
        first = read_release(made.first).id
        others = {"the release that serves": first, "one of another bundle": foreign}
        damages = [*flips(place, second, self.points, rng), *cuts(place, second, self.points, rng)]
        damages += swaps(place, second, others)
        oracle = Oracle(made.bodies)  # which does not know the second release yet: an answer from it is wrong
        oracle.know(made.first)
        with (
            serving(place.url, WORKERS[self.kind], self.home) as replica,
            observed([replica], oracle),
            Line(replica.port) as line,
        ):
            rows = [self._try(line, first, second, damage) for damage in damages]
            rows.append(self._try(line, first, mixed, Damage("swapped", "bundle, sealed as one", {})))
            oracle.know(made.second)
            store.activate(second)
            taken = until_told(line, second) is None
        asked = replica.asked
        failed = sum(each.release is None for each in asked)
        wrong = sum(each.release is not None and each.wrong is not None for each in asked)
        rows.append({"kind": "answers", "store": self.kind, "asked": len(asked), "failed": failed, "wrong": wrong,
                     "whole_taken": taken})  # fmt: skip
        return rows

    def _try(self, line: Line, first: str, target: str, damage: Damage) -> dict[str, Any]:
        """Do it, activate, hear what the replica says, and put all back."""
        place = self.place
        before = {piece: place.get(target, piece) for piece in damage.pieces if piece in place.pieces(target)}
        for piece, content in damage.pieces.items():
            place.put(target, piece, content)
        refused = None
        try:
            place.store.activate(target)
        except RankTowerError as error:
            refused = str(error)
            place.point(target)
        reason = until_told(line, target)
        place.point(first)
        until_calm(line, first)
        for cut in (self.home / CACHE).glob(f"*/.{target}.partial"):  # whole chunks of it would not be fetched again
            shutil.rmtree(cut)
        for piece in damage.pieces:
            place.put(target, piece, before.get(piece))
        row = {"kind": "damage", "store": self.kind, "damage": damage.kind, "of": damage.of}
        return {**row, "activate": refused, "replica": reason, "taken": reason is None}


@contextmanager
def serving(url: str, workers: int, home: Path) -> Iterator[Replica]:
    port = free_port()
    flags = ("--workers", str(workers), "--cache-dir", str(home / CACHE))
    with server([*serve_command(url, port), *flags], port, None, ready=b"/readyz"):
        yield Replica(f"{workers} workers", port)


def until_told(line: Line, target: str) -> str | None:
    """Why the replica does not serve what the store names; None once it does."""
    state = until(line, lambda state: state["release"] == target or state["store"]["failure"] is not None)
    return None if state["release"] == target else str(state["store"]["failure"])


def until_calm(line: Line, release: str) -> None:
    """Wait until the replica serves the release, and nothing is wrong."""
    until(line, lambda state: state["release"] == release and state["store"]["failure"] is None)


def until(line: Line, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What /readyz says once it says that. Raises TimeoutError. A line leads to one worker: each hears by itself."""
    give_up_s = time.monotonic() + WITHIN_S
    while time.monotonic() < give_up_s:
        state: dict[str, Any] = orjson.loads(line.ask(READYZ).body)
        if reached(state):
            return state
        time.sleep(LOOK_S)
    raise TimeoutError(f"a replica has not followed its store within {WITHIN_S:g} s; it says {state}")


# --- the result ------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[Row]) -> list[Bar]:
    tried = [row for row in rows if row["kind"] == "damage"]
    answers = [row for row in rows if row["kind"] == "answers"]
    taken = sum(row["taken"] for row in tried)
    bad = sum(row["failed"] + row["wrong"] for row in answers)
    whole = sum(row["whole_taken"] for row in answers)
    return [
        Bar(name=f"damaged releases taken over, of {len(tried)}", value=taken, side="at most", limit=0),
        Bar(name="answers that failed or were wrong", value=bad, side="at most", limit=0),
        Bar(name="stores whose release, put back, is served", value=whole, side="at least", limit=len(answers)),
    ]


def cells(rows: Sequence[Row]) -> list[list[Any]]:
    """A line for each kind of damage to each part."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "damage":
            found.setdefault((row["store"], row["damage"], row["of"]), []).append(row)
    return [
        [*key, len(group), sum(row["activate"] is not None for row in group), sum(not row["taken"] for row in group),
         sum(row["taken"] for row in group), shortened(group[-1]["replica"] or "")]
        for key, group in found.items()
    ]  # fmt: skip


def shortened(reason: str) -> str:
    """Without names of files and releases, so that reasons are alike."""
    return re.sub(r"[^\s:]*/([\w.-]+)", r"\1", DIGITS.sub("N", reason))[:110]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damage", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny to try this command")
    parser.add_argument("--items", type=int, help="items of the catalogue, in place of the size's")
    parser.add_argument("--points", type=int, help="flips and cuts in each store, of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result and made releases")
    return parser


if __name__ == "__main__":
    sys.exit(main())
