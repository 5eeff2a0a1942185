"""URLs of Redis: what they name, what of them is shown, and how a wrong one is refused. No server is asked here."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import exceptions as failures

from cache.errors import StoreError
from cache.redis_client import (
    ANSWER_S,
    OPTIONS,
    SCHEMES,
    TRANSFER_S,
    Clients,
    is_passing,
    read_url,
    store_error,
    without_password,
)
from cache.redis_store import RedisStore
from cache.store import REDIS, open_store

ROOT = Path(__file__).resolve().parents[2]


def test_every_scheme_has_a_store() -> None:
    assert set(SCHEMES) == set(REDIS)


def test_every_scheme_and_option_is_documented() -> None:
    page = (ROOT / "docs" / "stores.md").read_text()
    assert [scheme for scheme in SCHEMES if f"`{scheme}://" not in page] == []
    assert [name for name in OPTIONS if f"`{name}`" not in page] == []


@pytest.mark.parametrize(
    ("url", "kind", "nodes"),
    [
        ("redis://host", "redis", (("host", 6379),)),
        ("rediss://host:1/3", "redis", (("host", 1),)),
        ("redis://[::1]:7/3", "redis", (("::1", 7),)),
        ("redis+cluster://a,b:2", "redis+cluster", (("a", 6379), ("b", 2))),
        ("rediss+cluster://a:1/0", "redis+cluster", (("a", 1),)),
        ("redis+sentinel://a,b:2/main/3", "redis+sentinel", (("a", 26379), ("b", 2))),
    ],
)
def test_a_url_names_its_kind_and_nodes(url: str, kind: str, nodes: tuple[tuple[str, int], ...]) -> None:
    address = read_url(url)
    assert (address.kind, address.nodes, address.url) == (kind, nodes, url)
    assert address.options["ssl"] == url.startswith("rediss")
    assert address.options.get("db", 0) == (3 if url.endswith("/3") else 0)
    assert address.service == ("main" if "main" in url else "")


def test_options_have_the_types_that_redis_py_wants() -> None:
    options = "prefix=a&socket_timeout=2&max_connections=3&ssl_check_hostname=no&ssl_ca_certs=/etc/ca.pem"
    address = read_url(f"rediss+sentinel://h/main?{options}&sentinel_auth=yes")
    assert (address.prefix, address.sentinel_auth) == ("a", True)
    chosen = {"socket_timeout": 2.0, "max_connections": 3, "ssl_check_hostname": False, "ssl_ca_certs": "/etc/ca.pem"}
    assert chosen.items() <= address.options.items()


@pytest.mark.parametrize(
    ("written", "user", "password"),
    [
        ("ranker:secret@", "ranker", "secret"),
        (":secret@", None, "secret"),
        ("ranker@", "ranker", None),
        ("ranker:s%40c%2Fr%25t@", "ranker", "s@c/r%t"),
        ("ranker:se@cret/@", "ranker", "se@cret/"),
        ("", None, None),
    ],
)
def test_user_and_password_are_read_as_written(written: str, user: str | None, password: str | None) -> None:
    for scheme in SCHEMES:
        address = read_url(f"{scheme}://{written}host/{'main' if 'sentinel' in scheme else ''}")
        assert (address.options["username"], address.options["password"]) == (user, password)
        assert "cr" not in address.url + repr(address) + repr(RedisStore(f"redis://{written}host"))
        assert address.url.startswith(
            f"{scheme}://{user or ''}{':***' if password else ''}{'@' if written else ''}host"
        )


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://host:port/0",
        "redis://host/0?prefix=a b",
        "redis://host/0?prefix=",
        "redis://host/zero",
        "redis://a,b/0",
        "redis://host?socket_timeout=long",
        "redis://host?socket_keepalive=perhaps",
        "redis://host?ssl_ca_certs=/etc/ca.pem",
        "redis+cluster://host/1",
        "redis+cluster://host?db=1",
        "redis+cluster://a,,b",
        "redis+sentinel://host",
        "redis+sentinel://host/main/zero",
        "redis://host:0",
        "redis://host:65536",
        "redis://host?db=-1",
        *(f"redis://host?socket_timeout={wrong}" for wrong in ("-1", "0", "nan", "inf", "1e300")),
        "redis://host?socket_connect_timeout=-1",
        "redis://host?max_connections=0",
        "redis://host?health_check_interval=-1",
    ],
)
def test_a_wrong_url_says_how_to_write_it(url: str) -> None:
    with pytest.raises(
        StoreError,
        match=r"write |use letters|use seconds above 0|use [01] or more|could not convert|neither yes nor no",
    ):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://ranker:secret@host/0?prefx=a",
        "redis://host/0?password=secret",
        "redis://ranker:secret",
        "redis://ranker:secret/",
        "redis://ranker:secret?prefix=a",
        "redis://ranker:se?cret@host:port/0",
        "redis://ranker:se#cret@host:port/0",
        "redis+cluster://ranker:secret@a,b:c/0",
        "redis+sentinel://ranker:secret@a",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert "cret" not in str(caught.value)
    assert without_password(url).startswith(url.split("://")[0] + "://")


@pytest.mark.parametrize(
    "url",
    [
        "redis:ranker:secret@host",
        ":secret@host",
        "secret@host",
        "//ranker:secret@host",
        "redis//ranker:secret@host",
        "REDIS//:secret@host",
        "ranker:secret@redis://host",
        "REDIS://ranker:secret@host",
        "http://ranker:secret@host",
    ],
)
def test_what_is_no_url_of_a_store_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(
        StoreError, match=r"no store answers to .*: use a URL that starts with file://, redis://"
    ) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("password", ["s\u2100cret", "s[cret", "s]cret", "s[c]ret", "s\u2488cret", "s cret"])
def test_a_password_of_any_characters_is_read_and_not_shown(password: str) -> None:
    store = open_store(f"redis://ranker:{password}@host")
    assert store.url == "redis://ranker:***@host"
    assert read_url(f"redis://ranker:{password}@host").options["password"] == password


def test_questions_wait_shorter_than_what_is_large_unless_the_url_says_how_long() -> None:
    def timeouts_s(url: str) -> list[float]:
        clients = Clients(read_url(url))
        pools = (client.connection_pool for client in (clients.quick, clients.bulk))
        return [pool.connection_kwargs["socket_timeout"] for pool in pools]

    for url in ("redis://host", "redis+sentinel://host/main"):
        assert timeouts_s(url) == [ANSWER_S, TRANSFER_S]
        assert timeouts_s(f"{url}?socket_timeout=7") == [7, TRANSFER_S]
        assert timeouts_s(f"{url}?socket_timeout=60") == [60, 60]


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(StoreError, match="unknown option 'prefx': did you mean 'prefix'"):
        open_store("redis://host/0?prefx=a")


def test_a_certificate_that_is_not_there_is_named() -> None:
    with pytest.raises(StoreError, match=r"ssl_ca_certs: there is no file /nowhere/ca\.pem"):
        open_store("rediss://host?ssl_ca_certs=/nowhere/ca.pem").current()


def test_the_cause_decides_the_remedy_not_the_wrapping() -> None:
    address = read_url("redis+cluster://host")
    assert "--cluster check" in str(store_error(address, failures.RedisClusterException("no slots")))
    wrapped = failures.RedisClusterException("cannot be connected")
    wrapped.__cause__ = failures.ConnectionError("refused")
    assert str(store_error(address, wrapped)).startswith("redis+cluster://host: refused: check that redis-server runs")


def test_a_password_that_a_server_repeats_is_hidden() -> None:
    address = read_url("redis://ranker:s%2Fecret@host")
    error = store_error(
        address, failures.ResponseError("unknown command `AUTH`, with args: `ranker` `s/ecret` s%2Fecret")
    )
    assert "ecret" not in str(error)


def test_what_a_pipeline_carried_is_not_shown() -> None:
    error = failures.OutOfMemoryError("Command # 1 (SET key personal\n(data)...) of pipeline caused error: not allowed")
    assert ": not allowed: free memory" in str(store_error(read_url("redis://host"), error))


def test_only_what_ends_by_itself_is_waited_for() -> None:
    assert is_passing(failures.ConnectionError("refused"))
    assert is_passing(failures.ReadOnlyError("a replica"))
    assert not is_passing(failures.AuthenticationError("wrong"))
    wrapped = failures.RedisClusterException("cannot be connected")
    assert not is_passing(wrapped)
    wrapped.__cause__ = failures.ConnectionError("refused")
    assert is_passing(wrapped)
    assert not is_passing(failures.OutOfMemoryError("full"))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (failures.MovedError("1234 10.0.0.1:6379"), r"write redis\+cluster://"),
        (failures.ClusterDownError("Hash slot not served"), "bring the masters back"),
        (failures.ClusterError("TTL exhausted."), "resharding"),
        (failures.TryAgainError("Multiple keys request during rehashing of slot"), "resharding"),
        (failures.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "raise maxmemory"),
        (failures.ReadOnlyError("You can't write against a read only replica."), "publish to the primary"),
        (failures.NoPermissionError("this user has no permissions"), r"docs/stores\.md"),
        (failures.LockNotOwnedError("no longer owned"), "publish again"),
        (failures.TimeoutError("Timeout reading from socket"), "in time"),
        (failures.ResponseError("ERR DB index is out of range"), "the database in the URL"),
        (failures.ResponseError("MISCONF Redis is configured to save RDB snapshots"), "server's log"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_has_its_remedy(error: Exception, remedy: str) -> None:
    with pytest.raises(StoreError, match=rf"^redis://ranker:\*\*\*@host: .*{remedy}"):
        raise store_error(read_url("redis://ranker:secret@host"), error)
