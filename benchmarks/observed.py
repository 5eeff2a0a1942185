"""Replicas under steady load: each answer checked against an oracle of the release it names, and what they say of it.

Requests leave one after the other with pauses, some on each connection, so that all workers of a replica are asked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import orjson

from benchmarks.client import AnswerError, Line, request_bytes
from benchmarks.report import quantile
from service.ranker import Ranker

PAUSE_S = 0.01  # between two requests to a replica
ON_A_LINE = 5  # requests on one connection
LOOK_S = 0.2  # between two looks at what a replica says
STALENESS = re.compile(rb"^ranktower_staleness_seconds (\S+)", re.MULTILINE)


class Asked(NamedTuple):
    """One request and what became of it."""

    at_s: float  # monotonic, when it left
    ms: float
    release: str | None  # that the answer names, None where there was none
    wrong: str | None  # what is wrong with the answer, or why there was none


class Said(NamedTuple):
    """What a replica said of itself."""

    at_s: float
    staleness_s: float
    failure: str | None  # of /readyz


class Oracle:
    """The right answers of each release to each request."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        self.requests = [request_bytes(body) for body in bodies]
        self._bodies = bodies
        self._right: dict[str, list[list[tuple[Any, np.float32]]]] = {}

    def know(self, folder: Path) -> None:
        """Rank all requests with the release in a folder, in this process."""
        ranker = Ranker.open(folder)
        rankings = [ranker.rank(ranker.decoders.rank(body)) for body in self._bodies]
        self._right[ranker.release] = [
            list(zip(ranking.ids, ranking.scores.astype(np.float32), strict=True)) for ranking in rankings
        ]

    def check(self, number: int, answer: Mapping[str, Any]) -> str | None:
        """What is wrong with the answer to a request, None where nothing is."""
        right = self._right.get(answer["release"])
        if right is None:
            return f"release {answer['release']} was never current"
        found = [(item["id"], np.float32(item["score"])) for item in answer["items"]]
        return None if found == right[number] else f"not the items and scores of release {answer['release']}"


@dataclass
class Replica:
    """One service, and all that was heard of it so far. Lists only grow: they may be read meanwhile."""

    name: str
    port: int
    asked: list[Asked] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)

    def load(self, oracle: Oracle, stopping: Event) -> None:
        """Ask until told to stop; whatever fails is written down."""
        line: Line | None = None
        for number in count():
            if stopping.wait(PAUSE_S):
                break
            which = number % len(oracle.requests)
            if line is not None and number % ON_A_LINE == 0:
                line.__exit__(None, None, None)
                line = None
            at_s = time.monotonic()
            try:
                line = line or Line(self.port)
                answer = line.ask(oracle.requests[which])
            except (OSError, AnswerError) as error:
                self.asked.append(Asked(at_s, 1e3 * (time.monotonic() - at_s), None, repr(error)))
                line = None
                continue
            ms = 1e3 * (time.monotonic() - at_s)
            if answer.status != 200:
                self.asked.append(Asked(at_s, ms, None, f"status {answer.status}"))
                continue
            document = orjson.loads(answer.body)
            self.asked.append(Asked(at_s, ms, document["release"], oracle.check(which, document)))
        if line is not None:
            line.__exit__(None, None, None)

    def watch(self, stopping: Event) -> None:
        while not stopping.wait(LOOK_S):
            state = orjson.loads(self._get("/readyz"))["store"]
            found = STALENESS.search(self._get("/metrics"))
            self.said.append(Said(time.monotonic(), float(found[1]) if found else np.nan, state["failure"]))

    def _get(self, path: str) -> bytes:
        with Line(self.port) as line:
            return line.ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).body

    # --- what was heard between two moments

    def asked_within(self, since_s: float, until_s: float) -> list[Asked]:
        return [each for each in list(self.asked) if since_s <= each.at_s < until_s]

    def said_within(self, since_s: float, until_s: float) -> list[Said]:
        return [each for each in list(self.said) if since_s <= each.at_s < until_s]

    def last_other_s(self, release: str) -> float:
        """When an answer named another release for the last time."""
        return max((each.at_s for each in list(self.asked) if each.release not in (release, None)), default=0.0)


@contextmanager
def observed(replicas: Sequence[Replica], oracle: Oracle) -> Iterator[None]:
    """All replicas are asked and watched within the block; raises what ended that early."""
    stopping = Event()
    with ThreadPoolExecutor(2 * len(replicas)) as pool:
        jobs = [pool.submit(each.load, oracle, stopping) for each in replicas]
        jobs += [pool.submit(each.watch, stopping) for each in replicas]
        try:
            yield
        finally:
            stopping.set()
        for job in jobs:
            job.result()


def p99_ms(asked: Sequence[Asked]) -> float:
    return quantile([each.ms for each in asked], 0.99)
