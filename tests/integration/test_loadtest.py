"""`python -m loadtest` from start to verdict, on a tiny release and the real service."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cache.file_store import FileStore
from loadtest.report import Report, from_json
from service.telemetry import STAGES
from tests.fake_service import Reply, fake_service, ranking
from tests.tiny_releases import publish, tiny_release

ROOT = Path(__file__).resolve().parents[2]
LOOSE = "[rank]\nfailures = { at_most = 0.0 }\nrate_of_target = { at_least = 0.5 }\n"


def load(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "loadtest",
        "--seconds",
        "2",
        "--candidates",
        "30",
        "--top-k",
        "10",
        *map(str, arguments),
    ]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)


def objectives(folder: Path, text: str = LOOSE) -> Path:
    path = folder / "slo.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("load")
    store = FileStore(f"file://{folder / 'store'}")
    publish(tiny_release(folder / "made", ids="string"), store)
    return store.url


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_a_run_serves_measures_every_stage_and_ends_its_service(loop: str, store: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    flags = ["--open-loop"] if loop == "open" else ["--users", 2]
    ended = load("--store", store, "--rate", 20, "--slo", objectives(tmp_path), "--report", path, *flags)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report: Report = from_json(path.read_text())
    assert (report.loop, report.failures) == (loop, {})
    assert [row.name for row in report.rows if row.kind == "stage"] == list(STAGES)
    rank, score = report.row("rank"), report.row("score")
    assert rank is not None
    assert score is not None
    assert 20 <= rank.count <= 60  # 40 wanted, on a machine that may be busy
    assert 0 < score.p50_ms < rank.p50_ms
    assert "all of 2 objectives held" in ended.stdout
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{report.url}/livez", timeout=1.0)


def test_failures_and_missed_objectives_make_the_exit_code(tmp_path: Path) -> None:
    def refuse_half(count: int, body: dict[str, object]) -> Reply:
        if count % 2:
            return Reply(status=429, body=json.dumps({"title": "Too many requests"}).encode())
        return Reply(body=ranking([1]), headers={"Server-Timing": "score;dur=0.5"})

    with fake_service(refuse_half) as url:
        ended = load("--url", url, "--rate", 40, "--slo", objectives(tmp_path))
    assert ended.returncode == 1, ended.stderr
    assert 'status 429: {"title": "Too many requests"}' in ended.stdout
    assert "missed: rank failures is 0." in ended.stdout


def test_a_service_that_names_no_items_cannot_be_loaded() -> None:
    with fake_service(sample=b'{"release": "r1", "items": [], "users": []}') as url:
        ended = load("--url", url)
    assert ended.returncode == 2
    assert "names no items: publish a release" in ended.stderr
