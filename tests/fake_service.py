"""A service by hand, for tests of what stands in front of one: it names ids and answers as it is told to."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TIMING = "queue;dur=0.010, decode;dur=0.120, score;dur=0.456"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer."""

    status: int = 200
    body: Mapping[str, Any] | bytes = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


def ranking(ids: list[Any]) -> dict[str, Any]:
    """A ranking of these ids in this order, scores falling from 1."""
    items = [{"id": one, "score": 1.0 - n / 100, "position": n} for n, one in enumerate(ids)]
    return {"release": "r1", "items": items, "missing": []}


def rank_in_order(_: int, body: dict[str, Any]) -> Reply:
    """The candidates as they came."""
    ids = body["candidates"][: body.get("top_k", 100)]
    return Reply(body=ranking(ids), headers={"Server-Timing": TIMING})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Callers that hang up are part of the tests; anything else is not."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


SAMPLE = {"release": "r1", "items": list(range(100, 400)), "users": list(range(50))}


@contextmanager
def fake_service(
    answer: Callable[[int, dict[str, Any]], Reply] = rank_in_order, sample: Mapping[str, Any] | bytes = SAMPLE
) -> Iterator[str]:
    """The URL of a service that answers the n-th POST with `answer(n, body)`; n counts from 0."""
    count = iter(range(1_000_000))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            ready = self.path.startswith("/readyz")
            self._send(Reply(body={"status": "ready", "release": "r1"} if ready else sample))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(answer(next(count), body))

        def _send(self, reply: Reply) -> None:
            content = (
                reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body, separators=(",", ":")).encode()
            )
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
