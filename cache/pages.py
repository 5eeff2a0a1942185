"""Huge pages for a mapped file, where the kernel keeps files in such (Linux 6.16 and ext4, XFS or btrfs of that age).

Records lie at random all over a table, so nearly every one is another page, and what translates its address has been
driven out of the caches by the other work of a request: with pages of 2 MiB a ranking of 5,000 of a million candidates
takes a fifth less. A file's pages become huge when they are read through a mapping that asked for it, hence what is in
memory is let go first and read from the disk anew. The pages stay the file's: all processes share them, and none is
taken from other uses when memory is short.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

HUGE_BYTES = 2 << 20
SMALL_BYTES = 4096
ENOUGH = 0.9  # of what can be huge; the rest of memory was too scattered


def read_into_huge_pages(path: Path, mapped: mmap.mmap) -> float:
    """Have all of a mapped file in memory, in huge pages where that can be had; returns their share.

    Pages that others have mapped stay as they are.
    """
    whole = len(mapped) // HUGE_BYTES * HUGE_BYTES
    if not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0.0
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return 0.0
    _touch(mapped, whole)
    if huge_bytes(mapped) < ENOUGH * whole:
        _let_go(path, mapped, HUGE_BYTES)  # a trial: without huge pages for files the rest need not be read twice
        _touch(mapped, HUGE_BYTES)
        if huge_bytes(mapped):
            _let_go(path, mapped, whole)
            _touch(mapped, whole)
    return huge_bytes(mapped) / len(mapped)


def huge_bytes(mapped: mmap.mmap) -> int:
    """What of a mapping this process sees in huge pages, by /proc; 0 where that does not tell."""
    first = f"{np.frombuffer(mapped, np.uint8).ctypes.data:x}-"
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
            if any(line.startswith(first) for line in lines):
                huge = next((line for line in lines if line.startswith("FilePmdMapped:")), "FilePmdMapped: 0 kB")
                return int(huge.split()[1]) * 1024
    except OSError:  # no /proc: nothing is said
        return 0
    return 0


def _touch(mapped: mmap.mmap, size: int) -> None:
    """Have the first `size` octets in memory. NumPy lets other threads run meanwhile."""
    np.frombuffer(mapped, np.uint8, size)[::SMALL_BYTES].max()


def _let_go(path: Path, mapped: mmap.mmap, size: int) -> None:
    """Forget the first `size` octets of a file, unless another process has them mapped or they are not on disk yet."""
    mapped.madvise(mmap.MADV_DONTNEED, 0, size)
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, size, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
