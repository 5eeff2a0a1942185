"""Make the releases that benchmarks serve: a real user tower with random weights over a catalogue of random records.

Speed does not depend on what the weights are, so nothing is trained; records are drawn and written straight into the
table, never computed by a tower. Every draw is seeded: rivals get the same vectors without reading our format.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.file_store import FileStore
from cache.release import BUNDLE, ITEMS, seal_release
from cache.snapshot import IdType, Snapshot, SnapshotWriter
from kernel.head import ITEM_PARTS, HeadKind, HeadSpec
from kernel.record import Dtype, RecordLayout, unpack
from model.bundle import Bundle, open_bundle
from model.features import FeatureSpec, Field

SIZES = {"tiny": 2_000, "full": 1_000_000}
HEADS, DIM = 4, 32
SEEN = 200_000  # items that the model has seen in training, at most: the others are new, and unknown to its histories
HISTORY_LENGTH = 50
ID_RANGE = 1 << 40  # as wide as ids of real catalogues: twelve to thirteen digits
PART = 50_000  # records drawn at a time
COUNTRIES, CITIES, MODELS, CREATORS = 60, 2_000, 500, 5_000
ROOT = Path(__file__).resolve().parents[1]
SHAPED_BY = ("benchmarks/made.py", "cache/snapshot.py", "cache/release.py", "cache/file_store.py", "model/*.py",
             "kernel/*.py", "kernel/cpp/*")  # fmt: skip

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to make."""

    kind: HeadKind = "maxsim"
    ids: IdType = "int"
    dtype: Dtype = "int8"  # what RankTower is meant to serve
    items: int = SIZES["full"]
    seed: int = 0  # another one: other records and weights, the same ids

    def __post_init__(self) -> None:
        if self.items < HISTORY_LENGTH:
            raise ValueError(f"a catalogue of {self.items} items is too small: make at least {HISTORY_LENGTH}")
        if self.kind not in ("maxsim", "cross_attention") or self.ids not in ("int", "string"):
            raise ValueError(f"no release has a {self.kind} head and {self.ids} ids: use maxsim or cross_attention")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.ids}-{self.dtype}-{self.items}-{self.seed}"


@dataclass(frozen=True)
class Made:
    """A published release, and what a benchmark needs to know of it."""

    plan: Plan
    folder: Path

    @property
    def store(self) -> str:
        return f"file://{self.folder / 'store'}"

    @cached_property
    def release(self) -> Path:
        store = FileStore(self.store)
        current = store.current()
        if current is None:
            raise ValueError(f"{self.folder.name} holds no release: delete it, it is made again")
        return store.fetch(current, self.folder)

    @property
    def bundle_folder(self) -> Path:
        return self.release / BUNDLE

    @cached_property
    def bundle(self) -> Bundle:
        return open_bundle(self.bundle_folder)

    @cached_property
    def snapshot(self) -> Snapshot:
        return Snapshot.open(self.release / ITEMS)

    @cached_property
    def ids(self) -> NDArray[Any]:
        """(n,) int64 or str objects, row by row."""
        return item_ids(self.plan)

    def vectors(self) -> Path:
        """vectors.npy, (n, item size) float32, and ids.npy beside it: the catalogue as rivals load it."""
        path = self.folder / "vectors.npy"
        if not path.is_file():
            table = np.lib.format.open_memmap(
                self.folder / "part.npy", "w+", np.float32, (self.plan.items, self.bundle.head.item_size)
            )
            for start, records in draw_records(self.bundle.head, self.plan.items, self.plan.seed):
                table[start : start + len(records)] = records
            table.flush()
            np.save(self.folder / "ids.npy", self.ids, allow_pickle=False)
            (self.folder / "part.npy").rename(path)
        return path


def make(plan: Plan, folder: Path) -> Made:
    """The release of that plan below `folder`, made unless the same code has made it already."""
    home = folder / f"{plan.name}-{_fingerprint()}"
    if (home / "complete").is_file():
        return Made(plan, home)
    for older in folder.glob(f"{plan.name}-*"):  # made by other code, or cut off
        shutil.rmtree(older)
    home.mkdir(parents=True)
    draft = home / "draft"
    spec = catalogue_spec(plan)
    write_bundle(plan, spec, home / "run", draft / BUNDLE)
    bundle = open_bundle(draft / BUNDLE)
    write_items(draft / ITEMS, plan, bundle.id, bundle.head)
    seal_release(draft, bundle_id=bundle.id, head=bundle.head)
    store = FileStore(f"file://{home / 'store'}")
    store.activate(store.publish(draft))
    shutil.rmtree(draft)
    shutil.rmtree(home / "run")
    (home / "complete").touch()
    return Made(plan, home)


@cache
def _fingerprint() -> str:
    """Changes with every file that shapes a release; taken once, so that an edit during a run changes nothing."""
    digest = hashlib.sha256()
    for pattern in SHAPED_BY:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


# --- the table -------------------------------------------------------------------------------------------------------


def write_items(path: Path, plan: Plan, owner: str, head: HeadSpec) -> None:
    """The item table of a bundle. The one place of the benchmarks that writes records in the project's format."""
    ids = item_ids(plan)
    with SnapshotWriter(
        path,
        kind="items",
        owner=owner,
        id_type=plan.ids,
        layout=RecordLayout(head, plan.dtype),
    ) as writer:
        for start, records in draw_records(head, plan.items, plan.seed):
            writer.append(ids[start : start + len(records)].tolist(), records)
        writer.finish()


def stored_records(made: Made, rows: NDArray[np.int64]) -> Floats:
    """Records (b, item size) as the table holds them. The one place of the benchmarks that reads that format."""
    return unpack(RecordLayout(made.bundle.head, made.plan.dtype), made.snapshot.rows[rows])


def item_ids(plan: Plan) -> NDArray[Any]:
    """(n,) distinct ids in no order: int64, or str objects of the same digits."""
    rng = np.random.default_rng(1)
    numbers = np.unique(rng.integers(1, ID_RANGE, plan.items + plan.items // 100 + 8))
    chosen = rng.permutation(numbers)[: plan.items]
    return chosen if plan.ids == "int" else np.array([f"sku-{number}" for number in chosen.tolist()], object)


def draw_records(head: HeadSpec, items: int, seed: int = 0) -> Iterator[tuple[int, Floats]]:
    """Parts of the catalogue, each with the row it starts at: (b, item size) float32.

    maxsim: unit vectors. cross_attention: E and V of about unit norm, gates G between 0 and 1.
    """
    for start in range(0, items, PART):
        count = min(PART, items - start)
        rng = np.random.default_rng([2, start, seed])
        shape = (count, ITEM_PARTS[head.kind], head.item_heads, head.dim)
        records = rng.standard_normal(shape, np.float32)
        if head.kind == "maxsim":
            records /= np.linalg.norm(records, axis=-1, keepdims=True)
        else:
            records /= np.sqrt(np.float32(head.dim))
            records[:, 2] = rng.random(shape[:1] + shape[2:], np.float32)
        yield start, records.reshape(count, -1)


# --- the bundle ------------------------------------------------------------------------------------------------------


def write_bundle(plan: Plan, spec: FeatureSpec, run: Path, out: Path) -> None:
    """Export an untrained RankTower network through the checkpoint that a training run would have left."""
    import torch  # only making needs it: the benchmarks themselves, like the service, do without

    from model.checkpoint import save_weights
    from model.export import export_bundle
    from model.networks import NETWORKS

    torch.manual_seed(plan.seed)
    options = {
        "user_heads": HEADS,
        "item_heads": HEADS,
        "dim": DIM,
        "cross_attention": plan.kind == "cross_attention",
        "item_bias": False,  # leaves the rivals whole rows to multiply
    }
    network = NETWORKS["ranktower"](spec, **options)  # type: ignore[arg-type]
    run.mkdir()
    save_weights(network, run / "weights.safetensors")
    spec.save(run / "spec.json")
    seen = seen_ids(plan)[:4]
    documents = {
        "config": {"network": "ranktower", "options": options, "spec_id": spec.id, "head": network.head().to_json()},
        "metrics": {"calibration": {"a": 1.0, "b": 0.0}},
        "warmup": [{"user": {"age": 30}, "context": {"hour": 20}, "history": seen, "candidates": seen}],
    }
    for name, document in documents.items():
        (run / f"{name}.json").write_text(json.dumps(document))
    out.parent.mkdir(parents=True, exist_ok=True)
    export_bundle(run, out)


def seen_ids(plan: Plan) -> list[Any]:
    """Ids that the model has an embedding for."""
    seen: list[Any] = item_ids(plan)[:SEEN].tolist()
    return seen


def catalogue_spec(plan: Plan) -> FeatureSpec:
    """20 fields of user and context, a history of 50 items, three fields of the item."""
    return FeatureSpec((*_user_fields(), *_context_fields(), *_item_fields(plan)), "int", plan.ids)


def _numeric(name: str, side: Any, top: float) -> Field:
    return Field(name=name, side=side, kind="numeric", edges=tuple(np.linspace(0, top, 31)[1:-1].tolist()))


def _numbers(name: str, side: Any, count: int, **options: Any) -> Field:
    return Field(
        name=name, side=side, kind=options.pop("kind", "categorical"), vocabulary=tuple(range(count)), **options
    )


def _texts(name: str, side: Any, count: int, **options: Any) -> Field:
    values: Any = tuple(f"{name}-{k}" for k in range(count))
    kind = options.pop("kind", "categorical")
    return Field(name=name, side=side, kind=kind, values="string", vocabulary=values, **options)


def _user_fields() -> tuple[Field, ...]:
    return (
        _numeric("age", "user", 90),
        _numeric("signup_days", "user", 3_000),
        _numeric("visits_7d", "user", 60),
        _numeric("spend_30d", "user", 500),
        _texts("gender", "user", 3),
        _texts("country", "user", COUNTRIES),
        _texts("language", "user", 30),
        _texts("plan", "user", 4),
        _numbers("city", "user", CITIES),
        _numbers("segment", "user", 100),
        _numbers("device_model", "user", MODELS),
        _texts("tastes", "user", 200, kind="multi", length=5),
        _numbers("follows", "user", CREATORS, kind="multi", length=8),
        Field(
            name="history", side="user", kind="sequence", length=HISTORY_LENGTH, pooling="attention", shares="item_id"
        ),
    )


def _context_fields() -> tuple[Field, ...]:
    return (
        _numbers("hour", "context", 24),
        _numbers("weekday", "context", 7),
        _texts("device", "context", 3),
        _texts("network", "context", 4),
        _texts("page", "context", 20),
        _numeric("position", "context", 200),
        _numeric("session_minutes", "context", 120),
    )


def _item_fields(plan: Plan) -> tuple[Field, ...]:
    return (
        Field(name="item_id", side="item", kind="categorical", values=plan.ids, vocabulary=tuple(seen_ids(plan))),
        _numbers("category", "item", 300),
        _numeric("price", "item", 200),
    )
