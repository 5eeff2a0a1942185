"""Embed a catalogue on a Ray cluster: tasks on this node read, encode and compare, actors anywhere hold the item tower.

    row groups of the items file -> blocks (this node) -> records (the cluster) -> snapshot, in order (this process)

Ray Data streams blocks between the two as its object stores have room, and gives the work of a dead node to others.
A block that is read again is the same, and a record does not depend on where or with whom it was embedded, so the
snapshot is that of `on_threads` bit for bit, as long as all processors have the same instruction sets: ONNX Runtime
chooses its loops by them.
"""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from cache.catalogue import Catalogue
from cache.embed import Block, Engine, Previous, compare, open_previous
from cache.errors import StoreError
from model.bundle import Bundle
from model.errors import RankTowerError
from model.tower import Tower

READ_ROWS = 1 << 20  # items that one task reads at least: what is read again when its blocks are lost
CONNECT_S = 5
READERS = 2  # tasks that read at a time, beside this process
ACTOR_CPUS = 0.5  # of the processor that an actor fills: actors of a dead node find room while half of the others live


def on_ray(address: str | None = None, workers: int | None = None) -> Engine:
    """An engine of so many actors, as many as the cluster has processors where absent.

    `address` is host:port of a cluster that this node is part of; where absent Ray's own rule holds: RAY_ADDRESS, or a
    cluster of this machine alone for this run. Its nodes need this version of RankTower, but neither items nor bundle.
    Raises StoreError when there is no such cluster.
    """

    def embed(bundle: Bundle, catalogue: Catalogue, previous: Previous | None) -> Iterator[Block]:
        with connected(address):
            count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            yield from _rows(_dataset(bundle, catalogue, previous, count))

    return embed


def _dataset(bundle: Bundle, catalogue: Catalogue, previous: Previous | None, workers: int) -> Dataset:
    """A table of one row a block, in the order of the catalogue."""
    parts = catalogue.parts(READ_ROWS)
    here = ray.get_runtime_context().get_node_id()
    numbers = ray.data.from_items(
        [{"first": part.start, "end": part.stop} for part in parts], override_num_blocks=max(1, len(parts))
    )
    blocks = numbers.map_batches(
        read_blocks,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={
            "catalogue": ray.put(catalogue),
            "previous": previous and previous.items.path.parent,
            "bundle_id": bundle.id,
        },
        num_cpus=0,  # a head node may offer none
        compute=TaskPoolStrategy(size=min(READERS, max(1, len(parts)))),
        label_selector={"ray.io/node-id": here},
    )
    records = blocks.map_batches(
        Embedder,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_kwargs={"graph": ray.put((bundle.folder / "item.onnx").read_bytes())},
        num_cpus=ACTOR_CPUS,
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
    )
    for dataset in (numbers, blocks, records):
        dataset.context.target_max_block_size = 1  # else Ray joins our blocks to some of 128 MiB, too few to share out
        dataset.context.enable_progress_bars = False
        dataset.context.execution_options.preserve_order = True
    return records


def _rows(records: Dataset) -> Iterator[Block]:
    """Blocks as they come. Raises what a task raised as if it had been raised here."""
    try:
        for batch in records.iter_batches(batch_size=1, batch_format="pyarrow"):
            yield Block.from_table(batch, np.float32)
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, RankTowerError):
            raise error.cause from None
        raise StoreError(f"Ray gave up ({error}): see its logs, and publish again") from error


# --- on the cluster --------------------------------------------------------------------------------------------------


def read_blocks(
    part: pa.Table, *, catalogue: ray.ObjectRef[Catalogue], previous: Path | None, bundle_id: str
) -> Iterator[pa.Table]:
    """Blocks of the row groups that the one row of `part` names."""
    groups = range(part["first"][0].as_py(), part["end"][0].as_py())
    for block in compare(ray.get(catalogue), open_previous(previous, bundle_id), groups):
        yield block.to_table()


class Embedder:
    """An actor that holds the item tower, on one thread."""

    def __init__(self, graph: ray.ObjectRef[bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "item.onnx"
            path.write_bytes(ray.get(graph))
            self._tower = Tower(path, threads=1)

    def __call__(self, table: pa.Table) -> pa.Table:
        block = Block.from_table(table, np.int32)
        return replace(block, values=self._tower.embed(block.values)).to_table()


# --- the connection --------------------------------------------------------------------------------------------------


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be a driver of the cluster; the one that this process has joined already stays joined.

    `local` is one of this machine alone, whatever else runs here; None as in `on_ray`.
    """
    if address and address not in ("auto", "local"):
        _check_reachable(address)
    if ray.is_initialized():
        yield
        return
    alone = {"include_dashboard": False} if address in (None, "local") else {}
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **alone)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StoreError(f"Ray cannot start or be joined at {address} ({error}): see its logs") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        raise StoreError(f"{address}: give host:port, and run this on a node of the cluster, which reads the items")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise StoreError(f"no Ray cluster answers at {address} ({error}): check the address") from error
