"""The load test's parts: bodies, reports, objectives, the open loop against a service by hand."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import slo
from loadtest.corpus import Sample, Traffic, build_corpus, candidate_counts, fetch_sample, user_picks
from loadtest.errors import LoadTestError, ObjectiveError, SampleError, ServingError
from loadtest.open_loop import Exchange, Limits, Schedule, _Pool, invalid, run_open_loop
from loadtest.report import (
    Report,
    Row,
    bucket_ms,
    from_json,
    row_of_histogram,
    row_of_times,
    stage_times,
    table,
    to_json,
)
from loadtest.run import Load, check_loopback, locust_command
from loadtest.serving import served
from tests.fake_service import Reply, fake_service, rank_in_order

SAMPLE = Sample(release="r1", items=tuple(range(100, 600)), users=tuple(f"u{n}" for n in range(40)))
TRAFFIC = Traffic(median_candidates=50, top_k=20)
ROW = Row(name="rank", kind="route", count=200, failures=0, p50_ms=2.0, p90_ms=3.0, p99_ms=4.0, max_ms=9.0)
REPORT = Report(loop="closed", url="http://127.0.0.1:1", release="r1", seconds=2.0, target_rate=100.0, rows=(ROW,))


def bodies_of(sample: Sample, traffic: Traffic, count: int = 300) -> list[dict[str, Any]]:
    return [json.loads(body) for body in build_corpus(sample, traffic, count)]


def test_bodies_hold_distinct_known_candidates_and_known_users() -> None:
    for body in bodies_of(SAMPLE, TRAFFIC):
        assert len(set(body["candidates"])) == len(body["candidates"]) > 0
        assert set(body["candidates"]) | set(body.get("history", ())) <= set(SAMPLE.items)
        assert body["user_id"] in SAMPLE.users
        assert body["top_k"] == min(20, len(body["candidates"]))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    assert build_corpus(SAMPLE, TRAFFIC, 20) == build_corpus(SAMPLE, TRAFFIC, 20)
    assert build_corpus(SAMPLE, TRAFFIC, 20) != build_corpus(SAMPLE, replace(TRAFFIC, seed=8), 20)


def test_candidate_counts_are_log_normal_around_the_median_and_bounded() -> None:
    counts = candidate_counts(np.random.default_rng(1), Traffic(), 20_000, limit=2_000)
    assert np.median(counts) == pytest.approx(1_000, rel=0.03)
    assert np.quantile(counts, 0.1586) == pytest.approx(1_000 * np.exp(-0.5), rel=0.05)
    assert counts.min() >= 1
    assert counts.max() == 2_000


def test_users_follow_zipfs_law() -> None:
    picks = user_picks(np.random.default_rng(1), Traffic(zipf=1.0), 60_000, 100)
    counts = np.bincount(picks, minlength=100)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)
    assert np.bincount(user_picks(np.random.default_rng(1), Traffic(zipf=0.0), 60_000, 10)).min() > 5_500


def test_the_wanted_share_of_requests_brings_a_history() -> None:
    share = np.mean(["history" in body for body in bodies_of(SAMPLE, replace(TRAFFIC, history_share=0.3), 1_000)])
    assert share == pytest.approx(0.3, abs=0.05)


def test_without_a_user_table_every_request_brings_a_history() -> None:
    bodies = bodies_of(replace(SAMPLE, users=()), TRAFFIC, 20)
    assert all("user_id" not in body and len(body["history"]) == 20 for body in bodies)


def test_a_sample_is_what_the_service_names() -> None:
    with fake_service() as url:
        sample = fetch_sample(f"{url}/", items=10, users=5, seed=1)
    assert (sample.release, len(sample.items), len(sample.users)) == ("r1", 300, 50)


@pytest.mark.parametrize("document", [b"no json", b"[]", b"{}", b'{"release": "r1", "items": [], "users": []}'])
def test_a_service_that_names_nothing_is_refused(document: bytes) -> None:
    with fake_service(sample=document) as url, pytest.raises(SampleError, match="/v1/sample"):
        fetch_sample(url, items=10, users=5, seed=1)


def test_an_absent_service_is_refused_with_a_remedy() -> None:
    with fake_service() as url:
        pass
    with pytest.raises(SampleError, match="is the service running there"):
        fetch_sample(url, items=10, users=5, seed=1)


@pytest.mark.parametrize(
    ("time_ms", "bucket"),
    [(0.0, 0.0), (0.0123456, 0.0123), (0.999, 0.999), (1.2349, 1.23), (147.4, 147.0), (58_760.0, 58_800.0)],
)
def test_buckets_keep_three_digits(time_ms: float, bucket: float) -> None:
    assert bucket_ms(time_ms) == pytest.approx(bucket)


def test_a_histogram_and_all_times_give_the_same_row() -> None:
    times = np.random.default_rng(1).lognormal(0, 1, 5_000)
    rounded = np.array([bucket_ms(time) for time in times.tolist()])
    values, counts = np.unique(rounded, return_counts=True)
    histogram = dict(zip(values.tolist(), counts.tolist(), strict=True))
    row = row_of_histogram("rank", "route", histogram, 3, float(rounded.max()))
    assert row == row_of_times("rank", "route", rounded, 3)
    assert row.p99_ms == pytest.approx(np.quantile(times, 0.99), rel=0.02)
    assert row.p50_ms == pytest.approx(np.quantile(times, 0.5), rel=0.02)


def test_nothing_measured_is_a_row_of_zeros() -> None:
    assert row_of_times("rank", "route", np.array([])) == replace(
        ROW, count=0, p50_ms=0.0, p90_ms=0.0, p99_ms=0.0, max_ms=0.0
    )


def test_failed_requests_do_not_count_as_achieved() -> None:
    assert replace(REPORT, rows=(replace(ROW, failures=50),)).achieved_rate == 75.0


def test_a_report_survives_json() -> None:
    report = replace(REPORT, failures={"status 500": 2})
    assert from_json(to_json(report)) == report


def test_the_table_shows_rate_rows_and_failures() -> None:
    stage = replace(ROW, name="score", kind="stage", p50_ms=0.031)
    text = table(replace(REPORT, rows=(ROW, stage), failures={"status 500": 2}))
    assert "100.0 requests/s of 100.0/s wanted" in text
    assert "  score" in text
    assert "0.031" in text
    assert "failed 2 times: status 500" in text


def test_stage_times_are_read_from_server_timing() -> None:
    assert stage_times("queue;dur=0.004, score;dur=1.25") == {"queue": 0.004, "score": 1.25}
    assert stage_times("") == {}


def objectives(text: str, folder: Path) -> tuple[slo.Objective, ...]:
    path = folder / "slo.toml"
    path.write_text(text)
    return slo.read_objectives(path)


@pytest.mark.parametrize(
    ("line", "miss"),
    [
        ("failures = { at_most = 0.0 }", "rank failures is 0.05, objective at most 0"),
        ("p99_ms = { at_most = 3.5 }", "rank p99_ms is 4, objective at most 3.5"),
        ("rate_of_target = { at_least = 0.99 }", "rank rate_of_target is 0.95, objective at least 0.99"),
        ("p50_ms = { at_most = 2.0 }", None),
        ("failures = { at_most = 0.05 }", None),
    ],
)
def test_a_missed_objective_is_one_sentence(line: str, miss: str | None, tmp_path: Path) -> None:
    report = replace(REPORT, rows=(replace(ROW, failures=10),))
    assert slo.misses(report, objectives(f"[rank]\n{line}\n", tmp_path)) == ([miss] if miss else [])


def test_an_objective_on_what_was_not_measured_is_missed(tmp_path: Path) -> None:
    (miss,) = slo.misses(REPORT, objectives("[score]\np99_ms = { at_most = 1 }\n", tmp_path))
    assert "score: nothing was measured" in miss


def test_a_run_without_a_rate_is_held_to_its_failures_only(tmp_path: Path) -> None:
    goals = objectives("[rank]\nrate_of_target = { at_least = 0.99 }\nfailures = { at_most = 0 }\n", tmp_path)
    assert slo.applicable(REPORT, goals) == goals
    assert [goal.measure for goal in slo.applicable(replace(REPORT, target_rate=0.0), goals)] == ["failures"]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("rank = 3", "write a table"),
        ("[rank]\np98_ms = { at_most = 3 }", "use one of failures"),
        ("[rank]\np99_ms = 3", "write a table"),
        ("[rank]\np99_ms = { below = 3 }", "at_most = NUMBER"),
        ("[rank]\np99_ms = { at_most = true }", "write a number"),
        ("[rank", "slo.toml"),
    ],
)
def test_objectives_that_cannot_be_read_are_refused(text: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=remedy):
        objectives(text, tmp_path)


def test_the_shipped_objectives_can_be_read() -> None:
    assert {goal.row for goal in slo.read_objectives(slo.DEFAULT)} >= {"rank", "score"}


@pytest.mark.parametrize("arrivals", ["poisson", "even"])
def test_a_schedule_has_exactly_its_rate(arrivals: Any) -> None:
    offsets = Schedule(rate=50, seconds=2, arrivals=arrivals).offsets_s()
    assert len(offsets) == 100
    assert np.all(np.diff(offsets) >= 0)
    assert 0 <= offsets[0] <= offsets[-1] < 2


def test_a_schedule_without_requests_is_refused() -> None:
    with pytest.raises(LoadTestError, match="no request"):
        Schedule(rate=0.1, seconds=1).offsets_s()


BODIES = build_corpus(SAMPLE, TRAFFIC, 10)


def test_an_open_loop_measures_every_request_and_every_stage() -> None:
    heard: list[float] = []
    with fake_service() as url:
        report = run_open_loop(url, BODIES, Schedule(rate=100, seconds=0.5), release="r1", on_time=heard.append)
    assert [row.name for row in report.rows] == ["rank", "queue", "decode", "score", "send to answer", "send lag"]
    assert {row.count for row in report.rows} == {50}
    assert report.failures == {}
    assert invalid(report) is None
    assert report.row("score") == row_of_times("score", "stage", np.full(50, 0.456))
    assert len(heard) == 50


def test_a_stall_shows_in_every_request_that_should_have_left_meanwhile() -> None:
    """One stalled answer, one connection: a client that waits its turn would report one slow request of fifty."""
    stalled = threading.Event()

    def stall_once(count: int, body: dict[str, Any]) -> Reply:
        if count == 0:
            stalled.wait(0.3)
        return rank_in_order(count, body)

    schedule = Schedule(rate=100, seconds=0.5, arrivals="even")
    with fake_service(stall_once) as url:
        report = run_open_loop(url, BODIES, schedule, release="r1", limits=Limits(connections=1))
    intended, sent = report.row("rank"), report.row("send to answer")
    assert intended is not None
    assert sent is not None
    assert intended.p50_ms > 20 > sent.p90_ms
    assert intended.max_ms == pytest.approx(300, abs=100)


def test_failures_are_counted_by_what_they_were() -> None:
    def every_other(count: int, body: dict[str, Any]) -> Reply:
        return rank_in_order(count, body) if count % 2 else Reply(status=503, body=b"full")

    with fake_service(every_other) as url:
        report = run_open_loop(url, BODIES, Schedule(rate=100, seconds=0.2), release="r1")
    assert report.failures == {"status 503: full": 10}
    assert report.achieved_rate == pytest.approx(50, rel=0.2)
    assert "invalid run" in (invalid(report) or "")


def test_a_request_without_answer_fails_at_its_timeout() -> None:
    ended = threading.Event()

    def silent(count: int, body: dict[str, Any]) -> Reply:
        ended.wait(5)
        return rank_in_order(count, body)

    with fake_service(silent) as url:
        schedule = Schedule(rate=50, seconds=0.1, arrivals="even")
        report = run_open_loop(url, BODIES, schedule, release="r1", limits=Limits(timeout_s=0.2))
        ended.set()
    assert report.failures == {"no answer within 0.2 s": 5}
    assert invalid(report) is not None


def test_an_absent_service_is_a_failure_of_every_request_and_an_invalid_run() -> None:
    with fake_service() as url:
        pass
    report = run_open_loop(url, BODIES, Schedule(rate=50, seconds=0.1), release="r1")
    assert sum(report.failures.values()) == 5
    assert invalid(report) is not None


def test_a_connection_that_the_service_closed_while_idle_is_not_used_again() -> None:
    served: list[asyncio.StreamWriter] = []

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
        async with server, asyncio.timeout(10):
            pool = _Pool("127.0.0.1", server.sockets[0].getsockname()[1], limit=2)
            for _ in range(2):
                assert (await pool.ask(b"GET / HTTP/1.1\r\n\r\n", lambda: None)).keep
                while not pool._idle[-1].ended:
                    await asyncio.sleep(0.001)
            pool.close()

    asyncio.run(run())
    assert len(served) == 2


def test_an_open_loop_tells_of_every_request_until_that_is_enough() -> None:
    heard: list[Exchange] = []
    with fake_service() as url:
        report = run_open_loop(
            url,
            BODIES[:3],
            Schedule(rate=100, seconds=60, arrivals="even"),
            release="r1",
            hear=heard.append,
            enough=lambda: len(heard) >= 10,
        )
    assert len(heard) >= 10
    assert sorted(heard, key=lambda one: one.intended_at_s)[4].number == 1
    assert all(one.answer is not None and one.answer.status == 200 for one in heard)
    assert all(0 <= one.lag_ms <= one.latency_ms for one in heard)
    assert report.target_rate == pytest.approx(100, rel=0.01)
    assert report.seconds < 30


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "http://127.0.0.1:1/path", "127.0.0.1:1"])
def test_the_open_loop_speaks_plain_http_only(url: str) -> None:
    with pytest.raises(LoadTestError, match="plain HTTP"):
        run_open_loop(url, BODIES, Schedule(rate=50, seconds=0.1), release="r1")


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:8080", "http://localhost:1", "http://[::1]:1"])
def test_loopback_is_loaded_without_asking(url: str) -> None:
    check_loopback(url, allow_remote=False)


@pytest.mark.parametrize("url", ["http://192.0.2.1:8080", "http://example.org", "example.org"])
def test_another_machine_is_loaded_only_when_asked_for(url: str) -> None:
    with pytest.raises(LoadTestError, match="--allow-remote"):
        check_loopback(url, allow_remote=False)
    check_loopback(url, allow_remote=True)


def test_locust_runs_are_bounded_in_users_and_time() -> None:
    load = Load(users=3, seconds=2.5, rate=10, traffic=TRAFFIC, open_loop=False)
    command = locust_command("http://127.0.0.1:1", load, Path("report.json"))
    for option, value in {"--users": "3", "--run-time": "2.5s", "--rate": "10", "--candidates": "50"}.items():
        assert command[command.index(option) + 1] == value
    assert "--headless" in command


def test_a_service_that_does_not_start_leaves_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="ended with code"), served(f"nothing://{tmp_path}"):
        raise AssertionError("unreachable")


def test_a_wrong_command_line_ends_with_code_2_and_one_sentence() -> None:
    command = [sys.executable, "-m", "loadtest", "--url", "http://192.0.2.1", "--seconds", "1"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: http://192.0.2.1 is another machine")
