"""Data sets by name: each adapter writes a log in the documented form (docs/data.md) into a folder, and returns it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from model.datasets import kuairand, movielens
from model.datasets.log import Log, read_log

__all__ = ["DATASETS", "Adapter", "Log", "read_log"]

Adapter = Callable[[Path | None, Path], Path]  # (source, or None for the default one; folder to write)

DATASETS: dict[str, Adapter] = {"kuairand": kuairand.convert, "movielens": movielens.convert}
