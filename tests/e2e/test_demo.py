"""What `make demo` and `make refresh` run, on a log of one's own, from an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.serving import free_port, served
from tests.logs import write_tiny_log

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, module: str, *arguments: str) -> str:
    """Run a module in `folder` as make does in the clone; its output."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "client")])
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("string_ids", [False, True], ids=["int", "string"])
def test_the_demo_and_the_refresh_run_on_a_log_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, string_ids: bool
) -> None:
    log = write_tiny_log(tmp_path / "shop", string_ids=string_ids)
    shown = run(tmp_path, "experiments.demo", "--data", str(log), "--once", "--port", str(free_port()))
    for row in ("RankTower, over HTTP", "popularity", "random"):
        recall, ndcg = map(float, re.search(rf"{row} +([0-9.]+) +([0-9.]+)", shown).groups())  # type: ignore[union-attr]
        assert 0 < recall <= 1
        assert 0 < ndcg <= 1
    assert all(stage in shown for stage in ("queue", "decode", "encode", "user", "score", "topk", "respond"))

    monkeypatch.chdir(tmp_path)
    with served("file://./var/releases") as url:
        refreshed = run(tmp_path, "experiments.refresh", "--url", url, "--items", "7")
    assert "7 embedded, 73 reused" in refreshed
    assert "the service took release" in refreshed
