"""What `torchrun` runs in tests/integration/test_distributed.py: trainings, and what came out in each process."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from model.checkpoint import write_json, write_tensors
from model.datasets.log import Log, read_log
from model.distributed import Processes, opened
from model.errors import TrainError
from model.features import FeatureSpec
from model.losses import LOSSES
from model.requests import fit_log_spec
from model.teacher import fit_teacher
from model.train import Learner, Recipe, _epoch, _set_up, prepare, train

SMALL = {"user_heads": 2, "item_heads": 2, "dim": 8, "hidden": 16, "dropout": 0.0}
RECIPE = Recipe(
    options=SMALL, sampler_options={"candidates": 5, "random": 10}, average=0.9, epochs=3, patience=9, batch=32
)
STEPS = {
    **{name: replace(RECIPE, loss=name) for name in LOSSES},
    "learned": replace(RECIPE, loss_options={"balance": "learned", "distill": "logloss"}),
    "cold": replace(RECIPE, network="cold", options={"hidden": [16], "dropout": 0.0}),
    "lr": replace(RECIPE, network="lr", options={}, loss="bce"),
    "dat": replace(RECIPE, network="dat", options={"hidden": [16], "dropout": 0.0, "align": 0.0, "mimic": 0.5}),
}
RUNS = {
    "curve": RECIPE,
    "single": replace(RECIPE, batch=1, steps=4, epochs=1),  # no list for the second process
    "dropout": replace(RECIPE, options={**SMALL, "dropout": 0.2}),
}


def main() -> None:
    folder = Path(sys.argv[1])
    log = read_log(folder / "log")
    with opened("cpu") as processes:
        stepped(log, folder / f"steps-{processes.rank}", processes)
        for name, recipe in RUNS.items():
            said = train(log, folder / "runs" / name, recipe, processes=processes)
            write_json(folder / f"{name}-{processes.rank}.json", said)
        train(log, folder / "runs" / "parts", replace(RUNS["dropout"], epochs=1), processes=processes)
        train(log, folder / "runs" / "parts", RUNS["dropout"], resume=True, processes=processes)
        write_json(folder / f"refused-{processes.rank}.json", refusals(log, processes))


def stepped(log: Log, out: Path, processes: Processes) -> None:
    """Weights after four steps of plain gradient descent, which moves them by the gradient itself, by recipe."""
    out.mkdir()
    spec = fit_log_spec(log)
    material = prepare(log, spec, fit_teacher(log, spec), RECIPE.valid_lists)
    for name, recipe in STEPS.items():
        learner = descending(recipe, spec, log)
        _epoch(learner, material, replace(recipe, steps=4, clip=1e9), 1, lambda *_: None, processes)
        tensors = {
            f"{part}.{key}": value for part, m in learner.modules.items() for key, value in m.state_dict().items()
        }
        write_tensors(out / name, {key: value.contiguous() for key, value in tensors.items()}, {})


def descending(recipe: Recipe, spec: FeatureSpec, log: Log) -> Learner:
    learner = _set_up(recipe, spec, log)
    parameters = [*learner.network.parameters(), *learner.loss.parameters()]
    return replace(learner, optimizer=torch.optim.SGD(parameters, lr=0.05))


def refusals(log: Log, processes: Processes) -> dict[str, str]:
    """What each process says of trainings that went wrong in the second one alone."""
    spec = fit_log_spec(log)
    material = prepare(log, spec, None, RECIPE.valid_lists)
    recipe = replace(RECIPE, network="dat", options={"align": 0.0}, loss="softmax")
    weights, term = (descending(recipe, spec, log) for _ in range(2))
    if not processes.lead:
        weights.network.get_parameter("bias.linear.weight").data.fill_(math.nan)
        term.network.mimic = math.nan
    return {
        "weights": refusal(lambda: _epoch(weights, material, recipe, 1, lambda *_: None, processes)),
        "term": refusal(lambda: _epoch(term, material, recipe, 1, lambda *_: None, processes)),
        "agree": refusal(lambda: processes.agree({"lr": 0.1 + processes.rank})),
    }


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except TrainError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
