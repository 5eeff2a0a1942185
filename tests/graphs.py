"""Tiny bundles whose towers are hand-made ONNX graphs: no torch, milliseconds to build."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from kernel.head import HeadSpec
from model.bundle import HEAD_FILE, open_scorer, seal_bundle
from model.features import FeatureSpec
from model.tower import HEAD_INPUTS, HEAD_OUTPUT, INPUT, OUTPUT, Tower


def write_tower(path: Path, sizes: Sequence[int], size: int, seed: int, output: str = OUTPUT) -> list[np.ndarray]:
    """A tower whose record is the sum of one row of `size` floats per input column; returns the tables."""
    rng = np.random.default_rng(seed)
    tables = [rng.normal(size=(rows, size)).astype(np.float32) for rows in sizes]
    nodes, initializers, gathered = [], [], []
    for column, table in enumerate(tables):
        initializers += [
            numpy_helper.from_array(table, f"table{column}"),
            numpy_helper.from_array(np.array(column, np.int64), f"column{column}"),
        ]
        nodes += [
            helper.make_node("Gather", [INPUT, f"column{column}"], [f"index{column}"], axis=1),
            helper.make_node("Gather", [f"table{column}", f"index{column}"], [f"row{column}"], axis=0),
        ]
        gathered.append(f"row{column}")
    nodes.append(helper.make_node("Sum", gathered, [output]))
    inputs = [helper.make_tensor_value_info(INPUT, TensorProto.INT32, ["batch", len(sizes)])]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", size])]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return tables


def write_head(path: Path, head: HeadSpec, seed: int) -> None:
    """A head of kind onnx whose score is the sum of tanh(user * (items A)) over the user's floats."""
    table = np.random.default_rng(seed).normal(0, 0.05, (head.item_size, head.user_size)).astype(np.float32)
    user, items = HEAD_INPUTS
    nodes = [
        helper.make_node("MatMul", [items, "a"], ["mapped"]),
        helper.make_node("Mul", ["mapped", user], ["product"]),
        helper.make_node("Tanh", ["product"], ["bent"]),
        helper.make_node("ReduceSum", ["bent", "axis"], [HEAD_OUTPUT], keepdims=0),
    ]
    constants = [numpy_helper.from_array(table, "a"), numpy_helper.from_array(np.array([1], np.int64), "axis")]
    inputs = [
        helper.make_tensor_value_info(user, TensorProto.FLOAT, [1, head.user_size]),
        helper.make_tensor_value_info(items, TensorProto.FLOAT, ["items", head.item_size]),
    ]
    outputs = [helper.make_tensor_value_info(HEAD_OUTPUT, TensorProto.FLOAT, ["items"])]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def write_bundle(
    folder: Path,
    spec: FeatureSpec,
    head: HeadSpec,
    *,
    seed: int = 0,
    warmup: Sequence[Mapping[str, Any]] = (),
    calibration: Mapping[str, float] | None = None,
) -> Path:
    """A sealed bundle of two hand-made towers, and a head where it is a graph; all differ when `seed` does."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    inputs = {}
    for tower, size in (("user", head.user_size), ("item", head.item_size)):
        fields = spec.tower_fields(tower)  # type: ignore[arg-type]
        sizes = [spec.owner(field).size for field in fields for _ in range(field.length)]
        write_tower(folder / f"{tower}.onnx", sizes, size, seed=2 * seed + (tower == "item"))
        inputs[tower] = np.stack([rng.integers(0, rows, 4) for rows in sizes], axis=1).astype(np.int32)
    if head.kind == "onnx":
        write_head(folder / HEAD_FILE, head, seed)
    scorer = open_scorer(folder, head)
    users = Tower(folder / "user.onnx").run(inputs["user"])
    items = Tower(folder / "item.onnx").run(inputs["item"])
    probe = {
        "user_features": inputs["user"],
        "item_features": inputs["item"],
        "user_records": users,
        "item_records": items,
        "scores": np.stack([scorer(user, items) for user in users]),
    }
    save_file(probe, folder / "probe.safetensors")
    spec.save(folder / "spec.json")
    (folder / "warmup.json").write_text(json.dumps(list(warmup)))
    manifest = {
        "network": {"name": "hand-made", "options": {}},
        "head": head.to_json(),
        "spec_id": spec.id,
        "calibration": calibration,
        "metrics": {},
        "versions": {},
        "git_commit": None,
    }
    seal_bundle(folder, manifest)
    return folder
