"""A training run on disk: what it was, the best weights, and the state to go on from. Every file appears whole or not.

config.json          network and options, loss, sampler, seed, head: enough to build the network again
spec.json            the fitted FeatureSpec
weights.safetensors  the weights of the best epoch so far
state.safetensors    the last epoch: weights, optimiser, and in its metadata the progress; `--resume` reads only this
state.json           the same progress, for people
teacher.safetensors  the soft labels, so that a resumed run distils from the same ones
epochs.jsonl         one line an epoch
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.errors import SpecError, TrainError
from model.features import FeatureSpec
from model.networks import NETWORKS, Network

OURS = (
    "config.json",
    "spec.json",
    "weights.safetensors",
    "state.safetensors",
    "state.json",
    "teacher.safetensors",
    "epochs.jsonl",
    "metrics.json",
    "warmup.json",
    "heldout.json",
)


def check_run(out: Path) -> None:
    """Raise TrainError unless a new run may go to `out`: nothing there, an empty folder, or an earlier run."""
    if out.exists() and not out.is_dir():
        raise TrainError(f"{out} is a file: choose a folder")
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise TrainError(f"{out} holds files but no training run: choose another folder")


def open_run(out: Path) -> None:
    """Make the folder ready for a new run: an earlier run in it is replaced, anything else is left alone."""
    check_run(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in OURS:
        (out / name).unlink(missing_ok=True)


def build_network(name: str, spec: FeatureSpec, options: Mapping[str, Any]) -> Network:
    """A network by name; TrainError names the known ones, or the option that it does not take."""
    if name not in NETWORKS:
        raise TrainError(f"network {name!r} is not known: use one of {', '.join(NETWORKS)}")
    try:
        network: Network = NETWORKS[name](spec, **options)  # type: ignore[arg-type]  # each takes the specification
        return network
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise TrainError(
            f"network {name!r} does not take these options ({error}): see `ranktower train --help`"
        ) from error


def load_checkpoint(run: Path) -> tuple[Network, FeatureSpec, dict[str, Any]]:
    """The network with the best weights so far, in evaluation mode, its specification and its configuration.

    Raises TrainError when a file is missing, broken, or does not belong to the others.
    """
    config = read_json(run / "config.json")
    try:
        spec = FeatureSpec.load(run / "spec.json")
    except SpecError as error:
        raise TrainError(f"run {run}: {error}: train again") from error
    if spec.id != config.get("spec_id"):
        raise TrainError(
            f"run {run}: spec.json has id {spec.id}, config.json names {config.get('spec_id')}: train again"
        )
    network = build_network(config["network"], spec, config["options"])
    load_weights(network, run / "weights.safetensors")
    return network.eval(), spec, config


def load_weights(network: nn.Module, path: Path) -> None:
    """Put the weights of a file into a network of the same shape."""
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainError(f"{path} cannot be loaded ({error}): train again, or with --resume") from error


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's weights whole or not at all."""
    write_tensors(path, {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}, {})


def save_state(
    run: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write everything that the next epoch depends on. One file holds it all, so that it cannot be half new."""
    tensors = {f"{part}.{name}": value for part, m in modules.items() for name, value in m.state_dict().items()}
    for place, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{place}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_tensors(run / "state.safetensors", plain, {"progress": json.dumps(progress)})
    write_json(run / "state.json", progress)


def load_state(run: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the last epoch's state into modules and optimiser; returns the progress. TrainError when it does not fit."""
    path = run / "state.safetensors"
    if not path.is_file():
        raise TrainError(f"{run} has no state to resume from: train without --resume")
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as opened:
            progress: dict[str, Any] = json.loads(opened.metadata()["progress"])
        for part, module in modules.items():
            module.load_state_dict(_below(tensors, f"{part}."))
        optimizer.load_state_dict(_optimizer_state(optimizer, _below(tensors, "optimizer.")))
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise TrainError(f"{path} cannot be resumed ({error}): train without --resume") from error
    return progress


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The optimiser's own groups with the moments of the file."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, moment = name.split(".", 1)
        moments.setdefault(int(place), {})[moment] = value
    return {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside its place, then rename it there."""
    temporary = _temporary(path)
    save_file(tensors, temporary, metadata)
    _settle(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file beside its place, then rename it there."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, then rename it there."""
    temporary = _temporary(path)
    temporary.write_text(text)
    _settle(temporary, path)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; TrainError when it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise TrainError(
            f"{path.parent} is not a training run (no {path.name}): run `ranktower train`, or finish it with --resume"
        ) from error
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}): train again") from error


def _temporary(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


def _settle(temporary: Path, path: Path) -> None:
    """On disk first, then under its name: a crash leaves the old file or the new one."""
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.chmod(0o644)
    os.replace(temporary, path)
