"""The short way of a ranking: who goes it, that it answers as the ordinary way does, and what it leaves to that one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cache.file_store import FileStore
from service.admission import Admission
from service.at_once import RankProtocol
from tests.services import TIMEOUT_S, Running, running, running_release
from tests.tiny_releases import TinyRelease, tiny_release

BODY = json.dumps({"user_id": 4, "candidates": [100, 101, 102]}).encode()
PLAIN = {"Host": "here", "Content-Type": "application/json", "Content-Length": str(len(BODY))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return tiny_release(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def service(made: TinyRelease, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_release(made, tmp_path_factory.mktemp("store"), max_body_bytes=20_000) as service:
        yield service


@pytest.fixture
def round_(service: Running, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that went the ordinary way."""
    seen: list[str] = []
    ordinary = service.service.answer

    async def watched(request: Any, answerer: Any) -> Any:
        seen.append(request.url.path)
        return await ordinary(request, answerer)

    monkeypatch.setattr(service.service, "answer", watched)
    return seen


def head(headers: dict[str, str], line: str = "POST /v1/rank HTTP/1.1") -> bytes:
    return "\r\n".join([line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


def connect(service: Running) -> socket.socket:
    connection = socket.create_connection((service.http.base_url.host, service.http.base_url.port or 0), TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def answers(connection: socket.socket, count: int) -> list[tuple[int, dict[str, str], dict[str, Any]]]:
    """Status, headers and document of as many answers."""
    found, octets = [], b""
    while len(found) < count:
        text, complete, rest = octets.partition(b"\r\n\r\n")
        lines = text.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        size = int(headers.get("content-length", 0))
        if complete and len(rest) >= size:
            found.append((int(lines[0].split()[1]), headers, json.loads(rest[:size])))
            octets = rest[size:]
            continue
        more = connection.recv(65536)
        assert more, f"closed after {octets!r}"
        octets += more
    return found


def ask(service: Running, octets: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    with connect(service) as connection:
        connection.sendall(octets)
        return answers(connection, 1)[0]


def test_a_plain_ranking_goes_the_short_way_and_is_answered_as_on_the_ordinary_one(
    service: Running, round_: list[str]
) -> None:
    status, headers, document = ask(service, head(PLAIN) + BODY)
    assert (status, round_) == (200, [])
    ordinary = ask(service, head(PLAIN, "POST /v1/rank? HTTP/1.1") + BODY)
    assert round_ == ["/v1/rank"]
    assert ordinary[0] == status
    assert ordinary[2] == document
    assert {*ordinary[1]} == {*headers}
    for name in {*headers} - {"date", "server-timing"}:
        assert ordinary[1][name] == headers[name], name


def test_a_plain_batch_goes_the_short_way_too(service: Running, round_: list[str]) -> None:
    body = b'{"requests": [%s, %s]}' % (BODY, BODY)
    status, _, document = ask(
        service, head({**PLAIN, "Content-Length": str(len(body))}, "POST /v1/rank:batch HTTP/1.1") + body
    )
    assert (status, round_, len(document["rankings"])) == (200, [], 2)


@pytest.mark.parametrize(
    ("line", "changed", "status"),
    [
        ("POST /v1/rank?why HTTP/1.1", {}, 200),
        ("POST /v1/rank HTTP/1.0", {}, 200),
        ("POST /v1/rank HTTP/1.1", {"Connection": "close"}, 200),
        ("POST /v1/rank HTTP/1.1", {"Content-Encoding": "identity"}, 200),
        ("POST /v1/rank HTTP/1.1", {"Content-Encoding": "gzip"}, 415),
        ("POST /v1/rank HTTP/1.1", {"Content-Type": "text/plain"}, 415),
        ("POST /v1/rank HTTP/1.1", {"Accept": "*/*", "accept": "application/json"}, 200),
        ("POST /v1/retrieve HTTP/1.1", {}, 422),
        ("PUT /v1/rank HTTP/1.1", {}, 405),
    ],
)
def test_what_is_unusual_goes_the_ordinary_way(
    service: Running, round_: list[str], line: str, changed: dict[str, str], status: int
) -> None:
    assert ask(service, head({**PLAIN, **changed}, line) + BODY)[0] == status
    assert round_ or status == 405


@pytest.mark.parametrize(
    ("body", "status"), [(b"", 422), (b"{", 422), (b'{"candidates": [1.5]}', 422), (b" " * 20_001, 413)]
)
def test_what_is_wrong_is_refused_on_the_ordinary_way(
    service: Running, round_: list[str], body: bytes, status: int
) -> None:
    found, _, document = ask(service, head({**PLAIN, "Content-Length": str(len(body))}) + body)
    assert (found, round_) == (status, ["/v1/rank"])
    assert document["remedy"]


def test_no_size_is_too_long_to_be_compared(service: Running, round_: list[str]) -> None:
    assert ask(service, head({**PLAIN, "Content-Length": "0" * 30 + "20001"}) + b" " * 20_001)[0] == 413
    assert round_ == ["/v1/rank"]


def test_a_defect_of_the_short_way_is_logged(
    service: Running, round_: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(service.service), "is_quick", lambda *given: 1 / 0 if not round_ else True)
    assert ask(service, head(PLAIN) + BODY)[0] == 200
    assert round_ == ["/v1/rank"]
    assert "failed on the short way" in caplog.text


def test_a_caller_whose_answer_cannot_be_written_is_not_left_waiting(
    service: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken, connect(service) as connection:
        broken.setattr(RankProtocol, "reply", lambda *given: 1 / 0)
        connection.sendall(head(PLAIN) + BODY)
        assert connection.recv(1) == b""
    assert "could not be written" in caplog.text
    assert ask(service, head(PLAIN) + BODY)[0] == 200


def test_a_chunked_body_is_read(service: Running, round_: list[str]) -> None:
    headers = {**PLAIN, "Transfer-Encoding": "chunked"}
    del headers["Content-Length"]
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    assert ask(service, head(headers) + chunks)[0] == 200
    assert round_ == ["/v1/rank"]


def test_many_candidates_are_ranked_in_the_pool(made: TinyRelease, tmp_path: Path) -> None:
    with running_release(made, tmp_path, inline_ms=0.0) as service:
        threads: list[str] = []
        ranker = service.service.refresher.ranker()
        known = type(ranker).rank

        def watched(*given: Any) -> Any:
            threads.append(threading.current_thread().name)
            return known(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(ranker), "rank", watched)
            assert ask(service, head(PLAIN) + BODY)[0] == 200
        assert threads[0].startswith("rank")


def test_a_body_may_come_in_pieces_and_connections_stay_open(service: Running, round_: list[str]) -> None:
    with connect(service) as connection:
        for _ in range(3):
            connection.sendall(head(PLAIN))
            for octet in BODY:
                connection.sendall(bytes([octet]))
            assert answers(connection, 1)[0][0] == 200
    assert round_ == []


def test_requests_sent_one_upon_another_are_answered_in_their_order(service: Running, round_: list[str]) -> None:
    bodies = [json.dumps({"candidates": list(range(100, 100 + count))}).encode() for count in range(1, 6)]
    octets = b"".join(head({**PLAIN, "Content-Length": str(len(body))}) + body for body in bodies)
    with connect(service) as connection:
        connection.sendall(octets)
        found = answers(connection, 5)
    assert [document["counts"]["candidates"] for _, _, document in found] == [1, 2, 3, 4, 5]
    assert len(round_) >= 4, "all but the last, which has none behind it"


@contextmanager
def held(service: Running) -> Iterator[None]:
    """The event loop stands still meanwhile: what is sent waits in the sockets, and is read in one turn."""
    standing, go_on = threading.Event(), threading.Event()
    loop = service.server.servers[0].get_loop()
    loop.call_soon_threadsafe(lambda: (standing.set(), go_on.wait(TIMEOUT_S)))
    assert standing.wait(TIMEOUT_S)
    try:
        yield
    finally:
        go_on.set()


def test_who_leaves_is_forgotten(service: Running, round_: list[str]) -> None:
    for octets in (head(PLAIN), head(PLAIN) + BODY[:-1]):
        with connect(service) as connection:
            connection.sendall(octets)
    with connect(service) as connection, connect(service) as other, held(service):
        connection.sendall(head(PLAIN) + BODY)
        other.sendall(head(PLAIN) + BODY)
        connection.close()
    assert ask(service, head(PLAIN) + BODY)[0] == 200
    admission = service.service.admission
    assert (admission.waiting, admission.working, round_) == (0, 0, [])


@pytest.mark.parametrize("line", ["POST /v1/rank HTTP/1.1", "POST /v1/rank? HTTP/1.1"])
def test_a_deadline_counts_from_the_head_of_the_request(service: Running, line: str) -> None:
    body = json.dumps({"candidates": [100], "deadline_ms": 40}).encode()
    with connect(service) as connection:
        connection.sendall(head({**PLAIN, "Content-Length": str(len(body))}, line) + body[:-1])
        httpx.get(f"{service.http.base_url}/livez")  # by now the server has read what came before
        threading.Event().wait(0.1)
        connection.sendall(body[-1:])
        status, _, document = answers(connection, 1)[0]
    assert (status, document["field"]) == (504, "deadline_ms")


def test_no_release_and_a_full_queue_are_said_as_ever(
    service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(FileStore(f"file://{tmp_path}/none")) as empty:
        assert ask(empty, head(PLAIN) + BODY)[0] == 503
    monkeypatch.setattr(Admission, "has_room", False)
    assert ask(service, head(PLAIN) + BODY)[0] == 429


def test_a_crowd_on_the_short_way_is_answered_or_told_to_come_again(made: TinyRelease, tmp_path: Path) -> None:
    with running_release(made, tmp_path, max_queue=2) as service, ExitStack() as stack:
        crowd = [stack.enter_context(connect(service)) for _ in range(8)]
        for connection in crowd:  # all are known to the server before it stands still
            connection.sendall(head(PLAIN) + BODY)
            answers(connection, 1)
        with held(service):
            for connection in crowd:
                connection.sendall(head(PLAIN) + BODY)
        found = [answers(connection, 1)[0][0] for connection in crowd]
        assert {*found} == {200, 429}
        assert found.count(429) >= 4, "two wait; another may come in when one of them is answered"
        assert (service.service.admission.waiting, service.service.admission.working) == (0, 0)


def test_a_request_on_its_way_when_the_server_stops_is_answered(made: TinyRelease, tmp_path: Path) -> None:
    with running_release(made, tmp_path) as service, connect(service) as connection:
        connection.sendall(head(PLAIN) + BODY[:-1])
        httpx.get(f"{service.http.base_url}/livez")  # by now the server has read what came before
        service.stop()
        connection.sendall(BODY[-1:])
        status, headers, _ = answers(connection, 1)[0]
    assert (status, headers["connection"]) == (200, "close")
