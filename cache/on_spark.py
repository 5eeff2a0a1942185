"""Embed a catalogue on a Spark cluster: this process reads, encodes and compares, executors hold the item tower.

    blocks (this process) -> a job of one task each, `mapInArrow` (the cluster) -> snapshot, in order (this process)

Spark gives a task whose executor or Python worker died to another. A record does not depend on where or with whom it
was embedded, so the snapshot is that of `on_threads` bit for bit, as long as all processors have the same instruction
sets: ONNX Runtime chooses its loops by them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark import Broadcast
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from cache.catalogue import Catalogue
from cache.embed import Block, Engine, Previous, compare
from cache.errors import StoreError
from cache.parallel import in_order
from model.bundle import Bundle
from model.tower import Tower

ROW = "start long, known long, width long, prints binary, rows binary, values binary"  # Block.to_table
QUIET = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.log.level": "ERROR"}


def on_spark(master: str | None = None, workers: int | None = None) -> Engine:
    """An engine with so many blocks on the cluster at a time, as many as it has processors where absent.

    `master` is a URL of Spark's; where absent Spark's own rule holds: that of spark-submit or spark-defaults.conf, or
    all processors of this machine. Executors need this version of RankTower, but neither items nor bundle. Raises
    StoreError when Spark cannot be started or gives up.
    """

    def embed(bundle: Bundle, catalogue: Catalogue, previous: Previous | None) -> Iterator[Block]:
        with connected(master) as spark:
            graph = spark.sparkContext.broadcast((bundle.folder / "item.onnx").read_bytes())

            def embedded(block: Block) -> Block:
                if not len(block.values):  # nothing for the tower, whose records are as wide as they are
                    return replace(block, values=np.empty((0, 1), np.float32))
                row = spark.createDataFrame(block.to_table())
                return Block.from_table(row.mapInArrow(lambda rows: run(rows, graph), ROW).toArrow(), np.float32)

            count = workers or max(1, spark.sparkContext.defaultParallelism)
            try:
                yield from in_order(embedded, compare(catalogue, previous), count)
            except (Py4JError, PySparkException) as error:
                raise StoreError(f"Spark gave up ({error}): see its logs, and publish again") from error

    return embed


def run(rows: Iterable[pa.RecordBatch], graph: Broadcast[bytes]) -> Iterator[pa.RecordBatch]:
    """On an executor: the records of a block, in place of its features."""
    for batch in rows:
        block = Block.from_table(pa.Table.from_batches([batch]), np.int32)
        records = replace(block, values=_tower(graph.value).embed(block.values))
        yield from records.to_table().cast(batch.schema).to_batches()


@lru_cache(maxsize=1)
def _tower(graph: bytes) -> Tower:
    """The item tower on one thread, opened once by a Python worker, which Spark keeps for its next tasks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "item.onnx"
        path.write_bytes(graph)
        return Tower(path, threads=1)


@contextmanager
def connected(master: str | None) -> Iterator[SparkSession]:
    """A session on the cluster; the one that this process has already is taken, and stays."""
    if (running := SparkSession.getActiveSession()) is not None:
        yield running
        return
    builder = SparkSession.builder.appName("ranktower publish").config(map=QUIET)
    try:
        spark = (builder.master(master) if master else builder).getOrCreate()
    except (Py4JError, PySparkException) as error:
        raise StoreError(f"Spark cannot be started at {master} ({error}): see its output") from error
    if spark.sparkContext.master.startswith("local"):
        spark.sparkContext.pythonExec = sys.executable  # else the first python3 of the path
    try:
        yield spark
    finally:
        spark.stop()
