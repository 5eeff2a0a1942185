"""The shadow: what it measures, that it equals itself, and that it never holds anybody up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.rollout import Rollout, Shadow
from service.answers import Answer
from service.live import Serving
from service.ranker import Ranker, Ranking
from service.shadow import ShadowScorer, compare
from service.telemetry import Telemetry
from service.wire import RankRequest
from tests.tiny_releases import tiny_release

TIMEOUT_S = 20.0
Rank = RankRequest[Any, Any]


@pytest.fixture(scope="module")
def rankers(tmp_path_factory: pytest.TempPathFactory) -> list[Ranker]:
    folder = tmp_path_factory.mktemp("made")
    sizes = (60, 60, 40)
    return [
        Ranker.open(tiny_release(folder / str(seed), seed=seed, items=size).folder) for seed, size in enumerate(sizes)
    ]


def order(*positions: int, candidates: int | None = None, missing: tuple[int, ...] = (), nan: int = 0) -> Ranking:
    """A ranking of candidates whose ids are their positions; the last `nan` have no score."""
    scores = np.arange(len(positions), 0, -1).astype(np.float32)
    scores[len(positions) - nan :] = np.nan
    count = len(positions) if candidates is None else candidates
    return Ranking(
        release="r",
        watermark=0,
        user_known=None,
        candidates=count,
        scored=count - len(missing),
        missing=np.array(missing, np.int64),
        kept=np.array(positions, np.int64),
        positions=np.array(positions, np.int32),
        scores=scores,
        probabilities=None,
        explanation=None,
    )


# --- what is measured


def test_an_order_equals_itself() -> None:
    found = compare(order(*range(120)), order(*range(120)))
    assert (found.overlap, found.correlation, found.missing) == ({10: 1.0, 50: 1.0, 100: 1.0}, 1.0, 0)


def test_the_reverse_of_an_order_correlates_by_minus_one() -> None:
    found = compare(order(*range(20)), order(*range(19, -1, -1)))
    assert found.correlation == pytest.approx(-1.0)
    assert found.overlap == {10: 0.0, 50: 1.0, 100: 1.0}  # of 20 items the best 50 are all


def test_overlap_counts_the_best_k_of_either() -> None:
    theirs = [0, 1, 2, *range(20, 27), *range(3, 20), *range(27, 30)]
    assert compare(order(*range(30)), order(*theirs)).overlap[10] == pytest.approx(0.3)


def test_correlation_is_spearmans_over_what_both_know() -> None:
    ours, theirs = [3, 0, 1, 4, 2], [0, 3, 2, 1]  # 4 is unknown to the shadow: 3 0 1 2 beside 0 3 2 1
    found = compare(order(*ours), order(*theirs, candidates=5, missing=(4,)))
    assert found.correlation == pytest.approx(1 - 6 * (1 + 1 + 1 + 1) / (4 * 15))
    assert found.missing == 1


def test_what_was_not_asked_for_is_not_compared() -> None:
    found = compare(order(*range(30), candidates=200), order(*range(200)))
    assert found.overlap == {10: 1.0}
    assert compare(order(0, candidates=5), order(*range(5))).correlation is None
    assert compare(order(), order()).overlap == {}


def test_items_that_neither_knows_are_not_missed() -> None:
    live = order(*range(4), candidates=5, missing=(4,))
    with_unknown = order(*range(5), candidates=5, missing=(4,), nan=1)
    for answered in (live, with_unknown):
        found = compare(answered, order(*range(3), candidates=5, missing=(3, 4)))
        assert found.missing == 1
        assert found.correlation == 1.0


# --- the thread


def offered(
    scorer: ShadowScorer, live: Ranker, shadow: Ranker, requests: list[Rank], share: float = 1.0
) -> list[Ranking]:
    rollout = Rollout(shadow=Shadow(release=shadow.release, share=share))
    rankings = [live.rank(request) for request in requests]
    answer = Answer(b"", live.release, rankings, requests=requests)
    scorer.offer(Serving(live, rollout, {shadow.release: shadow}), answer)
    return rankings


def requests(ranker: Ranker, count: int, **given: Any) -> list[Rank]:
    rng = np.random.default_rng(3)
    ids = np.arange(100, 160)
    return [Rank(candidates=rng.permutation(ids), user_id=k % 12, **given) for k in range(count)]


def done(telemetry: Telemetry, release: str, count: int) -> dict[str, Any]:
    """The means once so many rankings were compared."""
    pause = threading.Event()
    for _ in range(int(TIMEOUT_S / 0.01)):
        found = telemetry.shadow_means(release)
        if found and found[0]["rankings"] >= count:
            return found[0]
        pause.wait(0.01)
    raise AssertionError(telemetry.shadow_means(release))


def test_a_shadow_of_itself_agrees_and_another_does_not(rankers: list[Ranker]) -> None:
    telemetry = Telemetry()
    scorer = ShadowScorer(telemetry)
    asked = requests(rankers[0], 20)
    try:
        offered(scorer, rankers[0], rankers[0], asked)
        same = done(telemetry, rankers[0].release, 20)
        assert same["overlap@10"] == same["overlap@100"] == same["rank_correlation"] == {"mean": 1.0, "count": 20}
        offered(scorer, rankers[0], rankers[1], asked)
        other = done(telemetry, rankers[1].release, 20)
        assert other["overlap@10"]["mean"] < 0.7
        assert other["rank_correlation"]["mean"] < 0.7
        assert other["against"] == rankers[0].release
        offered(scorer, rankers[0], rankers[2], asked)
        assert done(telemetry, rankers[2].release, 20)["missing_items"] == 20 * 20
    finally:
        scorer.stop()


def test_whatever_a_request_asks_for_all_candidates_are_compared(rankers: list[Ranker]) -> None:
    telemetry = Telemetry()
    scorer = ShadowScorer(telemetry)
    asked = requests(rankers[0], 3, top_k=10, explain=True, on_missing="error", deadline_ms=60_000)
    try:
        offered(scorer, rankers[0], rankers[2], asked)  # lacks 20 of them
        assert done(telemetry, rankers[2].release, 3)["overlap@10"]["count"] == 3
    finally:
        scorer.stop()
    assert telemetry.shadow_failures._value.get() == 0


def test_a_full_queue_drops_and_never_waits(rankers: list[Ranker], monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = Telemetry()
    scorer = ShadowScorer(telemetry, depth=4)
    holding, go_on = threading.Event(), threading.Event()
    known = Ranker.rank

    def held(self: Ranker, *given: Any) -> Ranking:
        if threading.current_thread().name == "shadow":
            holding.set()
            go_on.wait(TIMEOUT_S)
        return known(self, *given)

    monkeypatch.setattr(Ranker, "rank", held)
    try:
        offered(scorer, rankers[0], rankers[1], requests(rankers[0], 1))
        assert holding.wait(TIMEOUT_S)
        offered(scorer, rankers[0], rankers[1], requests(rankers[0], 10))
        assert telemetry.shadow_dropped._value.get() == 6
        go_on.set()
        assert done(telemetry, rankers[1].release, 5)["rankings"] == 5
    finally:
        go_on.set()
        scorer.stop()
    assert not any(thread.name == "shadow" for thread in threading.enumerate())


def test_stopping_drops_what_waits(rankers: list[Ranker], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ShadowScorer(Telemetry(), depth=2)
    begun = threading.Event()
    known = Ranker.rank

    def slow(self: Ranker, *given: Any) -> Ranking:
        if threading.current_thread().name == "shadow":
            begun.set()
        return known(self, *given)

    monkeypatch.setattr(Ranker, "rank", slow)
    offered(scorer, rankers[0], rankers[1], requests(rankers[0], 8))
    assert begun.wait(TIMEOUT_S)
    scorer.stop()
    scorer.stop()


def test_what_the_shadow_cannot_answer_is_counted_and_logged_once(
    rankers: list[Ranker], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    telemetry = Telemetry()
    scorer = ShadowScorer(telemetry)
    asked = requests(rankers[0], 2)
    wrong = [Rank(candidates=request.candidates, user={"nobody": 1}) for request in asked]
    answer = Answer(b"", "r", [rankers[0].rank(request) for request in asked], requests=wrong)
    rollout = Rollout(shadow=Shadow(release=rankers[1].release, share=1.0))
    try:
        scorer.offer(Serving(rankers[0], rollout, {rankers[1].release: rankers[1]}), answer)
        offered(scorer, rankers[0], rankers[1], asked)  # and goes on
        done(telemetry, rankers[1].release, 2)
    finally:
        scorer.stop()
    assert telemetry.shadow_failures._value.get() == 2
    assert caplog.text.count("cannot answer what was asked") == 1


def test_a_share_of_the_requests_is_taken(rankers: list[Ranker], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ShadowScorer(Telemetry(), depth=10_000)
    taken: list[Any] = []
    monkeypatch.setattr(scorer._queue, "put_nowait", taken.append)
    offered(scorer, rankers[0], rankers[1], requests(rankers[0], 1) * 2000, share=0.25)
    assert abs(len(taken) - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_what_was_retrieved_or_cut_off_is_not_compared(rankers: list[Ranker], tmp_path: Path) -> None:
    telemetry = Telemetry()
    scorer = ShadowScorer(telemetry)
    request = requests(rankers[0], 1)[0]
    cut = order(0, 1, candidates=60)
    object.__setattr__(cut, "scored", 2)
    rollout = Rollout(shadow=Shadow(release=rankers[1].release, share=1.0))
    serving = Serving(rankers[0], rollout, {rankers[1].release: rankers[1]})
    try:
        scorer.offer(serving, Answer(b"", "r", [cut], requests=[request]))
        scorer.offer(serving, Answer(b"", "r", [cut]))
        offered(scorer, rankers[0], rankers[1], [request])
        assert done(telemetry, rankers[1].release, 1)["rankings"] == 1
    finally:
        scorer.stop()
