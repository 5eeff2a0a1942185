"""The artifact folder between training and serving: written once, named by its content, verified whenever it is opened.

manifest.json     format, id, network, head, calibration, metrics, versions, git commit, sha256 of every other file
spec.json         the fitted FeatureSpec
user.onnx         (b, user width) int32 -> (b, user record) float32
item.onnx         (b, item width) int32 -> (b, item record) float32
head.onnx         (1, user record), (n, item record) -> (n,) float32; only of a head of kind `onnx`
probe.safetensors golden inputs and outputs, recomputed at every load
warmup.json       recorded request bodies, replayed before a service is ready
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kernel.head import HeadSpec, Scorer
from kernel.reference import score
from model.errors import BundleError
from model.features import FeatureSpec
from model.tower import GraphHead, Tower

FORMAT = 1
FILES = ("spec.json", "user.onnx", "item.onnx", "probe.safetensors", "warmup.json")
HEAD_FILE = "head.onnx"
PROBE_TOLERANCE = 1e-4  # other instruction sets round differently

_in_use: WeakValueDictionary[str, FeatureSpec] = WeakValueDictionary()  # by the hash of spec.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """probability = sigmoid(a * score + b), fitted on validation."""

    a: float
    b: float


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose hashes have been checked."""

    folder: Path
    manifest: Mapping[str, Any]
    spec: FeatureSpec

    @property
    def id(self) -> str:
        return str(self.manifest["id"])

    @cached_property
    def head(self) -> HeadSpec:
        return HeadSpec.from_json(self.manifest["head"])

    @cached_property
    def calibration(self) -> Calibration | None:
        fitted = self.manifest["calibration"]
        return None if fitted is None else Calibration(**fitted)

    @cached_property
    def warmup(self) -> list[dict[str, Any]]:
        requests: list[dict[str, Any]] = json.loads((self.folder / "warmup.json").read_text())
        return requests

    def user_tower(self, *, threads: int = 1) -> Tower:
        return self._tower("user", self.spec.user_width, self.head.user_size, threads)

    def item_tower(self, *, threads: int = 1) -> Tower:
        return self._tower("item", self.spec.item_width, self.head.item_size, threads)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files but the manifest."""
        return files_of(self.manifest)

    def graph(self, *, threads: int = 1) -> GraphHead | None:
        """The head's own graph, None where a kernel scores. BundleError when it reads other records than the head."""
        return open_graph(self.folder, self.head, threads=threads) if self.head.kind == "onnx" else None

    def scorer(self, *, threads: int = 1) -> Scorer:
        """What scores: the reference of the kernels, or the head's own graph."""
        return open_scorer(self.folder, self.head, threads=threads)

    def _tower(self, name: str, width: int, size: int, threads: int) -> Tower:
        tower = Tower(self.folder / f"{name}.onnx", threads=threads)
        if (tower.width, tower.size) != (width, size):
            raise BundleError(
                f"bundle {self.id}: {name}.onnx maps {tower.width} to {tower.size}, "
                f"the manifest says {width} to {size}: export the bundle again"
            )
        return tower

    def check_probe(self, user: Tower, item: Tower) -> None:
        """Recompute the golden outputs; raise BundleError when they differ by more than 1e-4 of their size."""
        probe = read_probe(self.folder)
        user_records, item_records = user.run(probe["user_features"]), item.run(probe["item_features"])
        scorer = self.scorer()
        scores = np.stack([scorer(record, item_records) for record in user_records])
        for name, found in (("user_records", user_records), ("item_records", item_records), ("scores", scores)):
            difference = largest_difference(found, probe[name])
            if not difference <= PROBE_TOLERANCE:
                raise BundleError(
                    f"bundle {self.id}: {name} of the probe differ by {difference:.1e} on this machine "
                    f"(allowed {PROBE_TOLERANCE:.0e}): do not serve it; export again or report the library versions"
                )


def open_scorer(folder: Path, head: HeadSpec, *, threads: int = 1) -> Scorer:
    """The scorer of the bundle in `folder`; BundleError when its graph reads other records than the head names."""
    return open_graph(folder, head, threads=threads) if head.kind == "onnx" else partial(score, head)


def open_graph(folder: Path, head: HeadSpec, *, threads: int = 1) -> GraphHead:
    """The graph of a head of kind `onnx`."""
    graph = GraphHead(folder / HEAD_FILE, threads=threads)
    if (graph.user_size, graph.item_size) != (head.user_size, head.item_size):
        raise BundleError(
            f"bundle {folder}: {HEAD_FILE} reads {graph.user_size} and {graph.item_size} floats, "
            f"the manifest says {head.user_size} and {head.item_size}: export the bundle again"
        )
    return graph


def largest_difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest absolute difference in units of max(1, largest expected magnitude); NaN never compares as small."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.size:
        return 0.0
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def read_probe(folder: Path) -> dict[str, NDArray[Any]]:
    try:
        return load_file(folder / "probe.safetensors")
    except SafetensorError as error:
        raise BundleError(f"{folder}/probe.safetensors cannot be read ({error}): export the bundle again") from error


def files_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Which files a bundle of this manifest holds beside it."""
    head = manifest["head"]
    own_graph = isinstance(head, Mapping) and head.get("kind") == "onnx"
    return (*FILES, HEAD_FILE) if own_graph else FILES


def seal_bundle(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Write manifest.json over the files already in `folder`; returns the bundle's id, the hash of its content."""
    hashes = {name: hash_file(folder / name) for name in files_of(manifest)}
    body = {**manifest, "format": FORMAT, "files": hashes}
    bundle_id = _content_id(body)
    (folder / "manifest.json").write_text(json.dumps({**body, "id": bundle_id}, indent=2, sort_keys=True))
    return bundle_id


def open_bundle(folder: Path) -> Bundle:
    """Check every hash and open. Raises BundleError naming the file that is missing or changed."""
    manifest = _read_manifest(folder)
    for name in files_of(manifest):
        path = folder / name
        if not path.is_file():
            raise BundleError(f"bundle {folder}: {name} is missing: copy or export the bundle again")
        if hash_file(path) != manifest["files"].get(name):
            raise BundleError(f"bundle {folder}: {name} has changed since export: copy or export the bundle again")
    body = {key: value for key, value in manifest.items() if key != "id"}
    if _content_id(body) != manifest["id"]:
        raise BundleError(f"bundle {folder}: manifest.json has changed since export: copy or export the bundle again")
    return Bundle(folder, manifest, _spec(folder / "spec.json", manifest["files"]["spec.json"]))


def _spec(path: Path, digest: str) -> FeatureSpec:
    """The specification in a file of that hash, or the equal one of a bundle in use, with its vocabularies."""
    spec = _in_use.get(digest)
    if spec is None:
        spec = _in_use[digest] = FeatureSpec.load(path)
    return spec


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle (no manifest.json): run `ranktower export` first") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}/manifest.json cannot be read ({error}): export the bundle again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BundleError(f"bundle {folder} has format {found}, this version reads {FORMAT}: export it again")
    for key in ("id", "files", "head", "calibration", "network", "spec_id"):
        if key not in manifest:
            raise BundleError(f"bundle {folder}: manifest.json lacks {key!r}: export the bundle again")
    return manifest


def _content_id(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
