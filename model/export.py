"""Write a trained checkpoint as a bundle, refusing when torch and ONNX Runtime do not agree."""

from __future__ import annotations

import logging
import platform
import subprocess
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from kernel.head import HeadSpec
from model.bundle import HEAD_FILE, open_bundle, open_scorer, seal_bundle
from model.checkpoint import load_checkpoint, read_json
from model.errors import BundleError
from model.features import FeatureSpec
from model.features import Tower as TowerName
from model.folders import replacing_folder
from model.fused import fused
from model.networks import Network
from model.tower import HEAD_INPUTS, HEAD_OUTPUT, INPUT, OUTPUT, Tower

TOLERANCE = 1e-4
PROBE_USERS, PROBE_ITEMS = 4, 64
OPSET = 20

log = logging.getLogger(__name__)


class _Graph(nn.Module):
    """One method of a network as a module, so that it can be traced."""

    def __init__(self, network: Network, tower: TowerName) -> None:
        super().__init__()
        self.network, self.tower = network, tower

    def forward(self, features: Tensor) -> Tensor:
        record: Tensor = getattr(self.network, self.tower)(features)
        return record


class _HeadGraph(nn.Module):
    """network.score of one user as a module."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, user: Tensor, items: Tensor) -> Tensor:  # (1, Ru), (n, Ri) -> (n,)
        return self.network.score(user, items.unsqueeze(0)).squeeze(0)


def export_bundle(run: Path, out: Path) -> str:
    """Export the checkpoint in folder `run` to the bundle folder `out`; returns the bundle's id.

    Raises BundleError when a tower or a score in ONNX Runtime differs from torch by more than 1e-4; `out` stays.
    """
    network, spec, config = load_checkpoint(run)
    network = network.cpu().float().eval()
    served = fused(network)
    metrics = read_json(run / "metrics.json")
    with replacing_folder(out, "manifest.json") as folder:
        for tower in ("user", "item"):
            write_graph(served, tower, width(spec, tower), folder / f"{tower}.onnx")
        head: HeadSpec = network.head()
        if head.kind == "onnx":
            write_head(network, head, folder / HEAD_FILE)
        probe = make_probe(network, spec, head, folder)
        save_file(probe, folder / "probe.safetensors")
        spec.save(folder / "spec.json")
        (folder / "warmup.json").write_bytes((run / "warmup.json").read_bytes())
        bundle_id = seal_bundle(folder, _manifest(config, spec, head, metrics))
        opened = open_bundle(folder)
        opened.check_probe(opened.user_tower(), opened.item_tower())
    return bundle_id


def width(spec: FeatureSpec, tower: TowerName) -> int:
    return spec.user_width if tower == "user" else spec.item_width


def write_graph(network: Network, tower: TowerName, columns: int, path: Path) -> None:
    """Trace network.user or network.item to ONNX with a free batch dimension."""
    example = torch.zeros((2, columns), dtype=torch.int32)
    graph = _Graph(network, tower)
    _trace(graph, (example,), ([INPUT], [OUTPUT]), ({0: torch.export.Dim("batch")},), path)


def write_head(network: Network, head: HeadSpec, path: Path) -> None:
    """Trace network.score to ONNX for one user and a free number of items."""
    examples = torch.zeros(1, head.user_size), torch.zeros(2, head.item_size)
    shapes: tuple[dict[int, Any], ...] = ({}, {0: torch.export.Dim("items")})
    _trace(_HeadGraph(network), examples, (HEAD_INPUTS, [HEAD_OUTPUT]), shapes, path)


def _trace(
    graph: nn.Module,
    examples: tuple[Tensor, ...],
    names: tuple[Sequence[str], Sequence[str]],  # of inputs and outputs
    shapes: tuple[dict[int, Any], ...],  # the free dimensions of each input
    path: Path,
) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about packages that are not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter deprecates its own internals
        program = torch.onnx.export(
            graph.eval(),
            examples,
            input_names=names[0],
            output_names=names[1],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise BundleError(f"{path.name} cannot be traced to ONNX: use operations that the exporter knows")
    program.save(path)


def make_probe(network: Network, spec: FeatureSpec, head: HeadSpec, folder: Path) -> dict[str, NDArray[Any]]:
    """Random valid inputs with torch's outputs, which ONNX Runtime and the NumPy head must reproduce."""
    features = {"user": random_features(spec, "user", PROBE_USERS), "item": random_features(spec, "item", PROBE_ITEMS)}
    with torch.no_grad():
        records = {name: getattr(network, name)(torch.from_numpy(rows)) for name, rows in features.items()}
        scores = network.score(records["user"], records["item"].expand(PROBE_USERS, -1, -1)).numpy()
    for name, rows in features.items():
        _agree(f"{name} tower", Tower(folder / f"{name}.onnx").run(rows), records[name].numpy())
    items, scorer = records["item"].numpy(), open_scorer(folder, head)
    _agree("score", np.stack([scorer(user, items) for user in records["user"].numpy()]), scores)
    return {
        "user_features": features["user"],
        "item_features": features["item"],
        "user_records": np.ascontiguousarray(records["user"].numpy()),
        "item_records": np.ascontiguousarray(items),
        "scores": np.ascontiguousarray(scores),
    }


def random_features(spec: FeatureSpec, tower: TowerName, rows: int) -> NDArray[np.int32]:
    """Valid index rows (rows, width), drawn uniformly from each table; the first row is all missing."""
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, spec.owner(field).size, (rows, field.length)) for field in spec.tower_fields(tower)]
    features = np.concatenate(columns, axis=1).astype(np.int32)
    features[0] = 0
    return features


def _agree(what: str, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    difference = float(np.abs(found - expected).max()) if found.size else 0.0
    log.info("%s: torch and ONNX Runtime differ by %.1e", what, difference)
    if not difference <= TOLERANCE:
        raise BundleError(
            f"{what}: torch and ONNX Runtime differ by {difference:.1e} (allowed {TOLERANCE:.0e}): not exported; "
            "train again, or report the network's options"
        )


def _manifest(config: dict[str, Any], spec: FeatureSpec, head: HeadSpec, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "network": {"name": config["network"], "options": config["options"]},
        "head": head.to_json(),
        "spec_id": spec.id,
        "calibration": {name: metrics["calibration"][name] for name in ("a", "b")},
        "metrics": metrics,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnxruntime", "onnx")},
        },
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the source tree that exports, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
