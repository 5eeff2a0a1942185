"""What a record type costs: how far it changes the order of sampled candidates for real users, against float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.catalogue import Catalogue
from cache.errors import StoreError
from cache.release import DtypeChoice
from cache.users import sample_users
from kernel.engine import Index, Table, build_index, open_index, open_table, pack, top_k
from kernel.errors import KernelError
from kernel.head import HeadSpec, Scorer
from kernel.plain import item_layout
from kernel.record import DTYPES, Dtype
from model.bundle import Bundle

ITEMS, USERS = 5_000, 200  # sampled at most
GRAPH_USERS = 50  # where a graph scores: with COLD's published widths they take 6 s, 200 would take 24
TAU_ITEMS = 512  # of them, for Kendall's tau, which compares all pairs
TOP = 100
LEAST_OVERLAP = 0.99  # with which `auto` takes a smaller type
KEPT_OVERLAP = 0.98  # with which it keeps one: a catalogue on the verge would be embedded anew every other time


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Means over users."""

    overlap: float  # share of the best k of float32 that are among the best k
    tau: float  # Kendall's tau-a of the order of random candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The type of a release's records, and what the types that were tried cost."""

    dtype: Dtype
    costs: dict[str, Cost]
    k: int
    items: int
    users: int
    source: str  # who the users are

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Precision:
        return cls(**{**value, "costs": {dtype: Cost(**cost) for dtype, cost in value["costs"].items()}})

    def tell(self) -> str:
        """One sentence for a person."""
        tried = "; ".join(
            f"{dtype} keeps {cost.overlap:.2%} of the top {self.k} of f32, Kendall tau {cost.tau:.4f}"
            for dtype, cost in self.costs.items()
        )
        return f"records are {self.dtype}: {tried} ({self.items:,} items, {self.users} {self.source})"


def choose_precision(
    bundle: Bundle,
    catalogue: Catalogue,
    wanted: str,
    users: Path | None = None,
    seed: int = 0,
    kept: Dtype | None = None,
) -> Precision:
    """Measure a type, or with `auto` the smallest whose overlap is at least 0.99. Nothing is measured for f32.

    `users` is a user table; without one the bundle's recorded requests stand for the users. `kept` is the type of the
    release that is built upon, which `auto` leaves only when its overlap is below 0.98, or when it is f32. Raises
    StoreError for an unknown type, KernelError for one that no record of this head has.
    """
    if wanted == DtypeChoice.F32:
        return Precision(dtype="f32", costs={}, k=0, items=0, users=0, source="users")
    graph = bundle.graph()
    tried = _tried(bundle.head, wanted, kept)
    features = catalogue.sample(ITEMS, seed)
    records = bundle.item_tower().embed(features)
    user_records, source = sample_users(bundle, users, GRAPH_USERS if graph else USERS, seed)
    k = min(TOP, max(1, len(records) // 10))
    costs: dict[str, Cost] = {}
    for dtype in tried:
        cost = _cost(bundle.head, graph, records, user_records, dtype, k, seed)
        if cost is not None:
            costs[dtype] = cost
    least = {dtype: KEPT_OVERLAP if dtype == kept else LEAST_OVERLAP for dtype in tried}
    good = [dtype for dtype in tried if dtype in costs and costs[dtype].overlap >= least[dtype]]
    return Precision(
        dtype=tried[0] if wanted != DtypeChoice.AUTO else good[0] if good else "f32",
        costs=costs,
        k=k,
        items=len(records),
        users=len(user_records),
        source=source,
    )


def _tried(head: HeadSpec, wanted: str, kept: Dtype | None) -> tuple[Dtype, ...]:
    """The types to measure, the preferred one first."""
    if wanted != DtypeChoice.AUTO:
        return (item_layout(head, dtype_of(wanted)).dtype,)
    tried: tuple[Dtype, ...] = ("f16",) if head.kind == "onnx" else ("int8", "f16")
    return (kept, *(dtype for dtype in tried if dtype != kept)) if kept in tried else tried


def dtype_of(name: str) -> Dtype:
    """Raises StoreError for a type that no record has."""
    for dtype in DTYPES:
        if name == dtype:
            return dtype
    raise StoreError(f"there is no record type {name!r}: use auto, {', '.join(DTYPES)}")


def _cost(
    head: HeadSpec,
    graph: Scorer | None,
    records: NDArray[np.float32],  # (n, item size)
    users: NDArray[np.float32],  # (u, user size)
    dtype: Dtype,
    k: int,
    seed: int,
) -> Cost | None:
    """None where the type cannot hold these records."""
    try:
        exact, stored = _table(head, graph, records, "f32"), _table(head, graph, records, dtype)
    except KernelError:
        return None
    if not len(records) or not len(users):
        return Cost(overlap=1.0, tau=1.0)
    rows = np.arange(len(records), dtype=np.int32)
    few = np.random.default_rng(seed).permutation(len(records))[:TAU_ITEMS]
    overlaps, taus = [], []
    for user in users:
        a, b = exact.score(user, rows), stored.score(user, rows)
        overlaps.append(len(np.intersect1d(top_k(a, k), top_k(b, k))) / k)
        taus.append(kendall_tau(a[few], b[few]))
    return Cost(overlap=float(np.mean(overlaps)), tau=float(np.mean(taus)))


def _table(head: HeadSpec, graph: Scorer | None, records: NDArray[np.float32], dtype: Dtype) -> Table:
    layout = item_layout(head, dtype)
    keys = np.arange(len(records), dtype=np.uint64)
    return open_table(layout, pack(layout, records), open_index(Index(build_index(keys), len(keys))), graph)


def kendall_tau(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Kendall's tau of two score lists (n,): concordant less discordant pairs over those that are not tied in `a`."""
    upper = np.triu_indices(len(a), 1)
    first = np.sign(a[:, None] - a[None, :])[upper]
    second = np.sign(b[:, None] - b[None, :])[upper]
    pairs = int(np.count_nonzero(first))
    return float((first * second).sum() / pairs) if pairs else 1.0
