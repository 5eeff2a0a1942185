"""What only a cluster, a master behind Sentinel or a server with TLS can do, and what is said when they cannot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import pytest
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import ResponseError

from cache.errors import StoreError
from cache.redis_store import RedisStore
from cache.release import read_release, verify_release
from cache.rollout import NOTHING, Change, Live
from tests.changed import embedded, happened
from tests.integration.test_stores import LEASE_S, PASSWORD, allow
from tests.redis_server import (
    NOBODY,
    SERVICE,
    Certificates,
    RedisServer,
    Watched,
    cluster_url,
    eventually,
    has_tls,
    running_cluster,
    running_redis,
    running_sentinel,
    silent,
    slow_line,
    write_certificates,
)
from tests.releases import SPEC_ID, write_release, write_users
from tests.tiny_releases import publish, tiny_release

SOON_S = 10.0  # nobody waits that long; minutes were the case


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two releases of several chunks, the first of many."""
    home = tmp_path_factory.mktemp("releases")
    for number, items in enumerate((60_000, 10_000)):
        write_release(home / str(number), number, items=items)
    return [home / str(number) for number in range(2)]


def activated(store: RedisStore, folder: Path) -> str:
    name = store.publish(folder)
    store.activate(name)
    return name


# --- cluster ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[RedisServer]]:
    with running_cluster() as servers:
        yield servers


def test_the_chunks_of_a_release_lie_on_all_masters(cluster: list[RedisServer], folders: list[Path]) -> None:
    name = activated(RedisStore(f"{cluster_url(cluster)}?prefix=spread"), folders[0])
    held = []
    for server in cluster:
        with server.client() as client:
            held.append(len(list(client.scan_iter(f"spread:release:{name}:*"))))
    assert sum(held) == len(list(read_release(folders[0]).chunks()))
    assert min(held) > 0


def test_a_node_that_is_down_does_not_keep_a_cluster_from_being_found(cluster: list[RedisServer]) -> None:
    store = RedisStore(f"redis+cluster://{NOBODY},{cluster[2].address}?prefix=found")
    assert store.current() is None
    store.close()


def test_a_cluster_under_the_url_of_one_server_is_told(cluster: list[RedisServer]) -> None:
    def ask() -> None:
        for server in cluster:  # one of them has the key
            RedisStore(server.url).current()

    with pytest.raises(StoreError, match=r"MOVED .*write redis\+cluster://"):
        ask()


def test_one_server_under_the_url_of_a_cluster_is_told() -> None:
    with running_redis() as server, pytest.raises(StoreError, match="one server is redis://"):
        RedisStore(cluster_url([server])).current()


def test_a_store_works_while_its_slots_move(cluster: list[RedisServer], folders: list[Path], tmp_path: Path) -> None:
    store, other = (RedisStore(f"{cluster_url(cluster)}?prefix=moving") for _ in range(2))
    name = activated(store, folders[1])
    with Move(cluster, key_slot(b"{moving}")) as move:
        assert other.current() == name  # ASK leads to what has moved
        move.one_key()
        assert store.current() == name
        assert [info.id for info in store.list()] == [name]
        assert verify_release(store.fetch(name, tmp_path)).id == name
        with pytest.raises(StoreError, match="once the resharding has ended"):
            store.change(Change(verb="shadow", release=name, share=1.0))  # a script whose keys lie here and there
    assert other.current() == store.current() == name  # MOVED leads to all of it
    new = activated(other, folders[0])
    assert store.current() == new
    assert store.rollback() == name


class Move:
    """A slot on its way from one master to the next; on leaving it has arrived."""

    def __init__(self, servers: list[RedisServer], slot: int) -> None:
        self._slot = slot
        self._clients = [server.client() for server in servers]
        self._ids = [client.execute_command("CLUSTER MYID").decode() for client in self._clients]
        self._at = next(
            place for place, client in enumerate(self._clients) if client.cluster("COUNTKEYSINSLOT", slot) > 0
        )
        self._to = (self._at + 1) % len(servers)

    def __enter__(self) -> Move:
        self._clients[self._to].cluster("SETSLOT", self._slot, "IMPORTING", self._ids[self._at])
        self._clients[self._at].cluster("SETSLOT", self._slot, "MIGRATING", self._ids[self._to])
        return self

    def one_key(self) -> bool:
        source, target = self._clients[self._at], self._clients[self._to].connection_pool.connection_kwargs
        keys = source.execute_command("CLUSTER GETKEYSINSLOT", self._slot, 1)
        for key in keys:
            source.migrate(target["host"], target["port"], key, 0, 5000)
        return bool(keys)

    def __exit__(self, *error: object) -> None:
        while self.one_key():
            continue
        for client in (self._clients[self._to], *self._clients):
            client.cluster("SETSLOT", self._slot, "NODE", self._ids[self._to])
        for client in self._clients:
            client.close()


def test_a_cluster_that_lost_a_master_says_so_and_goes_on_once_it_is_back(folders: list[Path]) -> None:
    with running_cluster("--cluster-node-timeout", "500") as servers:
        store = RedisStore(f"{cluster_url(servers)}?prefix=lost", lease_s=LEASE_S)
        name = activated(store, folders[1])
        owner = key_slot(b"{lost}") * 3 // 16_384
        servers[(owner + 1) % 3].kill()
        assert eventually(lambda: "bring the masters back" in failure(store))
        servers[owner].kill()
        servers[(owner + 2) % 3].kill()
        assert "check that redis-server runs there" in failure(store)
        assert all(server.start() for server in servers)
        assert eventually(lambda: not failure(store))
        assert store.current() is None  # nothing was saved to disk
        assert activated(store, folders[1]) == name


def test_a_replica_in_a_cluster_takes_over(folders: list[Path], tmp_path: Path) -> None:
    node = ("--cluster-enabled", "yes", "--cluster-node-timeout", "500")
    with running_cluster("--cluster-node-timeout", "500") as servers, running_redis(*node) as replica:
        owner = key_slot(b"{over}") * 3 // 16_384
        with servers[owner].client() as master, replica.client() as client:
            client.execute_command("CLUSTER MEET", *servers[owner].address.split(":"))
            name = master.execute_command("CLUSTER MYID")
            assert eventually(lambda: name.decode() in str(client.cluster("NODES")))
            assert eventually(lambda: replicates(client, name))
            assert eventually(lambda: client.info("replication")["master_link_status"] == "up")
            assert all(eventually(lambda server=server: knows_replica(server, name)) for server in servers)  # they vote
            store = RedisStore(f"{cluster_url(servers)}?prefix=over", lease_s=LEASE_S)
            old = activated(store, folders[1])
            assert eventually(lambda: master.wait(1, 1000) == 1)
            killed = servers[owner]

            def kill(stage: str, done: int, total: int) -> None:
                killed.kill()

            new = store.publish(folders[0], kill)
            assert store.current() == old
            store.activate(new)
            assert client.execute_command("ROLE")[0] == b"master"
            assert verify_release(store.fetch(new, tmp_path)).id == new


def replicates(client: Redis, master_id: bytes) -> bool:
    try:
        return bool(client.execute_command("CLUSTER REPLICATE", master_id))
    except ResponseError:  # it does not know that node well yet
        return False


def knows_replica(server: RedisServer, master_id: bytes) -> bool:
    with server.client() as client:
        nodes: dict[str, dict[str, str]] = client.cluster("NODES")
    return any(node["master_id"] == master_id.decode() for node in nodes.values())


def failure(store: RedisStore) -> str:
    try:
        store.current()
    except StoreError as error:
        return str(error)
    return ""


# --- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one server", "cluster"])
def test_a_server_that_is_silent_is_told_soon(folders: list[Path], kind: str) -> None:
    with running_redis() if kind == "one server" else nullcontext() as one, ExitStack() as stack:
        servers = stack.enter_context(running_cluster()) if one is None else [one]
        url = servers[0].url if one else cluster_url(servers)
        used, fresh = RedisStore(url), RedisStore(url)
        name = activated(used, folders[1])
        assert used.wait(NOTHING, 60).current == name
        with ExitStack() as silence:
            for server in servers:
                silence.enter_context(silent(server))
            for store in (used, fresh, used):
                assert "it does not answer in time" in fails_soon(store)
        for store in (used, fresh):
            assert store.current() == name
            store.close()


def fails_soon(store: RedisStore) -> str:
    """What is said."""
    start_s = time.monotonic()
    with pytest.raises(StoreError) as caught:
        store.wait(NOTHING, 60)
    assert time.monotonic() - start_s < SOON_S
    return str(caught.value)


def test_large_writes_have_the_time_that_a_slow_line_takes(folders: list[Path], tmp_path: Path) -> None:
    with running_redis() as server, slow_line(server.port, 4 << 20) as port:  # a chunk takes half a second
        store = RedisStore(f"redis://127.0.0.1:{port}?socket_timeout=0.25&prefix=slow")
        name = activated(store, folders[0])
        assert verify_release(store.fetch(name, tmp_path)).id == name
        log = store.log("changes")
        log.append([bytes(2 << 20)])
        assert [len(entry.payload) for entry in log.read(0, 10)] == [2 << 20]
        store.close()


# --- Sentinel --------------------------------------------------------------------------------------------------------


def test_readers_and_writers_go_on_after_a_failover(folders: list[Path], tmp_path: Path) -> None:
    with running_sentinel() as watched, ThreadPoolExecutor() as pool:
        reader, writer = (RedisStore(f"{watched.url}?prefix=failover") for _ in range(2))
        old = activated(writer, folders[1])
        assert reader.wait(NOTHING, 60).current == old
        replicate(watched)
        watched.master.kill()
        waiting = pool.submit(until_changed, reader, old)
        assert eventually(lambda: failure(writer) == "")
        assert master_port(watched) == watched.replica.port
        new = activated(writer, folders[0])
        assert waiting.result(30) == new
        assert verify_release(reader.fetch(new, tmp_path)).id == new
        assert writer.rollback() == old
        for store in (reader, writer):
            store.close()


def test_a_publisher_whose_master_dies_completes_on_the_next(folders: list[Path], tmp_path: Path) -> None:
    with running_sentinel() as watched:
        store = RedisStore(f"{watched.url}?prefix=dies", lease_s=LEASE_S)
        old = activated(store, folders[1])
        replicate(watched)

        def kill(stage: str, done: int, total: int) -> None:
            watched.master.kill()

        new = store.publish(folders[0], kill)
        assert watched.master.process.poll() is not None
        assert master_port(watched) == watched.replica.port
        assert store.current() == old
        store.activate(new)
        assert verify_release(store.fetch(new, tmp_path)).id == new


def test_a_master_that_was_replaced_in_order_is_left(folders: list[Path]) -> None:
    with running_sentinel() as watched:
        store = RedisStore(f"{watched.url}?prefix=order")
        old = activated(store, folders[1])
        replicate(watched)
        with watched.sentinel.client() as sentinel:
            sentinel.execute_command("SENTINEL FAILOVER", SERVICE)
        assert eventually(lambda: master_port(watched) == watched.replica.port)
        assert eventually(lambda: failure(store) == "")
        assert store.current() == old
        assert activated(store, folders[0]) == store.current()


def test_readers_and_writers_go_on_after_a_failover_from_a_silent_master(folders: list[Path], tmp_path: Path) -> None:
    with running_sentinel() as watched:
        reader, writer = (RedisStore(f"{watched.url}?prefix=silent") for _ in range(2))
        old = activated(writer, folders[1])
        assert reader.wait(NOTHING, 60).current == old
        assert verify_release(reader.fetch(old, tmp_path)).id == old  # over several connections, which now lie idle
        replicate(watched)
        with silent(watched.master):
            assert eventually(lambda: master_port(watched) == watched.replica.port)
            assert eventually(lambda: goes_on(reader), within_s=2 * SOON_S)
            assert eventually(lambda: failure(writer) == "", within_s=SOON_S)
            assert RedisStore(reader.url).current() == old
            new = activated(writer, folders[0])
            assert until_changed(reader, old) == new
        assert verify_release(reader.fetch(new, tmp_path)).id == new
        for store in (reader, writer):
            store.close()


def goes_on(store: RedisStore) -> bool:
    try:
        store.wait(NOTHING, 0)
    except StoreError:
        return False
    return True


def test_sentinels_and_a_master_that_are_silent_are_told_soon(folders: list[Path]) -> None:
    with running_sentinel() as watched:
        store = RedisStore(f"{watched.url}?prefix=silent")
        activated(store, folders[1])
        with silent(watched.sentinel), silent(watched.master):
            for _ in range(2):  # with a connection to the master, and without
                assert f"{watched.sentinel.address} says Timeout" in fails_soon(store)


def test_a_master_that_hangs_is_left_for_the_one_that_replaced_it(folders: list[Path], tmp_path: Path) -> None:
    with running_sentinel() as watched:
        url = f"{watched.url}?prefix=hangs"
        store, reader = RedisStore(url), RedisStore(f"{url}&socket_timeout=0.3")
        old = activated(store, folders[1])
        assert reader.wait(NOTHING, 1).current == old
        reader.fetch(old, tmp_path)  # its connections are open, to the master
        reader.log("changes").last()
        replicate(watched)
        with silent(watched.master):
            assert eventually(lambda: master_port(watched) == watched.replica.port)
            new = activated(RedisStore(url), folders[0])
            assert reader.wait(Live(current=old), 0.1).current == new
            assert verify_release(reader.fetch(new, tmp_path)).id == new
            assert reader.log("changes").last() == 0


def until_changed(store: RedisStore, seen: str) -> str | None:
    """As the refresher does: what fails is tried again."""
    found: list[str | None] = [seen]

    def changed() -> bool:
        with suppress(StoreError):
            found[0] = store.wait(Live(current=seen), 1.0).current
        return found[0] != seen

    assert eventually(changed)
    return found[0]


def replicate(watched: Watched) -> None:
    """Until the replica has all."""
    with watched.master.client() as client:
        client.set("last", 1)
        assert client.wait(1, 10_000) == 1


def master_port(watched: Watched) -> int:
    with watched.sentinel.client() as client:
        return int(client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


def test_sentinels_are_asked_with_the_password_where_the_url_says_so() -> None:
    with running_sentinel() as watched, watched.master.client() as master, watched.sentinel.client() as sentinel:
        for client in (master, sentinel):
            client.execute_command("ACL SETUSER", "ranker", "on", ">secret", "~*", "&*", "+@all")
        sentinel.execute_command("ACL SETUSER", "default", "resetpass", ">other")
        url = watched.url.replace("://", "://ranker:secret@")
        with pytest.raises(StoreError, match=r"sentinel_auth=yes") as caught:
            RedisStore(url).current()
        assert "secret" not in str(caught.value)
        assert RedisStore(f"{url}?sentinel_auth=yes").current() is None


def test_an_unknown_master_is_told_with_those_there_are() -> None:
    with running_sentinel() as watched:
        url = watched.url.replace(f"/{SERVICE}", "/nobody")
        with pytest.raises(StoreError, match=rf"no master 'nobody' is up: .* knows {SERVICE}.*check the service"):
            RedisStore(url).current()


def test_sentinels_that_do_not_answer_are_told() -> None:
    with pytest.raises(StoreError, match=rf"no master 'main' is up: {NOBODY} says .*Connection refused"):
        RedisStore(f"redis+sentinel://{NOBODY}/main").current()


# --- TLS and users ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if not has_tls():
        pytest.skip("this redis-server has no TLS: install Debian's package redis-server, for example")
    return write_certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def tls_server(certificates: Certificates) -> Iterator[RedisServer]:
    with running_redis(*certificates.options()) as server:
        yield server


def test_a_server_of_another_authority_is_refused(
    tls_server: RedisServer, certificates: Certificates, tmp_path: Path
) -> None:
    other = write_certificates(tmp_path / "theirs")
    for query in (certificates.query.replace(str(certificates.authority), str(other.authority)), ""):
        with pytest.raises(StoreError, match=r"CERTIFICATE_VERIFY_FAILED.*check ssl_ca_certs"):
            RedisStore(f"rediss://{tls_server.address}?{query}").current()


def test_a_server_that_is_not_who_the_url_says_is_refused(tls_server: RedisServer, certificates: Certificates) -> None:
    url = f"rediss://localhost:{tls_server.port}?{certificates.query}"
    with pytest.raises(StoreError, match=r"localhost.*the host in the URL"):
        RedisStore(url).current()
    assert RedisStore(f"{url}&ssl_check_hostname=no").current() is None


def test_a_client_without_a_certificate_is_refused(tls_server: RedisServer, certificates: Certificates) -> None:
    with pytest.raises(StoreError, match="ssl_certfile with ssl_keyfile"):
        RedisStore(f"rediss://{tls_server.address}?ssl_ca_certs={certificates.authority}").current()


def test_the_authority_may_come_from_the_environment(
    tls_server: RedisServer, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    files = f"ssl_certfile={certificates.certificate}&ssl_keyfile={certificates.key}"
    assert RedisStore(f"rediss://{tls_server.address}?{files}").current() is None


def test_tls_on_one_side_alone_is_told(tls_server: RedisServer, certificates: Certificates) -> None:
    with pytest.raises(StoreError, match="rediss:// where the port speaks TLS"):
        RedisStore(f"redis://{tls_server.address}").current()
    with running_redis() as server, pytest.raises(StoreError, match="that this port speaks TLS"):
        RedisStore(f"rediss://{server.address}?{certificates.query}&socket_timeout=0.2").current()


def test_a_cluster_speaks_tls(certificates: Certificates, folders: list[Path], tmp_path: Path) -> None:
    with running_cluster(*certificates.options(), "--tls-cluster", "yes") as servers:
        keeps_releases(with_tls(cluster_url(servers), certificates), folders[1], tmp_path)


def test_sentinel_speaks_tls(certificates: Certificates, folders: list[Path], tmp_path: Path) -> None:
    with running_sentinel(*certificates.options(), "--tls-replication", "yes") as watched:
        keeps_releases(with_tls(watched.url, certificates), folders[1], tmp_path)


def with_tls(url: str, certificates: Certificates) -> str:
    return f"{url.replace('redis', 'rediss', 1)}?{certificates.query}"


def keeps_releases(url: str, folder: Path, cache: Path) -> None:
    store = RedisStore(url)
    name = activated(store, folder)
    assert store.wait(NOTHING, 1).current == name
    assert verify_release(store.fetch(name, cache)).id == name
    store.close()


def test_a_reader_may_do_what_a_replica_needs_and_no_more(folders: list[Path], tmp_path: Path) -> None:
    with running_redis() as server, server.client() as admin:
        writer = RedisStore(f"{server.url}?prefix=rights")
        name = activated(writer, folders[1])
        writer.publish_users(write_users(tmp_path / "users.snap"))
        allow(admin, "reader", "rights")
        reader = RedisStore(f"redis://reader:{PASSWORD}@{server.address}?prefix=rights")
        assert reader.wait(NOTHING, 1).current == name
        assert [info.id for info in reader.list()] == [name]
        assert verify_release(reader.fetch(name, tmp_path / "cache")).id == name
        assert reader.fetch_users(SPEC_ID, tmp_path / "cache") is not None
        made = tiny_release(tmp_path / "made")
        later = reader.fetch(publish(made, writer), tmp_path / "cache")
        for _ in range(2):  # with nothing new, too
            embedded(writer, made, 0, happened(writer), made.item_ids[:1])
            assert reader.fetch_changes(later, tmp_path / "cache").overlay is not None
        for verb in (reader.check_writable, lambda: reader.publish(folders[0]), lambda: reader.activate(name)):
            with pytest.raises(StoreError, match=r"NOPERM.*docs/stores\.md"):
                verb()
        with pytest.raises(StoreError, match=r"NOPERM.*docs/stores\.md"):
            happened(reader)
        with pytest.raises(StoreError, match=r"NOPERM.*docs/stores\.md"):
            RedisStore(f"redis://reader:{PASSWORD}@{server.address}?prefix=other").current()
        for store in (reader, writer):
            store.close()


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_a_wrong_password_is_told_and_not_shown(cluster: list[RedisServer], scheme: str) -> None:
    with pytest.raises(StoreError, match=r"WRONGPASS.*check user and password") as caught:
        RedisStore(f"{scheme}://nobody:{PASSWORD}@{cluster[0].address}").current()
    assert "ss@w" not in str(caught.value)
    assert "%2Fss" not in str(caught.value)
    assert f"{scheme}://nobody:***@{cluster[0].address}" in str(caught.value)


def test_what_a_publisher_lacks_is_found_before_the_work() -> None:
    with running_redis() as server, Redis(host="127.0.0.1", port=server.port) as admin:
        admin.execute_command("ACL SETUSER", "half", "on", ">pw", "~{ranktower}:*", "+@all")  # no chunks
        with pytest.raises(StoreError, match="NOPERM"):
            RedisStore(f"redis://half:pw@{server.address}").check_writable()
