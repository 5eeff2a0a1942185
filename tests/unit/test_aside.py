"""Fetching in another process: the folder comes back verified, and so does the reason where there is none."""

from __future__ import annotations

import os
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cache import aside
from cache.aside import fetch_aside
from cache.errors import StoreError
from cache.file_store import FileStore
from cache.release import ITEMS
from service.refresh import Refresher
from tests.tiny_releases import publish, tiny_release


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(f"file://{tmp_path / 'store'}")


def die(tell: Connection, *arguments: object) -> None:
    os._exit(9)


def test_a_release_is_fetched_as_the_store_would(store: FileStore, tmp_path: Path) -> None:
    name = publish(tiny_release(tmp_path / "1"), store)
    assert fetch_aside(store.url, True, name, tmp_path / "cache") == store.fetch(name, tmp_path / "cache")


def test_what_refuses_a_release_there_is_said_here(store: FileStore, tmp_path: Path) -> None:
    name = publish(tiny_release(tmp_path / "1"), store)
    items = store.fetch(name, tmp_path) / ITEMS
    octets = bytearray(items.read_bytes())
    octets[100] ^= 1
    items.chmod(0o600)
    items.write_bytes(octets)
    with pytest.raises(StoreError, match=ITEMS):
        fetch_aside(store.url, False, name, tmp_path / "cache")


def test_a_process_that_is_killed_is_an_error_that_says_so(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = publish(tiny_release(tmp_path / "1"), store)
    monkeypatch.setattr(aside, "_fetch", die)
    with pytest.raises(StoreError, match="ended with code 9: see the log"):
        fetch_aside(store.url, False, name, tmp_path / "cache")


def test_a_replica_fetches_its_first_release_itself_and_others_aside(store: FileStore, tmp_path: Path) -> None:
    fetched: list[str] = []

    def fetch(release_id: str, cache_dir: Path) -> Path:
        fetched.append(release_id)
        return fetch_aside(store.url, False, release_id, cache_dir)

    subject = Refresher(store, tmp_path / "cache", aside=fetch)
    names = [publish(tiny_release(tmp_path / str(seed), seed=seed), store) for seed in (1, 2)]
    for name in names:
        subject.take_over(name)
        assert subject.ranker().release == name
    assert fetched == names[1:]


def test_what_fails_aside_leaves_the_old_release_serving(store: FileStore, tmp_path: Path) -> None:
    subject = Refresher(store, tmp_path / "cache", aside=partial(fetch_aside, store.url, False))
    first = publish(tiny_release(tmp_path / "1"), store)
    subject.take_over(first)
    with pytest.raises(StoreError):
        subject.take_over("20240101T000000000-000000000000")
    assert subject.ranker().release == first
