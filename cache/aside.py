"""Fetch a release in a process of its own: receiving, hashing and reading gigabytes would take requests the processor,
and threads that receive would take them the interpreter, too.

The process starts anew (spawn): one that is forked from many threads may find a lock that nobody gives back.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from cache.errors import StoreError
from cache.release import ITEMS
from cache.snapshot import Snapshot
from cache.store import open_store
from model.errors import RankTowerError

NICE = 10  # beside those that answer within a millisecond
FETCHED, FAILED = b"+", b"-"

spawn = multiprocessing.get_context("spawn")


def fetch_aside(url: str, huge_pages: bool, release_id: str, cache_dir: Path) -> Path:
    """As `open_store(url).fetch`, with the items read into huge pages if asked for. Raises StoreError."""
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(
        target=_fetch, args=(theirs, url, huge_pages, release_id, cache_dir), name="fetch", daemon=True
    )
    process.start()
    theirs.close()  # what we read ends when the process does
    try:
        told = ours.recv_bytes()
    except EOFError:
        process.join()
        raise StoreError(
            f"the process that fetched release {release_id} ended with code {process.exitcode}: "
            "see the log for what ended it, such as too little memory; it is tried again"
        ) from None
    finally:
        ours.close()
    process.join()
    if told[:1] == FAILED:
        raise StoreError(told[1:].decode())
    return Path(os.fsdecode(told[1:]))


def _fetch(tell: Connection, url: str, huge_pages: bool, release_id: str, cache_dir: Path) -> None:
    """In the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which reaches the whole group: who started this ends it
    os.nice(NICE)
    try:
        store = open_store(url)
        folder = store.fetch(release_id, cache_dir)
        if huge_pages:  # before they are mapped in small ones
            Snapshot.open(folder / ITEMS).settle()
    except RankTowerError as error:
        tell.send_bytes(FAILED + str(error).encode())
    else:
        tell.send_bytes(FETCHED + os.fsencode(folder))
