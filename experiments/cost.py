"""What serving a trained network costs: parameters, bytes an item, arithmetic of a pair, time of a request."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kernel import engine
from kernel.head import HeadSpec
from kernel.record import RecordLayout
from model.bundle import Bundle, open_bundle
from model.checkpoint import load_checkpoint
from model.datasets.log import TEST, Log
from model.export import export_bundle
from model.networks import COLD, Network
from model.requests import encode_items, encode_users, requests_of

CANDIDATES = 5_000
REQUESTS, WARMUP = 60, 10

Score = Callable[[np.ndarray, np.ndarray], Any]  # a user record, rows (n,) int32 of the catalogue


def measure_cost(run: Path, log: Log) -> dict[str, Any]:
    """Costs of a training run's network over the items of a log, as plain numbers; one thread scores.

    A request is 5,000 candidates drawn from the catalogue, with repeats; times are medians over users of the test.
    """
    network, spec, _ = load_checkpoint(run)
    parameters = {"tables": 0, "rest": 0}
    for module in network.modules():
        kind = "tables" if isinstance(module, nn.Embedding) else "rest"
        parameters[kind] += sum(value.numel() for value in module.parameters(recurse=False))
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(run, Path(folder) / "bundle")
        bundle = open_bundle(Path(folder) / "bundle")
        head = bundle.head
        items = bundle.item_tower().embed(encode_items(spec, log))
        requests = requests_of(log, TEST)
        some = requests.take(np.arange(min(len(requests), WARMUP + REQUESTS)))
        users = bundle.user_tower().embed(encode_users(spec, log, some))
        score, served = scorer(bundle, items)
        took_ms = score_times(score, users, len(items))
    return {
        "parameters": parameters["tables"] + parameters["rest"],
        "parameters_of_tables": parameters["tables"],
        "item_bytes": 4 * head.item_size if head.kind == "onnx" else RecordLayout(head, "f32").stride,
        "macs": pair_macs(network, head),
        "ms": round(float(np.median(took_ms)), 4),
        "ms_p99": round(float(np.quantile(took_ms, 0.99)), 4),
        "candidates": CANDIDATES,
        "scored_by": served,
        "head": head.to_json(),
    }


def scorer(bundle: Bundle, items: np.ndarray) -> tuple[Score, str]:
    """What scores rows of the catalogue as the service does: the kernel on f32 records, or the bundle's own graph."""
    if bundle.head.kind == "onnx":
        graph = bundle.scorer(threads=1)
        return lambda user, rows: graph(user, items[rows]), "ONNX Runtime"
    layout = RecordLayout(bundle.head, "f32")
    finder = engine.open_index(engine.Index(engine.build_index(np.arange(len(items), dtype=np.uint64)), len(items)))
    table = engine.open_table(layout, engine.pack(layout, items), finder)
    return table.score, f"kernel, {table.level}"


def score_times(score: Score, users: np.ndarray, items: int) -> np.ndarray:
    """Milliseconds of scoring CANDIDATES rows for one user after the other; (m,)."""
    rng = np.random.default_rng(0)
    took_ms = []
    for place in range(WARMUP + REQUESTS):
        rows = rng.integers(0, items, CANDIDATES, dtype=np.int32)
        began = time.perf_counter()
        score(users[place % len(users)], rows)
        took_ms.append(1000 * (time.perf_counter() - began))
    return np.array(took_ms[WARMUP:])


def pair_macs(network: Network, head: HeadSpec) -> int:
    """Multiply-adds that one more candidate costs, all else cached; element-wise work of COLD's gates left out."""
    if isinstance(network, COLD):
        layers = [layer for part in (network.se, network.mlp) for layer in part.modules()]
        return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    once = head.user_heads * head.item_heads * head.dim
    return 5 * once if head.kind == "cross_attention" else once
