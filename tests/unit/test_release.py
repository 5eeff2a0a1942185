"""The manifest of a release: it names every byte, and cannot be changed or swapped unseen."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cache.durable import locked
from cache.errors import StoreError
from cache.release import (
    CHUNK_BYTES,
    ITEMS,
    NAME,
    RELEASE,
    created_at,
    drop_cached,
    parse_release,
    read_release,
    seal_release,
    verify_release,
)
from tests.releases import BUNDLE_ID, FIRST, HEAD, write_release


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_release(tmp_path / "release", items=50)
    return tmp_path / "release"


def test_names_sort_by_time_and_tell_it(tmp_path: Path) -> None:
    names = [write_release(tmp_path / str(number), number, items=3).id for number in (0, 1, 61)]
    assert names == sorted(names)
    assert all(NAME.fullmatch(name) for name in names)
    assert created_at(names[2]) == FIRST + timedelta(seconds=61)


def test_a_name_depends_on_the_content(tmp_path: Path) -> None:
    first = write_release(tmp_path / "a", 0, items=3)
    again = write_release(tmp_path / "b", 0, items=3)
    other = write_release(tmp_path / "c", 0, items=4)
    assert first.id == again.id
    assert first.id[:18] == other.id[:18]
    assert first.id != other.id


def test_chunks_cover_every_byte_of_every_file(tmp_path: Path) -> None:
    release = write_release(tmp_path / "big", items=10_000)
    assert [file.path for file in release.files] == ["bundle/manifest.json", ITEMS]
    for file in release.files:
        chunks = [chunk for chunk in release.chunks() if chunk.path == file.path]
        assert sum(chunk.size for chunk in chunks) == file.size == (tmp_path / "big" / file.path).stat().st_size
        assert [chunk.offset for chunk in chunks] == [k * CHUNK_BYTES for k in range(len(chunks))]
    assert release.file(ITEMS) == release.files[1]
    assert release.file("items.faiss") is None


def test_a_manifest_reads_back_as_it_was_written(folder: Path) -> None:
    release = read_release(folder)
    assert release == verify_release(folder) == parse_release((folder / RELEASE).read_bytes(), "here")
    assert (release.bundle_id, release.head, release.count) == (BUNDLE_ID, HEAD, 50)
    assert datetime.fromisoformat(release.created) == FIRST.astimezone(UTC)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"count": 50', '"count": 51'),
        ('"path": "items.snap"', '"path": "items.snip"'),
        ('"scale": 5.0', '"scale": 6.0'),
        ('"bundle_id": "b', '"bundle_id": "c'),
    ],
)
def test_any_change_of_a_manifest_is_found(folder: Path, old: str, new: str) -> None:
    text = (folder / RELEASE).read_text()
    assert old in text
    (folder / RELEASE).write_text(text.replace(old, new))
    with pytest.raises(StoreError, match="its manifest has changed"):
        read_release(folder)


def test_any_flipped_bit_of_a_manifest_is_found(folder: Path) -> None:
    report = {"embed_s": 1.2345678901234567e-05, "store_s": 123.45678901234567, "by": "caf\u00e9"}
    seal_release(folder, bundle_id=BUNDLE_ID, head=HEAD, report=report)
    raw = (folder / RELEASE).read_bytes()
    assert parse_release(raw, "here").report == report
    flips = ((at, bit) for at in range(len(raw)) for bit in range(8))
    assert [flip for flip in flips if is_read(flipped(raw, *flip))] == []


def flipped(raw: bytes, at: int, bit: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


def is_read(raw: bytes) -> bool:
    try:
        parse_release(raw, "here")
    except StoreError:
        return False
    return True


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "..\\evil", ""])
def test_a_file_that_leads_out_of_the_folder_is_refused(folder: Path, path: str) -> None:
    whole = json.loads((folder / RELEASE).read_text())
    whole["files"][0]["path"] = path
    with pytest.raises(StoreError, match="leads out of the folder"):
        parse_release(json.dumps(whole).encode(), "a store")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\xff", b'{"format": 1}', b'{"format": 1, "files": [1]}'])
def test_what_is_no_manifest_is_refused_with_its_source(raw: bytes) -> None:
    with pytest.raises(StoreError, match=r"the store: its manifest cannot be read .*publish it again"):
        parse_release(raw, "the store")


def test_another_format_is_named(folder: Path) -> None:
    whole = json.loads((folder / RELEASE).read_text()) | {"format": 2}
    with pytest.raises(StoreError, match="has format 2, this version reads 1"):
        parse_release(json.dumps(whole).encode(), "the store")


def test_a_snapshot_of_another_bundle_is_not_sealed(folder: Path) -> None:
    with pytest.raises(StoreError, match=f"embedded with bundle {BUNDLE_ID}, not other"):
        seal_release(folder, bundle_id="other", head=HEAD)


def test_verify_names_the_chunk_that_changed(tmp_path: Path) -> None:
    release = write_release(tmp_path / "big", items=10_000)
    path = tmp_path / "big" / ITEMS
    content = bytearray(path.read_bytes())
    content[CHUNK_BYTES + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=re.escape(f"{release.id}: chunk 1 of {ITEMS}")):
        verify_release(tmp_path / "big")


def test_a_cache_forgets_releases_and_nothing_else(tmp_path: Path, folder: Path) -> None:
    kept, dropped = "20260101T000000000-0123456789ab", "20260102T000000000-0123456789ab"
    for name in (kept, dropped, "users", "something"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    assert drop_cached(tmp_path / "cache", {kept}) == [dropped]
    folders = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert folders == [kept, "something", "users"]


def test_a_cache_leaves_a_release_that_another_process_is_at(tmp_path: Path) -> None:
    name = "20260101T000000000-0123456789ab"
    (tmp_path / name).mkdir()
    with locked(tmp_path / f".{name}.lock"):
        assert drop_cached(tmp_path, set()) == []
    assert drop_cached(tmp_path, set()) == [name]


def test_a_cache_forgets_cut_downloads_that_nobody_goes_on_with(tmp_path: Path) -> None:
    cut, running, kept = (f"2026010{day}T000000000-0123456789ab" for day in (1, 2, 3))
    for name in (cut, running, kept):
        (tmp_path / f".{name}.partial" / "bundle").mkdir(parents=True)
    with locked(tmp_path / f".{running}.lock"):
        assert drop_cached(tmp_path, {kept}) == [cut]
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == [f".{running}.partial", f".{kept}.partial"]
