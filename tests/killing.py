"""Publishers that die on order: at the n-th write to the store or to the disk, or after so many seconds.

Run as a process of its own (`python -m tests.killing`), which imports once and forks a publisher for each order that it
reads, a line of JSON each: {"arguments": [...], "root": folder, "event": n or null, "seconds": s or null, "copied":
whether the disk of the store takes no links to what was built}. It answers
{"killed": whether, "events": how many there were of each kind (none of a killed one), "seconds": s}. Kinds: `fsync`;
`file`, what makes, opens for writing, renames or deletes below `root`; `chunk` of a folder; `command` to Redis. A chunk
or a command may be cut in half.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
FAILED = 3  # exit code of a publisher that ended with an error


@dataclass
class Counter:
    """Counts events, and dies at the one that it was told."""

    last: int | None
    seen: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def next(self, kind: str) -> bool:
        """Whether this event is the last."""
        self.seen += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        return self.seen == self.last


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse_link(*_: Any, **__: Any) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def watch(counter: Counter, root: str) -> None:
    """From now on every event of this process counts."""
    import redis.connection

    from cache import file_store

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        below = (writes or event in CHANGES) and str(arguments[0]).startswith(root)
        if below and counter.next("file"):
            die()

    real_fsync, real_write = os.fsync, file_store.write_chunk
    real_send = redis.connection.AbstractConnection.send_packed_command

    def fsync(handle: int) -> None:
        if counter.next("fsync"):
            die()
        real_fsync(handle)

    def write_chunk(folder: Path, chunk: Any, content: bytes) -> None:
        if counter.next("chunk"):
            real_write(folder, chunk, content[: len(content) // 2])
            die()
        real_write(folder, chunk, content)

    def send(connection: Any, command: Any, check_health: bool = True) -> None:
        parts = [bytes(part) for part in ([command] if isinstance(command, (bytes, str)) else command)]
        if counter.next("command"):
            whole = b"".join(parts)
            sent = (0, len(whole) // 2, len(whole))[counter.seen % 3]
            connection._sock.sendall(whole[:sent])
            die()
        real_send(connection, parts, check_health)

    os.fsync = fsync
    file_store.write_chunk = write_chunk
    redis.connection.AbstractConnection.send_packed_command = send  # type: ignore[method-assign]
    sys.addaudithook(heard)


def publish(order: dict[str, Any], said: int) -> None:
    """In a forked process, whose end this is."""
    from cache.cli import app

    code = FAILED
    try:
        counter = Counter(order["event"])
        watch(counter, order["root"])
        if order["copied"]:
            os.link = refuse_link
        if order["seconds"] is not None:
            signal.setitimer(signal.ITIMER_REAL, order["seconds"])  # SIGALRM ends a process that does not expect it
        app(order["arguments"], standalone_mode=False)
        os.write(said, json.dumps(counter.kinds).encode())
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    import cache.cli
    import cache.embed
    import cache.redis_store  # noqa: F401  imported once, for all

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what publishers say
    for line in sys.stdin:
        order = json.loads(line)
        heard, said = os.pipe()
        begun = time.perf_counter()
        child = os.fork()
        if child == 0:
            publish(order, said)
        os.close(said)
        _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - begun
        with os.fdopen(heard, "rb") as stream:
            events = json.loads(stream.read() or b"{}")
        killed = os.WIFSIGNALED(status)
        answer = {"killed": killed, "failed": not killed and status != 0, "events": events, "seconds": seconds}
        print(json.dumps(answer), file=answers, flush=True)


class Publishers:
    """The process that forks them, asked from a test."""

    def __init__(self, process: subprocess.Popen[str], root: Path, *, copied: bool) -> None:
        self._process, self._root, self._copied = process, root, copied

    def run(self, *arguments: str, event: int | None = None, seconds: float | None = None) -> dict[str, Any]:
        """Publish, and die on the way. Raises AssertionError where it ended with an error: see stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limits = {"event": event, "seconds": seconds}
        order = {"arguments": arguments, "root": str(self._root), "copied": self._copied, **limits}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert not answer["failed"], "a publisher ended with an error"
        return answer


@contextmanager
def publishers(root: Path, *, copied: bool = False) -> Iterator[Publishers]:
    """Ended by closing what it reads."""
    command = [sys.executable, "-m", "tests.killing"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        yield Publishers(process, root, copied=copied)


if __name__ == "__main__":
    main()
