"""Embed the catalogue: items in Parquet -> encoded rows -> item tower -> snapshot, in a stream that fits any catalogue.

The tower runs on padded batches of one fixed shape, so that a record does not depend on its neighbours. With a previous
release of the same bundle only items whose encoded input changed go through it: of each block of 32,768 rows those that
changed are batched together, and their padding is at most 255 rows.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.catalogue import Catalogue, open_catalogue
from cache.errors import StoreError
from cache.precision import Precision, choose_precision
from cache.release import (
    BUNDLE,
    INDEX,
    INPUTS,
    ITEMS,
    RELEASE,
    IndexKind,
    Progress,
    index_kind,
    no_progress,
    read_release,
    seal_release,
)
from cache.snapshot import Snapshot, SnapshotWriter
from kernel.plain import ItemLayout, item_layout
from kernel.reference import mix
from model.bundle import Bundle, open_bundle
from model.folders import replacing_folder
from model.tower import EMBED_BATCH, Tower

FINGERPRINT = "splitmix64-1"  # names the function below: another one cannot reuse its values

log = logging.getLogger(__name__)


# --- the previous release --------------------------------------------------------------------------------------------


def fingerprints(features: NDArray[np.int32]) -> NDArray[np.uint64]:
    """64-bit hashes (n,) of encoded rows (n, width): h = mix(h ^ x) over the columns."""
    prints = np.full(len(features), features.shape[1], np.uint64)
    for column in features.T:
        prints = mix(mix(prints) ^ column.astype(np.uint64))
    return prints


@dataclass(frozen=True)
class Previous:
    """Stored records of an earlier release of the same bundle, with the fingerprints of what made them."""

    items: Snapshot
    prints: NDArray[np.uint64]  # (n,) in the order of the snapshot

    def rows(self, ids: NDArray[Any], prints: NDArray[np.uint64]) -> tuple[NDArray[np.int32], int]:
        """Row of each item whose input is the same as then, else -1; and how many of the items were there at all."""
        rows = self.items.lookup(ids)
        known = np.flatnonzero(rows >= 0)
        rows[known[self.prints[rows[known]] != prints[known]]] = -1
        return rows, len(known)


def open_previous(folder: Path | None, bundle_id: str) -> Previous | None:
    """What can be used again of a release folder: nothing when it is of another bundle."""
    if folder is None:
        return None
    release = read_release(folder)
    if release.bundle_id != bundle_id or release.inputs != FINGERPRINT:
        log.info(
            "release %s was made with bundle %s, not %s: embedding everything", release.id, release.bundle_id, bundle_id
        )
        return None
    prints = np.fromfile(folder / INPUTS, "<u8")
    if len(prints) != release.count:
        raise StoreError(
            f"{folder / INPUTS} holds {len(prints)} of {release.count} fingerprints: publish without --incremental"
        )
    return Previous(Snapshot.open(folder / ITEMS), prints)


def _choose(
    bundle: Bundle, catalogue: Catalogue, dtype: str, users: Path | None, previous: Path | None
) -> tuple[Precision, Previous | None]:
    """The type of the records, and what can be used again in it."""
    before = open_previous(previous, bundle.id)
    kept = before.items.dtype if before else None
    precision = choose_precision(bundle, catalogue, dtype, users, kept=kept)
    if before and kept != precision.dtype:
        log.info("the release before holds %s records, not %s: embedding everything", kept, precision.dtype)
        return precision, None
    return precision, before


# --- releases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What happened, or would happen, to the items."""

    items: int = 0
    embedded: int = 0
    reused: int = 0
    removed: int = 0  # of the previous release, no longer in the catalogue


@dataclass
class _Tally:
    """Counts in the making."""

    previous: Previous | None
    counts: Counts = field(default_factory=Counts)
    found: int = 0

    def add(self, ids: NDArray[Any], prints: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Rows of the previous release to take records from, -1 for items to embed."""
        if self.previous is None:
            rows, found = np.full(len(ids), -1, np.int32), 0
        else:
            rows, found = self.previous.rows(ids, prints)
        reused = int((rows >= 0).sum())
        self.found += found
        self.counts = replace(
            self.counts,
            items=self.counts.items + len(ids),
            embedded=self.counts.embedded + len(ids) - reused,
            reused=self.counts.reused + reused,
            removed=0 if self.previous is None else len(self.previous.items) - self.found,
        )
        return rows


def plan_release(
    bundle: Path,
    items: Path,
    *,
    dtype: str = "f32",
    users: Path | None = None,
    previous: Path | None = None,
    id_column: str | None = None,
    progress: Progress = no_progress,
) -> Counts:
    """What `build_release` would embed, reuse and drop; writes nothing."""
    opened = open_bundle(bundle)
    catalogue = open_catalogue(items, opened.spec, id_column)
    _, before = _choose(opened, catalogue, dtype, users, previous)
    tally = _Tally(before)
    for ids, features in catalogue.blocks():
        tally.add(ids, fingerprints(features))
        progress("compare", tally.counts.items, len(catalogue))
    return tally.counts


def build_release(
    bundle: Path,
    items: Path,
    out: Path,
    *,
    index: str = "none",
    dtype: str = "f32",
    users: Path | None = None,
    previous: Path | None = None,
    id_column: str | None = None,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write a release folder from a bundle folder and a Parquet file of items; returns `out`, complete or not there.

    `dtype` is f32, f16, int8, or auto: what it costs is measured on `users` (a user table) and goes into the manifest.
    `previous` is a release folder whose records are used again where nothing changed; `workers` threads run the tower,
    the number of processors where absent, and the result does not depend on it. Raises DataError for the items,
    BundleError for the bundle, StoreError for the index, SnapshotError for a record that is not finite.
    """
    opened = open_bundle(bundle)
    kind = index_kind(index, opened.head)  # before hours of embedding
    catalogue = open_catalogue(items, opened.spec, id_column)
    precision, before = _choose(opened, catalogue, dtype, users, previous)
    layout = item_layout(opened.head, precision.dtype)
    with replacing_folder(out, RELEASE) as folder:
        _copy_bundle(opened, folder / BUNDLE)
        started = time.perf_counter()
        counts = _embed(opened, catalogue, layout, before, folder, workers or os.cpu_count() or 1, progress)
        report = {
            "items": counts.items,
            "embedded": counts.embedded,
            "reused": counts.reused,
            "removed": counts.removed,
            "embed_s": round(time.perf_counter() - started, 3),
            "precision": precision.to_json(),
        }
        if kind is not IndexKind.NONE:
            report["index_s"] = _index(opened, folder, kind, progress)
        seal_release(folder, bundle_id=opened.id, head=opened.head, index=kind, inputs=FINGERPRINT, report=report)
    return out


def _embed(
    bundle: Bundle,
    catalogue: Catalogue,
    layout: ItemLayout,
    previous: Previous | None,
    folder: Path,
    workers: int,
    progress: Progress,
) -> Counts:
    """Write items.snap and inputs.hash."""
    tally = _Tally(previous)
    tower = bundle.item_tower()
    with (
        SnapshotWriter(
            folder / ITEMS, kind="items", owner=bundle.id, id_type=bundle.spec.item_id_type, layout=layout
        ) as writer,
        (folder / INPUTS).open("wb") as inputs,
        ThreadPoolExecutor(workers) as pool,
    ):
        for ids, features in catalogue.blocks():
            prints = fingerprints(features)
            rows = tally.add(ids, prints)
            embed = partial(run_parallel, tower, pool, workers)
            _append(writer, ids, previous, rows, features, embed, partial(_pack, writer, pool, workers))
            inputs.write(prints.astype("<u8").tobytes())
            progress("embed", tally.counts.items, len(catalogue))
        writer.finish()
    return tally.counts


def _append(
    writer: SnapshotWriter,
    ids: NDArray[Any],
    previous: Previous | None,
    rows: NDArray[np.int32],
    features: NDArray[np.int32],
    embed: Callable[[NDArray[np.int32]], NDArray[np.float32]],
    pack: Callable[[NDArray[Any], NDArray[np.float32]], NDArray[np.uint8]],
) -> None:
    """Write a block: packed records of the previous release where rows >= 0, what `embed` makes of the others."""
    fresh = rows < 0
    if previous is None or fresh.all():
        writer.append(ids, pack(ids, embed(features)))
        return
    packed = np.empty((len(ids), writer.stride), np.uint8)
    packed[~fresh] = previous.items.rows[rows[~fresh]]
    if fresh.any():
        packed[fresh] = pack(ids[fresh], embed(features[fresh]))
    writer.append(ids, packed)


def run_parallel(tower: Tower, pool: Executor, workers: int, features: NDArray[np.int32]) -> NDArray[np.float32]:
    """`tower.embed` on several threads, cut between batches: they share one session, which releases the interpreter."""
    batches = -(-len(features) // EMBED_BATCH)
    step = max(1, -(-batches // workers)) * EMBED_BATCH
    parts = [features[start : start + step] for start in range(0, len(features), step)]
    return np.concatenate(list(pool.map(tower.embed, parts)))


def _pack(
    writer: SnapshotWriter, pool: Executor, workers: int, ids: NDArray[Any], records: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Rows (b, stride) as the table holds them, on several threads: packing takes a microsecond an item."""
    step = max(1, -(-len(ids) // workers))
    parts = [slice(start, start + step) for start in range(0, len(ids), step)]
    return np.concatenate(
        list(pool.map(lambda part: writer.packed(ids[part], records[part], part.start), parts)), dtype=np.uint8
    )


def _copy_bundle(bundle: Bundle, target: Path) -> None:
    target.mkdir()
    for name in ("manifest.json", *bundle.files):
        shutil.copyfile(bundle.folder / name, target / name)


def _index(bundle: Bundle, folder: Path, kind: str, progress: Progress) -> float:
    """Write items.faiss; returns the seconds that it took."""
    from cache.index import build_index  # FAISS comes into memory only where an index is asked for

    started = time.perf_counter()
    build_index(Snapshot.open(folder / ITEMS), bundle.head, kind, folder / INDEX, progress)
    return round(time.perf_counter() - started, 3)
