"""Tiny release folders and user tables, made without a bundle: for stores, which do not look inside."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from cache.release import BUNDLE, ITEMS, Release, seal_release
from cache.snapshot import SnapshotWriter
from kernel.head import HeadSpec
from kernel.record import RecordLayout

HEAD = HeadSpec(kind="maxsim", user_heads=2, item_heads=2, dim=64, scale=5.0)
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
BUNDLE_ID, SPEC_ID = "b" * 16, "5" * 16


def write_release(folder: Path, number: int = 0, *, items: int = 10_000) -> Release:
    """Release `number`, made `number` seconds after the first; by default 5 MB, that is, several chunks."""
    (folder / BUNDLE).mkdir(parents=True)
    (folder / BUNDLE / "manifest.json").write_text(f'{{"number": {number}}}')
    rng = np.random.default_rng(number)
    with SnapshotWriter(
        folder / ITEMS, kind="items", owner=BUNDLE_ID, id_type="int", layout=RecordLayout(HEAD, "f32")
    ) as writer:
        writer.append(np.arange(items), rng.standard_normal((items, 128), dtype=np.float32))
        writer.finish()
    return seal_release(folder, bundle_id=BUNDLE_ID, head=HEAD, now=lambda: FIRST + timedelta(seconds=number))


def write_users(path: Path, seed: int = 0, *, spec_id: str = SPEC_ID, users: int = 50) -> Path:
    rows = np.random.default_rng(seed).integers(0, 100, (users, 7)).astype(np.int32)
    with SnapshotWriter(path, kind="users", owner=spec_id, id_type="string", record_size=7) as writer:
        writer.append([f"u{k}" for k in range(users)], rows)
        writer.finish()
    return path
