"""Those who take part in the benchmark of the service: how each is asked and timed, and how its answers are checked."""

from __future__ import annotations

import json
import selectors
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.checks import Item, Referee, Stored, json_items
from benchmarks.client import AnswerError, Line, Timings, closed_loop, refuse_failure

CHECKED = 3  # requests of each contestant and length that the referee looks at
FEAST_WITHIN_S = 600.0
FEAST_SHARE = 10  # a tenth of the others' requests: a fetch takes so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What everybody is asked: `rounds` times `count` requests, after `warm_up`, for each number of candidates."""

    lengths: tuple[int, ...]
    rounds: int
    count: int
    warm_up: int

    @property
    def a_round(self) -> int:
        return self.count + self.warm_up

    @property
    def total(self) -> int:
        return self.rounds * self.a_round


class Contestant(Protocol):
    """Somebody to be timed."""

    @property
    def name(self) -> str: ...

    def run(self, length: int, number: int) -> Timings:
        """The times of round `number` with `length` candidates. Raises AnswerError."""

    def check(self) -> int:
        """Have a sample of answers checked; how many. Raises AnswerError."""


@dataclass(slots=True, kw_only=True)
class Served:
    """A contestant behind HTTP, on a new connection in every round: servers close one that waits for its turn."""

    name: str
    port: int
    course: Course
    requests: Mapping[int, Sequence[bytes]]  # by number of candidates: whole requests

    def run(self, length: int, number: int) -> Timings:
        start = number * self.course.a_round
        requests = self.requests[length][start : start + self.course.a_round]
        with Line(self.port) as line:
            return closed_loop(line, requests, warm_up=self.course.warm_up)

    def check(self) -> int:
        return 0  # a constant answer


@dataclass(slots=True, kw_only=True)
class Ranking(Served):
    """One that ranks, so that its answers can be wrong."""

    bodies: Mapping[int, Sequence[bytes]]  # the same requests as JSON
    referee: Referee
    stored: Stored
    items: Callable[[bytes], list[Item]] = json_items

    def check(self) -> int:
        with Line(self.port) as line:
            for length, requests in self.requests.items():
                for request, body in zip(requests[:CHECKED], self.bodies[length], strict=False):
                    answer = line.ask(request)
                    refuse_failure(answer)
                    self.referee.check(self.name, body, self.items(answer.body), self.stored)
        return sum(len(requests[:CHECKED]) for requests in self.requests.values())


@dataclass(slots=True, kw_only=True)
class Fetching:
    """A process that times its own fetches, and compares what it fetched with what it wrote: Feast's online store."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path  # its standard error
    course: Course
    answered: int = field(default=0)

    def run(self, length: int, number: int) -> Timings:
        count, warm_up = (max(1, share // FEAST_SHARE) for share in (self.course.count, self.course.warm_up))
        order = {"candidates": length, "count": count, "warm_up": warm_up, "seed": number}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        times: list[float] = self.read()["times_us"]
        self.answered += 1
        return Timings(times)

    def check(self) -> int:
        if not self.answered:
            self.run(min(self.course.lengths), 0)
        return 1

    def read(self) -> dict[str, Any]:
        """The next line that it prints. Raises AnswerError when it ends, waits too long or prints anything else."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if waiting.select(FEAST_WITHIN_S) else b""
        if not line.startswith(b"{"):
            words = self.log.read_text(errors="replace")[-1000:]
            raise AnswerError(f"{self.name} printed {line[:200]!r}; its last words:\n{words}")
        document: dict[str, Any] = json.loads(line)
        return document
