"""Train -> publish -> serve -> publish again while requests run: nothing fails, every answer matches its release."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.snapshot import Snapshot
from cache.store import open_store
from kernel.reference import score_oracle
from loadtest.serving import served
from model.bundle import open_bundle
from model.datasets import read_log
from model.datasets.log import Table
from ranktower_client import Ranking, RankTower
from tests.logs import write_tiny_log
from tests.redis_server import redis_server

ROOT = Path(__file__).resolve().parents[2]


def ranktower(*arguments: object) -> str:
    """Run one verb of the command line; its output."""
    command = [sys.executable, "-m", "service.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass
class Line:
    """A tiny log, two bundles trained on it, and a Redis to publish to."""

    log: Path
    users: Table
    bundles: list[Path]
    store: str
    cache: Path
    held_out: list[dict[str, Any]]
    releases: dict[str, tuple[Any, Snapshot]] = field(default_factory=dict)

    def publish(self, bundle: Path) -> str:
        users = ["--users", self.log]
        ranktower(
            "publish",
            "--bundle",
            bundle,
            "--items",
            self.log / "items.parquet",
            *users,
            "--index",
            "flat",
            "--store",
            self.store,
        )
        release = open_store(self.store).current()
        assert release is not None
        return release

    def opened(self, release: str) -> tuple[Any, Snapshot]:
        """The bundle and the item table of a release, fetched from the store by its name."""
        if release not in self.releases:
            folder = open_store(self.store).fetch(release, self.cache)
            self.releases[release] = open_bundle(folder / "bundle"), Snapshot.open(folder / "items.snap")
        return self.releases[release]

    def oracle(self, release: str, body: dict[str, Any]) -> np.ndarray:
        """float64 scores of the candidates of a body (no unknown item) under a release."""
        bundle, items = self.opened(release)
        place = self.users.ids.tolist().index(body["user_id"])
        known = {name: column[place] for name, column in self.users.columns.items()}  # what the user table filled in
        row = {**known, **body["context"], "history": body["history"], "user_id": body["user_id"]}
        record = bundle.user_tower().run(bundle.spec.encode_row("user", row)[None])[0]
        rows = items.lookup(np.array(body["candidates"]))
        return score_oracle(bundle.head, record, items.table(bundle.head).records(rows))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("line")
    log = write_tiny_log(folder / "log")
    bundles = []
    for seed in (1, 2):
        run, bundle = folder / f"run{seed}", folder / f"bundle{seed}"
        ranktower("train", "--log", log, "--out", run, "--epochs", "2", "--seed", seed)
        ranktower("export", "--run", run, "--out", bundle)
        bundles.append(bundle)
    held_out = [entry["request"] for entry in json.loads((folder / "run1" / "heldout.json").read_text())]
    with redis_server() as url:
        yield Line(log, read_log(log).users, bundles, url, folder / "cache", held_out)


def test_a_running_service_takes_over_a_release_without_a_failed_request(line: Line) -> None:
    first = line.publish(line.bundles[0])
    answers: list[tuple[dict[str, Any], Ranking]] = []
    failures: list[BaseException] = []
    taken_over = threading.Event()

    def ask(url: str, expected: list[str]) -> None:
        try:
            with RankTower(url, timeout_s=10.0, retries=0) as client:
                for turn in range(100_000):
                    body = line.held_out[turn % len(line.held_out)]
                    answers.append((body, client.rank(**body)))
                    if answers[-1][1].release in expected:
                        taken_over.set()
                    if taken_over.is_set() and turn % len(line.held_out) == 0:
                        return
        except BaseException as error:
            failures.append(error)
            taken_over.set()

    with served(line.store) as url:
        with RankTower(url) as client:
            assert client.release().id == first
        expected: list[str] = []
        callers = [threading.Thread(target=ask, args=(url, expected)) for _ in range(2)]
        for caller in callers:
            caller.start()
        expected.append(line.publish(line.bundles[1]))
        assert taken_over.wait(60)
        for caller in callers:
            caller.join(60)
    assert failures == []
    assert {ranking.release for _, ranking in answers} == {first, expected[0]}
    worst = dict.fromkeys((first, expected[0]), 0.0)
    for body, ranking in answers:
        truth = line.oracle(ranking.release, body)
        worst[ranking.release] = max(
            worst[ranking.release], float(np.abs(ranking.scores - truth[ranking.positions]).max())
        )
    assert max(worst.values()) < 1e-4
    other = line.oracle(expected[0], answers[0][0]) - line.oracle(first, answers[0][0])
    assert np.abs(other).max() > 1e-3, "the two releases must differ, else the check above proves nothing"
