"""Train several networks on one log with several seeds and print their test metrics on the same held-out lists."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

NETWORKS = ("ranktower", "two_tower", "lr")
BASELINES = ("popularity", "random")
METRICS = ("recall@10", "ndcg@10", "recall@50", "ndcg@50", "gauc")
console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=Path("var/log"), help="log in the documented form")
    parser.add_argument("--out", type=Path, default=Path("var/compare"), help="folder of the runs; finished ones stay")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("train", nargs="*", help="options for `ranktower train`, after --")
    options = parser.parse_args(arguments)
    runs = {
        network: [run(options.log, options.out, network, seed, options.train) for seed in range(options.seeds)]
        for network in options.networks
    }
    show(runs)
    return 0


def run(log: Path, out: Path, network: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """The metrics of one training; a finished one is not repeated."""
    folder = out / f"{network}-{seed}"
    if not (folder / "metrics.json").is_file():
        console.print(f"[dim]training {network}, seed {seed}, into {folder}[/]")
        command = [sys.executable, "-m", "service.cli", "train", "--log", str(log), "--out", str(folder)]
        command += ["--network", network, "--seed", str(seed), *options]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(done.returncode)
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def show(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Mean over seeds and their standard deviation; the rows that need no training have none."""
    first = next(iter(runs.values()))[0]
    if len({metrics["lists"]["digest"] for group in runs.values() for metrics in group}) != 1:
        raise SystemExit("the runs were measured on different lists: give another --out")
    table = Table("", *METRICS, "seconds", box=None, pad_edge=False)
    for network, group in runs.items():
        values = np.array([[metrics["model"][name]["mean"] for name in METRICS] for metrics in group])
        spread = values.std(axis=0, ddof=1) if len(group) > 1 else np.full(len(METRICS), np.nan)
        cells = [f"{mean:.4f} ± {sd:.4f}" for mean, sd in zip(values.mean(axis=0), spread, strict=True)]
        table.add_row(network, *cells, f"{np.mean([metrics['train_seconds'] for metrics in group]):.0f}")
    for row in BASELINES:
        table.add_row(row, *(f"{first[row][name]['mean']:.4f}" for name in METRICS), "")
    console.print(table)
    lists, auc = first["lists"], (first["teacher"] or {}).get("auc", {})
    console.print(
        f"log {first['log']['name']}: {lists['lists']:,} test lists {lists['digest'][:16]} of {lists['size']} items; "
        f"{len(next(iter(runs.values())))} seeds, mean ± standard deviation; teacher AUC out of fold "
        + (", ".join(f"{rung} {value:.3f}" for rung, value in auc.items()) or "none")
    )


if __name__ == "__main__":
    sys.exit(main())
