"""Bring the contestants of the benchmark of the service to the start: releases, servers, Redis and requests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson

from benchmarks.arrow import arrow_body, arrow_items
from benchmarks.checks import TOLERANCE, Referee, Stored, drawn
from benchmarks.client import ARROW, JSON, AnswerError, Line, request_bytes
from benchmarks.contestants import Contestant, Course, Fetching, Ranking, Served
from benchmarks.made import Made, Plan, make, stored_records
from benchmarks.processes import cores, python, redis, server
from benchmarks.rivals import plain
from benchmarks.traffic import bodies
from kernel.record import Dtype
from loadtest.serving import HOST, end, free_port, serve_command

FEAST_PYTHON = Path("var/bench/peers/feast/bin/python")
FEAST_ITEMS = 100_000  # Feast writes slowly; fewer items than the others have are in its favour

Requests = dict[int, list[bytes]]


class AbsentError(RuntimeError):
    """A contestant cannot take part; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the benchmark was asked for."""

    items: int
    dtype: Dtype
    course: Course
    folder: Path  # for made releases


class Lineup:
    """What contestants share, each part made when first wanted. All of it ends with `stack`."""

    def __init__(self, options: Options, stack: ExitStack) -> None:
        self.options, self.course, self.stack = options, options.course, stack
        self.cores = cores()
        self.server_core = self.cores[0] if self.cores else None
        self.client_core = self.cores[1] if self.cores else None
        self._ports: dict[str, int] = {}
        self._bodies: dict[str, Requests] = {}
        self._referees: dict[str, Referee] = {}

    def made(self, kind: str = "maxsim", ids: str = "int") -> Made:
        plan = Plan(kind=kind, ids=ids, dtype=self.options.dtype, items=self.options.items)  # type: ignore[arg-type]
        return make(plan, self.options.folder)

    @cached_property
    def scratch(self) -> Path:
        return Path(self.stack.enter_context(TemporaryDirectory(prefix="ranktower-bench-")))

    @cached_property
    def redis(self) -> int:
        """Port of a Redis beside the client, whose core is idle while a server waits for it."""
        return self.stack.enter_context(redis(self.client_core))

    def bodies(self, made: Made) -> Requests:
        """JSON bodies by number of candidates; both heads are asked the same."""
        if made.plan.ids not in self._bodies:
            self._bodies[made.plan.ids] = {
                length: bodies(made, self.course.total, length, seed=0) for length in self.course.lengths
            }
        return self._bodies[made.plan.ids]

    def referee(self, made: Made) -> Referee:
        if made.plan.name not in self._referees:
            self._referees[made.plan.name] = Referee(made)
        return self._referees[made.plan.name]

    def our_port(self, made: Made, *options: str) -> int:
        """The port of RankTower on that release, as its users start it, with one worker."""
        name = " ".join([made.plan.name, *options])
        if name not in self._ports:
            port = self._ports[name] = free_port()
            command = [*serve_command(made.store, port), "--workers", "1", *options]
            self.stack.enter_context(server(command, port, self.server_core, ready=b"/readyz"))
        return self._ports[name]

    def rival_port(self, module: str, *arguments: str) -> int:
        port = free_port()
        command = python(f"benchmarks.rivals.{module}", "--port", str(port), *arguments)
        self.stack.enter_context(server(command, port, self.server_core))
        return port


# --- ours ------------------------------------------------------------------------------------------------------------


def _ours(lineup: Lineup, name: str, made: Made, *options: str) -> Ranking:
    found = dict(lineup.bodies(made))
    return Ranking(
        name=name,
        port=lineup.our_port(made, *options),
        course=lineup.course,
        requests=_requests(found),
        bodies=found,
        referee=lineup.referee(made),
        stored=Stored(lambda rows: stored_records(made, rows), TOLERANCE[made.plan.dtype]),
    )


def _ours_cached(lineup: Lineup, name: str) -> Contestant:
    """The users of the shortest lists ask all the lists, and have asked before: every look into the cache is a hit."""
    contestant = _ours(lineup, name, lineup.made(), "--user-cache", str(lineup.course.total))
    shortest = [orjson.loads(body) for body in contestant.bodies[min(lineup.course.lengths)]]
    asked: Requests = {}
    for length, part in contestant.bodies.items():
        asked[length] = [_asked_by(user, body) for user, body in zip(shortest, part, strict=True)]
    contestant.bodies, contestant.requests = asked, _requests(asked)
    with Line(contestant.port) as line:
        for request in contestant.requests[min(lineup.course.lengths)]:
            line.ask(request)
    return contestant


def _asked_by(user: Mapping[str, Any], body: bytes) -> bytes:
    """The body with another user."""
    return orjson.dumps({**orjson.loads(body), **{field: user[field] for field in ("user", "context", "history")}})


def _ours_arrow(lineup: Lineup, name: str) -> Contestant:
    contestant = _ours(lineup, name, lineup.made())
    shortest = min(lineup.course.lengths)
    probe = request_bytes(arrow_body(contestant.bodies[shortest][0]), media_type=ARROW)
    with Line(contestant.port) as line:
        answer = line.ask(probe)
    if answer.status != 200:
        reason = "takes no Arrow bodies" if answer.status == 415 else answer.body[:200].decode(errors="replace")
        raise AbsentError(f"the service answers {answer.status}: {reason}")
    contestant.requests = {
        length: [request_bytes(arrow_body(body), media_type=ARROW) for body in part]
        for length, part in contestant.bodies.items()
    }
    contestant.items = arrow_items
    return contestant


def _requests(found: Requests) -> Requests:
    return {length: [request_bytes(body, media_type=JSON) for body in part] for length, part in found.items()}


# --- rivals ----------------------------------------------------------------------------------------------------------


def _rival(lineup: Lineup, name: str, port: int, dtype: str) -> Ranking:
    made = lineup.made()
    found = lineup.bodies(made)
    return Ranking(
        name=name,
        port=port,
        course=lineup.course,
        requests=_requests(found),
        bodies=found,
        referee=lineup.referee(made),
        stored=Stored(drawn(made, dtype), TOLERANCE["f32"]),  # both compute in float32 on what they hold
    )


def _plain(lineup: Lineup, name: str) -> Contestant:
    made, url = lineup.made(), f"redis://{HOST}:{lineup.redis}/0"
    plain.load(url, made.ids, np.load(made.vectors(), mmap_mode="r", allow_pickle=False))
    port = lineup.rival_port("plain", "--bundle", str(made.bundle_folder), "--redis", url)
    return _rival(lineup, name, port, "float16")


def _plain_local(lineup: Lineup, name: str) -> Contestant:
    made = lineup.made()
    port = lineup.rival_port("plain_local", "--bundle", str(made.bundle_folder), "--vectors", str(made.vectors()))
    return _rival(lineup, name, port, "float32")


def _constant(lineup: Lineup, name: str, port: int) -> Contestant:
    requests = _requests(lineup.bodies(lineup.made()))
    return Served(name=name, port=port, course=lineup.course, requests=requests)


def _our_answer(lineup: Lineup) -> bytes:
    made = lineup.made()
    with Line(lineup.our_port(made)) as line:
        answer = line.ask(request_bytes(lineup.bodies(made)[max(lineup.course.lengths)][0]))
    if answer.status != 200:
        raise AnswerError(f"RankTower answers {answer.status}: {answer.body[:300].decode(errors='replace')}")
    return answer.body


def _empty(lineup: Lineup, name: str) -> Contestant:
    path = lineup.scratch / "answer.json"
    path.write_bytes(_our_answer(lineup))
    return _constant(lineup, name, lineup.rival_port("empty", "--answer", str(path)))


def _client_alone(lineup: Lineup, name: str) -> Contestant:
    return _constant(lineup, name, lineup.rival_port("trivial", "--bytes", str(len(_our_answer(lineup)))))


def _feast(lineup: Lineup, name: str) -> Contestant:
    if not FEAST_PYTHON.is_file():
        raise AbsentError("run make bench-peers")
    made = lineup.made()
    items = min(made.plan.items, FEAST_ITEMS)
    command = [str(FEAST_PYTHON), str(Path(__file__).with_name("rivals") / "feast_fetch.py")]
    command += ["--vectors", str(made.vectors()), "--items", str(items), "--redis", f"{HOST}:{lineup.redis}"]
    log = lineup.scratch / "feast.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--folder", str(lineup.scratch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink
        )
    lineup.stack.callback(end, process)
    if lineup.server_core is not None:
        os.sched_setaffinity(process.pid, lineup.server_core)
    contestant = Fetching(name=name, process=process, log=log, course=lineup.course)
    contestant.read()  # it says when everything is written
    return contestant


@dataclass(frozen=True, slots=True)
class Entry:
    """How a contestant is started, and what it is."""

    start: Callable[[Lineup, str], Contestant]
    meaning: str
    ours: bool = False


ENTRIES = {
    "ours": Entry(lambda all_, name: _ours(all_, name, all_.made()), "RankTower, JSON, MaxSim", True),
    "ours-cross": Entry(
        lambda all_, name: _ours(all_, name, all_.made("cross_attention")), "RankTower, JSON, cross-attention", True
    ),
    "ours-strings": Entry(
        lambda all_, name: _ours(all_, name, all_.made(ids="string")), "RankTower, JSON, MaxSim, string ids", True
    ),
    "ours-arrow": Entry(_ours_arrow, "RankTower, Arrow in and out, MaxSim", True),
    "ours-cached": Entry(_ours_cached, "RankTower, JSON, MaxSim, users from the cache", True),
    "plain": Entry(_plain, "typed FastAPI, Redis MGET, NumPy"),
    "plain-local": Entry(_plain_local, "raw FastAPI, matrix in the process, NumPy"),
    "empty": Entry(_empty, "FastAPI, body parsed, constant answer"),
    "feast-fetch": Entry(_feast, "Feast online store, fetch alone, no HTTP"),
    "client-alone": Entry(_client_alone, "blocking socket, constant answer: the client's own cost"),
}


def start(lineup: Lineup, names: Sequence[str]) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that can take part, and why the others cannot."""
    present: list[Contestant] = []
    absent = {}
    for name in names:
        try:
            present.append(ENTRIES[name].start(lineup, name))
        except AbsentError as reason:
            absent[name] = str(reason)
    return present, absent
