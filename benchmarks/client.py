"""A closed loop on one blocking connection that sends ready-made bytes, so that the client costs microseconds."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from types import TracebackType

from benchmarks.report import no_collection
from loadtest.serving import HOST

TIMEOUT_S = 30.0
ROOM = 1 << 20  # bytes of an answer, at most
JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TIMING = re.compile(rb"\r\nserver-timing: *([^\r]*)", re.IGNORECASE)


class AnswerError(RuntimeError):
    """An answer that is not what was asked for: the benchmark that got it is void."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as bytes."""

    status: int
    head: bytes
    body: bytes

    @property
    def server_timing(self) -> str:
        found = _TIMING.search(self.head)
        return found[1].decode("latin-1") if found else ""


@dataclass(slots=True)
class Timings:
    """What a closed loop measured."""

    round_trips_us: list[float] = field(default_factory=list)
    server_timings: list[str] = field(default_factory=list)


def request_bytes(body: bytes, *, path: str = "/v1/rank", media_type: str = JSON) -> bytes:
    """A whole POST request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media_type}\r\nAccept: {media_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


class Line:
    """One keep-alive connection to a server on this machine."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._room = bytearray(ROOM)
        self._view = memoryview(self._room)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    def ask(self, request: bytes) -> Answer:
        """Send a whole request, read the whole answer. Raises AnswerError when the peer closes or speaks otherwise."""
        self._socket.sendall(request)
        filled, ends, needed = 0, -1, 1
        while filled < needed:
            count = self._socket.recv_into(self._view[filled:])
            if not count:
                raise AnswerError(f"the connection ended after {filled} bytes of an answer")
            filled += count
            if ends < 0:
                ends = self._room.find(b"\r\n\r\n", 0, filled)
                needed = filled + 1 if ends < 0 else ends + 4 + self._length(ends)
        return Answer(int(self._room[9:12]), bytes(self._view[:ends]), bytes(self._view[ends + 4 : filled]))

    def _length(self, ends: int) -> int:
        found = _LENGTH.search(self._room, 0, ends)
        if found is None or ends + 4 + int(found[1]) > ROOM:
            raise AnswerError(f"an answer without a Content-Length below {ROOM}: {bytes(self._view[:ends])[:200]!r}")
        return int(found[1])


def closed_loop(line: Line, requests: Sequence[bytes], *, warm_up: int) -> Timings:
    """Ask one after the other, the first `warm_up` without a clock. Raises AnswerError on any status but 200."""
    timings = Timings()
    for request in requests[:warm_up]:
        refuse_failure(line.ask(request))
    with no_collection():
        for request in requests[warm_up:]:
            start = perf_counter_ns()
            answer = line.ask(request)
            timings.round_trips_us.append((perf_counter_ns() - start) / 1e3)
            refuse_failure(answer)
            timings.server_timings.append(answer.server_timing)
    return timings


def refuse_failure(answer: Answer) -> None:
    """Raise AnswerError on any status but 200."""
    if answer.status != 200:
        raise AnswerError(f"status {answer.status}: {answer.body[:300].decode(errors='replace')}")
