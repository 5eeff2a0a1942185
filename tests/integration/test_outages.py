"""The benchmarks of outages and of damage at their tiny size, and what they are made of: a proxy, an oracle, bars."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from benchmarks import damage, outages
from benchmarks.made import SIZES, Made, Plan, make
from benchmarks.observed import Asked, Oracle, Replica, Said
from benchmarks.proxy import Proxy, proxy
from benchmarks.report import read
from benchmarks.traffic import bodies
from service.ranker import Ranker

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"


def run(module: str, folder: Path, *arguments: str) -> str:
    """What a benchmark prints; it exits with an error where a bar is missed."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--size", "tiny", "--out", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_outages_are_measured_from_before_their_beginning_until_both_replicas_have_recovered(tmp_path: Path) -> None:
    shown = run("outages", tmp_path, "--outages", "resetting", "--seconds", "1.5")
    rows: list[dict[str, Any]] = read(tmp_path / "outages-tiny.json")["rows"]
    replicas = [row for row in rows if row["kind"] == "replica"]
    assert [(row["outage"], row["replica"]) for row in replicas] == [
        ("resetting", "1 worker"),
        ("resetting", "2 workers"),
    ]
    assert all(row["asked"] > 0 and row["failed"] == row["wrong"] == 0 for row in replicas)
    assert "Connection reset by peer" in shown
    verbs = {(row["when"], row["verb"]) for row in rows if row["kind"] == "verb"}
    assert verbs == {(when, verb) for when in ("before", "within") for verb in ("publish", "update")}
    assert all(row["exit"] == 0 for row in rows if row["kind"] == "verb" and row["when"] == "before")


def test_damage_of_every_kind_is_refused_by_replicas_of_both_stores(tmp_path: Path) -> None:
    run("damage", tmp_path, "--points", "2")
    rows = [row for row in read(tmp_path / "damage-tiny.json")["rows"] if row["kind"] == "damage"]
    assert {(row["store"], row["damage"]) for row in rows} == {
        (store, kind) for store in ("file", "redis") for kind in ("bit flipped", "cut", "gone", "swapped")
    }
    assert all(row["replica"] for row in rows)


# --- the proxy -------------------------------------------------------------------------------------------------------


@contextmanager
def echoing() -> Iterator[Proxy]:
    """A proxy before a server that sends back what one client sends."""
    with socket.create_server((HOST, 0)) as listener:

        def echo() -> None:
            peer, _ = listener.accept()
            with peer:
                while piece := peer.recv(100):
                    peer.sendall(piece)

        thread = Thread(target=echo, daemon=True)
        thread.start()
        with proxy(listener.getsockname()[1]) as made:
            yield made
        thread.join()


def test_a_proxy_passes_on_and_delays_in_order() -> None:
    with echoing() as made, socket.create_connection((HOST, made.port), timeout=10) as client:
        client.sendall(b"at once")
        assert client.recv(100) == b"at once"
        made.delay_s = 0.2
        begun_s = time.monotonic()
        client.sendall(b"late")
        made_late = client.recv(100)
        assert made_late == b"late"
        assert time.monotonic() - begun_s >= 0.2
        client.sendall(b"1")
        made.delay_s = 0.0
        client.sendall(b"2")
        assert client.recv(1) + client.recv(1) == b"12"


def test_a_proxy_resets_connections_when_told_and_where_nobody_listens() -> None:
    with echoing() as made, socket.create_connection((HOST, made.port), timeout=10) as client:
        client.sendall(b"x")
        assert client.recv(100) == b"x"
        made.resetting = True
        client.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    with socket.create_server((HOST, 0)) as listener:
        nowhere = listener.getsockname()[1]
    with proxy(nowhere) as made, pytest.raises(ConnectionResetError):
        heard(made.port)


def heard(port: int) -> bytes:
    with socket.socket() as client:
        client.connect((HOST, port))  # may be reset here, or a moment later
        return client.recv(100)


# --- oracle and bars -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(Plan(items=SIZES["tiny"]), tmp_path_factory.mktemp("made"))


def test_an_oracle_knows_another_release_another_score_and_another_order(made: Made) -> None:
    asked = bodies(made, 2, 30, seed=1)
    oracle = Oracle(asked)
    oracle.know(made.release)
    ranker = Ranker.open(made.release)
    ranking = ranker.rank(ranker.decoders.rank(asked[0]))
    items = [{"id": item, "score": score} for item, score in zip(ranking.ids, ranking.scores.tolist(), strict=True)]
    answer = {"release": ranker.release, "items": items}
    assert oracle.check(0, answer) is None
    assert oracle.check(1, answer) is not None
    assert oracle.check(0, {**answer, "items": items[::-1]}) is not None
    assert oracle.check(0, {**answer, "items": [{**items[0], "score": items[0]["score"] + 0.01}, *items[1:]]})
    assert "never current" in (oracle.check(0, {**answer, "release": "20000101T000000000-000000000000"}) or "")


def test_a_replica_recovers_with_its_last_answer_from_the_old_release() -> None:
    replica = Replica("one", 0)
    replica.asked += [Asked(1.0, 1, "old", None), Asked(2.0, 1, "new", None), Asked(3.0, 1, "old", None)]
    replica.asked += [Asked(4.0, 1, "new", None), Asked(5.0, 1, None, "status 500")]
    replica.said += [Said(1.5, 0.1, None), Said(2.5, 4.0, "away")]
    assert replica.last_other_s("new") == 3.0
    assert [each.ms for each in replica.asked_within(2.0, 4.0)] == [1, 1]
    assert [each.failure for each in replica.said_within(2.0, 9.0)] == ["away"]


def test_bars_fail_on_each_thing_that_may_go_wrong() -> None:
    row = {"kind": "replica", "outage": "killed", "failed": 0, "wrong": 0, "seconds": 4.0, "stale_within_s": 3.9,
           "recovered_s": 1.0}  # fmt: skip
    left = {"kind": "left", "good": True}
    assert {bar.verdict for bar in outages.bars([row, left])} == {"met"}
    wrongs: tuple[dict[str, Any], ...] = ({"failed": 1}, {"wrong": 1}, {"stale_within_s": 0.2}, {"recovered_s": 5.1})
    for wrong in wrongs:
        assert [bar.verdict for bar in outages.bars([{**row, **wrong}, left])].count("MISSED") == 1
    assert [bar.verdict for bar in outages.bars([row, {**left, "good": False}])].count("MISSED") == 1


def test_a_damaged_release_that_is_taken_over_misses_the_bar() -> None:
    rows = [{"kind": "damage", "taken": True}, {"kind": "answers", "failed": 0, "wrong": 0, "whole_taken": True}]
    assert [bar.verdict for bar in damage.bars(rows)] == ["MISSED", "met", "met"]


def test_reasons_are_alike_without_names() -> None:
    one, two = (
        damage.shortened(f"2026112{k}T1-0123456789ab: chunk {k} of items.snap in /tmp/x{k}/store is not")
        for k in (1, 2)
    )
    assert one == two
    assert re.search("chunk N of items.snap", one)
