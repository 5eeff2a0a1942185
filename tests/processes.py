"""The real command `ranktower serve` in processes of its own, and what it logs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 60.0
POLL_S = 0.02
READY = re.compile(r"RankTower is ready at (http://\S+) with release (\S+):")


def eventually(reached: Callable[[], bool]) -> None:
    """Ask until it is so."""
    deadline = time.monotonic() + TIMEOUT_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


class Server:
    """A running `ranktower serve`, whose log is read as it comes."""

    def __init__(self, process: subprocess.Popen[str], temporary: Path) -> None:
        self.process, self.temporary = process, temporary
        self.lines: list[str] = []
        self._read = 0  # lines that `read_until` has gone through
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()

    def read_until(self, pattern: re.Pattern[str] | str) -> re.Match[str]:
        """The next line of the log with that in it."""
        deadline = time.monotonic() + TIMEOUT_S
        with self._more:
            while True:
                while self._read < len(self.lines):
                    self._read += 1
                    if found := re.search(pattern, self.lines[self._read - 1]):
                        return found
                assert self._reader.is_alive(), "".join(self.lines)
                assert self._more.wait(deadline - time.monotonic()), f"no {pattern} in " + "".join(self.lines)

    def until_nothing_is_left(self) -> None:
        """Wait for the end of the log, which every process of the service holds open while it lives."""
        self._reader.join(TIMEOUT_S)
        assert not self._reader.is_alive(), "a process is left: " + "".join(self.lines)

    def _collect(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._add(line)
        self._add("")

    def _add(self, line: str) -> None:
        with self._more:
            self.lines.append(line)
            self._more.notify_all()


@contextmanager
def server(store_url: str, *flags: str) -> Iterator[Server]:
    """The command over a store, on a free port; killed at the end, if it has not ended."""
    command = [sys.executable, "-m", "service.cli", "serve", "--store", store_url, "--port", "0", *flags]
    with TemporaryDirectory(prefix="serve-") as temporary:
        environment = {**os.environ, "TMPDIR": temporary}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        running = Server(process, Path(temporary))
        try:
            yield running
        finally:
            process.kill()
            process.wait(TIMEOUT_S)
            running.until_nothing_is_left()
            assert process.stderr is not None
            process.stderr.close()


@contextmanager
def asked(url: str, *, broken: int = 0) -> Iterator[list[httpx.Response]]:
    """Ask without pause, each time on a connection of its own, so that any worker may answer; all answers so far.

    None fails, and at most `broken` connections break.
    """
    answers: list[httpx.Response] = []
    breaks: list[httpx.HTTPError] = []
    stopping = threading.Event()

    def ask() -> None:
        while not stopping.is_set():
            try:
                answers.append(rank(url))
            except httpx.HTTPError as error:
                breaks.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        stopping.set()
        thread.join(TIMEOUT_S)
    assert len(breaks) <= broken, breaks
    assert {answer.status_code for answer in answers} == {200}


def rank(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/rank", json={"user_id": 4, "candidates": [100, 101]}, timeout=TIMEOUT_S)
