from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kernel.head import HeadSpec
from model.bundle import FILES, hash_file, largest_difference, open_bundle, seal_bundle
from model.errors import BundleError
from model.features import FeatureSpec, Field
from tests.graphs import write_bundle

SPEC = FeatureSpec(
    (
        Field(name="user_id", side="user", kind="categorical", vocabulary=(1, 2, 3)),
        Field(name="item_id", side="item", kind="categorical", vocabulary=(10, 20)),
        Field(name="price", side="item", kind="numeric", edges=(1.0, 2.0)),
    ),
    "int",
    "int",
)
HEADS = [
    HeadSpec(kind="maxsim", user_heads=2, item_heads=3, dim=8, scale=2.0, item_bias=True),
    HeadSpec(kind="cross_attention", user_heads=2, item_heads=2, dim=8, scale=2.0),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(
        tmp_path / "bundle", SPEC, HEADS[0], warmup=[{"candidates": [10]}], calibration={"a": 1.0, "b": 0.5}
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_bundle_opens_as_it_was_written(tmp_path: Path, head: HeadSpec) -> None:
    bundle = open_bundle(
        write_bundle(tmp_path / "bundle", SPEC, head, warmup=[{"candidates": [10]}], calibration={"a": 1.0, "b": 0.5})
    )
    assert bundle.head == head
    assert bundle.spec == SPEC
    assert bundle.warmup == [{"candidates": [10]}]
    assert bundle.calibration is not None
    assert bundle.calibration.b == 0.5
    bundle.check_probe(bundle.user_tower(), bundle.item_tower())


def test_the_id_names_the_content(tmp_path: Path) -> None:
    ids = [
        open_bundle(write_bundle(tmp_path / str(i), SPEC, HEADS[0], seed=seed)).id for i, seed in enumerate((1, 1, 2))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_bundles_in_use_at_a_time_share_an_equal_specification(tmp_path: Path) -> None:
    other = replace(SPEC, fields=SPEC.fields[:2])
    specs = (SPEC, SPEC, other)
    first, second, third = (
        open_bundle(write_bundle(tmp_path / str(i), spec, HEADS[0], seed=i)) for i, spec in enumerate(specs)
    )
    assert first.id != second.id
    assert second.spec is first.spec
    assert third.spec == other
    held = ref(first.spec)
    del first, second
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_changed_file_is_refused_by_name(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} has changed"):
        open_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "has format None"),
        ('{"format": 99}', "has format 99"),
        ('{"format": 1}', "lacks 'id'"),
    ],
)
def test_a_damaged_manifest_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["head"]["scale"] = 3.0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"manifest\.json has changed"):
        open_bundle(folder)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="ranktower export"):
        open_bundle(tmp_path)


def test_a_probe_that_does_not_come_out_is_refused(folder: Path) -> None:
    probe = load_file(folder / "probe.safetensors")
    probe["scores"][0, 0] += 1
    save_file(probe, folder / "probe.safetensors")
    seal_bundle(folder, {key: value for key, value in open_manifest(folder).items() if key != "id"})
    bundle = open_bundle(folder)
    with pytest.raises(BundleError, match="scores of the probe differ"):
        bundle.check_probe(bundle.user_tower(), bundle.item_tower())


def test_towers_of_another_shape_are_refused(folder: Path) -> None:
    manifest = open_manifest(folder)
    manifest["head"]["dim"] = 16
    seal_bundle(folder, {key: value for key, value in manifest.items() if key != "id"})
    with pytest.raises(BundleError, match=r"user\.onnx maps 1 to 16, the manifest says 1 to 32"):
        open_bundle(folder).user_tower()


def open_manifest(folder: Path) -> dict[str, object]:
    manifest: dict[str, object] = json.loads((folder / "manifest.json").read_text())
    return manifest


def test_nan_is_a_large_difference() -> None:
    a = np.array([1.0, np.nan], np.float32)
    assert not largest_difference(a, np.zeros(2, np.float32)) <= 1e-4
    assert largest_difference(a, a[:1]) == float("inf")


def test_a_file_hash_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert hash_file(tmp_path / "x") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
