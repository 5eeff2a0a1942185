"""Rival `feast`: the fetch alone, a vector for each candidate from Feast's online store in Redis, without any ranking.

Runs in an environment of its own (`make bench-peers`) and as a script of its own: it imports nothing of RankTower.
Loads the first items of vectors.npy as one feature view, prints {"ready": items}, then answers each line of standard
input, {"candidates": n, "count": m, "warm_up": w, "seed": s}, with {"times_us": [...]}: m fetches of n other items
each. The vectors of each first fetch are compared with what was written.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Array, Float32, Int64
from numpy.typing import NDArray

PART = 10_000  # items written at a time
VIEW, FEATURE = "items", "vector"


def open_store(folder: Path, redis: str) -> FeatureStore:
    """A feature store with one view over one entity, in Redis at HOST:PORT."""
    config = RepoConfig(
        project="bench",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store={"type": "redis", "connection_string": redis},
        offline_store={"type": "file"},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
    source = FileSource(path=str(folder / "items.parquet"), timestamp_field="event_timestamp")
    schema = [Field(name="item_id", dtype=Int64), Field(name=FEATURE, dtype=Array(Float32))]
    frame(np.arange(1), np.zeros((1, 1), np.float32)).to_parquet(folder / "items.parquet")
    store.apply([item, FeatureView(name=VIEW, entities=[item], ttl=timedelta(0), schema=schema, source=source)])
    return store


def frame(ids: NDArray[Any], vectors: NDArray[np.float32]) -> pd.DataFrame:
    return pd.DataFrame({"item_id": ids, FEATURE: list(vectors), "event_timestamp": datetime.now(UTC)})


def fetch(store: FeatureStore, rows: list[dict[str, int]]) -> Any:
    """The call that is measured."""
    return store.get_online_features(features=[f"{VIEW}:{FEATURE}"], entity_rows=rows)


def answer(
    store: FeatureStore, ids: NDArray[np.int64], vectors: NDArray[np.float32], order: dict[str, int]
) -> list[float]:
    """Microseconds of each measured fetch. Raises ValueError when a vector is not as it was written."""
    rng = np.random.default_rng(order["seed"])
    times = []
    for turn in range(order["warm_up"] + order["count"]):
        chosen = rng.choice(len(ids), order["candidates"], replace=False)
        rows = [{"item_id": id_} for id_ in ids[chosen].tolist()]
        start = perf_counter_ns()
        found = fetch(store, rows)
        spent_us = (perf_counter_ns() - start) / 1e3
        if turn == 0 and not np.array_equal(np.array(found.to_dict()[FEATURE], np.float32), vectors[chosen]):
            raise ValueError("Feast answered other vectors than were written")
        if turn >= order["warm_up"]:
            times.append(spent_us)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--items", type=int, required=True, help="how many of them to load")
    parser.add_argument("--redis", required=True, help="HOST:PORT")
    parser.add_argument("--folder", type=Path, required=True, help="for the registry")
    options = parser.parse_args()
    vectors = np.load(options.vectors, mmap_mode="r", allow_pickle=False)[: options.items]
    ids = np.load(options.vectors.with_name("ids.npy"), allow_pickle=False)[: options.items]
    store = open_store(options.folder, options.redis)
    for start in range(0, len(ids), PART):
        part = slice(start, start + PART)
        store.write_to_online_store(VIEW, frame(ids[part], np.asarray(vectors[part])))
    print(json.dumps({"ready": len(ids)}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"times_us": answer(store, ids, vectors, json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
