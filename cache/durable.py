"""Files that survive a crash: written beside their place, synced, renamed; and locks that die with their holder."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_path(path)
    sync_path(folder)


def rename_durably(source: Path, target: Path) -> None:
    """Rename within one file system, and make the new name survive a crash."""
    os.replace(source, target)
    sync_path(target.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Replace a small file in one step: a reader sees the old content or the new, also after a crash.

    For one writer at a time, who also deletes what a killed one has left beside it.
    """
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()
    with _replacing(path, content) as written:
        sync_path(written)
        rename_durably(written, path)


def replace_file(path: Path, content: bytes) -> None:
    """The same for what need not outlive a crash of the machine, and so need not wait for the disk."""
    with _replacing(path, content) as written:
        os.replace(written, path)


@contextmanager
def _replacing(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside `path` with that content, to rename over it; gone where that fails."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(name, 0o644)
        yield Path(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file, created when absent; waits for its holder, and is free once that one ends."""
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def locked_now(path: Path) -> Iterator[bool]:
    """The same without waiting: yields whether the lock could be had."""
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def sharing(path: Path) -> Iterator[None]:
    """Hold the lock of a file beside others who share it; waits for who has it alone."""
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder itself, which needs no file that somebody could clear away; waits for its holder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a process alive holds it. Those who ask do not see each other."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(handle)
