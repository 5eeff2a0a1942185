"""From the URL of a store to a client of Redis, and from what went wrong there to the error that says what to do.

    redis://[user:password@]host[:port][/db]                            one server
    redis+cluster://[user:password@]host[:port][,host[:port]...]        a Redis Cluster, found through any of its nodes
    redis+sentinel://[user:password@]host[:port][,...]/service[/db]     the master that Sentinel names, now and later

Each also with TLS: rediss, rediss+cluster, rediss+sentinel. Options follow a question mark, most with redis-py's names.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from redis import Redis, RedisCluster
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
ANSWER_S = 2.0  # for questions, answered at once by a server that is well; one that hangs may have been replaced
TRANSFER_S = 30.0  # for chunks and rows, which are megabytes
CONNECT_S, SENTINEL_S = 2.0, 1.0
RETRIES = 3  # of a command, after 0.1, 0.2 and 0.4 s; opening a connection has as many of its own
HEALTH_CHECK_S = 30
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
    (RedisError, "check the server's log"),
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


TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "prefix": _prefix,
    "sentinel_auth": _boolean,  # whether sentinels, too, want the user and password
    "db": int,
    "client_name": str,
    "max_connections": int,
    "socket_timeout": float,
    "socket_connect_timeout": float,
    "socket_keepalive": _boolean,
    "health_check_interval": int,
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
    found = re.fullmatch(r"(?:\[([\da-fA-F:.]+)\]|([\w.-]+))(?::(\d+))?", text)
    if found is None:
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


class Masters(Sentinel):
    """The sentinels, saying what each of them knows where none knows the master."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        try:
            host, port = super().discover_master(service_name)  # type: ignore[no-untyped-call]
            return host, port
        except MasterNotFoundError:
            known = "; ".join(_knowledge(sentinel) for sentinel in self.sentinels)
            raise MasterNotFoundError(f"no master {service_name!r} is up: {known}") from None


def _knowledge(sentinel: Any) -> str:
    place = "{host}:{port}".format_map(sentinel.connection_pool.connection_kwargs)
    try:
        states = sentinel.sentinel_masters().items()
    except RedisError as error:
        return f"{place} says {error}"
    masters = [name + (" (down)" if state["is_sdown"] else "") for name, state in states]
    return f"{place} knows {', '.join(masters) or 'none'}"


class _AsksAgain:
    """Asks the sentinels whenever it connects: redis-py keeps to the server that it had while it tries a command again,
    also to one that hangs and was replaced meanwhile."""

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        if self._sock is None:  # type: ignore[attr-defined]
            self.host, self.port = self.connection_pool.get_master_address()  # type: ignore[attr-defined]
        super().connect_check_health(check_health, retry_socket_connect)  # type: ignore[misc]


class MasterConnection(_AsksAgain, SentinelManagedConnection):
    """To whoever is the master."""


class TlsMasterConnection(_AsksAgain, SentinelManagedSSLConnection):
    """The same over TLS."""


def connect(address: Address, timeout_s: float = ANSWER_S) -> Any:
    """A redis.Redis or redis.RedisCluster, alike in all that a store does. A cluster is asked for its slots here.

    timeout_s: of a silence, and of all that is sent at once; the URL may say otherwise.
    """
    for name in TLS_FILES:
        path = address.options.get(name)
        if path is not None and not Path(path).is_file():
            raise StoreError(f"{address.url}: {name}: there is no file {path}: correct its path")
    timeouts = {"socket_timeout": timeout_s, "socket_connect_timeout": CONNECT_S}
    options: dict[str, Any] = {**timeouts, **address.options}
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), RETRIES)
    if address.kind == "redis+cluster":
        nodes = [ClusterNode(*node) for node in address.nodes]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=nodes, retry=retry, **options)
    options = {"health_check_interval": HEALTH_CHECK_S, "retry": retry, **options}
    if address.kind == "redis+sentinel":
        kind = TlsMasterConnection if options["ssl"] else MasterConnection
        sentinels = _sentinels(address, options)
        return sentinels.master_for(address.service, connection_class=kind, **options)  # type: ignore[no-untyped-call]
    ((host, port),) = address.nodes
    return Redis(host=host, port=port, **options)


def _sentinels(address: Address, options: Mapping[str, Any]) -> Masters:
    """They answer at once or not at all: the command that asks them is tried again by itself.

    One may lie on the machine that was lost with the master, so its silence is part of every failover.
    """
    kept = {name: value for name, value in options.items() if name.startswith("ssl")}
    if address.sentinel_auth:
        kept |= {name: options[name] for name in ("username", "password")}
    kept |= {"socket_timeout": SENTINEL_S, "socket_connect_timeout": SENTINEL_S, "retry": Retry(NoBackoff(), 0)}
    return Masters(address.nodes, sentinel_kwargs=kept)  # type: ignore[no-untyped-call]


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
