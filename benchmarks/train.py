"""Benchmark of training: samples a second and core of each network, and which part of a step takes how long.

A sample is an item of a list. Rates are of whole epochs with everything in them but validation; the first is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.report import RESULTS, Bar, Report, machine, machine_line, median, print_bars, table
from kernel import engine
from model.datasets import cascade
from model.datasets.log import Log, read_log
from model.datasets.world import Settings
from model.networks import NETWORKS
from model.requests import fit_log_spec
from model.teacher import Teacher, fit_teacher
from model.train import PARTS, Recipe, train

LOGS = {
    "full": Settings(requests=5_000),
    "tiny": Settings(users=60, items=300, requests=200, topics=8, retrieved=40, pre_ranked=30),
}
RECIPES = {
    "full": Recipe(steps=20, epochs=5, valid_lists=100),
    "tiny": Recipe(steps=2, epochs=2, batch=16, valid_lists=20),
}
MOST_DRAWN, STRETCH = 0.25, 0.15  # share of a step that any network may wait for its lists

Row = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    recipe = RECIPES[given.size]
    name = "train" if given.size == "full" else f"train-{given.size}"
    log = read_log(given.log or made_log(LOGS[given.size], given.out / "made"))
    settings = {"log": log.schema.name, "batch": recipe.batch, "steps": recipe.steps, "epochs": recipe.epochs - 1}
    report = Report(name, {**settings, "kernel": engine.level()})
    print(machine_line(machine()))
    teacher = fit_teacher(log, fit_log_spec(log))
    before = torch.get_num_threads()
    for threads in given.threads:
        torch.set_num_threads(threads)
        for network in given.networks:
            row = measured(log, teacher, replace(recipe, network=network, patience=recipe.epochs), threads)
            print(f"{network}, threads {threads}: {row['samples_per_s']:,.0f} samples/s", flush=True)
            report.rows.append(row)
    torch.set_num_threads(before)
    most = max(row["draw"] for row in report.rows)
    limits = {"limit": MOST_DRAWN, "stretch": STRETCH}
    report.bars.append(Bar(name="drawing lists, largest share of a step", value=most, side="at most", **limits))
    print("\n" + table(HEADS, cells(report.rows)) + "\n")
    print_bars(report.bars)
    print(f"\nwritten: {report.write(given.out).name}")
    return 0


def made_log(settings: Settings, folder: Path) -> Path:
    """A simulated log, made once."""
    out = folder / f"cascade-{settings.id}"
    return out if out.is_dir() else cascade.simulate(settings, out)


def measured(log: Log, teacher: Teacher, recipe: Recipe, threads: int) -> dict[str, Any]:
    """The row of one network: medians over epochs."""
    with TemporaryDirectory() as folder:
        train(log, Path(folder), recipe, teacher=teacher, test=False)
        lines = [json.loads(line) for line in (Path(folder) / "epochs.jsonl").read_text().splitlines()][1:]
    rate = median([line["samples_per_s"] for line in lines])
    return {
        "kind": "train",
        "network": recipe.network,
        "threads": threads,
        "samples_per_s": rate,
        "samples_per_s_core": rate / threads,
        "step_ms": 1e3 * recipe.batch / median([line["lists_per_s"] for line in lines]),
        **{part: median([line["shares"][part] for line in lines]) for part in PARTS},
    }


HEADS = ("network", "threads", "samples/s/core", "step, ms", "drawing lists", "forward", "loss", "backward and step")


def cells(rows: Sequence[Row]) -> list[list[Any]]:
    return [
        [row["network"], row["threads"], row["samples_per_s_core"], row["step_ms"]]
        + [f"{100 * row[part]:.1f} %" for part in PARTS]
        for row in rows
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-train", description=__doc__)
    parser.add_argument("--size", choices=list(RECIPES), default="full", help="tiny to try this command")
    parser.add_argument("--log", type=Path, help="folder with a log (docs/data.md), by default a simulated one")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads to try")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
