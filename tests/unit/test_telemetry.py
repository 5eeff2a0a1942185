"""Stage times, the Server-Timing header, and the metrics that the documentation names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.shadow import Comparison
from service.telemetry import STAGES, StageClock, Telemetry

ROOT = Path(__file__).resolve().parents[2]


def test_each_lap_gives_the_time_since_the_last_one_to_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1_000, 3_000, 7_000])
    monkeypatch.setattr("service.telemetry.perf_counter_ns", lambda: next(ticks))
    clock = StageClock()
    clock.lap("decode")
    clock.lap("score")
    clock.lap("decode")
    assert clock.spent_ns == {**dict.fromkeys(STAGES, 0), "decode": 5_000, "score": 2_000}


def test_the_header_lists_every_stage_in_milliseconds() -> None:
    parts = StageClock().header().split(", ")
    assert parts == [f"{stage};dur=0.000" for stage in STAGES]


def test_only_the_newest_release_is_marked_as_serving() -> None:
    telemetry = Telemetry()
    telemetry.serve_release("r1", "b1")
    telemetry.serve_release("r2", "b1")
    text = telemetry.render(1.5).decode()
    assert 'ranktower_release_info{bundle="b1",release="r1"} 0.0' in text
    assert 'ranktower_release_info{bundle="b1",release="r2"} 1.0' in text
    assert "ranktower_staleness_seconds 1.5" in text


def test_what_is_known_of_changes_is_told() -> None:
    telemetry = Telemetry()
    telemetry.serve_changes(7, 3, 0.25, 2)
    text = telemetry.render(None).decode()
    for line in ("watermark 7.0", "changed_items 3.0", "changes_behind_seconds 0.25", "dead_changes 2.0"):
        assert f"ranktower_{line}\n" in text


def test_no_series_tells_when_another_was_created() -> None:
    telemetry = Telemetry()
    telemetry.observe_stages(StageClock())
    assert "_created" not in telemetry.render(None).decode()


def test_every_metric_is_documented() -> None:
    documentation = (ROOT / "docs" / "api.md").read_text()
    names = [family.name for family in Telemetry().registry.collect()]
    assert len(names) > 8
    assert [name for name in names if name not in documentation] == []


def test_workers_add_up_their_metrics(tmp_path: Path) -> None:
    """Two processes count one request each and die; a third renders the sum, and the release of the living only."""
    count = "from service.telemetry import Telemetry as T; t = T(); t.requests.labels('/v1/rank', '200').inc()"
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def run(script: str) -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    run(count)
    run(count)
    text = run(
        "import sys; from service.telemetry import Telemetry; sys.stdout.write(Telemetry().render(None).decode())"
    )
    assert 'ranktower_requests_total{route="/v1/rank",status="200"} 2.0' in text


def test_shares_of_releases_that_are_no_longer_live_are_nothing() -> None:
    telemetry = Telemetry()
    telemetry.show_shares({("a", "current"): 0.9, ("b", "canary"): 0.1}, {"c"})
    telemetry.show_shares({("b", "current"): 1.0}, set())
    text = telemetry.render(None).decode()
    assert 'ranktower_release_share{release="a",role="current"} 0.0' in text
    assert 'ranktower_release_share{release="b",role="canary"} 0.0' in text
    assert 'ranktower_release_share{release="b",role="current"} 1.0' in text
    assert 'ranktower_release_refused{release="c"} 0.0' in text


def test_means_of_a_shadow_are_by_the_release_that_it_stood_against() -> None:
    telemetry = Telemetry()
    for against, overlap in (("a", 0.5), ("a", 1.0), ("b", 0.25)):
        found = Comparison(overlap={10: overlap}, correlation=None if against == "b" else 0.5, missing=2)
        telemetry.observe_shadow("s", against, found, 0.001)
    telemetry.observe_shadow("other", "a", Comparison(overlap={}, correlation=None, missing=0), 0.001)
    first, second = telemetry.shadow_means("s")
    assert (first["against"], first["rankings"], first["missing_items"]) == ("a", 2, 4)
    assert first["overlap@10"] == {"mean": 0.75, "count": 2}
    assert first["rank_correlation"] == {"mean": 0.5, "count": 2}
    assert second["overlap@10"] == {"mean": 0.25, "count": 1}
    assert "rank_correlation" not in second
    assert telemetry.shadow_means("nobody") == []


def test_requests_and_their_time_are_counted_by_release() -> None:
    telemetry = Telemetry()
    clock = StageClock()
    clock.lap("score")
    telemetry.observe_release("a", 3)
    telemetry.observe_release_seconds("a", clock)
    text = telemetry.render(None).decode()
    assert 'ranktower_release_rankings_total{release="a"} 3.0' in text
    assert 'ranktower_release_seconds_count{release="a"} 1.0' in text
