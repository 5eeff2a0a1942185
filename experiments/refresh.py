"""Change some items of the catalogue, embed only those again, and watch a running service take the new release."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from model.datasets.schema import read_schema
from ranktower_client import RankTower
from ranktower_client.errors import RankTowerError

VAR = Path("var")
POLL_S = 0.05
console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default=f"file://./{VAR}/releases")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--log", type=Path, default=VAR / "log")
    parser.add_argument("--bundle", type=Path, default=VAR / "bundle")
    parser.add_argument("--items", type=int, default=50, help="how many items get the features of another one")
    options = parser.parse_args(arguments)
    with RankTower(options.url, timeout_s=5.0) as client:
        try:
            before = client.release().id
        except RankTowerError as error:
            console.print(f"no service answers at {options.url} ({error}): start one with `make serve` or `make demo`")
            return 1
        console.print(f"the service at {options.url} serves release [bold]{before}[/]")
        items = changed_items(options.log, options.items)
        publish(options.bundle, items, options.store)
        return watch(client, before)


def changed_items(log_folder: Path, count: int) -> Path:
    """A copy of the items in which `count` of them swap all features (not ids); differs from run to run."""
    columns = read_schema(log_folder / "log.toml").columns
    table = pq.read_table(log_folder / "items.parquet")
    rng = np.random.default_rng(time.time_ns())
    chosen = rng.choice(table.num_rows, min(count, table.num_rows), replace=False)
    order = np.arange(table.num_rows)
    order[chosen] = np.roll(chosen, 1)
    kept = {columns.item, columns.title}
    changed = [table[name] if name in kept else table[name].take(pa.array(order)) for name in table.column_names]
    out = VAR / "refresh" / "items.parquet"
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(changed, names=table.column_names), out)
    console.print(f"{len(chosen)} of {table.num_rows} items changed their features: {out}")
    return out


def publish(bundle: Path, items: Path, store: str) -> None:
    """`ranktower publish --incremental`, as a batch job would run it."""
    arguments = ["publish", "--bundle", str(bundle), "--items", str(items), "--index", "flat"]
    arguments += ["--store", store, "--incremental"]
    console.print(f"[dim]$ ranktower {' '.join(arguments)}[/]", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "service.cli", *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def watch(client: RankTower, before: str, within_s: float = 30.0) -> int:
    """Print when the service answers from another release than `before`."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        now = client.release().id
        if now != before:
            console.print(
                f"the service took release [bold]{now}[/] {time.monotonic() - began:.2f} s after it was current"
            )
            return 0
        time.sleep(POLL_S)  # paces the polling; the loop ends on the change, not on the clock
    console.print(f"the service still serves {before} after {within_s:.0f} s: see its log and {client.url}/readyz")
    return 1


if __name__ == "__main__":
    sys.exit(main())
