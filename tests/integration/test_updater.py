"""Updates from a Parquet file to the records of every live bundle, on a folder and on a real Redis."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cache import updater as room
from cache.changes import (
    CHANGES,
    DEAD,
    Deleted,
    Embedded,
    Entry,
    Upserted,
    decode_dead,
    decode_embedded,
    encode_change,
    encode_dead,
    encode_embedded,
)
from cache.cli import app
from cache.errors import StoreError
from cache.file_store import FileStore
from cache.follow import Follower
from cache.intake import append_deletes, append_items, item_rows
from cache.redis_store import RedisStore
from cache.release import BUNDLE, ITEMS
from cache.store import ReleaseStore, open_store
from cache.updater import Updater, read_entry, resume
from kernel.ids import Texts
from model.bundle import Bundle, open_bundle, seal_bundle
from model.errors import DataError
from tests.catalogues import Shop, open_shop
from tests.graphs import write_bundle
from tests.processes import eventually
from tests.redis_server import redis_server
from tests.updates import embedded, folded, records_of, with_id, with_price, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["int", "string"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=400, string_ids=request.param == "string")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("plain"), items=400)


@pytest.fixture(scope="module")
def other(plain: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another bundle for the same items."""
    return write_bundle(tmp_path_factory.mktemp("other") / "bundle", plain.spec, open_bundle(plain.bundle).head, seed=5)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(params=["file", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # build and cache folders are relative
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"{request.getfixturevalue('redis_url')}?prefix={re.sub(r'[^a-z0-9]', '-', tmp_path.name)}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.chdir(tmp_path)
    return FileStore(f"file://{tmp_path}/store")


def run(*arguments: object) -> str:
    """The output of a verb; what it raises, it raises here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def publish(store: ReleaseStore, bundle: Path, items: Path, *more: object) -> str:
    """The name of the release."""
    said = run("publish", "--bundle", bundle, "--items", items, "--store", store.url, "--dtype", "f32", *more)
    return re.findall(r"published (\d{8}T\d{9}-\w+) ", said)[0]


def watermark_of(store: ReleaseStore, release: str) -> int:
    return next(info.watermark for info in store.list() if info.id == release)


def fresh(item: int, shop: Shop) -> Any:
    return f"fresh-{item}" if shop.spec.item_id_type == "string" else 1_000_000 + item


# --- the whole line --------------------------------------------------------------------------------------------------


def test_updates_give_the_records_of_a_full_publish_bit_for_bit(shop: Shop, url: str, tmp_path: Path) -> None:
    store, bundle, table = open_store(url), open_bundle(shop.bundle), pq.read_table(shop.items)
    release = publish(store, shop.bundle, shop.items)
    assert watermark_of(store, release) == 0
    first = with_price(table.slice(10, 40), range(40), 1e9)
    newest = with_price(table.slice(20, 5), range(5), 0.0)
    added = with_id(table.slice(0, 1), fresh(0, shop))
    said = run("update", "--items", write(tmp_path / "first.parquet", first), "--store", url)
    position = store.log(CHANGES).last()
    assert f"appended 40 items to the log of {store.url}, up to position {position}" in said
    assert f"embedded for 1 bundle: {bundle.id} (up to position {position})" in said
    run("update", "--items", write(tmp_path / "second.parquet", pa.concat_tables([newest, added])), "--store", url)
    gone = [table["item_id"][row].as_py() for row in (11, 300)]
    run("update", "--delete", write(tmp_path / "gone.parquet", table.take([11])), "--store", url)
    run("update", "--delete-ids", gone[1], "--store", url)

    whole = pa.concat_tables([table.slice(0, 10), first.slice(0, 1), first.slice(2, 8), newest, first.slice(15), added])
    full = FileStore(f"file://{tmp_path}/full")
    name = publish(full, shop.bundle, write(tmp_path / "whole.parquet", whole))
    found = folded(store, bundle, 0)
    assert found.watermark == store.log(CHANGES).last() == int(run("update", "--position", "--store", url))
    assert sorted(found.deleted.tolist(), key=str) == sorted(gone, key=str)
    changed = [*table["item_id"].slice(10, 40).to_pylist(), fresh(0, shop)]
    assert set(found.ids.tolist()) == set(changed) - set(gone)
    wanted = records_of(full.fetch(name, tmp_path / "fetched") / ITEMS, bundle, found.ids.tolist())
    np.testing.assert_array_equal(found.rows, wanted)


def test_a_new_bundle_gets_the_changes_behind_its_watermark_before_it_is_current(
    plain: Shop, other: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.watermarks.EXPORT_S", 0.0)  # this file is written in no time
    store, table = open_store(url), pq.read_table(plain.items)
    publish(store, plain.bundle, plain.items)
    run(
        "update", "--items", write(tmp_path / "a.parquet", with_price(table.slice(0, 9), range(9), 1e9)), "--store", url
    )
    time.sleep(0.005)
    items = write(tmp_path / "all.parquet", with_price(table, range(9), 1e9))
    behind = store.log(CHANGES).last()
    time.sleep(0.005)
    late = with_price(table.slice(5, 9), range(9), 0.0)
    run("update", "--no-embed", "--items", write(tmp_path / "b.parquet", late), "--store", url)
    release = publish(store, other, items)
    bundle = open_bundle(other)
    assert behind <= watermark_of(store, release) < store.log(CHANGES).last()
    found = folded(store, bundle, watermark_of(store, release))
    assert set(found.ids.tolist()) == set(late["item_id"].to_pylist())
    assert embedded(store, bundle.id)[0].since == watermark_of(store, release)
    assert folded(store, open_bundle(plain.bundle), 0).watermark == behind  # that is for the updater of the others


def test_a_release_with_a_lower_watermark_gets_the_earlier_changes(plain: Shop, url: str, tmp_path: Path) -> None:
    """The same bundle from an older items file: its log of records begins too late, and is gone through again."""
    store, table, bundle = open_store(url), pq.read_table(plain.items), open_bundle(plain.bundle)
    base = publish(store, plain.bundle, plain.items)
    for number in range(4):
        part = with_price(table.slice(number, 2), range(2), 1e9)
        run("update", "--no-embed", "--items", write(tmp_path / f"{number}.parquet", part), "--store", url)
    positions = [entry.position for entry in store.log(CHANGES).read(0, 9)]
    late = publish(store, plain.bundle, plain.items, "--watermark", positions[2])
    assert watermark_of(store, late) == positions[2]
    run("update", "--delete-ids", table["item_id"][7].as_py(), "--store", url)
    for watermark, ids in ((0, {0, 1, 2, 3, 4}), (positions[0], {1, 2, 3, 4}), (positions[2], {3, 4})):
        found = folded(store, bundle, watermark)
        assert set(found.ids.tolist()) == {table["item_id"][row].as_py() for row in ids}
        assert found.watermark == store.log(CHANGES).last()
    assert watermark_of(store, base) == 0


def test_two_updaters_at_once_and_killed_ones_lose_nothing(
    plain: Shop, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of many updaters takes a few steps, in any order, and is forgotten."""
    monkeypatch.setattr(room, "READ_ENTRIES", 2)
    rng, table, bundle = random.Random(3), pq.read_table(plain.items), open_bundle(plain.bundle)
    publish(store, plain.bundle, plain.items)
    latest: dict[Any, float] = {}
    updaters = [Updater(store, tmp_path / "cache") for _ in range(3)]
    for number in range(30):
        row, price = rng.randrange(12), 10.0 ** rng.randrange(-3, 9)
        part = with_price(table.slice(row, 1), [0], price)
        append_items(store, write(tmp_path / "one.parquet", part), plain.spec)
        latest[part["item_id"][0].as_py()] = price
        if number % 5 == 0:
            with updaters.pop(rng.randrange(3)):
                updaters.append(Updater(store, tmp_path / "cache"))
        which = rng.choice(updaters)
        which.look()
        which.step()
    for updater in updaters:
        with updater:
            updater.catch_up()
    found = folded(store, bundle, 0)
    whole = table
    for item, price in latest.items():
        whole = with_price(whole, [whole["item_id"].to_pylist().index(item)], price)
    full = FileStore(f"file://{tmp_path}/full")
    name = publish(full, plain.bundle, write(tmp_path / "whole.parquet", whole))
    assert set(found.ids.tolist()) == set(latest)
    wanted = records_of(full.fetch(name, tmp_path / "fetched") / ITEMS, bundle, found.ids.tolist())
    np.testing.assert_array_equal(found.rows, wanted)
    assert len(embedded(store, bundle.id)) > 30  # some came twice


def test_a_log_of_records_that_was_deleted_under_an_updater_is_made_again(
    plain: Shop, url: str, tmp_path: Path
) -> None:
    store, bundle = open_store(url), open_bundle(plain.bundle)
    publish(store, plain.bundle, plain.items)
    append_deletes(store, np.array([1]))
    with Updater(store, tmp_path / "cache") as updater:
        assert updater.catch_up() == 1
        store.delete_log(f"records/{bundle.id}")
        append_deletes(store, np.array([2]))
        assert updater.catch_up() == 2
    assert folded(store, bundle, 0).deleted.tolist() == [1, 2] or folded(store, bundle, 0).deleted.tolist() == [2, 1]


# --- where to go on --------------------------------------------------------------------------------------------------


def stretch(since: int, after: int, until: int) -> bytes:
    ids = np.array([1])
    return encode_embedded(Embedded(since=since, after=after, until=until, ids=ids, records=None))


@pytest.mark.parametrize(
    ("line", "floor", "low", "expected"),
    [
        ([], 0, 7, (7, 7)),
        ([(0, 0, 5), (0, 5, 9)], 0, 0, (0, 9)),
        ([(0, 0, 5), (0, 5, 9)], 0, 7, (0, 9)),
        ([(0, 0, 5), (0, 5, 9)], 0, 12, (12, 12)),  # what lies between is gone
        ([(5, 5, 9), (5, 9, 12)], 0, 0, (0, 0)),  # begins too late
        ([(5, 5, 9), (0, 0, 5), (0, 5, 9), (0, 9, 12)], 0, 0, (0, 12)),  # was gone through again
        ([(5, 5, 9), (0, 0, 5), (5, 9, 12)], 0, 0, (0, 5)),  # not to its end
        ([(0, 5, 9), (0, 9, 12)], 5, 0, (0, 0)),  # trimmed
        ([(0, 0, 5), (0, 5, 9), (0, 9, 12)], 5, 0, (0, 0)),  # about to be trimmed
        ([(0, 0, 5), (0, 5, 9), (0, 9, 12)], 5, 6, (0, 12)),
        ([(0, 5, 9), (0, 0, 5), (0, 5, 9)], 5, 0, (0, 9)),
    ],
)
def test_an_updater_goes_on_where_no_reader_misses_anything(
    tmp_path: Path, line: list[tuple[int, int, int]], floor: int, low: int, expected: tuple[int, int]
) -> None:
    log = FileStore(f"file://{tmp_path}").log("records/b")
    for each in line:
        log.append([stretch(*each)])
    log.raise_floor(floor)
    assert resume(log, low) == expected


# --- what cannot be embedded -----------------------------------------------------------------------------------------


def broken_bundle(plain: Shop, folder: Path, value: float) -> Path:
    """A bundle in which the largest price has an impossible record."""
    bundle = shutil.copytree(plain.bundle, folder)
    graph = onnx.load(bundle / "item.onnx")
    place = open_bundle(bundle).spec.columns("item")["price"].start
    table = next(one for one in graph.graph.initializer if one.name == f"table{place}")
    values = onnx.numpy_helper.to_array(table).copy()
    values[-1] = value
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(graph, bundle / "item.onnx")
    seal_bundle(bundle, {key: value for key, value in open_bundle(plain.bundle).manifest.items() if key != "id"})
    return bundle


@pytest.mark.parametrize(
    ("value", "dtype", "reason"), [(np.inf, "f32", "more than f32"), (1e5, "f16", "more than f16"), (1e5, "f32", "")]
)
def test_a_record_that_a_live_release_cannot_hold_is_dead(
    plain: Shop, store: FileStore, tmp_path: Path, value: float, dtype: str, reason: str
) -> None:
    table = pq.read_table(plain.items)
    path = broken_bundle(plain, tmp_path / "bundle", value)
    cheap = write(tmp_path / "cheap.parquet", with_price(table, range(400), 0.0))
    publish(store, path, cheap, "--dtype", dtype)
    part = with_price(with_price(table.slice(0, 3), range(3), 0.0), [1], 1e9)
    said = run("update", "--items", write(tmp_path / "part.parquet", part), "--store", store.url)
    ids = part["item_id"].to_pylist()
    found, shown = folded(store, open_bundle(path), 0), run("update", "--dead", "--store", store.url)
    if reason:
        assert "1 change could not be embedded: see `ranktower update --dead`" in said
        assert found.ids.tolist() == [ids[0], ids[2]]
        position = store.log(CHANGES).last()
        assert f"{ids[1]}: its record holds NaN, an infinity or {reason} can" in shown
        assert f"(position {position}, bundle {open_bundle(path).id})" in shown
    else:
        assert found.ids.tolist() == ids
        assert shown == "nothing"


def appended(store: ReleaseStore, table: pa.Table, tmp_path: Path) -> None:
    """Rows that the current bundle was not asked about, as another bundle's were."""
    path = write(tmp_path / "raw.parquet", table)
    store.log(CHANGES).append([encode_change(Upserted(rows)) for rows in item_rows(path, "item_id")])


def dead(store: ReleaseStore) -> list[tuple[Any, str]]:
    letters = [letter for entry in store.log(DEAD).read(0, 99) for letter in decode_dead(entry)]
    return [(letter.id, letter.reason) for letter in letters]


def test_what_two_updaters_find_dead_counts_once(
    plain: Shop, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.follow.REST", 0.0)
    store, table = open_store(url), pq.read_table(plain.items)
    publish(store, plain.bundle, plain.items)
    release = store.fetch(store.current() or "", tmp_path / "cache")
    follower = Follower(store.log)
    with Updater(store, tmp_path / "one") as one, Updater(store, tmp_path / "other") as other:
        one.look()
        other.look()
        for rows, counted in (([7, 31], 2), ([7, 3, 9], 3)):
            appended(store, with_price(table.slice(0, 50), rows, np.inf), tmp_path)
            for updater in (one, other):
                assert updater.step() == 50
                assert follower.bring(release, tmp_path / "cache").dead == counted
        appended(store, with_price(table.slice(0, 50), [1], np.inf), tmp_path)
        one.step()
        appended(store, with_price(table.slice(0, 50), [2], np.inf), tmp_path)
        other.step()  # both at once
        assert follower.bring(release, tmp_path / "cache").dead == 1  # the others are mended
    assert len(dead(store)) == 2 * 5 + 1 + 2
    assert Follower(store.log).bring(release, tmp_path / "cache").dead == 1
    follower.close()


def test_rows_with_wrong_values_are_dead_one_by_one(plain: Shop, url: str, tmp_path: Path) -> None:
    store, table = open_store(url), pq.read_table(plain.items)
    publish(store, plain.bundle, plain.items)
    wrong = with_price(table.slice(0, 50), [7, 31], np.inf)
    appended(store, wrong, tmp_path)
    with Updater(store, tmp_path / "cache") as updater:
        assert updater.catch_up() == 50
        assert updater.dead == 2
    ids = table["item_id"].to_pylist()
    assert set(folded(store, open_bundle(plain.bundle), 0).ids.tolist()) == set(ids[:50]) - {ids[7], ids[31]}
    position = store.log(CHANGES).last()
    assert dead(store) == [
        (
            ids[row],
            f"changes at {position}: column 'price', row {row} (from 0): is inf: write null where a value is missing",
        )
        for row in (7, 31)
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.drop_columns(["price"]), "has no column 'price'"),
        (
            lambda table: table.set_column(table.column_names.index("price"), "price", pa.array(["x"] * 3)),
            "column 'price' is string: a numeric field holds numbers",
        ),
        (
            lambda table: table.set_column(0, "item_id", pa.array(["a", "b", "c"])),
            "holds string ids, the bundle was trained with int ids",
        ),
    ],
    ids=["column", "type", "ids"],
)
def test_entries_that_a_bundle_cannot_read_are_dead_whole_and_the_rest_goes_on(
    plain: Shop, store: FileStore, tmp_path: Path, change: Any, reason: str
) -> None:
    table = pq.read_table(plain.items)
    publish(store, plain.bundle, plain.items)
    wrong = change(table.slice(0, 3))
    appended(store, wrong, tmp_path)
    appended(store, table.slice(5, 1), tmp_path)
    with Updater(store, tmp_path / "cache") as updater:
        updater.catch_up()
    assert [item for item, _ in dead(store)] == wrong["item_id"].to_pylist()
    assert all(reason in said for _, said in dead(store))
    found = folded(store, open_bundle(plain.bundle), 0)
    assert found.ids.tolist() == table["item_id"].slice(5, 1).to_pylist()
    assert found.watermark == store.log(CHANGES).last()


@pytest.mark.parametrize("rows", [b"no Arrow", b"", "no name of ids"])
def test_an_entry_without_rows_is_dead(plain: Shop, store: FileStore, tmp_path: Path, rows: bytes | str) -> None:
    publish(store, plain.bundle, plain.items)
    if isinstance(rows, str):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, pa.schema([("item_id", pa.int64())])) as writer:
            writer.write_table(pa.table({"item_id": [1]}))
        rows = sink.getvalue().to_pybytes()
    store.log(CHANGES).append([encode_change(Upserted(rows))])
    append_deletes(store, np.array([5]))
    with Updater(store, tmp_path / "cache") as updater:
        assert updater.catch_up() == 2
    assert [item for item, _ in dead(store)] == [None]
    assert "cannot be read" in dead(store)[0][1]
    assert folded(store, open_bundle(plain.bundle), 0).deleted.tolist() == [5]


def test_many_dead_changes_of_many_columns_are_written(
    plain: Shop, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told with all their columns for each row, they would be larger than an entry may be."""
    monkeypatch.setattr("cache.file_log.ENTRY_BYTES", 50_000)
    publish(store, plain.bundle, plain.items)
    table = pq.read_table(plain.items).drop_columns(["price"])
    for number in range(70):
        table = table.append_column(f"another column, the {number}th of many", pa.nulls(len(table), pa.int8()))
    store.log(CHANGES).append([stream(table.slice(start, 20)) for start in range(0, 400, 20)])
    append_deletes(store, np.array([7]))
    with Updater(store, tmp_path / "cache") as updater:
        updater.catch_up()
    assert [item for item, _ in dead(store)] == table["item_id"].to_pylist()
    assert {len(reason) < 600 and "has no column 'price'" in reason for _, reason in dead(store)} == {True}
    assert folded(store, open_bundle(plain.bundle), 0).deleted.tolist() == [7]


def stream(table: pa.Table, id_column: str = "item_id") -> bytes:
    """An entry of rows, as any program may append it."""
    sink = pa.BufferOutputStream()
    schema = pa.schema(table.schema, metadata={"ranktower_id_column": id_column})
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table.cast(schema))
    return b"U" + sink.getvalue().to_pybytes()


def twin(table: pa.Table, column: str) -> pa.Table:
    return table.append_column(column, table[column])


def no_utf8(table: pa.Table, column: str) -> pa.Table:
    """The column holds text that is none."""
    wrong = pa.array([b"\xff"] * len(table), pa.binary()).view(pa.string())
    return table.set_column(table.column_names.index(column), column, wrong)


DELETE_5 = encode_change(Deleted(np.array([5])))
MALFORMED: dict[str, tuple[Any, str]] = {  # of the first three rows: the entry, and what the reason says
    "empty": (lambda _: b"", "begins with b''"),
    "unknown": (lambda _: b"Zzzz", "begins with b'Zzzz'"),
    "too many rows": (
        lambda table: stream(pa.concat_tables([table] * 334)),
        "1,002 changes in one entry, 1,000 at most",
    ),
    "too many ids": (lambda _: encode_change(Deleted(np.arange(5_000))), "5,000 changes in one entry, 1,000 at most"),
    "cut rows": (lambda table: stream(table)[:-200], "cannot be read"),
    "a column twice": (lambda table: stream(twin(table, "price")), "has 2 columns 'price'"),
    "the ids twice": (lambda table: stream(twin(table, "item_id")), "has 2 columns 'item_id'"),
    "no such ids": (lambda table: stream(table, "who"), "has no column"),
    "no text": (lambda table: stream(no_utf8(table, "category")), "Invalid UTF8"),
    "ids that are no text": (lambda table: stream(no_utf8(table, "item_id")), "Invalid UTF8"),
    "booleans for ids": (
        lambda table: stream(table.set_column(0, "item_id", pa.array([True] * 3))),
        "ids are integers",
    ),
    "deletion, cut": (lambda _: DELETE_5[:-3], "cannot be read"),
    "deletion, nothing": (lambda _: b"D", "cannot be read"),
    "deletion, a kind": (lambda _: b"Dq" + DELETE_5[2:], "kind b'q'"),
    "deletion, a text cut": (lambda _: encode_change(Deleted(Texts.of(["abcdefghi"])))[:-9], "cannot be read"),
    "deletion, no text": (
        lambda _: encode_change(Deleted(Texts.of(["ab"]))).replace(b"ab", b"\xffb"),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_entry_is_dead_and_blocks_nothing(plain: Shop, store: FileStore, tmp_path: Path, name: str) -> None:
    table = pq.read_table(plain.items)
    made, reason = MALFORMED[name]
    publish(store, plain.bundle, plain.items)
    store.log(CHANGES).append([made(table.slice(0, 3))])
    append_deletes(store, np.array([7]))
    with Updater(store, tmp_path / "cache") as updater:
        updater.catch_up()
    assert dead(store)
    assert all(reason in said for _, said in dead(store)), dead(store)
    found = folded(store, open_bundle(plain.bundle), 0)
    assert (found.deleted.tolist(), len(found.ids)) == ([7], 0)
    assert found.watermark == store.log(CHANGES).last()
    assert run("update", "--dead", "--store", store.url) != "nothing"
    assert "published" in run("publish", "--bundle", plain.bundle, "--items", plain.items, "--store", store.url)


@pytest.mark.parametrize("seed", range(2))
def test_no_damage_of_an_entry_ends_the_updater(shop: Shop, seed: int) -> None:
    """Octets changed or cut off: what comes of it can be written to the logs and read again."""
    rng, bundle = random.Random(seed), open_bundle(shop.bundle)
    table = pq.read_table(shop.items).slice(0, 40)
    ids = Texts.of(["abc", "d"]) if shop.spec.item_id_type == "string" else np.array([1, 2])
    whole, lost = [stream(table), encode_change(Deleted(ids))], 0
    for position in range(1, 1000):
        payload = bytearray(whole[position % 4 == 0])
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            payload[rng.randrange(len(payload))] = rng.choice([0, 255, rng.randrange(256)])
        size = rng.choice([len(payload), len(payload), rng.randrange(len(payload))])
        read = read_entry(Entry(position, 0, bytes(payload[:size])), bundle)
        assert [each for part in encode_dead(read.dead) for each in decode_dead(Entry(1, 0, part))] == [*read.dead]
        made = Embedded(since=0, after=0, until=1, ids=read.ids, records=None)
        assert decode_embedded(Entry(1, 0, encode_embedded(made))).ids.tolist() == read.ids.tolist()
        assert read.features is None or len(read.features) == len(read.ids)
        lost += bool(read.dead)
    assert 100 < lost < 999


def test_an_entry_of_another_program_is_dead(
    plain: Shop, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = RedisStore(f"{redis_url}?prefix=foreign")
    publish(store, plain.bundle, plain.items)
    store._client.xadd("foreign:changes", {"who": "knows"})
    append_deletes(store, np.array([7]))
    with Updater(store, tmp_path / "cache") as updater:
        updater.catch_up()
    assert [item for item, _ in dead(store)] == [None]
    assert folded(store, open_bundle(plain.bundle), 0).deleted.tolist() == [7]


def test_rows_with_wrong_ids_are_dead_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shop = open_shop(tmp_path / "texts", items=40, string_ids=True)
    store, table = FileStore(f"file://{tmp_path}/store"), pq.read_table(shop.items).slice(0, 5)
    publish(store, shop.bundle, shop.items)
    ids = ["a", "", None, "x" * 1025, "b"]
    rows = table.set_column(0, "item_id", pa.array(ids))
    gone = encode_change(Deleted(Texts.of(["c", "y" * 2000, "", "d!", "e"]))).replace(b"d!", b"d\xff")
    store.log(CHANGES).append([stream(rows), gone])
    with Updater(store, tmp_path / "cache") as updater:
        updater.catch_up()
    found = folded(store, open_bundle(shop.bundle), 0)
    assert (found.ids.tolist(), found.deleted.tolist()) == (["a", "b"], ["c", "e"])
    said = dict(dead(store))
    assert len(dead(store)) == 6
    assert "row 2 (from 0): is null" in said[None]
    assert said["x" * 1024 + "..."] == "its id has 1,025 bytes: a text id has 1 to 1,024"
    assert said["y" * 1024 + "..."] == "its id has 2,000 bytes: a text id has 1 to 1,024"
    assert said[""] == "its id has 0 bytes: a text id has 1 to 1,024"
    assert "its id is no text" in said["d\ufffd"]


def test_ids_that_no_item_can_have_are_not_appended(shop: Shop, store: FileStore) -> None:
    publish(store, shop.bundle, shop.items)
    if shop.spec.item_id_type == "string":
        with pytest.raises(DataError, match=r"id 'x+' has 2,000 bytes of UTF-8: a text id has 1 to 1,024"):
            run("update", "--delete-ids", "fine," + "x" * 2000, "--store", store.url)
        assert store.log(CHANGES).last() == 0
    else:
        assert "appended 2 deletions" in run("update", "--delete-ids", f"{2**63 - 1},{-(2**63)}", "--store", store.url)


def test_a_column_that_comes_twice_is_refused_though_no_bundle_reads_it(
    plain: Shop, store: FileStore, tmp_path: Path
) -> None:
    publish(store, plain.bundle, plain.items)
    table = pq.read_table(plain.items)
    brands = pa.array(["b"] * len(table))
    twice = write(tmp_path / "twice.parquet", table.append_column("brand", brands).append_column("brand", brands))
    with pytest.raises(DataError, match=r"twice.parquet has 2 columns 'brand': keep or rename one"):
        run("update", "--items", twice, "--store", store.url)
    assert store.log(CHANGES).last() == 0


def test_deletions_of_another_type_of_ids_are_dead(plain: Shop, store: FileStore, tmp_path: Path) -> None:
    publish(store, plain.bundle, plain.items)
    store.log(CHANGES).append([encode_change(Deleted(Texts.of(["x", "y"])))])
    with Updater(store, tmp_path / "cache") as updater:
        updater.catch_up()
    assert [item for item, _ in dead(store)] == ["x", "y"]
    assert "another type than int" in dead(store)[0][1]
    assert len(folded(store, open_bundle(plain.bundle), 0)) == 0


def test_a_bundle_that_cannot_be_opened_is_told_of_once_and_others_go_on(
    plain: Shop, other: Path, store: FileStore, tmp_path: Path
) -> None:
    publish(store, plain.bundle, plain.items)
    broken = publish(store, other, plain.items)
    (store.root / "releases" / broken / BUNDLE / "item.onnx").write_bytes(b"")
    append_deletes(store, np.array([1]))
    said: list[str] = []
    with Updater(store, tmp_path / "cache", tell=said.append) as updater:
        updater.catch_up()
        updater.catch_up()
    assert len(said) == 1
    assert "item.onnx has changed since export" in said[0]
    assert folded(store, open_bundle(plain.bundle), 0).deleted.tolist() == [1]


def test_a_bundle_that_fails_while_embedding_is_told_of_once_and_others_go_on(
    plain: Shop, other: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of both it is, and whatever it raises; it goes on once it can."""
    store, bundles = open_store(url), [open_bundle(plain.bundle), open_bundle(other)]
    publish(store, plain.bundle, plain.items)
    publish(store, other, plain.items)

    def fail(*_: object) -> int:
        raise RuntimeError("no room")

    said: list[str] = []
    with Updater(store, tmp_path / "cache", tell=said.append) as updater:
        updater.look()
        for bad, good in (bundles, bundles[::-1]):
            with monkeypatch.context() as patched:
                patched.setattr(updater.lines[bad.id].records, "append", fail)
                for _ in range(2):
                    _, position = append_deletes(store, np.array([1]))
                    assert updater.catch_up() == 1
                assert until(store, good) == position
                assert updater.problems == {bad.id: said[-1]}
            assert updater.catch_up() == 2
            assert until(store, bad) == position
            assert not updater.problems
    assert said == [f"bundle {bad.id} gets no updates: RuntimeError('no room')" for bad in bundles]


def test_run_tells_that_changes_are_dead(
    plain: Shop, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a while, whatever comes."""
    publish(store, plain.bundle, plain.items)
    table, said, stopping = pq.read_table(plain.items), [], Event()
    with Updater(store, tmp_path / "cache", tell=said.append) as updater:
        thread = Thread(target=updater.run, args=(stopping,))
        thread.start()
        try:
            for rows in ([1, 2], [3]):
                appended(store, with_price(table.slice(0, 9), rows, np.inf), tmp_path)
                eventually(lambda: until(store, open_bundle(plain.bundle)) == store.log(CHANGES).last())
        finally:
            stopping.set()
            thread.join()
    assert said == ["2 changes could not be embedded: see `ranktower update --dead`"]


@pytest.mark.parametrize("how", ["opening", "embedding"])
def test_a_release_is_not_activated_without_the_updates_behind_it(
    plain: Shop, other: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store = open_store(url)
    before = publish(store, plain.bundle, plain.items)
    run("update", "--delete-ids", pq.read_table(plain.items)["item_id"][0].as_py(), "--store", url)
    end = store.log(CHANGES).last()

    def fail(*_: object, **__: object) -> None:
        raise StoreError("no room: make some")

    with monkeypatch.context() as patched:
        patched.setattr(room, "open_bundle" if how == "opening" else "encode_embedded", fail)
        message = (
            rf"was not activated: .* up to position \d+ of {end}: bundle {open_bundle(other).id} .*no room: make some"
        )
        with pytest.raises(StoreError, match=message):
            publish(store, other, plain.items)
        assert store.current() == before
        (built,) = (tmp_path / "var" / "build").glob("release-*/release")
        with pytest.raises(StoreError, match=message):
            run("releases", "push", built, "--store", url)
        assert store.current() == before
        with pytest.raises(StoreError, match=r"not for every bundle: bundle .* gets no updates: no room: make some"):
            run("update", "--delete-ids", 5, "--store", url)
    assert "current, was" in run("releases", "push", built, "--store", url)
    found = folded(store, open_bundle(other), watermark_of(store, store.current() or ""))
    assert found.watermark == store.log(CHANGES).last() > end


# --- the verb --------------------------------------------------------------------------------------------------------


def test_a_wrong_file_is_refused_whole_with_column_and_row(plain: Shop, store: FileStore, tmp_path: Path) -> None:
    publish(store, plain.bundle, plain.items)
    table = pq.read_table(plain.items)
    for wrong, message in (
        (with_price(table, [321], np.inf), r"wrong.parquet: column 'price', row 321 \(from 0\): is inf"),
        (table.drop_columns(["price"]), "wrong.parquet has no column 'price'"),
        (pa.concat_tables([table, table.slice(3, 1)]), "stands in row 3 already"),
    ):
        with pytest.raises(DataError, match=message):
            run("update", "--items", write(tmp_path / "wrong.parquet", wrong), "--store", store.url)
    assert store.log(CHANGES).last() == 0


@pytest.mark.parametrize("flags", [[], ["--follow", "--dead"], ["--items", "a", "--delete-ids", "1"]])
def test_an_update_does_one_thing(store: FileStore, flags: list[str]) -> None:
    with pytest.raises(DataError, match="give one of --items"):
        run("update", *flags, "--store", store.url)


def test_an_update_needs_a_release_to_check_against(store: FileStore) -> None:
    with pytest.raises(StoreError, match="no current release to check the items against: publish one first"):
        run("update", "--delete-ids", "1", "--store", store.url)


def follower(url: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service.cli", "update", "--follow", "--store", url, "--cache", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(store: ReleaseStore, bundle: Bundle) -> int:
    return folded(store, bundle, 0).watermark


def test_follow_embeds_what_others_append_until_it_is_told_to_stop(
    plain: Shop, other: Path, url: str, tmp_path: Path
) -> None:
    store, bundle = open_store(url), open_bundle(plain.bundle)
    publish(store, plain.bundle, plain.items)
    process = follower(url, tmp_path / "cache")
    try:
        for number in range(3):
            _, position = append_deletes(store, np.array([number]))
            eventually(lambda: until(store, bundle) == position)  # noqa: B023 called before the next
        publish(store, other, plain.items, "--watermark", 0)
        _, position = append_deletes(store, np.array([9]))
        eventually(lambda: until(store, open_bundle(other)) == position)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert (process.returncode, said) == (0, "")
    finally:
        process.kill()
        process.wait()


def test_run_tells_of_a_store_that_is_away_once_and_goes_on(
    plain: Shop, store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, plain.bundle, plain.items)
    monkeypatch.setattr(room, "STORE_PAUSE_S", 0.01)
    monkeypatch.setattr(room, "LOOK_S", 0.0)
    monkeypatch.setattr(room, "TELL_S", 0.0)
    said: list[str] = []
    stopping = Event()
    pointer = (store.root / "current").read_bytes()
    (store.root / "current").write_bytes(b"?")
    with Updater(store, tmp_path / "cache", tell=said.append) as updater:
        thread = Thread(target=updater.run, args=(stopping,))
        thread.start()
        try:
            eventually(lambda: len(said) > 0)
            (tmp_path / "pointer").write_bytes(pointer)
            (tmp_path / "pointer").replace(store.root / "current")  # at once: half a pointer is another problem
            _, position = append_deletes(store, np.array([1]))
            eventually(lambda: until(store, open_bundle(plain.bundle)) == position)
            eventually(lambda: f"is at {position}" in said[-1])
        finally:
            stopping.set()
            thread.join()
    problems = [line for line in said if "trying again every" in line]
    assert len(problems) == 1
    assert "cannot be read" in problems[0]
