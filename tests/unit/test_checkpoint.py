"""A run on disk: what is written comes back, whole or not at all, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.checkpoint import (
    OURS,
    build_network,
    check_run,
    load_checkpoint,
    load_state,
    open_run,
    save_state,
    save_weights,
    write_json,
)
from model.errors import TrainError
from model.features import FeatureSpec, Field
from model.networks import Network

SPEC = FeatureSpec(
    (
        Field(name="user_id", side="user", kind="categorical", dim=4, vocabulary=tuple(range(9))),
        Field(name="item_id", side="item", kind="categorical", dim=4, vocabulary=tuple(range(20))),
        Field(name="price", side="item", kind="numeric", dim=4, edges=(1.0, 2.0)),
    ),
    "int",
    "int",
)
OPTIONS = {"user_heads": 2, "item_heads": 2, "dim": 4, "hidden": 8}


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return build_network("ranktower", SPEC, OPTIONS)


def write_run(run: Path, net: Network) -> Path:
    """The three files that a checkpoint is read from."""
    open_run(run)
    write_json(run / "config.json", {"network": "ranktower", "options": OPTIONS, "spec_id": SPEC.id, "seed": 7})
    SPEC.save(run / "spec.json")
    save_weights(net, run / "weights.safetensors")
    return run


def scores(net: Network) -> Tensor:
    """(3, 5) scores of the first users and items."""
    users = torch.arange(3, dtype=torch.int32)[:, None]
    items = torch.stack([torch.arange(5), torch.arange(5) % 4], dim=1).int()
    with torch.no_grad():
        return net.score(net.user(users), net.item(items).expand(3, 5, -1))


def one_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step of training that depends on the weights and on the optimiser's moments."""
    optimizer.zero_grad()
    sum((weight**2).sum() for weight in net.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()


def test_a_checkpoint_scores_as_the_network_that_was_saved(tmp_path: Path) -> None:
    saved = network().eval()
    loaded, spec, config = load_checkpoint(write_run(tmp_path / "run", saved))
    torch.testing.assert_close(scores(loaded), scores(saved), rtol=0, atol=0)
    assert (spec.id, config["seed"], loaded.training) == (SPEC.id, 7, False)


@pytest.mark.parametrize("name", ["config.json", "spec.json", "weights.safetensors"])
@pytest.mark.parametrize("kept", [0, 20, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, name: str, kept: int) -> None:
    run = write_run(tmp_path / "run", network())
    (run / name).write_bytes((run / name).read_bytes()[:kept])
    with pytest.raises(TrainError, match=f"{name}.*train again"):
        load_checkpoint(run)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_missing_file_is_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", network())
    (run / name).unlink()
    with pytest.raises(TrainError, match=r"run `ranktower train`|train again"):
        load_checkpoint(run)


def test_a_specification_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", network())
    spec = json.loads((run / "spec.json").read_text())
    spec["fields"][0]["vocabulary"] = spec["fields"][0]["vocabulary"][:-1]
    (run / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(TrainError, match=r"spec\.json has id .* config\.json names .*: train again"):
        load_checkpoint(run)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", network())
    save_weights(build_network("ranktower", SPEC, {**OPTIONS, "hidden": 16}), run / "weights.safetensors")
    with pytest.raises(TrainError, match=r"weights\.safetensors cannot be loaded"):
        load_checkpoint(run)


def test_a_new_run_replaces_an_earlier_one_and_keeps_what_is_not_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", network())
    (run / "notes.txt").write_text("precious")
    open_run(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert not {"notes.txt"} & set(OURS)


def test_a_new_run_goes_to_a_new_folder_an_empty_one_or_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty", write_run(tmp_path / "run", network())):
        before = sorted(tmp_path.rglob("*"))
        check_run(folder)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_new_run_goes_to_no_foreign_folder_and_to_no_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(TrainError, match="holds files but no training run: choose another folder"):
        open_run(tmp_path)
    with pytest.raises(TrainError, match=r"thesis\.txt is a file: choose a folder"):
        open_run(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_training_goes_on_from_a_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    ours, theirs = network(0), network(1)
    optimizer, another = (torch.optim.Adam(net.parameters(), lr=0.01) for net in (ours, theirs))
    one_step(ours, optimizer)
    save_state(tmp_path, {"network": ours}, optimizer, {"epoch": 3, "best": 0.25})
    assert load_state(tmp_path, {"network": theirs}, another) == {"epoch": 3, "best": 0.25}
    for net, steps in ((ours, optimizer), (theirs, another)):
        one_step(net, steps)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=0, atol=0)


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"auc": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"auc": np.nan})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"auc": 0.5}
