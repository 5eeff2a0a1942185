"""The short way of a ranking: from the parser to the answer and back to the socket, with nothing in between.

A task, a scope, a request, a response and a second write take 100 us of a ranking that takes 1,000. A request goes
without them when it is as nearly all are: a POST over HTTP/1.1 that stays open, a body of known length, one request at
a time on its connection, few enough candidates for the event loop. Whatever else it turns out to be, wrong above all,
it goes the ordinary way through the application as though nothing had been tried: what an error is, is decided there
alone. Middleware of the application does not see the short way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from model.errors import RankTowerError
from service.admission import Permit
from service.answers import Answer, Answerer, answer_batch, answer_rank
from service.errors import ServiceError
from service.media import form_of, is_loaded, spoken
from service.telemetry import StageClock

if TYPE_CHECKING:
    from service.app import Service

RANK, BATCH = "/v1/rank", "/v1/rank:batch"
ANSWERERS: dict[bytes, Answerer] = {RANK.encode(): answer_rank, BATCH.encode(): answer_batch}
STATE = "at_once"  # the key under which the application hands its queue to the server
ARRIVED = "arrived_ns"  # the key of a scope's state under which a request that went round says since when it is here
LONGEST_TYPES = 256  # octets of Content-Type and Accept that are kept in mind
UNUSUAL = frozenset({b"content-encoding", b"transfer-encoding", b"expect", b"upgrade"})


log = logging.getLogger(__name__)


@dataclass(slots=True)
class Asked:
    """A request on the short way."""

    path: str
    answerer: Answerer
    form: str  # of the body
    arrived_ns: int
    parts: list[bytes] = field(default_factory=list)
    queued: bool = False
    whole: bool = False
    clock: StageClock = field(init=False)  # from when it is here whole

    @property
    def body(self) -> bytes:
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)


class AtOnce:
    """The requests on the short way that are here whole: one is answered in every turn of the event loop.

    Not sooner: those that came in the same turn shall all stand in the queue before the first is let in, as they do
    before `Admission`, whose bounds hold for both.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[RankProtocol, Asked]] = deque()

    def asked(self, path: bytes, headers: list[tuple[bytes, bytes]]) -> Asked | None:
        """None where these headers ask for the ordinary way."""
        found = dict(headers)
        size = found.get(b"content-length", b"")
        if len(found) != len(headers) or not UNUSUAL.isdisjoint(found):
            return None
        if not size.isdigit() or len(size) > 18 or int(size) > self._service.settings.max_body_bytes:
            return None
        content_type, accept = (found.get(name, b"").decode("latin-1") for name in (b"content-type", b"accept"))
        if len(content_type) + len(accept) > LONGEST_TYPES or not is_loaded(content_type, accept):
            return None
        way = _way(path, content_type, accept)
        return None if way is None else Asked(path.decode(), *way, perf_counter_ns())

    def wait(self, protocol: RankProtocol, asked: Asked) -> None:
        """Take a request into the queue; where that is full, the ordinary way refuses it."""
        if not self._service.admission.has_room:
            protocol.go_round()
            return
        asked.clock = StageClock()
        asked.queued = True
        self._service.admission.waiting += 1
        self._queue.append((protocol, asked))
        if len(self._queue) == 1:
            self._loop.call_soon(self._turn)

    def forget(self, asked: Asked) -> None:
        """Its caller is gone, or it went round: it waits here no longer. Its turn of the loop passes unused."""
        if asked.queued:
            asked.queued = False
            self._service.admission.waiting -= 1

    def _turn(self) -> None:
        protocol, asked = self._queue.popleft()
        if self._queue:
            self._loop.call_soon(self._turn)
        if not asked.queued:
            return
        self.forget(asked)
        answer = self._answer(asked)
        if answer is None:
            protocol.go_round()
            return
        try:
            protocol.reply(answer, asked.clock)
        except Exception:
            log.exception("an answer could not be written: its connection is closed")
            protocol.transport.close()
            return
        self._service.count(answer, asked.clock)  # after the answer has left
        self._service.telemetry.observe_answer(asked.path, 200, (perf_counter_ns() - asked.arrived_ns) / 1e9)

    def _answer(self, asked: Asked) -> Answer | None:
        """None where it must wait for its turn, would hold up the loop, or is wrong."""
        service, answerer, body = self._service, asked.answerer, asked.body
        serving = service.refresher.standing.serving
        if serving is None or service.admission.is_full:
            return None
        try:
            if not service.is_quick(serving, answerer, body, asked.form):
                return None
            asked.clock.lap("queue")
            return answerer(Permit(asked.arrived_ns), serving, body, service.limits, asked.clock)
        except RankTowerError:  # comes up again on the ordinary way, which answers with it
            return None
        except Exception:
            log.exception("a request failed on the short way and goes the ordinary one")
            return None


@lru_cache(maxsize=64)
def _way(path: bytes, content_type: str, accept: str) -> tuple[Answerer, str] | None:
    """The answerer, and the form of the body; None where nobody reads it."""
    answerer = ANSWERERS[path]
    try:
        form = form_of(content_type, answerer)
    except ServiceError:
        return None
    return spoken(accept, answerer, form), form


class _Plain:
    """What uvicorn asks its parser about a request on the short way, when the parser may be at the next one."""

    def get_http_version(self) -> str:
        return "1.1"

    def get_method(self) -> bytes:
        return b"POST"

    def should_keep_alive(self) -> bool:
        return True

    def should_upgrade(self) -> bool:
        return False


class RankProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the short way: a request on it has no cycle, which is how uvicorn calls its tasks."""

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], *rest: Any, **more: Any) -> None:
        super().__init__(config, server_state, app_state, *rest, **more)
        self._at_once: AtOnce | None = app_state.get(STATE)
        self.asked: Asked | None = None

    def on_message_begin(self) -> None:
        if self.asked is not None:  # another follows before its answer: uvicorn keeps their order
            self.go_round()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._at_once is not None and self._is_plain():
            self.asked = self._at_once.asked(self.url, self.headers)
        if self.asked is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.asked is None:
            super().on_body(body)
        else:
            self.asked.parts.append(body)

    def on_message_complete(self) -> None:
        if self.asked is None:
            super().on_message_complete()
        elif self._at_once is not None:
            self.asked.whole = True
            self._at_once.wait(self, self.asked)

    def shutdown(self) -> None:
        if self.asked is not None:
            self.go_round()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def reply(self, answer: Answer, clock: StageClock) -> None:
        """Send the answer, in one write, and be ready for the next request."""
        self._forget()
        lines = [b"HTTP/1.1 200 OK\r\n", *(b"%s: %s\r\n" % header for header in self.server_state.default_headers)]
        lines.append(
            b"content-length: %d\r\ncontent-type: %s\r\nserver-timing: %s\r\nx-ranktower-release: %s\r\n\r\n"
            % (len(answer.body), answer.media_type.encode(), clock.header().encode(), answer.release.encode())
        )
        self.transport.write(b"".join([*lines, answer.body]))
        self.on_response_complete()

    def go_round(self) -> None:
        """Send the request, as far as it has come, the ordinary way."""
        asked = self._forget()
        if asked is None or self.transport.is_closing():
            return
        self.scope["state"][ARRIVED] = asked.arrived_ns  # deadlines count from then
        parser, self.parser = self.parser, _Plain()  # type: ignore[assignment]
        try:
            super().on_headers_complete()
            for part in asked.parts:
                super().on_body(part)
            if asked.whole:
                super().on_message_complete()
        finally:
            self.parser = parser

    def _forget(self) -> Asked | None:
        asked, self.asked = self.asked, None
        if asked is not None and self._at_once is not None:
            self._at_once.forget(asked)
        return asked

    def _is_plain(self) -> bool:
        parser = self.parser
        return (
            self.url in ANSWERERS
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
        )
