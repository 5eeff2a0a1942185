"""What every change log must do: in a folder, on a real Redis and a cluster, with real processes; then their sum."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from redis import Redis

from cache import file_log
from cache.changes import (
    DeadLetter,
    Deleted,
    Embedded,
    Entry,
    Fold,
    Upserted,
    decode_change,
    decode_dead,
    decode_embedded,
    encode_change,
    encode_dead,
    encode_embedded,
)
from cache.errors import StoreError
from cache.file_log import FileLog
from cache.redis_log import SERIAL_BITS, _position
from cache.redis_store import RedisStore
from cache.store import open_store
from kernel.ids import Ids, Texts
from tests.redis_server import cluster_url, redis_server, running_cluster, running_redis

ROOT = Path(__file__).resolve().parents[2]
SEGMENT_BYTES = 300  # a few entries


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    with running_cluster() as servers:
        yield cluster_url(servers[:1])


@pytest.fixture(params=["file", "redis_url", "cluster"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that is empty at first."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    name = re.sub(r"\W", "-", request.node.name) + str(time.monotonic_ns())
    return f"{request.getfixturevalue(request.param)}?prefix={name}"


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few entries each."""
    monkeypatch.setattr(file_log, "SEGMENT_BYTES", SEGMENT_BYTES)


def numbered(start: int, count: int) -> list[bytes]:
    return [
        f"entry {number:04} ".encode() * (number % 5) + str(number).encode() for number in range(start, start + count)
    ]


# --- one process -----------------------------------------------------------------------------------------------------


def test_an_empty_log_has_nothing(url: str) -> None:
    log = open_store(url).log("changes")
    assert log.read(0, 10) == []
    assert log.newest() is None
    assert (log.last(), log.floor(), log.position_at(2**41)) == (0, 0, 0)
    log.trim(7)
    assert log.last() == 0


@pytest.mark.usefixtures("segments")
def test_what_was_appended_is_read_in_order_from_any_position(url: str) -> None:
    log = open_store(url).log("changes")
    ends = [log.append(numbered(start, 3)) for start in range(0, 60, 3)]
    entries = open_store(url).log("changes").read(0, 1000)
    assert [entry.payload for entry in entries] == numbered(0, 60)
    positions = [entry.position for entry in entries]
    assert positions == sorted(set(positions))
    assert positions[2::3] == ends
    assert log.last() == ends[-1]
    assert log.newest() == entries[-1]
    for place, position in enumerate(positions):
        assert log.read(position, 4) == entries[place + 1 : place + 5]
        assert log.read(position - 1, 1) == [entries[place]]  # between two entries, as an operator may say
    assert log.read(ends[-1] + 1, 5) == []


@pytest.mark.usefixtures("segments")
def test_a_reader_goes_on_where_it_stopped_while_others_append(url: str) -> None:
    log, other = open_store(url).log("changes"), open_store(url).log("changes")
    seen: list[Entry] = []
    for start in range(0, 40, 2):
        other.append(numbered(start, 2))
        while found := log.read(seen[-1].position if seen else 0, 3):
            seen += found
        assert len(seen) == start + 2
    assert [entry.payload for entry in seen] == numbered(0, 40)


def test_logs_are_apart_listed_and_deleted(url: str) -> None:
    store = open_store(url)
    for name in ("changes", "records/b1b1b1b1b1b1b1b1", "records/b2b2b2b2b2b2b2b2", "dead"):
        store.log(name).append([name.encode()])
    store.log("records/b2b2b2b2b2b2b2b2").raise_floor(5)
    assert store.logs("records") == ["records/b1b1b1b1b1b1b1b1", "records/b2b2b2b2b2b2b2b2"]
    store.delete_log("records/b2b2b2b2b2b2b2b2")
    store.delete_log("records/never")
    assert store.logs("records") == ["records/b1b1b1b1b1b1b1b1"]
    assert store.log("records/b2b2b2b2b2b2b2b2").read(0, 9) == []
    assert store.log("records/b2b2b2b2b2b2b2b2").floor() == 0
    assert [entry.payload for entry in store.log("changes").read(0, 9)] == [b"changes"]


@pytest.mark.usefixtures("segments")
def test_trimming_spares_what_is_behind_the_position(url: str) -> None:
    log = open_store(url).log("changes")
    log.append(numbered(0, 40))
    for start in range(40, 80, 4):
        log.append(numbered(start, 4))
    entries = log.read(0, 1000)
    for place in (0, 17, 41, 60, 79):
        log.trim(entries[place].position)
        left = open_store(url).log("changes").read(0, 1000)
        assert left[-(79 - place) :] == entries[place + 1 :] if place < 79 else len(left) < 10
        assert log.last() == entries[-1].position
    assert len(open_store(url).log("changes").read(0, 1000)) < 40  # space was given back
    assert log.append([b"more"]) > entries[-1].position


def test_the_floor_only_rises(url: str) -> None:
    log = open_store(url).log("changes")
    log.append([b"x"])
    for position, floor in ((5, 5), (3, 5), (2**60 + 1, 2**60 + 1), (2**60, 2**60 + 1)):
        log.raise_floor(position)
        assert open_store(url).log("changes").floor() == floor


@pytest.mark.usefixtures("segments")
def test_a_moment_has_the_position_of_what_was_there_by_then(url: str) -> None:
    log = open_store(url).log("changes")
    for start in range(0, 20, 2):
        log.append(numbered(start, 2))
        time.sleep(0.002)  # so that entries are of several milliseconds
    entries = log.read(0, 100)
    assert len({entry.at_ms for entry in entries}) > 5
    assert [entry.at_ms for entry in entries] == sorted(entry.at_ms for entry in entries)
    for moment in range(entries[0].at_ms - 2, entries[-1].at_ms + 3):
        behind = [entry.payload for entry in log.read(log.position_at(moment), 100)]
        assert behind == [entry.payload for entry in entries if entry.at_ms > moment]


def test_the_clock_of_a_log_is_that_of_its_entries(url: str) -> None:
    log = open_store(url).log("changes")
    before = log.now_ms()
    log.append([b"x"])
    assert before <= log.read(0, 1)[0].at_ms <= log.now_ms()


@pytest.mark.parametrize("payloads", [[], [b"x" * ((64 << 20) + 1)]], ids=["none", "too large"])
def test_an_append_that_cannot_be_is_refused(url: str, payloads: list[bytes]) -> None:
    with pytest.raises(StoreError, match="send fewer rows"):
        open_store(url).log("changes").append(payloads)
    assert open_store(url).log("changes").last() == 0


# --- many processes --------------------------------------------------------------------------------------------------

APPENDER = """
import sys
from cache import file_log
from cache.store import open_store
file_log.SEGMENT_BYTES = 100_000
url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
log = open_store(url).log("changes")
for number in range(count):
    payloads = [f"{name} {number} {part} ".encode() * 300 for part in range(3)]
    print(number, log.append(payloads), flush=True)
"""


def appender(url: str, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPENDER, url, name, str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str], lines: list[str]) -> list[tuple[int, int]]:
    """What an appender said before its end: number and position of each append, complete lines only."""
    assert process.stdout is not None
    rest = process.stdout.read()
    process.wait()
    process.stdout.close()
    whole = "".join(lines) + rest
    return [(int(line.split()[0]), int(line.split()[1])) for line in whole.split("\n")[:-1]]


def by_name(entries: list[Entry]) -> dict[str, list[tuple[int, int, int]]]:
    """(number, part, position) of the entries of each appender. Every payload is whole."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for entry in entries:
        name, number, part = entry.payload[: len(entry.payload) // 300].decode().split()
        assert entry.payload == f"{name} {number} {part} ".encode() * 300
        found.setdefault(name, []).append((int(number), int(part), entry.position))
    return found


def test_appenders_at_the_same_time_lose_nothing(url: str) -> None:
    processes = [appender(url, name, 60) for name in "abc"]
    said = dict(zip("abc", [told(process, []) for process in processes], strict=True))
    found = by_name(open_store(url).log("changes").read(0, 10_000))
    for name, entries in found.items():
        assert [entry[:2] for entry in entries] == [(number, part) for number in range(60) for part in range(3)]
        assert [(number, position) for number, part, position in entries if part == 2] == said[name]
    assert sorted(found) == ["a", "b", "c"]


def test_a_killed_appender_leaves_whole_entries_only(url: str) -> None:
    """Killed a dozen times at random, beside one that lives on."""
    rng = random.Random(7)
    survivor = appender(url, "survivor", 150)
    said: dict[str, list[tuple[int, int]]] = {}
    for round_ in range(12):
        process = appender(url, f"victim{round_}", 100_000)
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(rng.uniform(0, 0.03))  # a random point of its work
        process.send_signal(signal.SIGKILL)
        said[f"victim{round_}"] = told(process, lines)
    said["survivor"] = told(survivor, [])
    found = by_name(open_store(url).log("changes").read(0, 1_000_000))
    assert found.keys() == said.keys()
    for name, told_of in said.items():
        numbers = [entry[:2] for entry in found[name]]
        assert len(told_of) * 3 <= len(numbers) <= len(told_of) * 3 + 3  # what it had no time to tell of
        assert numbers == [(number, part) for number in range(len(numbers) // 3) for part in range(3)]
        assert told_of == [(number, at) for number, part, at in found[name] if part == 2][: len(told_of)]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_torn_entry_is_never_seen_and_is_cut_off(tmp_path: Path) -> None:
    log = FileLog(tmp_path)
    kept = log.append([b"first", b"second"])
    end = log.append([b"third " * 20])
    (path,) = tmp_path.glob("*.log")
    whole = path.read_bytes()
    assert len(whole) == end
    for size in range(kept, end):
        path.write_bytes(whole[:size])
        reader = FileLog(tmp_path)
        assert [entry.payload for entry in reader.read(0, 9)] == [b"first", b"second"]
        assert reader.last() == kept
        assert path.stat().st_size == size  # readers change nothing
    position = FileLog(tmp_path).append([b"fourth"])
    assert [entry.payload for entry in FileLog(tmp_path).read(0, 9)] == [b"first", b"second", b"fourth"]
    assert path.stat().st_size == position
    assert [entry.payload for entry in log.read(kept, 9)] == [b"fourth"]  # who knew the entry that was


def test_a_damaged_entry_before_others_is_told_of_and_not_cut(tmp_path: Path) -> None:
    log = FileLog(tmp_path)
    first = log.append([b"first"])
    log.append([b"second" * 10, b"third"])
    (path,) = tmp_path.glob("*.log")
    content = bytearray(path.read_bytes())
    content[first + 30] ^= 1
    path.write_bytes(content)
    for act in (lambda: FileLog(tmp_path).read(0, 9), lambda: FileLog(tmp_path).append([b"more"])):
        with pytest.raises(StoreError, match=rf"{path} is damaged at octet {first}: restore it"):
            act()
    assert path.read_bytes() == content


@pytest.mark.usefixtures("segments")
def test_a_file_that_ends_before_the_next_begins_is_damaged(tmp_path: Path) -> None:
    log = FileLog(tmp_path)
    ends = [log.append([b"x" * 400]) for _ in range(3)]
    path = min(tmp_path.glob("*.log"))
    path.write_bytes(path.read_bytes()[: ends[0] - 5])
    with pytest.raises(StoreError, match="is damaged"):
        FileLog(tmp_path).read(0, 9)


def test_times_never_fall_when_the_clock_does(tmp_path: Path) -> None:
    clock = iter([1000, 900, 1100])
    log = FileLog(tmp_path, clock_ms=lambda: next(clock))
    for _ in range(3):
        log.append([b"x"])
    assert [entry.at_ms for entry in log.read(0, 9)] == [1000, 1000, 1100]
    assert log.position_at(999) == 0


@pytest.mark.usefixtures("segments")
def test_a_file_log_rotates_and_gives_files_back(tmp_path: Path) -> None:
    log = FileLog(tmp_path)
    ends = [log.append([b"x" * 200]) for _ in range(6)]
    names = sorted(path.name for path in tmp_path.glob("*.log"))
    assert names == [f"{base:020}.log" for base in (0, ends[1], ends[3])]
    log.trim(ends[3] - 1)
    assert sorted(path.name for path in tmp_path.glob("*.log")) == names[1:]
    assert [entry.position for entry in log.read(0, 9)] == ends[2:]


def test_a_full_disk_is_said_and_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = FileLog(tmp_path)
    end = log.append([b"first"])

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cache.file_log.os.fsync", fails)
    with pytest.raises(StoreError, match="No space left on device: free space"):
        log.append([b"second"])
    (path,) = tmp_path.glob("*.log")
    assert path.stat().st_size == end
    monkeypatch.undo()
    assert log.append([b"third"]) > end


# --- Redis -----------------------------------------------------------------------------------------------------------


def test_a_position_of_redis_is_the_id_of_its_entry(redis_url: str) -> None:
    store = RedisStore(f"{redis_url}?prefix=ids")
    position = store.log("changes").append([b"x", b"y"])
    ((identity, fields),) = store._client.xrevrange("ids:changes", count=1)
    assert identity.decode() == f"{position >> 20}-{position % 2**20}"
    assert fields == {b"e": b"y"}


@pytest.mark.parametrize("milliseconds", [1_767_225_600_000, 8_796_093_022_207])  # the start of 2026, the last of all
def test_a_position_of_redis_as_a_double_is_exact_to_the_millisecond(milliseconds: int) -> None:
    """Readers of JSON and metrics have doubles: docs/api.md says what is left to them."""
    first = _position(f"{milliseconds}-0".encode())
    last = _position(f"{milliseconds}-{2**SERIAL_BITS - 1025}".encode())
    assert {int(float(position)) >> SERIAL_BITS for position in (first, first + 1, last)} == {milliseconds}
    assert "exact to the millisecond" in (ROOT / "docs" / "api.md").read_text()


def test_redis_keeps_the_last_position_when_all_was_trimmed(redis_url: str) -> None:
    log = RedisStore(f"{redis_url}?prefix=trimmed").log("changes")
    position = log.append([b"x"])
    log.trim(position)
    assert log.newest() is None
    assert log.last() == position
    assert log.position_at(2**42) == position


def test_a_redis_that_is_away_is_named(tmp_path: Path) -> None:
    log = RedisStore("redis://127.0.0.1:1/0?socket_connect_timeout=0.1").log("changes")
    for act in (log.last, log.newest, log.floor, lambda: log.read(0, 1), lambda: log.append([b"x"])):
        with pytest.raises(StoreError, match=r"redis://127.0.0.1:1/0"):
            act()


def allowed(admin: Redis, user: str) -> None:
    """Make a user as docs/stores.md says."""
    found = re.search(rf"ACL SETUSER {user} (.*)", (ROOT / "docs" / "stores.md").read_text())
    assert found is not None
    admin.execute_command("ACL SETUSER", user, *found[1].split())


def test_users_of_redis_may_do_what_their_part_takes() -> None:
    with running_redis() as server:
        with server.client() as admin:
            allowed(admin, "publisher")
            allowed(admin, "reader")
        place = server.url.split("//")[1]
        log = RedisStore(f"redis://publisher:password@{place}").log("changes")
        position = log.append([b"first", b"second"])
        log.raise_floor(position - 1)
        log.trim(position - 1)
        assert log.last() == position
        assert log.now_ms() >= log.read(0, 9)[0].at_ms
        reader = RedisStore(f"redis://reader:password@{place}").log("changes")
        assert [entry.payload for entry in reader.read(0, 9)] == [b"second"]
        assert reader.floor() == position - 1
        with pytest.raises(StoreError, match=r"docs/stores\.md"):
            reader.append([b"third"])


# --- what entries hold -----------------------------------------------------------------------------------------------


def listed(ids: Ids) -> list[int | str]:
    return list(ids.tolist())


ALL_IDS: list[Ids] = [
    np.array([3, -(2**63), 2**63 - 1]),
    np.array([], np.int64),
    Texts.of(["a", "é" * 500, "snow ☃"]),
    Texts.of(["part", "of", "more"])[np.array([2, 0])],
]


@pytest.mark.parametrize("ids", ALL_IDS, ids=["int", "none", "text", "some"])
def test_entries_come_back_as_they_were(ids: Ids) -> None:
    deleted = decode_change(Entry(1, 0, encode_change(Deleted(ids))))
    assert isinstance(deleted, Deleted)
    assert listed(deleted.ids) == listed(ids)
    records = np.random.default_rng(0).normal(size=(len(ids), 7)).astype(np.float32)
    for each in (records, None):
        embedded = Embedded(since=5, after=2**60, until=2**60 + 1, ids=ids, records=each)
        found = decode_embedded(Entry(1, 0, encode_embedded(embedded)))
        assert (found.since, found.after, found.until) == (5, 2**60, 2**60 + 1)
        assert listed(found.ids) == listed(ids)
        if each is None:
            assert found.records is None
        else:
            np.testing.assert_array_equal(found.records, each)
    assert decode_change(Entry(1, 0, encode_change(Upserted(b"rows")))) == Upserted(b"rows")
    letters = [DeadLetter(bundle_id="b", position=9, id=item, reason="r") for item in (1, "x", None)]
    (payload,) = encode_dead(letters)
    assert decode_dead(Entry(1, 0, payload)) == letters
    many = [DeadLetter(bundle_id="b", position=9, id=item, reason=f"r{item // 3}") for item in range(2_500)]
    payloads = encode_dead(many)
    assert len(payloads) == 3
    assert [letter for payload in payloads for letter in decode_dead(Entry(1, 0, payload))] == many
    assert encode_dead([]) == []


def test_a_reason_that_many_share_is_written_once() -> None:
    letters = [DeadLetter(bundle_id="b", position=9, id=item, reason="r" * 500) for item in range(1_000)]
    (payload,) = encode_dead(letters)
    assert len(payload) < 6_000


@pytest.mark.parametrize("decode", [decode_change, decode_embedded, decode_dead])
def test_an_entry_of_another_version_is_named(decode: Callable[[Entry], object]) -> None:
    with pytest.raises(StoreError, match=r"at 77 begins with b'\?unknown"):
        decode(Entry(77, 0, b"?unknown content"))


# --- what they sum to ------------------------------------------------------------------------------------------------


def random_history(rng: random.Random, kinds: str) -> list[Embedded]:
    """Stretches of a line that begins at 0, with upserts and deletions of a dozen ids."""
    line, at = [], 0
    for number in range(40):
        until = at + rng.randint(1, 9)
        chosen = rng.sample(range(12), rng.randint(0, 5))
        ids: Ids = np.array(chosen, np.int64) if kinds == "int" else Texts.of([f"item {item}" for item in chosen])
        records = np.full((len(chosen), 3), number, np.float32) + np.array(chosen, np.float32)[:, None] / 100
        line.append(Embedded(since=0, after=at, until=until, ids=ids, records=records if rng.random() < 0.6 else None))
        at = until
    return line


def state(folded: Fold) -> tuple[dict[int | str, float], set[int | str]]:
    assert folded.rows.shape == (len(folded.ids), 3)
    assert (folded.rows == folded.rows[:, :1]).all()
    upserts = dict(zip(listed(folded.ids), folded.rows[:, 0].tolist(), strict=True))
    deleted = listed(folded.deleted)
    assert len(upserts) == len(folded.ids)
    assert len(set(deleted)) == len(deleted)
    assert len(folded) == len(upserts) + len(deleted)
    return upserts, set(deleted)


def expected(line: list[Embedded], watermark: int) -> tuple[dict[int | str, float], set[int | str]]:
    """One by one, as the words say it."""
    upserts: dict[int | str, float] = {}
    deleted: set[int | str] = set()
    for entry in line:
        if entry.until <= watermark:
            continue
        for row, item in enumerate(listed(entry.ids)):
            upserts.pop(item, None)
            deleted.discard(item)
            if entry.records is None:
                deleted.add(item)
            else:
                upserts[item] = float(entry.records[row, 0])
    return upserts, deleted


@pytest.mark.parametrize("kinds", ["int", "string"])
@pytest.mark.parametrize("seed", range(30))
def test_however_entries_come_they_sum_to_the_latest_of_each_item(kinds: str, seed: int) -> None:
    """In parts, twice, of two writers at once, and after a line that began too late."""
    rng = random.Random(seed)
    line = random_history(rng, kinds)
    watermark = rng.choice([0, line[7].until, line[7].until - 1])
    too_late = line[rng.randrange(10, 40) :]
    slow = iter(line)
    log: list[Embedded] = [*too_late]
    for entry in line:  # a second writer, behind the first by some
        log.append(entry)
        log.extend(each for each, _ in zip(slow, range(rng.randint(0, 2)), strict=False) if each.until <= entry.until)
    fold = Fold(watermark, "int" if kinds == "int" else "string", 3)
    known = [entry for entry in log if fold.add(entry)]
    assert fold.watermark == line[-1].until
    assert state(fold) == expected(line, watermark)
    last = {item: entry.until for entry in line if entry.until > watermark for item in listed(entry.ids)}
    assert {item: fold.changed_at(item) for item in [*listed(fold.ids), *listed(fold.deleted)]} == last
    assert fold.changed_at("never") == 0
    assert [entry.until for entry in known] == sorted({entry.until for entry in known})


def test_what_does_not_follow_is_not_taken() -> None:
    fold = Fold(10, "int", 3)
    ids = np.array([1])
    gap = Embedded(since=11, after=11, until=20, ids=ids, records=None)
    old = Embedded(since=0, after=0, until=10, ids=ids, records=None)
    assert [fold.add(gap), fold.add(old)] == [False, False]
    assert (fold.watermark, len(fold)) == (10, 0)
    across = Embedded(since=0, after=5, until=15, ids=ids, records=None)
    assert [fold.add(gap), fold.add(across), fold.add(gap)] == [False, True, True]
    assert fold.watermark == 20


def test_what_cannot_be_packed_changes_nothing() -> None:
    def refuse(records: np.ndarray) -> np.ndarray:
        raise KeyError

    fold = Fold(0, "int", 3, refuse)
    with pytest.raises(KeyError):
        fold.add(Embedded(since=0, after=0, until=9, ids=np.array([1]), records=np.zeros((1, 3), np.float32)))
    assert (fold.watermark, len(fold)) == (0, 0)
