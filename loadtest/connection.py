"""One keep-alive HTTP/1.1 connection that sends ready-made bytes: the least work between the clock and the socket."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from loadtest.errors import LoadTestError


class AnswerError(LoadTestError):
    """The peer closed early or speaks another protocol; the connection is of no further use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the report needs of one answer."""

    status: int
    server_timing: str
    body: bytes
    keep: bool  # the peer keeps the connection open


class Connection:
    """One request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect. Raises OSError when nobody listens."""
        return cls(*await asyncio.open_connection(host, port))

    async def ask(self, request: bytes) -> Answer:
        """Send the bytes of a whole request and read its answer. Raises OSError or AnswerError."""
        self._writer.write(request)
        try:
            status, headers = _parse_head(await self._reader.readuntil(b"\r\n\r\n"))
            body = await self._reader.readexactly(_length(headers))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise AnswerError(f"the answer broke off: {error}") from error
        keep = headers.get("connection", "").lower() != "close"
        return Answer(status=status, server_timing=headers.get("server-timing", ""), body=body, keep=keep)

    @property
    def ended(self) -> bool:
        """Whether the peer has closed it, as it does with one that was idle for long."""
        return self._reader.at_eof()

    def close(self) -> None:
        """Drop the connection."""
        self._writer.close()


def request_bytes(host: str, port: int, path: str, body: bytes, media_type: str = "application/json") -> bytes:
    """A whole POST request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {media_type}\r\n"
        f"Accept-Encoding: identity\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def _parse_head(head: bytes) -> tuple[int, Mapping[str, str]]:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    parts = first.split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit():
        raise AnswerError(f"not an HTTP/1 answer: {first[:80]!r}")
    pairs = (line.partition(":") for line in lines)
    return int(parts[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _length(headers: Mapping[str, str]) -> int:
    try:
        return int(headers["content-length"])
    except (KeyError, ValueError) as error:
        raise AnswerError("the answer has no Content-Length: this client reads no chunked bodies") from error
