"""The table file: what is written is found again, and nothing damaged or foreign is opened."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import SnapshotError
from cache.snapshot import FIRST_SALT, HEADER_BYTES, PIECE_BYTES, RECORDS_AT, Snapshot, SnapshotWriter, equal_pair
from kernel.head import HeadSpec
from kernel.record import DTYPES, Dtype, RecordLayout, pack
from kernel.reference import hash_strings, mix

OWNER = "0123456789abcdef"


def head_of(size: int) -> HeadSpec:
    return HeadSpec(kind="maxsim", user_heads=1, item_heads=1, dim=size, scale=1.0)


def write(
    path: Path, ids: Any, records: np.ndarray, *, batch: int = 7, dtype: Dtype = "f32", **options: Any
) -> Snapshot:
    """A table written in batches: packed floats, or plain integers."""
    size = records.shape[1]
    form = {"layout": RecordLayout(head_of(size), dtype)} if records.dtype == np.float32 else {"record_size": size}
    settings = {"kind": "items", "owner": OWNER, "id_type": "int", **form, **options}
    with SnapshotWriter(path, **settings) as writer:
        for start in range(0, len(ids), batch):
            writer.append(ids[start : start + batch], records[start : start + batch])
        return writer.finish()


def unpacked(snapshot: Snapshot) -> np.ndarray:
    return snapshot.table(head_of(snapshot.record_size)).records(np.arange(len(snapshot), dtype=np.int32))


def some_records(count: int, size: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 1000])
@pytest.mark.parametrize("id_type", ["int", "string"])
def test_every_record_is_found_by_its_id(tmp_path: Path, count: int, id_type: str) -> None:
    numbers = np.random.default_rng(1).choice(10 * count + 1, count, replace=False)
    ids: Any = numbers if id_type == "int" else [f"item/{n} é" for n in numbers.tolist()]
    records = some_records(count)
    snapshot = write(tmp_path / "t.snap", ids, records, id_type=id_type)
    assert len(snapshot) == count
    assert snapshot.lookup(ids).tolist() == list(range(count))
    assert snapshot.ids().tolist() == list(ids)
    np.testing.assert_array_equal(unpacked(snapshot), records)
    absent: Any = [-1, 10**15] if id_type == "int" else ["item", "", "x" * 5000]
    assert snapshot.lookup(absent).tolist() == [-1] * len(absent)
    snapshot.verify()


@pytest.mark.parametrize("size", [1, 16, 33, 128])
def test_plain_records_are_aligned(tmp_path: Path, size: int) -> None:
    records = (100 * some_records(20, size)).astype(np.int32)
    snapshot = write(tmp_path / "t.snap", np.arange(20), records)
    np.testing.assert_array_equal(snapshot.records, records)
    assert snapshot.records.strides[0] % 64 == 0
    for section in (snapshot.records, snapshot.keys, snapshot.buckets):
        assert section.ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_records_lie_as_the_kernel_packs_them(tmp_path: Path, dtype: Dtype) -> None:
    records = some_records(20, 33)
    layout = RecordLayout(head_of(33), dtype)
    snapshot = write(tmp_path / "t.snap", np.arange(20), records, dtype=dtype)
    assert snapshot.dtype == dtype
    np.testing.assert_array_equal(snapshot.rows, pack(layout, records))
    with pytest.raises(SnapshotError, match="the head reads"):
        snapshot.table(head_of(34))
    with pytest.raises(SnapshotError, match="packed"):
        _ = snapshot.records


def test_rows_that_are_packed_already_are_written_as_they_are(tmp_path: Path) -> None:
    layout, records = RecordLayout(head_of(5), "int8"), some_records(10)
    packed = pack(layout, records)
    with SnapshotWriter(tmp_path / "t.snap", kind="items", owner=OWNER, id_type="int", layout=layout) as writer:
        writer.append(np.arange(10), packed)
        snapshot = writer.finish()
    np.testing.assert_array_equal(snapshot.rows, packed)


def test_the_header_says_what_is_inside(tmp_path: Path) -> None:
    snapshot = write(tmp_path / "t.snap", ["a"], np.ones((1, 3), np.int32), id_type="string", kind="users")
    assert (snapshot.kind, snapshot.owner, snapshot.id_type, snapshot.record_size) == ("users", OWNER, "string", 3)


@settings(max_examples=30)
@given(st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.integers(0, 9), max_size=60), st.integers(1, 30))
def test_any_integer_ids_in_any_batches(
    tmp_path_factory: pytest.TempPathFactory, table: dict[int, int], batch: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "t.snap"
    ids, records = list(table), np.array([[value] for value in table.values()], np.float32).reshape(-1, 1)
    snapshot = write(path, ids, records, batch=batch)
    assert snapshot.lookup(np.array(ids, np.int64)).tolist() == list(range(len(ids)))
    assert snapshot.ids().tolist() == ids


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable()), unique=True, max_size=40))
def test_any_text_ids(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    snapshot = write(tmp_path_factory.mktemp("any") / "t.snap", ids, some_records(len(ids)), id_type="string")
    assert snapshot.lookup(ids).tolist() == list(range(len(ids)))
    assert snapshot.ids(slice(0, 3)).tolist() == ids[:3]


def test_the_same_content_has_the_same_id_whatever_the_batches(tmp_path: Path) -> None:
    first = write(tmp_path / "a.snap", np.arange(50), some_records(50), batch=3)
    second = write(tmp_path / "b.snap", np.arange(50), some_records(50), batch=50)
    other = write(tmp_path / "c.snap", np.arange(50), some_records(50, seed=1))
    owned = write(tmp_path / "d.snap", np.arange(50), some_records(50), owner="f" * 16)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert len({first.id, other.id, owned.id}) == 3
    assert first.id == second.id


# --- ids -------------------------------------------------------------------------------------------------------------


def colliding_pair(salt: int) -> tuple[str, str]:
    """Two ASCII texts of 16 bytes with one hash: mix is a bijection, so the second word can be solved for."""
    rng = np.random.default_rng(0)
    words = rng.integers(97, 123, (20_000, 3, 8)).astype(np.uint8).view("<u8")[..., 0]
    seed = mix(np.array([salt ^ 16], np.uint64))
    a, b, tail = words.T
    solved = mix(seed ^ a) ^ mix(seed ^ b) ^ tail
    plain = (solved[:, None].view(np.uint8) < 128).all(axis=1)
    k = int(np.flatnonzero(plain)[0])
    return a[k].tobytes().decode() + tail[k].tobytes().decode(), b[k].tobytes().decode() + solved[k].tobytes().decode()


def test_texts_with_one_hash_are_told_apart_by_another_salt(tmp_path: Path) -> None:
    pair = list(colliding_pair(FIRST_SALT))
    assert len(set(hash_strings(pair, FIRST_SALT).tolist())) == 1
    ids = [*pair, "other"]
    snapshot = write(tmp_path / "t.snap", ids, some_records(3), id_type="string")
    assert snapshot.header.salt > FIRST_SALT
    assert snapshot.lookup(ids).tolist() == [0, 1, 2]


def test_an_unknown_text_with_a_known_hash_is_unknown(tmp_path: Path) -> None:
    known, unknown = colliding_pair(FIRST_SALT)
    snapshot = write(tmp_path / "t.snap", [known, "other"], some_records(2), id_type="string")
    assert snapshot.lookup([unknown, known, unknown[:-1]]).tolist() == [-1, 0, -1]


@pytest.mark.parametrize(("ids", "id_type"), [([5, 7, 5], "int"), (["a", "b", "a"], "string")])
def test_an_id_that_comes_twice_is_named_with_both_rows(tmp_path: Path, ids: Any, id_type: str) -> None:
    with pytest.raises(SnapshotError, match=rf"item {ids[0]!r} comes twice, in rows 0 and 2"):
        write(tmp_path / "t.snap", ids, some_records(3), id_type=id_type, batch=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "id_type", "message"),
    [
        (["a"], "int", "integer ids, got 'a'"),
        ([1.5], "int", "integer ids, got 1.5"),
        ([True], "int", "integer ids, got True"),
        ([2**70], "int", "integer"),
        ([1], "string", "text ids, got 1"),
        (["\ud800"], "string", "not text"),
        (["x" * 1025], "string", "has 1025 bytes"),
        ([""], "string", "has 0 bytes"),
    ],
)
def test_ids_of_another_type_are_refused(tmp_path: Path, ids: Any, id_type: str, message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        write(tmp_path / "t.snap", ids, some_records(1), id_type=id_type)


def test_looking_up_ids_of_another_type_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="integer ids, got 'a'"):
        write(tmp_path / "a.snap", [1], some_records(1)).lookup(["a"])
    with pytest.raises(SnapshotError, match="text ids, got 1"):
        write(tmp_path / "b.snap", ["a"], some_records(1), id_type="string").lookup([1])


def test_equal_pair_finds_the_first_repetition() -> None:
    assert equal_pair(np.array([3, 1, 2], np.uint64)) is None
    assert equal_pair(np.array([3, 1, 2, 1], np.uint64)) == (1, 3)


# --- what is not written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_record_that_is_not_finite_is_refused_with_its_item(tmp_path: Path, bad: float) -> None:
    records = some_records(10)
    records[8, 2] = bad
    with pytest.raises(SnapshotError, match=r"item .*108.* \(row 8\) holds NaN or infinity"):
        write(tmp_path / "t.snap", np.arange(100, 110), records, batch=3)
    assert list(tmp_path.iterdir()) == []


def test_a_float_too_large_for_the_record_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="infinity"):
        write(tmp_path / "t.snap", [1], np.array([[1e6]], np.float32), dtype="f16")


def test_a_table_that_was_not_finished_does_not_appear(tmp_path: Path) -> None:
    with SnapshotWriter(
        tmp_path / "t.snap", kind="items", owner=OWNER, id_type="int", layout=RecordLayout(head_of(5), "f32")
    ) as writer:
        writer.append([1, 2], some_records(2))
    assert list(tmp_path.iterdir()) == []


def test_records_of_another_shape_are_refused(tmp_path: Path) -> None:
    with (
        SnapshotWriter(
            tmp_path / "t.snap", kind="items", owner=OWNER, id_type="int", layout=RecordLayout(head_of(5), "f32")
        ) as writer,
        pytest.raises(SnapshotError, match=r"2 ids with records \(3, 5\)"),
    ):
        writer.append([1, 2], some_records(3))


# --- what is not opened ----------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "t.snap", ["a", "b", "c"], some_records(3), id_type="string").path


@pytest.mark.parametrize("keep", [0, 7, 100, HEADER_BYTES, RECORDS_AT + 10, -1])
def test_a_truncated_file_is_refused_by_name(table: Path, keep: int) -> None:
    table.write_bytes(table.read_bytes()[:keep])
    with pytest.raises(SnapshotError, match=r"t\.snap .*publish"):
        Snapshot.open(table)


def test_a_file_with_more_behind_it_is_refused(table: Path) -> None:
    table.write_bytes(table.read_bytes() + b"x")
    with pytest.raises(SnapshotError, match="bytes, not"):
        Snapshot.open(table)


@pytest.mark.parametrize("content", [b"", b"PAR1" * 1000, bytes(10_000)])
def test_a_foreign_file_is_refused(table: Path, content: bytes) -> None:
    table.write_bytes(content)
    with pytest.raises(SnapshotError, match="not a snapshot"):
        Snapshot.open(table)


def test_a_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"none\.snap cannot be opened"):
        Snapshot.open(tmp_path / "none.snap")


def test_any_flipped_bit_of_the_header_is_refused(table: Path) -> None:
    whole = table.read_bytes()
    for place in (*range(0, 400, 7), 800, HEADER_BYTES - 1):
        table.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(SnapshotError):
            Snapshot.open(table)


@pytest.mark.parametrize(
    ("place", "value", "message"), [(8, 99, "format 99, this version reads 3"), (12, 0x04030201, "little-endian")]
)
def test_another_version_or_byte_order_is_named(table: Path, place: int, value: int, message: str) -> None:
    whole = table.read_bytes()
    table.write_bytes(whole[:place] + struct.pack("<I", value) + whole[place + 4 :])
    with pytest.raises(SnapshotError, match=message):
        Snapshot.open(table)


@pytest.mark.parametrize("section", ["records", "keys", "offsets", "text", "buckets", "hashes"])
def test_any_changed_section_is_found_by_verify(table: Path, section: str) -> None:
    snapshot = Snapshot.open(table)
    place = snapshot.header.sections[section].offset
    whole = table.read_bytes()
    table.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(SnapshotError, match="changed"):
        Snapshot.open(table).verify()


def test_verify_names_the_piece_that_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "t.snap", np.arange(9000), some_records(9000, 128), batch=5000).path
    whole = bytearray(path.read_bytes())
    place = RECORDS_AT + PIECE_BYTES + 100
    whole[place] ^= 1
    path.write_bytes(whole)
    with pytest.raises(SnapshotError, match=f"bytes from {RECORDS_AT + PIECE_BYTES}:"):
        Snapshot.open(path).verify()


def lying(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """A change of header fields that keeps the header's own hash right: what a hostile writer would do."""

    def apply(fields: dict[str, Any]) -> None:
        fields |= change(fields)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lying(lambda h: {"count": 4}),
        lying(lambda h: {"count": 2**60}),
        lying(lambda h: {"stride": 0}),
        lying(lambda h: {"record_size": 10**6}),
        lying(lambda h: {"record_dtype": "f64"}),
        lying(lambda h: {"kind": "things"}),
        lying(lambda h: {"sections": {**h["sections"], "keys": (2**62, 24)}}),
        lying(lambda h: {"sections": {**h["sections"], "buckets": (0, 32)}}),
        lying(lambda h: {"sections": {k: v for k, v in h["sections"].items() if k != "offsets"}}),
        lying(lambda h: {"sections": {k: v for k, v in h["sections"].items() if k != "hashes"}}),
        lying(lambda h: {"sections": {}}),
    ],
)
def test_a_header_that_lies_about_the_file_is_refused(table: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from dataclasses import asdict

    from cache.snapshot import Header

    whole = table.read_bytes()
    header = Header.unpack(table, whole)
    fields = {**asdict(header), "sections": dict(header.sections)}
    change(fields)
    table.write_bytes(Header(**fields).pack() + whole[HEADER_BYTES:])
    with pytest.raises(SnapshotError, match=r"t\.snap"):
        Snapshot.open(table)
