"""From the URL of a store to a client of Redis, and from what went wrong there to the error that says what to do.

    redis://[user:password@]host[:port][/db]                            one server
    redis+cluster://[user:password@]host[:port][,host[:port]...]        a Redis Cluster, found through any of its nodes
    redis+sentinel://[user:password@]host[:port][,...]/service[/db]     the master that Sentinel names, now and later

Each also with TLS: rediss, rediss+cluster, rediss+sentinel. Options follow a question mark, most with redis-py's names.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode

from redis import ConnectionPool, Redis, RedisCluster
from redis import exceptions as failures
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.cluster import ClusterNode
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from cache.errors import StoreError
from model.datasets.schema import nearest

PREFIX = "ranktower"
PORT, SENTINEL_PORT = 6379, 26379
ANSWER_S, CONNECT_S = 2.0, 2.0  # of what answers at once: without a word for so long, a server is gone
TRANSFER_S = 30.0  # of a large write: 8 MB need 7 s at 10 Mbit/s, and nothing comes back before the last of them
SENTINEL_S = 1.0  # there are others to ask
RETRIES = 3  # of a command, after 0.1, 0.2 and 0.4 s; opening a connection has as many of its own
RETRY_WITHIN_S = 3.0  # what took longer is not tried again: so one timeout is, by who may be in charge by then
HEALTH_CHECK_S = 30
MOST_SECONDS = 86_400
ESCAPE = "write special characters of a password as %xx"
HINTS = {  # how to write what is behind the scheme
    "redis": "redis://user:password@host:6379/0?prefix=name",
    "redis+cluster": "redis+cluster://user:password@host:6379,host:6379?prefix=name",
    "redis+sentinel": "redis+sentinel://user:password@host:26379,host:26379/service/0?prefix=name",
}
SCHEMES = {scheme.replace("redis", text, 1): scheme for scheme in HINTS for text in ("redis", "rediss")}

REMEDIES: tuple[tuple[type[Exception], str], ...] = (  # the first that fits any error of the chain
    (
        ssl.SSLError,
        "check ssl_ca_certs (or SSL_CERT_FILE), the host in the URL, ssl_certfile with ssl_keyfile where the server "
        "asks for a certificate, and that this port speaks TLS",
    ),
    (failures.AuthenticationError, "check user and password in the URL"),
    (failures.NoPermissionError, "give this user the commands and keys that docs/stores.md lists"),
    (failures.OutOfMemoryError, "free memory with `ranktower releases prune --keep 1` or raise maxmemory"),
    (failures.ReadOnlyError, "this is a replica: publish to the primary, or name its Sentinel"),
    (failures.BusyLoadingError, "it is loading its data: try again soon"),
    (failures.LockError, "another publisher took over, or a failover lost the lease: publish again"),
    (MasterNotFoundError, "check the service in the URL, and sentinel_auth=yes where sentinels ask for the password"),
    (failures.ClusterDownError, "bring the masters back that are down: `redis-cli --cluster check` names them"),
    (failures.ClusterError, "slots are on the move: try again once the resharding has ended"),
    (failures.TryAgainError, "slots are on the move: try again once the resharding has ended"),
    (failures.AskError, "this is a node of a Redis Cluster: write redis+cluster://"),  # MOVED is one
    (
        failures.TimeoutError,
        "it does not answer in time: check its load, the network, and with rediss:// that this port speaks TLS",
    ),
    (
        failures.ConnectionError,
        "check that redis-server runs there and that the URL is right (rediss:// where the port speaks TLS)",
    ),
    (
        RedisClusterException,
        "check with `redis-cli --cluster check` that a cluster runs there and serves all slots; one server is redis://",
    ),
    (RedisError, "check the options and the database in the URL, and the server's log"),
)


PASSING = (  # what ends by itself: a restart, a failover, slots on the move
    failures.ConnectionError,
    failures.TimeoutError,
    failures.ReadOnlyError,
    failures.ClusterError,
    failures.TryAgainError,
    failures.LockNotOwnedError,
)
PIPELINED = re.compile(r"^Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)  # it has the content of chunks


def _boolean(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text.lower() in ("yes", "true", "1")


def _prefix(text: str) -> str:
    if not re.fullmatch(r"[\w.:-]+", text):
        raise ValueError(f"{text!r}: use letters, digits, '.', ':', '-' and '_'")
    return text


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= MOST_SECONDS:  # nan neither
        raise ValueError(f"{text!r}: use seconds above 0, {MOST_SECONDS} at most")
    return seconds


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if not least <= number < 1 << 31:
        raise ValueError(f"{text!r}: use {least} or more")
    return number


TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "prefix": _prefix,
    "sentinel_auth": _boolean,  # whether sentinels, too, want the user and password
    "db": partial(_at_least, 0),
    "client_name": str,
    "max_connections": partial(_at_least, 1),
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
    "socket_keepalive": _boolean,
    "health_check_interval": partial(_at_least, 0),  # 0 for none
    **dict.fromkeys(TLS_FILES, str),
    "ssl_check_hostname": _boolean,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A URL, read."""

    url: str  # as it is shown: without the password
    kind: str  # a key of HINTS
    prefix: str
    nodes: tuple[tuple[str, int], ...]
    service: str = ""
    options: Mapping[str, Any] = field(repr=False)  # of redis-py, user and password among them
    sentinel_auth: bool = False


# --- URLs ------------------------------------------------------------------------------------------------------------


def read_url(url: str) -> Address:
    """Raises StoreError when it cannot be read."""
    scheme, _, rest = url.partition("://")
    kind, shown = SCHEMES[scheme], without_password(url)
    place, _, query = rest.partition("?")
    credentials, _, place = place.rpartition("@")
    hosts, _, path = place.partition("/")
    options = _options(query, shown)
    port = SENTINEL_PORT if kind == "redis+sentinel" else PORT
    nodes = tuple(_node(host, port, kind, shown) for host in hosts.split(","))
    service, db = _path(path, kind, shown)
    if kind == "redis" and len(nodes) > 1:
        raise StoreError(f"{shown} names several hosts: write {HINTS['redis+cluster']} or {HINTS['redis+sentinel']}")
    tls = scheme.startswith("rediss")
    for name in options:
        if name.startswith("ssl_") and not tls:
            raise StoreError(f"{shown}: {name} without TLS: write {scheme.replace('redis', 'rediss', 1)}://")
    user, _, password = (unquote(part) for part in credentials.partition(":"))
    options |= {"username": user or None, "password": password or None, "ssl": tls}
    if kind != "redis+cluster":
        options = {"db": db, **options}
    elif db or options.pop("db", 0):
        raise StoreError(f"{shown}: a cluster has one database only: write {HINTS[kind]}")
    return Address(
        url=shown,
        kind=kind,
        prefix=options.pop("prefix", PREFIX),
        nodes=nodes,
        service=service,
        sentinel_auth=options.pop("sentinel_auth", False),
        options=options,
    )


def _options(query: str, shown: str) -> dict[str, Any]:
    if "@" in query:
        raise StoreError(f"{shown}: an @ behind the question mark: {ESCAPE}")
    options = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in OPTIONS:
            raise StoreError(f"{shown}: unknown option {name!r}: {nearest(name, OPTIONS)}")
        try:
            options[name] = OPTIONS[name](text)
        except ValueError as error:
            raise StoreError(f"{shown}: {name}: {error}") from error
    return options


def _node(text: str, port: int, kind: str, shown: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([\da-fA-F:.]+)\]|([\w.-]+))(?::(\d{1,5}))?", text)
    if found is None or not 0 < int(found[3] or port) < 1 << 16:
        raise StoreError(f"{shown} names no host or no port: write {HINTS[kind]}; {ESCAPE}")
    return found[1] or found[2], int(found[3] or port)


def _path(path: str, kind: str, shown: str) -> tuple[str, int]:
    """The service, which Sentinel alone has, and the database."""
    pattern = r"([\w.-]+)(?:/(\d*))?" if kind == "redis+sentinel" else r"()(\d*)/?"
    found = re.fullmatch(pattern, path)
    if found is None:
        raise StoreError(f"{shown} names no {'service' if 'sentinel' in kind else 'database'}: write {HINTS[kind]}")
    return found[1], int(found[2] or 0)


def without_password(url: str) -> str:
    """What may be shown of a URL. All before the last @ is the password's, however badly it was written."""
    scheme, _, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    place, _, query = place.partition("?")
    if not place.startswith("["):
        place = re.sub(r":(?!\d+(?:[,/]|$))[^,/]*", ":***", place)  # no port: a password whose host is missing
    known = urlencode([(name, text) for name, text in parse_qsl(query) if name in OPTIONS], safe="/:")
    return f"{scheme}://{user}{colon and ':***'}{at}{place}" + (known and f"?{known}")


# --- clients ---------------------------------------------------------------------------------------------------------


Answer = TypeVar("Answer")


class Brief(Retry):
    """Tries again what failed soon: for a silent server that is once."""

    __hash__ = Retry.__hash__

    def call_with_retry(
        self,
        do: Callable[[], Answer],
        fail: Callable[..., object],
        is_retryable: Callable[[Exception], bool] | None = None,  # no command has one
        with_failure_count: bool = False,
    ) -> Answer:
        """`fail` closes the connection: an answer that comes late is never taken for that of another command."""
        last_s, failed = monotonic() + RETRY_WITHIN_S, 0
        while True:
            try:
                return do()
            except self._supported_errors as error:
                failed += 1
                if with_failure_count:
                    fail(error, failed)
                else:
                    fail(error)
                if failed > self.get_retries() or monotonic() > last_s:
                    raise
            sleep(self._backoff.compute(failed))


class Cluster(RedisCluster):
    """A cluster whose slots are asked for anew after a timeout, but what timed out is not tried again."""

    ERRORS_ALLOW_RETRY = tuple(  # type: ignore[assignment]  # typed as all four of them
        kind for kind in RedisCluster.ERRORS_ALLOW_RETRY if kind is not failures.TimeoutError
    )


class MasterConnection(SentinelManagedConnection):
    """Asks the sentinels whenever it is opened, also for a command that is tried again: the master may be another."""

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if self._sock is None:
            self._connect_retry()  # type: ignore[no-untyped-call]
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


class MasterSSLConnection(MasterConnection, SentinelManagedSSLConnection):
    """The same with TLS."""


class Masters(Sentinel):
    """The sentinels, each asked once, saying what each of them knows where none knows the master."""

    def __init__(self, nodes: Sequence[tuple[str, int]], options: Mapping[str, Any]) -> None:
        super().__init__(nodes, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        self._found: tuple[str, int] | None = None
        self._pools: list[ConnectionPool] = []

    def client(self, service: str, options: Mapping[str, Any]) -> Any:
        kind = MasterSSLConnection if options["ssl"] else MasterConnection
        client = self.master_for(service, connection_class=kind, **options)  # type: ignore[no-untyped-call]
        self._pools.append(client.connection_pool)
        return client

    def discover_master(self, service_name: str) -> tuple[str, int]:
        known = []
        for place, sentinel in enumerate(self.sentinels):
            name = "{host}:{port}".format_map(sentinel.connection_pool.connection_kwargs)
            try:
                states: Any = sentinel.sentinel_masters()
            except RedisError as error:
                known.append(f"{name} says {error}")
                continue
            state = states.get(service_name)
            if state and self.check_master_state(state, service_name):  # type: ignore[no-untyped-call]
                self.sentinels.insert(0, self.sentinels.pop(place))  # who knows is asked first from now on
                return self._follow((state["ip"], state["port"]))
            masters = [other + (" (down)" if states[other]["is_sdown"] else "") for other in states]
            known.append(f"{name} knows {', '.join(masters) or 'none'}")
        raise MasterNotFoundError(f"no master {service_name!r} is up: {'; '.join(known)}")

    def _follow(self, found: tuple[str, int]) -> tuple[str, int]:
        """No client goes on with a master that another one has left: what one writes the other reads."""
        if found != self._found:
            self._found = found
            for pool in self._pools:
                pool.disconnect(inuse_connections=False)
        return found


class Clients:
    """The clients of one address, each a redis.Redis or a redis.RedisCluster, alike in all that a store does.

    They are made with the first question: a cluster is asked for its slots then. A failure is not kept.
    """

    def __init__(self, address: Address) -> None:
        self._address = address

    @cached_property
    def quick(self) -> Any:
        """A command fails once nothing has come back for two seconds, however much is on its way."""
        return self._connect(ANSWER_S)

    @cached_property
    def bulk(self) -> Any:
        """The same for what sends much: then nothing comes back for long."""
        return self._connect(TRANSFER_S)

    def drop_idle(self) -> None:
        """Connections that wait for use may lead to who is silent, too. The client of a cluster sees to its own."""
        if self._address.kind != "redis+cluster":
            for client in self._made():
                client.connection_pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        for client in self._made():
            client.close()

    def _made(self) -> list[Any]:
        return [self.__dict__[name] for name in ("quick", "bulk") if name in self.__dict__]

    def _connect(self, timeout_s: float) -> Any:
        address = self._address
        for name in TLS_FILES:
            path = address.options.get(name)
            if path is not None and not Path(path).is_file():
                raise StoreError(f"{address.url}: {name}: there is no file {path}: correct its path")
        timeouts = {"socket_timeout": ANSWER_S, "socket_connect_timeout": CONNECT_S}
        options: dict[str, Any] = {**timeouts, **address.options}
        if timeout_s > ANSWER_S:
            options["socket_timeout"] = max(timeout_s, options["socket_timeout"])
        retry = Brief(ExponentialBackoff(cap=1.0, base=0.05), RETRIES)
        if address.kind == "redis+cluster":
            nodes = [ClusterNode(*node) for node in address.nodes]  # type: ignore[no-untyped-call]
            return Cluster(startup_nodes=nodes, retry=retry, **options)
        options = {"health_check_interval": HEALTH_CHECK_S, "retry": retry, **options}
        if address.kind == "redis+sentinel":
            return self._masters.client(address.service, options)
        ((host, port),) = address.nodes
        return Redis(host=host, port=port, **options)

    @cached_property
    def _masters(self) -> Masters:
        """They answer at once or not at all: the command that asks them is tried again by itself."""
        given = self._address.options
        options = {name: value for name, value in given.items() if name.startswith("ssl")}
        if self._address.sentinel_auth:
            options |= {name: given[name] for name in ("username", "password")}
        options["socket_connect_timeout"] = given.get("socket_connect_timeout", SENTINEL_S)
        options |= {"socket_timeout": SENTINEL_S, "retry": Retry(NoBackoff(), 0)}
        return Masters(self._address.nodes, options)


# --- errors ----------------------------------------------------------------------------------------------------------


def store_error(address: Address, error: Exception) -> StoreError:
    """Where it went wrong, what, and what to do."""
    chain = list(_chain(error))
    found, remedy = next((each, text) for kind, text in REMEDIES for each in chain if isinstance(each, kind))
    said = " ".join(filter(None, (getattr(found, "status_code", None), PIPELINED.sub("", str(found)))))
    password = address.options["password"]
    for secret in {password, quote(password, safe="")} if password else ():  # a server may repeat what it is sent
        said = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", said)
    return StoreError(f"{address.url}: {said or type(found).__name__}: {remedy}")


def is_passing(error: Exception) -> bool:
    """Whether the same may succeed in a while, nobody doing anything."""
    chain = list(_chain(error))
    refused = any(isinstance(each, failures.AuthenticationError) for each in chain)  # a ConnectionError, too
    return not refused and any(isinstance(each, PASSING) for each in chain)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: RedisCluster wraps whatever its nodes said."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
