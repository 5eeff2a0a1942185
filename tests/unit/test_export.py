from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.bundle import open_bundle, seal_bundle
from model.checkpoint import save_weights
from model.errors import BundleError
from model.export import export_bundle, random_features
from model.features import FeatureSpec, Field
from model.networks import NETWORKS, Network

SPEC = FeatureSpec(
    (
        Field(name="user_id", side="user", kind="categorical", vocabulary=tuple(range(20))),
        Field(name="history", side="user", kind="sequence", length=4, shares="item_id"),
        Field(name="hour", side="context", kind="numeric", edges=(6.0, 12.0, 18.0)),
        Field(name="item_id", side="item", kind="categorical", vocabulary=tuple(range(30))),
        Field(name="tags", side="item", kind="multi", length=3, values="string", vocabulary=("a", "b", "c")),
    ),
    "int",
    "int",
)


def write_run(run: Path, name: str, network: Network | None = None, **options: Any) -> Path:
    """A checkpoint of an untrained network."""
    torch.manual_seed(0)
    network = network or NETWORKS[name](SPEC, **options)  # type: ignore[arg-type]
    run.mkdir()
    save_weights(network, run / "weights.safetensors")
    SPEC.save(run / "spec.json")
    config = {"network": name, "options": options, "spec_id": SPEC.id, "head": network.head().to_json()}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.json").write_text(json.dumps({"calibration": {"a": 2.0, "b": -1.0}}))
    (run / "warmup.json").write_text(json.dumps([{"user_id": 1, "candidates": [1, 2]}]))
    return run


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_exports_and_serves_as_it_was_trained(tmp_path: Path, name: str) -> None:
    bundle_id = export_bundle(write_run(tmp_path / "run", name), tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.id == bundle_id
    assert bundle.manifest["network"]["name"] == name
    assert bundle.calibration is not None
    assert bundle.calibration.a == 2.0
    assert bundle.warmup == [{"user_id": 1, "candidates": [1, 2]}]
    one, many = random_features(SPEC, "item", 1), random_features(SPEC, "item", 300)
    tower = bundle.item_tower()
    assert tower.run(one).shape == (1, bundle.head.item_size)
    np.testing.assert_allclose(tower.run(many)[:1], tower.run(one), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of an untrained COLD with small layers, not to be changed."""
    folder = tmp_path_factory.mktemp("cold")
    export_bundle(write_run(folder / "run", "cold", hidden=[16, 8]), folder / "bundle")
    return folder / "bundle"


@pytest.mark.parametrize("count", [0, 1, 2, 333])
def test_a_head_of_its_own_scores_as_torch_does(cold: Path, count: int) -> None:
    torch.manual_seed(0)
    network = NETWORKS["cold"](SPEC, hidden=[16, 8]).eval()  # type: ignore[call-arg,arg-type]
    bundle = open_bundle(cold)
    assert bundle.files[-1] == "head.onnx"
    users, items = random_features(SPEC, "user", 2), random_features(SPEC, "item", max(count, 1))[:count]
    user, item = bundle.user_tower().run(users)[1], bundle.item_tower().embed(items)
    with torch.no_grad():
        records = network.user(torch.from_numpy(users[1:])), network.item(torch.from_numpy(items))
        expected = network.score(records[0], records[1].unsqueeze(0))[0].numpy()
    found = bundle.scorer()(user, item)
    assert found.shape == (count,)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_bundle_whose_head_is_missing_or_changed_is_refused(cold: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(cold, tmp_path / "copy"))
    if damage == "missing":
        (copy / "head.onnx").unlink()
    else:
        (copy / "head.onnx").write_bytes((copy / "head.onnx").read_bytes() + b" ")
    with pytest.raises(BundleError, match=f"head.onnx (is|has) {damage}"):
        open_bundle(copy)


def test_a_head_of_another_network_is_refused(cold: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    export_bundle(write_run(tmp_path / "run", "cold", hidden=[8], groups=["user_id", "item_id"]), other)
    copy = Path(shutil.copytree(cold, tmp_path / "copy"))
    shutil.copyfile(other / "head.onnx", copy / "head.onnx")
    manifest = json.loads((copy / "manifest.json").read_text())
    seal_bundle(copy, {key: value for key, value in manifest.items() if key != "id"})
    with pytest.raises(BundleError, match=r"head.onnx reads 16 and 16 floats, the manifest says \d+ and \d+"):
        open_bundle(copy).scorer()


def test_a_network_that_onnx_runtime_computes_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", "two_tower")
    untouched = NETWORKS["two_tower"].item

    def differs_when_traced(network: Network, x: torch.Tensor) -> torch.Tensor:
        record = untouched(network, x)
        return record + 0.01 if torch.compiler.is_exporting() else record

    monkeypatch.setattr(NETWORKS["two_tower"], "item", differs_when_traced)
    with pytest.raises(BundleError, match="item tower: torch and ONNX Runtime differ by"):
        export_bundle(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_exporting_again_replaces_the_bundle(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "lr")
    first = export_bundle(run, tmp_path / "bundle")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "note": "later"}))
    second = export_bundle(run, tmp_path / "bundle")
    assert open_bundle(tmp_path / "bundle").id == second != first
