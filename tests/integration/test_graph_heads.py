"""COLD from torch to HTTP: published by the command line, served as head.onnx, swapped with RankTower and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cache.cli import app as publisher
from cache.file_store import FileStore
from cache.snapshot import Snapshot
from model.checkpoint import save_weights
from model.datasets.log import Log, read_log
from model.export import export_bundle
from model.features import FeatureSpec
from model.networks import NETWORKS, Network
from model.requests import encode_items, fit_log_spec
from service.answers import JSON, answer_batch, answer_rank
from service.cli import app as ranktower
from tests.logs import write_tiny_log
from tests.services import Running, running

ITEMS, UNKNOWN = 700, [1, 2]


@dataclass(frozen=True)
class Made:
    """Two untrained networks over one log, and a store with a release of each."""

    log: Log
    spec: FeatureSpec
    networks: dict[str, Network]
    releases: dict[str, str]
    store: FileStore
    cache: Path

    @property
    def user(self) -> int:
        return int(self.log.users.ids[7])

    @property
    def items(self) -> list[int]:
        ids: list[int] = self.log.items.ids.tolist()
        return ids

    def expected(self, name: str) -> dict[int, float]:
        """torch's score of every item for the user, who sends no context."""
        table = self.store.fetch_users(self.spec.id, self.cache)
        assert table is not None
        users = Snapshot.open(table)
        features = users.records[users.lookup([self.user])]
        network = self.networks[name]
        with torch.no_grad():
            user, item = (
                network.user(torch.from_numpy(features)),
                network.item(torch.from_numpy(encode_items(self.spec, self.log))),
            )
            scores = network.score(user, item.unsqueeze(0))[0]
        return dict(zip(self.items, scores.tolist(), strict=True))

    def activate(self, service: Running, name: str) -> None:
        release = self.releases[name]
        self.store.activate(release)
        service.until(lambda standing: standing.ranker is not None and standing.ranker.release == release)


def invoke(app: Any, *arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def write_run(run: Path, name: str, spec: FeatureSpec, user: int, items: list[int], **options: Any) -> Network:
    """The checkpoint of an untrained network."""
    torch.manual_seed(5)
    network = NETWORKS[name](spec, **options)
    run.mkdir()
    save_weights(network, run / "weights.safetensors")
    spec.save(run / "spec.json")
    config = {"network": name, "options": options, "spec_id": spec.id, "head": network.head().to_json()}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.json").write_text(json.dumps({"calibration": {"a": 2.0, "b": -1.0}}))
    (run / "warmup.json").write_text(json.dumps([{"user_id": user, "candidates": items[:300]}]))
    return network.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    log = read_log(write_tiny_log(folder / "log", items=ITEMS))
    spec = fit_log_spec(log)
    store = FileStore(f"file://{folder}/store")
    networks: dict[str, Network] = {}
    releases: dict[str, str] = {}
    for name, options in (("cold", {"hidden": [64, 16]}), ("ranktower", {})):
        run, bundle = folder / name, folder / f"{name}-bundle"
        networks[name] = write_run(run, name, spec, int(log.users.ids[0]), log.items.ids.tolist(), **options)
        export_bundle(run, bundle)
        chosen = ["--bundle", bundle, "--items", folder / "log" / "items.parquet", "--dtype", "f32"]
        places = ["--store", store.url, "--work", folder / "build", "--cache", folder / "cache"]
        invoke(publisher, "publish", *chosen, *places, "--users", folder / "log")
        current = store.current()
        assert current is not None
        releases[name] = current
    return Made(log, spec, networks, releases, store, folder / "cache")


def scores_of(answer: dict[str, Any]) -> dict[int, float]:
    return {item["id"]: item["score"] for item in answer["items"] if item["score"] is not None}


def test_cold_is_served_as_torch_scores_it_and_swapped_with_ranktower(made: Made) -> None:
    body = {"user_id": made.user, "candidates": [*UNKNOWN, *made.items], "top_k": 1000}
    kept: dict[str, dict[int, float]] = {}
    with running(made.store) as service:
        for name in ("cold", "ranktower", "cold"):
            made.activate(service, name)
            answer = service.post("/v1/rank", body).json()
            assert (answer["release"], answer["missing"], answer["user_known"]) == (made.releases[name], UNKNOWN, True)
            assert answer["counts"] == {"candidates": ITEMS + 2, "scored": ITEMS, "returned": ITEMS + 2}
            found, expected = scores_of(answer), made.expected(name)
            assert found.keys() == expected.keys()
            assert max(abs(found[item] - expected[item]) for item in expected) < 1e-4
            assert [*found.values()] == sorted(found.values(), reverse=True)
            assert kept.setdefault(name, found) == found
            level = service.http.get("/readyz").json()["kernel"]
            assert (level == "onnxruntime") == (name == "cold")
            assert service.http.get("/v1/release").json()["kernel"] == level
        assert service.service.refresher.standing.failures == 0
    assert kept["cold"] != kept["ranktower"]


def test_a_batch_is_what_its_rankings_are_alone(made: Made) -> None:
    bodies = [{"user_id": made.user, "candidates": made.items[start:]} for start in (0, 100, 699)]
    with running(made.store) as service:
        made.activate(service, "cold")
        answer = service.post("/v1/rank:batch", {"requests": [*bodies, {"candidates": []}]}).json()
        assert answer["rankings"][:3] == [service.post("/v1/rank", body).json() for body in bodies]
        assert answer["rankings"][3]["items"] == []


def test_a_score_does_not_depend_on_what_else_is_scored(made: Made) -> None:
    body = {"user_id": made.user, "candidates": made.items, "top_k": 1000}
    with running(made.store) as service:
        made.activate(service, "cold")
        together = scores_of(service.post("/v1/rank", body).json())
        for start, count in ((0, 1), (3, 2), (255, 2), (300, 17), (600, 100)):
            few = scores_of(service.post("/v1/rank", {**body, "candidates": made.items[start : start + count]}).json())
            assert few == {item: together[item] for item in made.items[start : start + count]}


def test_what_a_graph_cannot_do_is_a_problem_with_a_remedy(made: Made) -> None:
    with running(made.store, retrieval=True) as service:
        made.activate(service, "cold")
        refused = service.post("/v1/rank", {"candidates": made.items[:3], "explain": True})
        assert (refused.status_code, refused.json()["field"]) == (422, "explain")
        assert refused.json()["remedy"] == "leave explain out"
        refused = service.post("/v1/retrieve", {"user_id": made.user})
        assert (refused.status_code, refused.json()["remedy"]) == (409, "send candidates to /v1/rank")


def test_long_lists_of_a_graph_leave_the_event_loop(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(made.store) as service:
        made.activate(service, "cold")
        serving = service.service.refresher.serving()
        monkeypatch.setitem(vars(serving.current), "candidate_ns", 12_000.0)  # of the published widths
        long, short = (json.dumps({"candidates": list(range(count))}).encode() for count in (300, 20))
        assert not service.service.is_quick(serving, answer_rank, long, JSON)
        assert service.service.is_quick(serving, answer_rank, short, JSON)
        assert not service.service.is_quick(serving, answer_batch, b'{"requests":[' + long + b"]}", JSON)
        assert service.post("/v1/rank", {"candidates": made.items}).json()["counts"]["scored"] == ITEMS


def test_rank_on_the_command_line_scores_with_the_graph(made: Made) -> None:
    made.store.activate(made.releases["cold"])
    chosen = ",".join(map(str, [*made.items[:5], UNKNOWN[0]]))
    said = invoke(ranktower, "rank", "--store", made.store.url, "--user-id", made.user, "--candidates", chosen)
    lines = [line.split() for line in said.splitlines()[2:]]
    expected = made.expected("cold")
    best = sorted(made.items[:5], key=lambda item: -expected[item])
    assert [int(line[1]) for line in lines] == [*best, UNKNOWN[0]]
    np.testing.assert_allclose([float(line[2]) for line in lines[:5]], [expected[item] for item in best], atol=2e-4)
    assert lines[5][2] == "unknown"
