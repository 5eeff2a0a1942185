"""Bodies to answers without HTTP: limits, deadlines, stages, and the form of what is sent."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.ids import Texts
from service.admission import Permit
from service.answers import Answerer, Limits, answer_batch, answer_rank, answer_retrieve, encode_ranking
from service.errors import DeadlineExceeded, RequestError
from service.live import Serving
from service.ranker import Explanation, Ranker, Ranking
from service.telemetry import STAGES, StageClock
from tests.tiny_releases import tiny_release

LIMITS = Limits(max_candidates=4, max_batch=2)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    made = tiny_release(tmp_path_factory.mktemp("made"), index="flat")
    return Ranker.open(made.folder, made.users, retrieval=True)


def asked(ranker: Ranker, answerer: Answerer, body: Any, arrived_ns: int | None = None) -> Any:
    permit = Permit(perf_counter_ns() if arrived_ns is None else arrived_ns)
    return answerer(permit, Serving(ranker), orjson.dumps(body), LIMITS, StageClock())


@pytest.mark.parametrize(
    ("answerer", "body"),
    [
        (answer_rank, {"candidates": [100]}),
        (answer_batch, {"requests": [{"candidates": [100]}, {"candidates": []}]}),
        (answer_retrieve, {"top_k": 3}),
    ],
)
def test_every_stage_but_the_queue_is_timed(ranker: Ranker, answerer: Answerer, body: Any) -> None:
    clock = StageClock()
    answer = answerer(Permit(perf_counter_ns()), Serving(ranker), orjson.dumps(body), LIMITS, clock)
    assert [stage for stage, spent_ns in clock.spent_ns.items() if spent_ns == 0] == ["queue"]
    assert answer.release == ranker.release == orjson.loads(answer.body)["release"]


@pytest.mark.parametrize(
    ("answerer", "body", "field", "setting"),
    [
        (answer_rank, {"candidates": [1] * 5}, "candidates", "RANKTOWER_MAX_CANDIDATES"),
        (answer_batch, {"requests": [{"candidates": [1] * 5}]}, "requests[0].candidates", "RANKTOWER_MAX_CANDIDATES"),
        (answer_batch, {"requests": [{"candidates": []}] * 3}, "requests", "RANKTOWER_MAX_BATCH"),
    ],
)
def test_a_limit_names_its_setting(ranker: Ranker, answerer: Answerer, body: Any, field: str, setting: str) -> None:
    with pytest.raises(RequestError) as caught:
        asked(ranker, answerer, body)
    assert caught.value.field == field
    assert setting in caught.value.remedy


@pytest.mark.parametrize(
    ("answerer", "body"),
    [
        (answer_rank, {"candidates": [100], "deadline_ms": 1}),
        (answer_retrieve, {"deadline_ms": 1}),
        (answer_batch, {"requests": [{"candidates": []}, {"candidates": [], "deadline_ms": 1}]}),
    ],
)
def test_nothing_is_scored_after_the_deadline(ranker: Ranker, answerer: Answerer, body: Any) -> None:
    long_ago = perf_counter_ns() - 2_000_000
    with pytest.raises(DeadlineExceeded):
        asked(ranker, answerer, body, long_ago)
    later = orjson.loads(orjson.dumps(body).replace(b'"deadline_ms":1', b'"deadline_ms":60000'))
    assert asked(ranker, answerer, later, long_ago).body


def test_the_answer_holds_what_the_ranking_holds() -> None:
    ranking = Ranking(
        release="r1",
        watermark=12,
        user_known=None,
        candidates=3,
        scored=2,
        missing=np.array([7]),
        kept=np.array([5, 7]),
        positions=np.array([2, 0], np.int32),
        scores=np.array([0.1, np.nan], np.float32),
        probabilities=np.array([0.7, np.nan], np.float32),
        explanation=Explanation(np.array([[1, 0]], np.int32), np.array([[0.25, 0.5]], np.float32)),
    )
    assert orjson.loads(encode_ranking(ranking)) == {
        "release": "r1",
        "watermark": 12,
        "user_known": None,
        "items": [
            {
                "id": 5,
                "score": 0.1,  # the shortest text that reads back as the same float32
                "probability": 0.7,
                "position": 2,
                "explanation": {"item_heads": [1, 0], "similarities": [0.25, 0.5]},
            },
            {"id": 7, "score": None, "probability": None, "position": 0},
        ],
        "missing": [7],
        "counts": {"candidates": 3, "scored": 2, "returned": 2},
    }


def made_ranking(count: int, **more: Any) -> Ranking:
    scores = np.random.default_rng(0).normal(size=count).astype(np.float32)
    given: dict[str, Any] = {
        "release": "r1", "watermark": 0, "user_known": True, "candidates": count, "scored": count,
        "missing": np.empty(0, np.int64), "kept": np.arange(count), "positions": np.arange(count, dtype=np.int32),
        "scores": scores,
        "probabilities": None, "explanation": None,
    }  # fmt: skip
    return Ranking(**{**given, **more})


@pytest.mark.parametrize("score", [0.1, -1e-30, 3.4e38, 1e-45, 16777216.0, 0.0])
def test_a_score_reads_back_as_the_same_float32(score: float) -> None:
    scores = np.array([score], np.float32)
    answer = orjson.loads(encode_ranking(made_ranking(1, scores=scores)))
    assert np.float32(answer["items"][0]["score"]) == scores[0]


def test_what_a_ranking_does_not_have_is_absent() -> None:
    answer = orjson.loads(encode_ranking(made_ranking(2, positions=None)))
    assert [[*item] for item in answer["items"]] == [["id", "score"]] * 2
    assert orjson.loads(encode_ranking(made_ranking(0)))["items"] == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4)))
def test_missing_texts_are_sent_as_they_came(texts: list[str]) -> None:
    answer = orjson.loads(encode_ranking(made_ranking(0, missing=Texts.of(texts))))
    assert answer["missing"] == texts


def test_missing_texts_may_lie_anywhere_in_their_buffer() -> None:
    missing = Texts.of(["a", "item-1", "", "ü", '"'])
    answer = orjson.loads(encode_ranking(made_ranking(0, missing=missing[np.array([3, 1, 2])])))
    assert answer["missing"] == ["ü", "item-1", ""]


@pytest.mark.parametrize("missing", [[3, 4], np.array([3, 4]), np.array([3, 9, 4])[::2]])
def test_missing_integers_are_sent_as_they_came(missing: Any) -> None:
    ranking = made_ranking(0, missing=np.ascontiguousarray(missing) if isinstance(missing, np.ndarray) else missing)
    assert orjson.loads(encode_ranking(ranking))["missing"] == [3, 4]


def test_candidates_that_the_deadline_cut_off_are_counted_as_sent_alone() -> None:
    answer = orjson.loads(encode_ranking(made_ranking(2, candidates=9, scored=4)))
    assert answer["counts"] == {"candidates": 9, "scored": 4, "returned": 2}


def test_stages_are_those_of_the_architecture(tmp_path: Path) -> None:
    assert STAGES == ("queue", "decode", "encode", "user", "score", "topk", "respond")


def test_no_python_object_is_made_for_a_candidate(tmp_path: Path) -> None:
    """Objects that are alive at once while a request is answered, by 500 and by 5,000 candidates."""
    release = tiny_release(tmp_path)
    ranker = Ranker.open(release.folder, release.users)

    def made_by(count: int) -> int:
        ids = [release.item_ids[k % 60] if k % 7 else -k for k in range(count)]  # some are unknown
        body = orjson.dumps({"candidates": ids, "top_k": 10, "on_missing": "drop"})
        permit = Permit(perf_counter_ns())
        limits = Limits(max_candidates=count, max_batch=1)
        answer_rank(permit, Serving(ranker), body, limits, StageClock())  # what is made once, is made
        tracemalloc.start()
        try:
            answer_rank(permit, Serving(ranker), body, limits, StageClock())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return peak

    few, many = made_by(500), made_by(5_000)
    assert many - few < 4_500 * 8  # octets; a list of them would take 40 for each
