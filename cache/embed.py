"""Embed the catalogue: items in Parquet -> encoded rows -> item tower -> snapshot, in a stream that fits any catalogue.

The tower runs on padded batches of one fixed shape, so that a record does not depend on its neighbours. With a previous
release of the same bundle only items whose encoded input changed go through it: of each block of 32,768 rows those that
changed are batched together, and their padding is at most 255 rows. An `Engine` runs the tower: the threads of this
process (`on_threads`), or a cluster (cache/on_ray.py, on_spark.py).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
from cache.shards import Shard
from cache.size import PRINT_BYTES
from cache.snapshot import Snapshot, SnapshotWriter, file_bytes
from kernel.plain import ItemLayout, item_layout
from kernel.reference import mix
from model.bundle import Bundle, open_bundle
from model.errors import DataError
from model.features import FeatureSpec
from model.folders import replacing_folder
from model.tower import EMBED_BATCH, Tower

FINGERPRINT = "splitmix64-1"  # names the function below: another one cannot reuse its values
TIMED_BATCHES = 8  # of a thread, that tell how long embedding will take

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Items of a catalogue from row `start` on, compared with the previous release."""

    start: int
    prints: NDArray[np.uint64]  # (b,) fingerprints of their encoded input
    rows: NDArray[np.int32]  # (b,) of the previous release to take records from, -1 for items to embed
    known: int  # how many the previous release has at all
    values: NDArray[
        Any
    ]  # of the m items to embed: features (m, width) int32; after the tower records (m, size) float32

    def to_table(self) -> pa.Table:
        """One row of octets, which no cluster cuts or converts."""
        octets: dict[str, NDArray[Any]] = {"prints": self.prints, "rows": self.rows, "values": self.values}
        return pa.table(
            {
                "start": [self.start],
                "known": [self.known],
                "width": [self.values.shape[1]],
                **{name: pa.array([array.tobytes()], pa.large_binary()) for name, array in octets.items()},
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table, values: type[Any]) -> Self:
        """The block of such a row, with `values` of that type."""

        def array(name: str, dtype: Any) -> NDArray[Any]:
            return np.frombuffer(table[name][0].as_buffer(), dtype)

        start, known, width = (table[name][0].as_py() for name in ("start", "known", "width"))
        return cls(
            start=start,
            prints=array("prints", np.uint64),
            rows=array("rows", np.int32),
            known=known,
            values=array("values", values).reshape(-1, width),
        )


Engine = Callable[[Bundle, Catalogue, Previous | None], Iterator[Block]]  # every block once, in order, with records


def compare(catalogue: Catalogue, previous: Previous | None, groups: range | None = None) -> Iterator[Block]:
    """The blocks of the catalogue, or of some of its file's row groups, with the features of what is to be embedded."""
    start = catalogue.first_row(groups)
    for ids, features in catalogue.blocks(groups):
        prints = fingerprints(features)
        rows, known = (np.full(len(ids), -1, np.int32), 0) if previous is None else previous.rows(ids, prints)
        yield Block(start=start, prints=prints, rows=rows, known=known, values=features[rows < 0])
        start += len(ids)


def _open_part(items: Path, spec: FeatureSpec, id_column: str | None, shard: Shard | None) -> Catalogue:
    """Raises DataError, also where a shard would be empty."""
    catalogue = open_catalogue(items, spec, id_column, shard)
    if not len(catalogue):
        raise DataError(f"{items} holds no item of {shard}: publish fewer shards")
    return catalogue


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What publishing would do."""

    counts: Counts
    size_bytes: int  # of the release; that of an index to within 1 KB
    embed_s: float  # on the threads of this process, by the time that some of the items take


def _nothing_yet(previous: Previous | None) -> Counts:
    return Counts(removed=0 if previous is None else len(previous.items))


def _with(counts: Counts, block: Block) -> Counts:
    fresh = len(block.values)
    return Counts(
        items=counts.items + len(block.rows),
        embedded=counts.embedded + fresh,
        reused=counts.reused + len(block.rows) - fresh,
        removed=counts.removed - block.known,
    )


def plan_release(
    bundle: Path,
    items: Path,
    *,
    index: str = "none",
    dtype: str = "f32",
    users: Path | None = None,
    previous: Path | None = None,
    id_column: str | None = None,
    workers: int | None = None,
    shard: Shard | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """What `build_release` would embed, reuse and drop, how large and how long; writes nothing.

    Raises what `build_release` does of the same arguments before it embeds.
    """
    opened = open_bundle(bundle)
    kind = index_kind(index, opened.head)
    catalogue = _open_part(items, opened.spec, id_column, shard)
    precision, before = _choose(opened, catalogue, dtype, users, previous)
    counts = _nothing_yet(before)
    for block in compare(catalogue, before):
        counts = _with(counts, block)
        progress("compare", counts.items, len(catalogue))
    size_bytes = _release_bytes(opened, catalogue, item_layout(opened.head, precision.dtype), kind)
    embed_s = counts.embedded * _item_s(opened, catalogue, workers) if counts.embedded else 0.0
    return Plan(counts=counts, size_bytes=size_bytes, embed_s=embed_s)


def _release_bytes(bundle: Bundle, catalogue: Catalogue, layout: ItemLayout, kind: IndexKind) -> int:
    """Bytes of the files that `build_release` would make of them."""
    count, id_type = len(catalogue), bundle.spec.item_id_type
    text_bytes = pc.sum(pc.binary_length(catalogue.ids)).as_py() or 0 if id_type == "string" else 0
    size = file_bytes(count, layout.stride, id_type, text_bytes) + PRINT_BYTES * count
    if kind is not IndexKind.NONE:
        from cache.index import index_bytes  # FAISS comes into memory only where an index is asked for

        size += index_bytes(bundle.head, kind, count)
    return size + sum((bundle.folder / name).stat().st_size for name in ("manifest.json", *bundle.files))


def _item_s(bundle: Bundle, catalogue: Catalogue, workers: int | None) -> float:
    """Seconds that an item's embedding takes on so many threads, by some of the items."""
    count, tower = workers or os.cpu_count() or 1, bundle.item_tower()
    features = catalogue.sample(count * TIMED_BATCHES * EMBED_BATCH, seed=0)
    with ThreadPoolExecutor(count) as pool:
        run_parallel(tower, pool, count, features)  # warm
        started = time.perf_counter()
        run_parallel(tower, pool, count, features)
        return (time.perf_counter() - started) / len(features)


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
    shard: Shard | None = None,
    watermark: int = 0,
    engine: Engine | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write a release folder from a bundle folder and a Parquet file of items; returns `out`, complete or not there.

    `dtype` is f32, f16, int8, or auto: what it costs is measured on `users` (a user table) and goes into the manifest.
    `previous` is a release folder whose records are used again where nothing changed; `engine` runs the tower, threads
    of this process where absent, and the result does not depend on it. `shard`: take its items only. `watermark`: the
    position in the log of changes up to which the items file contains them (cache/changes.py). Raises DataError for the
    items, BundleError for the bundle, StoreError for the index, SnapshotError for a record that is not finite.
    """
    opened = open_bundle(bundle)
    kind = index_kind(index, opened.head)  # before hours of embedding
    catalogue = _open_part(items, opened.spec, id_column, shard)
    precision, before = _choose(opened, catalogue, dtype, users, previous)
    layout = item_layout(opened.head, precision.dtype)
    with replacing_folder(out, RELEASE) as folder:
        _copy_bundle(opened, folder / BUNDLE)
        started = time.perf_counter()
        counts = _embed(opened, catalogue, layout, before, folder, engine or on_threads(), progress)
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
        seal_release(
            folder,
            bundle_id=opened.id,
            head=opened.head,
            index=kind,
            inputs=FINGERPRINT,
            watermark=watermark,
            report=report,
        )
    return out


def _embed(
    bundle: Bundle,
    catalogue: Catalogue,
    layout: ItemLayout,
    previous: Previous | None,
    folder: Path,
    engine: Engine,
    progress: Progress,
) -> Counts:
    """Write items.snap and inputs.hash."""
    counts, packers = _nothing_yet(previous), os.cpu_count() or 1
    with (
        SnapshotWriter(
            folder / ITEMS, kind="items", owner=bundle.id, id_type=bundle.spec.item_id_type, layout=layout
        ) as writer,
        (folder / INPUTS).open("wb") as inputs,
        ThreadPoolExecutor(packers) as pool,
    ):
        for block in engine(bundle, catalogue, previous):
            if block.start != counts.items:
                raise StoreError(
                    f"rows from {block.start} came in place of {counts.items}: publish again, and report it"
                )
            ids = catalogue.ids_from(block.start, len(block.rows))
            _append(writer, ids, previous, block, partial(_pack, writer, pool, packers))
            inputs.write(block.prints.astype("<u8").tobytes())
            counts = _with(counts, block)
            progress("embed", counts.items, len(catalogue))
        if counts.items != len(catalogue):
            raise StoreError(f"{counts.items} of {len(catalogue)} items came back: publish again, and report it")
        writer.finish()
    return counts


def _append(
    writer: SnapshotWriter,
    ids: NDArray[Any],
    previous: Previous | None,
    block: Block,
    pack: Callable[[NDArray[Any], NDArray[np.float32]], NDArray[np.uint8]],
) -> None:
    """Write a block: packed records of the previous release where rows >= 0, the new ones elsewhere."""
    fresh = block.rows < 0
    if previous is None or fresh.all():
        writer.append(ids, pack(ids, block.values))
        return
    packed = np.empty((len(ids), writer.stride), np.uint8)
    packed[~fresh] = previous.items.rows[block.rows[~fresh]]
    if fresh.any():
        packed[fresh] = pack(ids[fresh], block.values)
    writer.append(ids, packed)


def on_threads(workers: int | None = None) -> Engine:
    """An engine of so many threads of this process, as many as processors where absent."""
    count = workers or os.cpu_count() or 1

    def embed(bundle: Bundle, catalogue: Catalogue, previous: Previous | None) -> Iterator[Block]:
        tower = bundle.item_tower()
        with ThreadPoolExecutor(count) as pool:
            for block in compare(catalogue, previous):
                yield replace(block, values=run_parallel(tower, pool, count, block.values))

    return embed


def run_parallel(tower: Tower, pool: Executor, workers: int, features: NDArray[np.int32]) -> NDArray[np.float32]:
    """`tower.embed` on several threads, cut between batches: they share one session, which releases the interpreter."""
    batches = -(-len(features) // EMBED_BATCH)
    step = max(1, -(-batches // workers)) * EMBED_BATCH
    parts = [features[start : start + step] for start in range(0, len(features), step)]
    return np.concatenate([np.empty((0, tower.size), np.float32), *pool.map(tower.embed, parts)])


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
