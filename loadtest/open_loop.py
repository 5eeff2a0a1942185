"""The open loop: requests leave at times fixed beforehand, whether or not earlier ones were answered.

Every time is measured from the moment at which the request was meant to leave, not from when it could. A service that
stalls for a second therefore shows that second in every request that should have been sent meanwhile, which a closed
loop leaves out (coordinated omission). The client's own delay has a row of its own: where it is large, the client is
the limit and not the service.
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from loadtest.connection import Answer, AnswerError, Connection, request_bytes
from loadtest.errors import LoadTestError
from loadtest.report import Report, row_of_times, stage_rows, stage_times

TOLERANCE = 0.02  # of the target rate; a run further below it is invalid
MESSAGE_CHARS = 200
JSON = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When requests leave. Poisson arrivals are what many independent callers look like; even ones flatter p99."""

    rate: float  # requests per second
    seconds: float
    arrivals: Literal["poisson", "even"] = "poisson"
    seed: int = 7

    def offsets_s(self) -> npt.NDArray[np.float64]:
        """Seconds from the start, (rate * seconds,) ascending. The number is fixed, so the target rate is exact."""
        count = round(self.rate * self.seconds)
        if count < 1:
            raise LoadTestError(f"{self.rate:g} requests/s for {self.seconds:g} s is no request: raise one of them")
        if self.arrivals == "even":
            return np.arange(count) / self.rate
        return np.sort(np.random.default_rng(self.seed).uniform(0.0, self.seconds, count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds the client."""

    connections: int = 64  # more than that in flight waits here, and the wait counts
    timeout_s: float = 10.0  # from the intended time; a request over it failed


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and what became of it. Times are those of `time.monotonic`."""

    number: int  # of the body that was sent
    intended_at_s: float
    latency_ms: float  # since then
    lag_ms: float  # of it, before the request left
    answer: Answer | None  # None where none came


@dataclass(slots=True)
class _Tally:
    """What came back so far."""

    latencies_ms: list[float] = field(default_factory=list)  # intended send -> answer, failed ones too
    service_ms: list[float] = field(default_factory=list)  # actual send -> answer
    lags_ms: list[float] = field(default_factory=list)  # intended send -> actual send
    stages_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: Counter[str] = field(default_factory=Counter)
    last_answer_s: float = 0.0  # from the start
    sending_s: float = 0.0  # for how long requests were sent


class _Pool:
    """Idle connections, last used first; new ones are made while fewer than the limit exist."""

    def __init__(self, host: str, port: int, limit: int) -> None:
        self._host, self._port = host, port
        self._idle: list[Connection] = []
        self._free = asyncio.Semaphore(limit)

    async def ask(self, request: bytes, on_sent: Callable[[], None]) -> Answer:
        """Send on an idle connection; `on_sent` is called when one is there and the bytes leave."""
        async with self._free:
            connection = self._kept() or await Connection.open(self._host, self._port)
            on_sent()
            try:
                answer = await connection.ask(request)
            except BaseException:  # cancelled too: half an answer may be left in it
                connection.close()
                raise
            if answer.keep:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    def _kept(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.ended:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class OpenLoop:
    """One run against one service."""

    def __init__(
        self,
        url: str,
        bodies: Sequence[bytes],
        schedule: Schedule,
        limits: Limits,
        media_type: str = JSON,
        hear: Callable[[Exchange], None] = lambda _: None,
    ) -> None:
        host, port = _address(url)
        self._url = url
        self._requests = [request_bytes(host, port, "/v1/rank", body, media_type) for body in bodies]
        self._schedule = schedule
        self._limits = limits
        self._hear = hear
        self._pool = _Pool(host, port, limits.connections)
        self._tally = _Tally()

    async def run(
        self, release: str, on_time: Callable[[float], None], enough: Callable[[], bool] = lambda: False
    ) -> Report:
        """Send everything, wait for every answer or its timeout. `on_time` hears the seconds as they pass; nothing
        more is sent once `enough` says so."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        try:
            async with asyncio.TaskGroup() as group:
                for offset_s, number in zip(
                    self._schedule.offsets_s().tolist(), itertools.cycle(range(len(self._requests))), strict=False
                ):
                    await asyncio.sleep(started_at + offset_s - loop.time())
                    if enough():
                        self._tally.sending_s = offset_s
                        break
                    group.create_task(self._one(number, started_at, offset_s))
                    on_time(offset_s)
                else:
                    self._tally.sending_s = self._schedule.seconds
        finally:
            self._pool.close()
        return self._report(release)

    async def _one(self, number: int, started_at: float, offset_s: float) -> None:
        loop = asyncio.get_running_loop()
        intended_at = started_at + offset_s
        sent_at = intended_at
        answer: Answer | None = None

        def sent() -> None:
            nonlocal sent_at
            sent_at = loop.time()

        try:
            async with asyncio.timeout_at(intended_at + self._limits.timeout_s):
                answer = await self._pool.ask(self._requests[number], sent)
        except TimeoutError:
            self._tally.failures[f"no answer within {self._limits.timeout_s:g} s"] += 1
        except (OSError, AnswerError) as error:
            self._tally.failures[f"{type(error).__name__}: {error}"[:MESSAGE_CHARS]] += 1
        else:
            self._count(answer)
        now = loop.time()
        latency_ms, lag_ms = (now - intended_at) * 1e3, (sent_at - intended_at) * 1e3
        self._tally.latencies_ms.append(latency_ms)
        self._tally.service_ms.append((now - sent_at) * 1e3)
        self._tally.lags_ms.append(lag_ms)
        self._tally.last_answer_s = max(self._tally.last_answer_s, now - started_at)
        self._hear(Exchange(number, intended_at, latency_ms, lag_ms, answer))

    def _count(self, answer: Answer) -> None:
        if answer.status != 200:
            body = answer.body[:MESSAGE_CHARS].decode(errors="replace")
            self._tally.failures[f"status {answer.status}: {body}"] += 1
            return
        for name, time_ms in stage_times(answer.server_timing).items():
            self._tally.stages_ms[name].append(time_ms)

    def _report(self, release: str) -> Report:
        tally = self._tally
        failed = tally.failures.total()
        return Report(
            loop="open",
            url=self._url,
            release=release,
            seconds=max(tally.sending_s, tally.last_answer_s),
            target_rate=len(tally.latencies_ms) / max(tally.sending_s, 1e-9),
            rows=(
                row_of_times("rank", "route", np.array(tally.latencies_ms), failed),
                *stage_rows(tally.stages_ms),
                row_of_times("send to answer", "client", np.array(tally.service_ms)),
                row_of_times("send lag", "client", np.array(tally.lags_ms)),
            ),
            failures=dict(tally.failures),
        )


def invalid(report: Report) -> str | None:
    """Why an open-loop run says nothing about latency at its rate; None when it is valid."""
    if report.achieved_rate >= report.target_rate * (1.0 - TOLERANCE):
        return None
    return (
        f"invalid run: {report.achieved_rate:,.1f} answers/s of {report.target_rate:,.1f}/s wanted; "
        "its percentiles describe a growing queue, not the service: lower the rate"
    )


def run_open_loop(
    url: str,
    bodies: Sequence[bytes],
    schedule: Schedule,
    *,
    release: str,
    limits: Limits | None = None,
    media_type: str = JSON,
    on_time: Callable[[float], None] = lambda _: None,
    hear: Callable[[Exchange], None] = lambda _: None,
    enough: Callable[[], bool] = lambda: False,
) -> Report:
    """Run in an event loop of its own; `hear` is told of every request as it ends. The loop's selector is select(),
    whose timeouts are exact to microseconds: epoll rounds each up to a millisecond, which would be added to every
    latency."""
    run = OpenLoop(url, bodies, schedule, limits or Limits(), media_type, hear)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(run.run(release, on_time, enough))


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise LoadTestError(f"{url}: the open loop speaks plain HTTP to http://HOST:PORT, without a path")
    return parts.hostname, parts.port or 80
