"""Tiny real releases, made in milliseconds without torch: hand-made towers, a snapshot, a user table, a file store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.index import build_index
from cache.release import BUNDLE, INDEX, ITEMS, USER_TABLE, seal_release
from cache.snapshot import Snapshot, SnapshotWriter
from cache.store import ReleaseStore
from kernel.head import HeadSpec
from kernel.plain import item_layout
from kernel.record import Dtype
from model.bundle import Bundle, open_bundle
from model.features import FeatureSpec, Field, IdType
from tests.graphs import write_bundle

ITEMS_COUNT, USERS_COUNT = 60, 12
DEVICES, TASTES = ("phone", "tablet", "desktop"), ("jazz", "rock", "folk")
HEADS = {
    "maxsim": HeadSpec(kind="maxsim", user_heads=2, item_heads=3, dim=8, scale=2.0, item_bias=True),
    "cross_attention": HeadSpec(kind="cross_attention", user_heads=3, item_heads=2, dim=8, scale=1.5),
    "onnx": HeadSpec(kind="onnx", user_heads=12, item_heads=20, dim=1, scale=1.0),
}


@dataclass(frozen=True)
class TinyRelease:
    """A release folder, its user table beside it, and what a test needs to know of both."""

    folder: Path
    users: Path
    spec: FeatureSpec
    head: HeadSpec
    item_ids: list[Any]
    user_ids: list[Any]

    @property
    def bundle(self) -> Bundle:
        return open_bundle(self.folder / BUNDLE)


def item_id(number: int, ids: IdType) -> int | str:
    return 100 + number if ids == "int" else f"item-{number}"


def user_id(number: int, ids: IdType) -> int | str:
    return 1 + number if ids == "int" else f"user-{number}"


def tiny_spec(ids: IdType = "int", items: int = ITEMS_COUNT, users: int = USERS_COUNT) -> FeatureSpec:
    """User: user_id, age, tastes, history; context: device, hour; item: item_id, price."""
    item_ids: Any = tuple(item_id(k, ids) for k in range(items))
    user_ids: Any = tuple(user_id(k, ids) for k in range(users))
    return FeatureSpec(
        (
            Field(name="user_id", side="user", kind="categorical", values=ids, vocabulary=user_ids),
            Field(name="age", side="user", kind="numeric", edges=(20.0, 30.0, 40.0)),
            Field(name="tastes", side="user", kind="multi", length=3, values="string", vocabulary=TASTES),
            Field(name="history", side="user", kind="sequence", length=4, shares="item_id"),
            Field(name="device", side="context", kind="categorical", values="string", vocabulary=DEVICES),
            Field(name="hour", side="context", kind="categorical", vocabulary=tuple(range(24))),
            Field(name="item_id", side="item", kind="categorical", values=ids, vocabulary=item_ids),
            Field(name="price", side="item", kind="numeric", edges=(1.0, 2.0, 5.0)),
        ),
        ids,
        ids,
    )


def tiny_release(
    folder: Path,
    *,
    kind: str = "maxsim",
    ids: IdType = "int",
    seed: int = 0,
    items: int = ITEMS_COUNT,
    calibration: Mapping[str, float] | None = None,
    warmup: Sequence[Mapping[str, Any]] | None = None,
    index: Any = "none",
    dtype: Dtype = "f32",
    spec: FeatureSpec | None = None,
) -> TinyRelease:
    """Write `folder`/release and `folder`/users.snap; another seed gives other towers, so other scores."""
    spec, head = spec or tiny_spec(ids, items), HEADS[kind]
    release, item_ids = folder / "release", [item_id(k, ids) for k in range(items)]
    user_ids = [user_id(k, ids) for k in range(USERS_COUNT)]
    recorded = [{"user_id": user_ids[0], "candidates": item_ids[:5]}] if warmup is None else warmup
    made = write_bundle(release / BUNDLE, spec, head, seed=seed, warmup=recorded, calibration=calibration)
    bundle = open_bundle(made)
    columns: dict[str, Any] = {"item_id": item_ids, "price": np.arange(items) % 7}
    records = bundle.item_tower().embed(spec.encode("item", columns, items))
    snapshot = write_table(release / ITEMS, "items", bundle.id, item_ids, records, head, dtype)
    if index != "none":
        build_index(snapshot, head, index, release / INDEX)
    seal_release(release, bundle_id=bundle.id, head=head, index=index)
    users = write_users(folder / USER_TABLE, spec, user_ids, item_ids)
    return TinyRelease(release, users, spec, head, item_ids, user_ids)


def write_users(path: Path, spec: FeatureSpec, user_ids: list[Any], item_ids: list[Any], age: float = 18.0) -> Path:
    """A user table: ages rise by two from `age`, each took the three items from its number on."""
    count = len(user_ids)
    columns: dict[str, Any] = {
        "user_id": user_ids,
        "age": age + 2.0 * np.arange(count),
        "tastes": [["jazz", "folk"] if k % 2 else ["rock"] for k in range(count)],
        "history": [item_ids[k : k + 3] for k in range(count)],
    }
    write_table(path, "users", spec.id, user_ids, spec.encode("user", columns, count))
    return path


def write_table(
    path: Path,
    kind: Any,
    owner: str,
    ids: list[Any],
    records: np.ndarray,
    head: HeadSpec | None = None,
    dtype: Dtype = "f32",
) -> Snapshot:
    """A snapshot file of these records (n, size): int32, or float32 to be stored as a head reads them."""
    writer = SnapshotWriter(
        path,
        kind=kind,
        owner=owner,
        id_type="string" if isinstance(ids[0], str) else "int",
        layout=None if head is None else item_layout(head, dtype),
        record_size=records.shape[1],
    )
    with writer:
        writer.append(ids, records)
        return writer.finish()


def publish(release: TinyRelease, store: ReleaseStore, *, users: bool = True, activate: bool = True) -> str:
    """Publish, the users first, and activate unless told not to; returns the release's name."""
    if users:
        store.publish_users(release.users)
    name = store.publish(release.folder)
    if activate:
        store.activate(name)
    return name
