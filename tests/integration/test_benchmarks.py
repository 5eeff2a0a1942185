"""The benchmarks at their tiny size: they run, their files are tidy, and a wrong contestant is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import numpy as np
import orjson
import pytest

from benchmarks import changes, large, lineup, memory, plots, swaps
from benchmarks.checks import Item, Referee, Stored, drawn
from benchmarks.client import AnswerError, Line, closed_loop, request_bytes
from benchmarks.contestants import Course, Ranking
from benchmarks.made import SIZES, Made, Plan, make
from benchmarks.processes import HOST, free_port, python, server
from benchmarks.report import Bar, Report, median_ratio, quantile, read, table
from benchmarks.rivals import plain
from benchmarks.service import equal_server
from benchmarks.svg import chart
from benchmarks.traffic import bodies
from kernel.reference import score
from model.features import HISTORY
from model.networks import NETWORKS
from model.train import PARTS
from service.answers import encode_ranking
from service.ranker import Ranker
from tests.redis_server import redis_server

ROOT = Path(__file__).resolve().parents[2]
CONTESTANTS = ("ours", "ours-arrow", "plain", "plain-local", "empty", "client-alone")
COURSE = Course(lengths=(30,), rounds=1, count=2, warm_up=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def made(folder: Path) -> Made:
    return make(Plan(items=SIZES["tiny"]), folder / "made")


def run(module: str, folder: Path, *arguments: str) -> str:
    """What a benchmark prints, run as `make` runs it: it pins itself to a core, so not in this process."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--size", "tiny", "--out", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service_run(folder: Path, made: Made) -> str:
    return run("service", folder, "--contestants", *CONTESTANTS)


@pytest.fixture(scope="module")
def memory_run(folder: Path, made: Made) -> str:
    return run("memory", folder, "--workers", "1", "2")


@pytest.fixture(scope="module")
def train_run(folder: Path) -> str:
    return run("train", folder)


@pytest.fixture(scope="module")
def releases_run(folder: Path) -> str:
    return run("releases", folder, "--rounds", "1")


def test_the_service_is_measured_beside_its_rivals(service_run: str, folder: Path) -> None:
    found = read(folder / "service-tiny.json")
    absent = {note.partition(":")[0] for note in found["notes"] if "n/a" in note}
    present = set(CONTESTANTS) - absent
    assert absent <= {"ours-arrow"}
    closed = [row for row in found["rows"] if row["kind"] == "closed"]
    assert {(row["contestant"], row["candidates"]) for row in closed} == {(n, k) for n in present for k in (50, 200)}
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in closed)
    stages = {row["stage"] for row in found["rows"] if row["kind"] == "stage" and row["contestant"] == "ours"}
    assert {"decode", "encode", "user", "score", "topk", "respond"} <= stages
    shares = defaultdict(list)
    for row in found["rows"]:
        if row["kind"] == "open":
            shares[row["contestant"]].append(row["share"])
    assert shares.pop("ours") == [0.25, 0.5, 0.75, 0.9, 0.5]
    assert set(shares) == (present & {"ours-arrow", "plain", "plain-local"}) | {"equal server"}
    assert all(of == [0.25, 0.5, 0.75, 0.9] for of in shares.values())
    bars = {bar["name"]: bar["value"] for bar in found["bars"]}
    assert bars["JSON MaxSim / empty"] > 0
    assert bars["JSON cross-attention / empty"] is None
    assert "ours: 6 answers checked" in service_run


def test_an_equal_server_is_as_long_as_queueing_theory_says() -> None:
    """M/D/1 waits rho / (2 (1 - rho)) requests in the mean, and at half of capacity nothing half of the time."""
    row = equal_server(0.5, capacity=1e6)
    assert row["p50_us"] == pytest.approx(1.0, abs=0.02)
    assert 4 < row["p99_us"] < 4.7
    assert equal_server(0.9, capacity=1e6)["p50_us"] == pytest.approx(4.4, abs=0.5)


def test_memory_is_read_from_every_worker(memory_run: str, folder: Path) -> None:
    found = read(folder / "memory-tiny.json")
    one, two = (row for row in found["rows"] if row["kind"] == "memory")
    assert (one["workers"], two["workers"]) == (1, 2)
    assert two["table_rss_mib"] == pytest.approx(2 * one["table_rss_mib"], rel=0.05)
    assert one["table_pss_mib"] <= one["whole_pss_mib"] <= one["whole_rss_mib"]
    disk = [row for row in found["rows"] if row["kind"] == "disk"]
    assert len(disk) == 9
    assert all(row["bytes_per_item"] > row["record_bytes"] for row in disk)
    assert found["bars"][0]["verdict"] == "not measured"  # it needs 4 workers


def test_releases_are_measured_from_parquet_to_a_ready_replica(releases_run: str, folder: Path) -> None:
    found = read(folder / "releases-tiny.json")
    kinds = [row["kind"] for row in found["rows"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "publish": 2,
        "memory": 1,
        "replica": 1,
        "limits": 1,
        "tower": 3,
    }
    assert all(value > 0 for row in found["rows"] for value in row.values() if isinstance(value, float))
    assert len(found["bars"]) == 5
    assert "publish, tower apart" in releases_run
    assert not [*folder.glob("releases-*/")]


def test_training_is_measured_for_every_network_and_every_part_of_a_step(train_run: str, folder: Path) -> None:
    found = read(folder / "train-tiny.json")
    assert [(row["network"], row["threads"]) for row in found["rows"]] == [(name, 1) for name in NETWORKS]
    for row in found["rows"]:
        assert row["samples_per_s"] > 0
        assert row["step_ms"] > 0
        assert sum(row[part] for part in PARTS) == pytest.approx(1, abs=1e-3)
    assert found["bars"][0]["value"] == max(row["draw"] for row in found["rows"])
    assert "ranktower" in train_run


def test_updates_are_timed_until_they_are_in_the_answers(folder: Path, made: Made) -> None:
    run("changes", folder)
    (row,) = read(folder / "changes-tiny.json")["rows"]
    assert (row["rate"], row["lost"]) == (500, 0)
    assert 0 < row["visible_p50_ms"] <= row["visible_p99_ms"]
    assert 0 < row["rank_p50_ms"] <= row["rank_p99_ms"]


def test_swaps_are_timed_under_load_and_every_answer_is_checked(folder: Path, made: Made) -> None:
    run("swaps", folder)
    found = read(folder / "swaps-tiny.json")
    windows = [row["window"] for row in found["rows"] if row["kind"] == "window"]
    assert windows == ["new", "steady", "new", "steady", "new", "steady", "back", "steady"]
    pooled = {row["window"]: row for row in found["rows"] if row["kind"] == "pooled"}
    assert set(pooled) == {"steady", "new", "back"}
    assert all(0 < row["p50_us"] <= row["p99_us"] <= row["max_us"] for row in pooled.values())
    assert [(bar["value"], bar["verdict"]) for bar in found["bars"][:2]] == [(0, "met"), (0, "met")]


def test_a_swap_is_to_a_release_that_the_replica_has_let_go_or_back() -> None:
    course = replace(swaps.COURSES["full"], swaps=6, back_every=3)
    order = swaps.turns(["a", "b", "c"], course)
    assert [kind for kind, _ in order] == ["new"] * 3 + ["back"] + ["new"] * 3 + ["back"]
    assert [release for _, release in order] == ["b", "c", "a", "c", "b", "a", "c", "a"]


def test_an_answer_with_the_scores_of_another_release_is_wrong(folder: Path, made: Made) -> None:
    other = make(Plan(items=SIZES["tiny"], seed=1), folder / "made")
    releases = {each.release.name: each for each in (made, other)}
    sent = bodies(made, 1, 50, seed=0)
    ranker = Ranker.open(made.release)
    right = encode_ranking(ranker.rank(ranker.decoders.rank(sent[0])))
    mixed = right.replace(made.release.name.encode(), other.release.name.encode())
    unknown = right.replace(made.release.name.encode(), b"none")
    checked, wrong = swaps.check(releases, sent, {(0, right): 5, (0, mixed): 2, (0, unknown): 1})
    assert (checked, sum(wrong.values())) == (8, 3)
    assert swaps.check(releases, sent, {(0, right): 5}) == (5, {})


def test_windows_hold_what_was_meant_to_leave_within_them() -> None:
    exchanges = [(0.9, 1.0, 0.0), (1.0, 8.0, 0.1), (1.9, 2.0, 0.1), (2.0, 4.0, 0.3), (3.0, 9.0, 0.0)]
    windows = [swaps.Window("new", 1.0, 2.0, 0.5), swaps.Window("steady", 2.0, 3.0)]
    rows = {row["window"]: row for row in swaps.pooled_rows(windows, exchanges)}
    assert (rows["new"]["requests"], rows["new"]["p99_us"], rows["steady"]["p99_us"]) == (2, 8_000, 4_000)
    assert [row["requests"] for row in swaps.window_rows(windows, exchanges)] == [2, 1]
    bars = {bar.name: bar for bar in swaps.bars([*rows.values()], 0, 1)}
    assert bars["p99, swaps with a download / steady"].value == 2
    assert [bar.verdict for bar in bars.values()] == ["met", "MISSED", "MISSED", "not measured"]


def test_a_large_catalogue_is_published_and_served_beside_a_small_one(folder: Path) -> None:
    run("large", folder)
    found = read(folder / "large-tiny.json")
    for kind in ("publish", "memory", "closed"):
        assert [row["items"] for row in found["rows"] if row["kind"] == kind] == [2_000, 4_000]
    for row in found["rows"]:
        if row["kind"] == "publish":
            assert 0 < row["peak_anonymous_mib"] <= row["peak_rss_mib"]
        if row["kind"] == "memory":
            assert row["table_mib"] == row["table_rss_mib"]
    assert [bar["value"] is None for bar in found["bars"]] == [False] * 3
    assert not [*folder.glob("large-*/")]
    assert large.bars(found["rows"], 4_000)[0].value == found["bars"][0]["value"]


def test_an_update_is_visible_with_the_first_answer_that_names_it_or_a_later_one() -> None:
    appended, seen = [(1.0, 10), (2.0, 20), (3.0, 30)], [(1.5, 12), (3.25, 30)]
    assert changes.delays_ms(appended, seen) == [500.0, 1250.0, 250.0]


def test_results_name_the_machine_but_no_path_of_it(
    service_run: str, memory_run: str, train_run: str, folder: Path
) -> None:
    for path in folder.glob("*.json"):
        found = read(path)
        assert found["machine"]["cpu"]
        assert found["machine"]["libraries"]["numpy"] == np.__version__
        assert not {str(folder), str(ROOT), str(Path.home())} & set(json.dumps(found).split('"'))
        assert str(folder) not in path.read_text()


def test_the_page_is_filled_from_results(
    service_run: str, memory_run: str, train_run: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "docs" / "performance.md", tmp_path)
    assert plots.main(["--results", str(folder), "--docs", str(tmp_path), "--size", "tiny"]) == 0
    page = (tmp_path / "performance.md").read_text()
    assert "Not measured yet: run `make bench-service`" not in page
    assert "Not measured yet: run `make bench-memory`" not in page
    assert page.count("| plain-local |") == 2 + 4, "closed with lists of two lengths, open at four rates"
    drawing = ElementTree.fromstring((tmp_path / "plots" / "service-candidates.svg").read_text())
    assert {"ours", "plain", "empty"} <= {text.text for text in drawing.iter() if text.text}


def test_kernel_results_of_the_agreed_form_fill_the_page_too(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "performance.md", tmp_path)
    same = {"contestant": "ours", "dtype": "int8", "level": "avx512", "shape": "4x4x32"}
    sizes = [(items, count) for items in (10_000, 1_000_000) for count in (500, 5_000)]
    rows = [{**same, "items": n, "candidates": c, "median_us": c / 50} for n, c in sizes]
    report = Report("kernel", {}, rows=list(rows), bars=[Bar(name="x", value=3.0, side="at least", limit=2)])
    report.write(tmp_path)
    assert plots.main(["--results", str(tmp_path), "--docs", str(tmp_path)]) == 0
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"kernel-candidates", "kernel-items"}
    assert "| ours | int8 | avx512 | 4x4x32 | 1,000,000 | 5,000 | 100 |" in (tmp_path / "performance.md").read_text()


# --- the referee -----------------------------------------------------------------------------------------------------


class Round:
    """One request, the right answer to it, and a referee."""

    def __init__(self, made: Made) -> None:
        self.referee, self.stored = Referee(made), Stored(drawn(made, "float32"), 1e-4)
        self.body = bodies(made, 1, 300, seed=1)[0]
        request = orjson.loads(self.body)
        row = {**request["user"], **request["context"], HISTORY: request["history"]}
        user = made.bundle.user_tower().run(made.bundle.spec.encode_row("user", row)[None])[0]
        place = {id_: k for k, id_ in enumerate(made.ids.tolist())}
        rows = np.array([place[id_] for id_ in request["candidates"]])
        scores = score(made.bundle.head, user, self.stored.records(rows))
        order = np.argsort(-scores, kind="stable")[: request["top_k"]]
        self.items = [Item(request["candidates"][k], float(scores[k]), k) for k in order.tolist()]
        self.left_out = next(k for k in range(300) if k not in set(order.tolist()))

    def check(self, items: list[Item]) -> None:
        self.referee.check("somebody", self.body, items, self.stored)


@pytest.fixture(scope="module")
def round_(made: Made) -> Round:
    return Round(made)


def test_the_reference_passes_and_near_ties_may_change_places(round_: Round) -> None:
    round_.check(round_.items)
    first, second, *rest = round_.items
    swapped = [second._replace(score=first.score), first._replace(score=second.score), *rest]
    lenient = Stored(round_.stored.records, first.score - second.score + 1e-4)
    round_.referee.check("somebody", round_.body, swapped, lenient)
    with pytest.raises(AnswerError, match="off the reference"):
        round_.check(swapped)


WRONG: dict[str, tuple[Callable[[list[Item]], list[Item]], str]] = {
    "an item too few": (lambda items: items[:-1], "99 items, not 100"),
    "one item twice": (lambda items: [items[0], *items[:-1]], "comes twice"),
    "another id": (lambda items: [items[0]._replace(id=7), *items[1:]], "not where its position says"),
    "a score that is off": (lambda items: [items[0]._replace(score=items[0].score + 0.01), *items[1:]], "off the ref"),
    "the order reversed": (lambda items: items[::-1], "scores rise"),
    "scores that are no numbers": (lambda items: [i._replace(score=float("nan")) for i in items], "off the reference"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_refused(round_: Round, what: str) -> None:
    wrong, message = WRONG[what]
    with pytest.raises(AnswerError, match=message):
        round_.check(wrong(round_.items))


def test_an_answer_without_the_best_items_is_refused(round_: Round) -> None:
    candidates = orjson.loads(round_.body)["candidates"]
    kept = {item.position for item in round_.items}
    rest = [k for k in range(len(candidates)) if k not in kept][:100]
    with pytest.raises(AnswerError):
        round_.check([Item(candidates[k], 0.0, k) for k in rest])


def test_a_contestant_that_serves_other_vectors_is_refused(made: Made) -> None:
    body = bodies(made, 3, 30, seed=2)
    port = free_port()
    arguments = ("--bundle", str(made.bundle_folder), "--vectors", str(made.vectors()), "--port", str(port))
    with server(python("benchmarks.rivals.plain_local", *arguments), port, None), Line(port) as line:
        right = Stored(drawn(made, "float32"), 1e-4)
        contestant = Ranking(
            name="plain-local",
            port=port,
            course=COURSE,
            requests={30: [request_bytes(one) for one in body]},
            bodies={30: body},
            referee=Referee(made),
            stored=right,
        )
        assert contestant.check() == 3
        contestant.stored = Stored(lambda rows: right.records(rows)[::-1], 1e-4)
        with pytest.raises(AnswerError, match="plain-local answers wrongly"):
            contestant.check()
        with pytest.raises(AnswerError, match="status 422"):
            closed_loop(line, [request_bytes(b'{"candidates": [true]}')], warm_up=0)
        with pytest.raises(AnswerError, match="status 404"):
            closed_loop(line, [request_bytes(body[0], path="/elsewhere")], warm_up=1)


# --- rivals ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rivals(made: Made) -> Iterator[dict[str, httpx.Client]]:
    """A client for each of the two rivals that rank."""
    with redis_server() as url:
        plain.load(url, made.ids, np.load(made.vectors()))
        first, second = free_port(), free_port()
        bundle = ("--bundle", str(made.bundle_folder))
        day = python("benchmarks.rivals.plain", *bundle, "--redis", url, "--port", str(first))
        week = python("benchmarks.rivals.plain_local", *bundle, "--vectors", str(made.vectors()), "--port", str(second))
        with server(day, first, None), server(week, second, None):
            clients = {
                name: httpx.Client(base_url=f"http://{HOST}:{port}", timeout=30)
                for name, port in (("plain", first), ("plain-local", second))
            }
            yield clients
            for client in clients.values():
                client.close()


NAMES = ("plain", "plain-local")


@pytest.mark.parametrize("name", NAMES)
def test_rivals_answer_unknown_items_last(rivals: dict[str, httpx.Client], made: Made, name: str) -> None:
    known = made.ids[:3].tolist()
    answer = rivals[name].post("/v1/rank", json={"candidates": [5, *known, 6], "top_k": 4})
    assert answer.status_code == 200
    document = answer.json()
    assert document["missing"] == [5, 6]
    assert {item["id"] for item in document["items"][:3]} == set(known)
    assert document["items"][3] == {"id": 5, "score": None, "position": 0}


@pytest.mark.parametrize("name", NAMES)
def test_rivals_answer_nothing_to_nothing(rivals: dict[str, httpx.Client], name: str) -> None:
    assert rivals[name].post("/v1/rank", json={"candidates": []}).json() == {"items": [], "missing": []}
    assert rivals[name].post("/v1/rank", json={"candidates": [5]}).json()["missing"] == [5]
    assert rivals[name].post("/v1/rank", json={"candidates": [5], "top_k": 0}).json()["items"] == []


WRONG_BODIES: dict[str, Any] = {
    "no candidates": {},
    "a list": [],
    "text ids": {"candidates": ["a"]},
    "one id": {"candidates": 3},
    "a negative k": {"candidates": [1], "top_k": -1},
    "too many": {"candidates": [1] * 20_001},
    "no user": {"candidates": [1], "user": 3},
    "a text for a number": {"candidates": [1], "user": {"age": "old"}},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", WRONG_BODIES)
def test_rivals_refuse_wrong_bodies(rivals: dict[str, httpx.Client], name: str, what: str) -> None:
    assert rivals[name].post("/v1/rank", json=WRONG_BODIES[what]).status_code == 422


def test_feast_is_absent_where_it_was_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lineup, "FEAST_PYTHON", tmp_path / "none")
    present, absent = lineup.start(None, ["feast-fetch"])  # type: ignore[arg-type]
    assert (present, absent) == ([], {"feast-fetch": "run make bench-peers"})


# --- figures ---------------------------------------------------------------------------------------------------------


def test_a_bar_is_met_missed_or_not_measured() -> None:
    bar = Bar(name="x", value=2.2, side="at most", limit=2.5, stretch=2.0)
    assert bar.verdict == "met"
    assert replace(bar, value=1.9).verdict == "met, stretch too"
    assert replace(bar, value=2.6).verdict == "MISSED"
    assert replace(bar, value=float("nan")).verdict == "MISSED"
    assert replace(bar, value=None).verdict == "not measured"
    assert replace(bar, side="at least").verdict == "MISSED"


def test_quantiles_are_measured_values_and_ratios_are_taken_within_a_round() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert quantile([float(k) for k in range(1, 201)], 0.99) == 198.0
    assert median_ratio([10.0, 40.0, 30.0], [5.0, 20.0, 10.0]) == 2.0
    assert median_ratio([], [1.0]) is None


def test_the_bar_on_memory_fails_when_workers_copy_the_table() -> None:
    rows = [{"kind": "memory", "workers": n, "table_pss_mib": mib} for n, mib in ((1, 512.0), (4, 2048.0))]
    assert memory.bar(rows).verdict == "MISSED"
    assert memory.bar([rows[0], {**rows[1], "table_pss_mib": 513.0}]).verdict == "met"


def test_columns_of_words_stand_left_and_columns_of_numbers_right() -> None:
    assert table(("name", "us", "what"), [("a", 1234.0, "b"), ("long", 1.5, "c")]).splitlines() == [
        "name     us  what",
        "-----------------",
        "a     1,234  b",
        "long    1.5  c",
    ]


def test_a_chart_needs_points_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        chart("t", "x", "y", {"a": [(1.0, 0.0), (2.0, 1.0)]})
