"""Start a service of our own on a free loopback port, wait until it is ready, end it by its own process."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtest.errors import ServingError

HOST = "127.0.0.1"
POLL_S = 0.1
GRACE_S = 15.0
LOG_LINES = 20


@contextmanager
def served(
    store: str, *, port: int | None = None, flags: Sequence[str] = (), ready_within_s: float = 60.0
) -> Iterator[str]:
    """The URL of a service on `store`, ready; it ends with the block. Raises ServingError with its last words."""
    port = port or free_port()
    url = f"http://{HOST}:{port}"
    with TemporaryDirectory(prefix="ranktower-load-") as folder:
        log = Path(folder, "service.log")
        with log.open("wb") as sink:
            process = subprocess.Popen([*serve_command(store, port), *flags], stdout=sink, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, url, log, ready_within_s)
            yield url
            _check_alive(process, log)
        finally:
            end(process)


def serve_command(store: str, port: int) -> list[str]:
    """The command line of the service, in this Python environment."""
    serve = [sys.executable, "-m", "service.cli", "serve", "--store", store]
    return [*serve, "--host", HOST, "--port", str(port), "--drain-s", "0"]


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, insist after GRACE_S."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, within_s: float) -> None:
    give_up_at = time.monotonic() + within_s
    while unready := _why_unready(f"{url}/readyz"):
        _check_alive(process, log, POLL_S)
        if time.monotonic() > give_up_at:
            words = _tail(log)
            raise ServingError(f"the service was not ready after {within_s:g} s ({unready}); its last words:\n{words}")


def _check_alive(process: subprocess.Popen[bytes], log: Path, wait_s: float = 0.0) -> None:
    """Return while the process runs, after up to `wait_s`."""
    try:
        code = process.wait(wait_s)
    except subprocess.TimeoutExpired:
        return
    raise ServingError(f"the service ended with code {code}; its last words:\n{_tail(log)}")


def _why_unready(address: str) -> str | None:
    """What stands against sending load now; None when nothing does."""
    try:
        with urllib.request.urlopen(address, timeout=2.0):
            return None
    except urllib.error.HTTPError as error:
        return error.read(1_000).decode(errors="replace")
    except OSError as error:
        return str(error)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LOG_LINES:])
