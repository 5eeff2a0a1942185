"""Huge pages for files: all of a file stays readable and equal, and where the system has them, it gets them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from cache import pages
from cache.pages import HUGE_BYTES, huge_bytes, read_into_huge_pages


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """On disk, and in memory in small pages."""
    path = tmp_path / "table"
    with path.open("wb") as stream:
        for piece in np.random.default_rng(0).integers(0, 256, (2000, 4096), np.uint8):
            stream.write(piece.tobytes())
            stream.flush()
        os.fsync(stream.fileno())
    return path


def test_a_file_is_what_it_was_and_another_mapping_sees_its_huge_pages(path: Path) -> None:
    octets = path.read_bytes()
    table = mapped(path)
    share = read_into_huge_pages(path, table)
    assert table[:] == octets
    assert 0 <= share <= 1
    if share < 0.7:  # of 7.8 MiB, all but the last piece
        pytest.skip("this system has no huge pages for files here, or its memory is too scattered for them")
    other = mapped(path)
    assert read_into_huge_pages(path, other) == share
    assert huge_bytes(table) == huge_bytes(other) == share * len(octets)


@pytest.mark.parametrize("size", [1, HUGE_BYTES - 1])
def test_small_files_are_left_alone(tmp_path: Path, size: int) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(size))
    assert read_into_huge_pages(path, mapped(path)) == 0


def test_a_system_without_them_reads_the_file_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go: list[int] = []
    monkeypatch.setattr(pages, "huge_bytes", lambda mapped: 0)
    monkeypatch.setattr(pages, "_let_go", lambda path, mapped, size: let_go.append(size))
    assert read_into_huge_pages(path, mapped(path)) == 0
    assert let_go == [HUGE_BYTES], "the trial alone"


def test_what_is_huge_already_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "huge_bytes", lambda mapped: len(mapped) // HUGE_BYTES * HUGE_BYTES)
    monkeypatch.setattr(pages, "_let_go", None)
    assert read_into_huge_pages(path, mapped(path)) > 0.7
