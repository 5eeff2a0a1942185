"""The whole answer without HTTP, on tiny real releases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import SnapshotError
from cache.release import ITEMS, seal_release
from kernel import engine
from kernel.reference import score_oracle
from model.errors import BundleError, RankTowerError
from service.errors import ReleaseError, RequestError, RetrievalOff
from service.ranker import Ranker, Ranking
from service.telemetry import STAGES, StageClock
from service.user_cache import UserCache
from service.wire import RankRequest, RetrieveRequest
from tests.graphs import write_tower
from tests.tiny_releases import HEADS, TinyRelease, tiny_release, tiny_spec, write_table, write_users

Rank = RankRequest[int, int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return tiny_release(tmp_path_factory.mktemp("made"), calibration={"a": 0.1, "b": -1.0}, index="flat")


@pytest.fixture(scope="module")
def ranker(made: TinyRelease) -> Ranker:
    return Ranker.open(made.folder, made.users, retrieval=True)


def oracle(ranker: Ranker, row: dict[str, Any], ids: list[Any]) -> np.ndarray:
    """float64 scores, or a graph's own, of known items for a user encoded from this row of raw features."""
    record = ranker.bundle.user_tower().run(ranker.spec.encode_row("user", row)[None])[0]
    records = ranker.table.records(ranker.items.lookup(ids))
    if ranker.head.kind == "onnx":
        return ranker.bundle.scorer()(record, records)
    return score_oracle(ranker.head, record, records)


def assert_scores(ranking: Ranking, expected: dict[Any, float]) -> None:
    known = [(i, s) for i, s in zip(ranking.ids, ranking.scores.tolist(), strict=True) if s == s]
    assert [s for _, s in known] == pytest.approx([expected[i] for i, _ in known], rel=1e-5, abs=1e-4)


STORED_3 = {"user_id": 4, "age": 24.0, "tastes": ["jazz", "folk"], "history": [103, 104, 105]}  # user 4 in the table


@pytest.mark.parametrize("ids", ["int", "string"])
@pytest.mark.parametrize("kind", HEADS)
def test_scores_equal_the_oracle(tmp_path: Path, kind: str, ids: Any) -> None:
    release = tiny_release(tmp_path, kind=kind, ids=ids, seed=3)
    ranker = Ranker.open(release.folder, release.users)
    ranking = ranker.rank(RankRequest(user_id=release.user_ids[3], candidates=release.item_ids, top_k=1000))
    stored = {**STORED_3, "user_id": release.user_ids[3], "history": release.item_ids[3:6]}
    assert_scores(ranking, dict(zip(release.item_ids, oracle(ranker, stored, release.item_ids).tolist(), strict=True)))
    assert sorted(ranking.ids) == sorted(release.item_ids)
    assert (np.diff(ranking.scores) <= 0).all()
    assert ranking.release == ranker.release


# --- candidates


def test_no_candidates_give_an_empty_answer(ranker: Ranker) -> None:
    ranking = ranker.rank(Rank(candidates=[], explain=True))
    assert (ranking.ids, ranking.missing.tolist(), ranking.candidates) == ([], [], 0)
    assert len(ranking.scores) == 0


def test_k_is_clamped_to_what_there_is(ranker: Ranker) -> None:
    assert len(ranker.rank(Rank(candidates=[100, 101], top_k=2**63 - 1)).ids) == 2
    assert ranker.rank(Rank(candidates=[100, 101], top_k=0)).ids == []
    assert len(ranker.rank(Rank(candidates=[100] * 300)).ids) == 100


def test_unknown_items_come_last_in_the_order_of_the_caller(ranker: Ranker) -> None:
    ranking = ranker.rank(Rank(candidates=[9, 100, 7, 101, 8]))
    assert ranking.ids[2:] == [9, 7, 8] == ranking.missing.tolist()
    assert ranking.positions is not None
    assert ranking.positions.tolist()[2:] == [0, 2, 4]
    assert np.isnan(ranking.scores[2:]).all()
    assert ranking.probabilities is not None
    assert np.isnan(ranking.probabilities[2:]).all()


def test_unknown_items_take_only_the_places_that_are_left(ranker: Ranker) -> None:
    assert ranker.rank(Rank(candidates=[9, 100, 7], top_k=2)).ids == [100, 9]
    assert ranker.rank(Rank(candidates=[9, 100, 7], top_k=1)).ids == [100]


def test_dropped_items_are_still_reported(ranker: Ranker) -> None:
    ranking = ranker.rank(Rank(candidates=[9, 100, 9], on_missing="drop"))
    assert (ranking.ids, ranking.missing.tolist()) == ([100], [9, 9])


@pytest.mark.parametrize(("on_missing", "ids"), [("last", [9, 7]), ("drop", []), (None, [9, 7])])
def test_all_candidates_may_be_unknown(ranker: Ranker, on_missing: Any, ids: list[int]) -> None:
    ranking = ranker.rank(Rank(candidates=[9, 7], on_missing=on_missing, explain=True))
    assert (ranking.ids, ranking.missing.tolist()) == (ids, [9, 7])


def test_an_unknown_item_can_be_an_error_that_names_it(ranker: Ranker) -> None:
    with pytest.raises(RequestError, match=r"unknown to .* \(the first of 2 such among 3 candidates\)") as caught:
        ranker.rank(Rank(candidates=[100, 9, 8], on_missing="error"))
    assert caught.value.field == "candidates[1]"
    with pytest.raises(RequestError, match=r"unknown to .* \(the only one among 3 candidates\)"):
        ranker.rank(Rank(candidates=[100, 9, 101], on_missing="error"))


def test_duplicates_are_scored_once_for_each_time_they_come(ranker: Ranker) -> None:
    ranking = ranker.rank(Rank(candidates=[100, 101, 100]))
    assert sorted(ranking.ids) == [100, 100, 101]
    twice = [p for i, p in zip(ranking.ids, ranking.positions.tolist(), strict=True) if i == 100]  # type: ignore[union-attr]
    assert twice == [0, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(95, 112), max_size=30), st.integers(0, 40), st.sampled_from(["last", "drop"]))
def test_the_answer_is_a_stable_sort_of_the_request(
    ranker: Ranker, candidates: list[int], k: int, on_missing: Any
) -> None:
    alone = {i: float(ranker.rank(Rank(candidates=[i])).scores[0]) for i in set(candidates) if i >= 100}
    known = sorted((p for p, i in enumerate(candidates) if i >= 100), key=lambda p: -alone[candidates[p]])
    unknown = [p for p, i in enumerate(candidates) if i < 100]
    expected = (known + (unknown if on_missing == "last" else []))[:k]
    ranking = ranker.rank(Rank(candidates=candidates, top_k=k, on_missing=on_missing))
    assert ranking.positions is not None
    assert ranking.positions.tolist() == expected
    assert ranking.missing.tolist() == [candidates[p] for p in unknown]


# --- the user


@pytest.mark.parametrize(
    ("request_", "row"),
    [
        (Rank(candidates=[]), {}),
        (Rank(candidates=[], user_id=4), STORED_3),
        (Rank(candidates=[], user_id=4, user={"age": 50}), {**STORED_3, "age": 50}),
        (Rank(candidates=[], user_id=4, user={"age": None}), {**STORED_3, "age": None}),
        (Rank(candidates=[], user_id=4, history=[110]), {**STORED_3, "history": [110]}),
        (Rank(candidates=[], user_id=4, history=[]), {**STORED_3, "history": []}),
        (Rank(candidates=[], user_id=4, context={"hour": 3}), {**STORED_3, "hour": 3}),
        (Rank(candidates=[], user_id=4, user={"user_id": 5}), {**STORED_3, "user_id": 5}),
        (Rank(candidates=[], user_id=999, user={"age": 50}), {"user_id": 999, "age": 50}),
        (Rank(candidates=[], user={"tastes": ["rock", None, "polka", "jazz"]}), {"tastes": ["rock", "polka", "jazz"]}),
    ],
)
def test_what_is_sent_overrides_the_table_field_by_field(ranker: Ranker, request_: Rank, row: dict[str, Any]) -> None:
    candidates = list(range(100, 120))
    asked = RankRequest(**{f: getattr(request_, f) for f in request_.__struct_fields__} | {"candidates": candidates})
    assert_scores(ranker.rank(asked), dict(zip(candidates, oracle(ranker, row, candidates).tolist(), strict=True)))


@pytest.mark.parametrize(("user_id", "known"), [(None, None), (4, True), (999, False)])
def test_the_answer_says_whether_the_user_is_known(ranker: Ranker, user_id: int | None, known: bool | None) -> None:
    assert ranker.rank(Rank(candidates=[100], user_id=user_id)).user_known is known


def test_no_user_table_is_fine(made: TinyRelease) -> None:
    ranking = Ranker.open(made.folder).rank(Rank(candidates=[100], user_id=4))
    assert ranking.user_known is False
    assert ranking.ids == [100]


def test_the_user_table_is_never_written_to(ranker: Ranker) -> None:
    before = np.array(ranker.users.records)  # type: ignore[union-attr]
    ranker.rank(Rank(candidates=[100], user_id=4, user={"age": 99}))
    assert (before == ranker.users.records).all()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sent", "field", "remedy"),
    [
        ({"user": {"agee": 1}}, "user.agee", "did you mean age?"),
        ({"user": {"hour": 1}}, "user.hour", "it is a field of `context`: send it there"),
        ({"context": {"age": 1}}, "context.age", "it is a field of `user`: send it there"),
        ({"context": {"zzz": 1}}, "context.zzz", "use one of: device, hour"),
        ({"user": {"history": []}}, "user.history", "send `history` beside `user`, not in it"),
        ({"user": {"age": "old"}}, "user.age", "send"),
        ({"user": {"age": [1]}}, "user.age", "send"),
        ({"user": {"tastes": "rock"}}, "user.tastes", "send a list"),
        ({"user": {"tastes": [1]}}, "user.tastes", "send"),
        ({"context": {"device": 3}}, "context.device", "send"),
        ({"context": {"hour": "x"}}, "context.hour", "send"),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(ranker: Ranker, sent: Any, field: str, remedy: str) -> None:
    with pytest.raises(RequestError) as caught:
        ranker.rank(Rank(candidates=[100], **sent))
    assert caught.value.field == field
    assert remedy in caught.value.remedy
    with pytest.raises(RequestError) as caught:
        ranker.rank_batch([Rank(candidates=[100]), Rank(candidates=[100], **sent)])
    assert caught.value.field == f"requests[1].{field}"


def test_a_long_value_is_shown_in_part(ranker: Ranker) -> None:
    sents: tuple[Any, ...] = ({"age": "x" * 9_999}, {"y" * 9_999: 1})
    for sent in sents:
        with pytest.raises(RequestError) as caught:
            ranker.rank(Rank(candidates=[100], user=sent))
        assert len(str(caught.value)) < 600


def test_a_history_that_no_field_reads_has_no_effect(tmp_path: Path) -> None:
    spec = replace(tiny_spec(), fields=tuple(f for f in tiny_spec().fields if f.name != "history"))
    ranker = Ranker.open(tiny_release(tmp_path, spec=spec).folder)
    ranking = ranker.rank(Rank(candidates=[100, 101], history=[105]))
    assert ranking.scores.tobytes() == ranker.rank(Rank(candidates=[100, 101])).scores.tobytes()


# --- several at once


def test_a_batch_equals_one_by_one(ranker: Ranker) -> None:
    requests = [
        Rank(candidates=[100, 9, 101], user_id=4, explain=True),
        Rank(candidates=[], user_id=5),
        Rank(candidates=[8, 120], user={"age": 3}, on_missing="drop"),
        Rank(candidates=list(range(100, 160)), user_id=4, top_k=3),
    ]
    for together, request in zip(ranker.rank_batch(requests), requests, strict=True):
        alone = ranker.rank(request)
        assert (together.ids, together.missing.tolist(), together.user_known) == (
            alone.ids,
            alone.missing.tolist(),
            alone.user_known,
        )
        assert together.scores.tobytes() == alone.scores.tobytes()
    assert ranker.rank_batch([]) == []


def test_an_unknown_item_in_a_batch_names_its_request(ranker: Ranker) -> None:
    with pytest.raises(RequestError) as caught:
        ranker.rank_batch([Rank(candidates=[9]), Rank(candidates=[100, 9], on_missing="error")])
    assert caught.value.field == "requests[1].candidates[1]"


# --- explanations, probabilities, stages


def test_an_explanation_adds_up_to_the_score(ranker: Ranker) -> None:
    ranking = ranker.rank(Rank(candidates=[9, *range(100, 130)], explain=True, top_k=40))
    assert ranking.explanation is not None
    heads, similarities = ranking.explanation
    assert heads.shape == similarities.shape == (30, ranker.head.user_heads)
    bias = ranker.table.records(ranker.items.lookup(ranking.ids[:30]))[:, -1]
    assert (ranker.head.scale * similarities.sum(axis=1) + bias).tolist() == pytest.approx(
        ranking.scores[:30].tolist(), rel=1e-5
    )


def test_probabilities_follow_the_calibration(ranker: Ranker, tmp_path: Path) -> None:
    ranking = ranker.rank(Rank(candidates=list(range(100, 160))))
    assert ranking.probabilities is not None
    assert ranking.probabilities.tolist() == pytest.approx(
        (1 / (1 + np.exp(1.0 - 0.1 * ranking.scores))).tolist(), rel=1e-5
    )
    assert Ranker.open(tiny_release(tmp_path).folder).rank(Rank(candidates=[100])).probabilities is None


def test_every_stage_of_the_ranker_is_timed(ranker: Ranker) -> None:
    clock = StageClock()
    ranker.rank(Rank(candidates=[100]), clock)
    spent = clock.spent_ns
    assert all(spent[stage] > 0 for stage in ("encode", "user", "score", "topk"))
    assert set(spent) == set(STAGES)


# --- retrieval


def test_retrieval_finds_the_best_of_the_catalogue(ranker: Ranker, made: TinyRelease) -> None:
    found = ranker.retrieve(RetrieveRequest(user_id=4, top_k=5, explain=True))
    exact = ranker.rank(Rank(user_id=4, candidates=made.item_ids, top_k=5))
    assert found.ids == exact.ids
    assert found.scores.tobytes() == exact.scores.tobytes()
    assert found.positions is None
    assert found.explanation is not None


def test_each_user_head_brings_so_many_items(ranker: Ranker) -> None:
    assert 1 <= ranker.retrieve(RetrieveRequest(user_id=4, per_head=1)).candidates <= ranker.head.user_heads


def test_retrieval_without_an_index_says_how_to_get_one(made: TinyRelease, tmp_path: Path) -> None:
    with pytest.raises(RetrievalOff, match="serve with --retrieval"):
        Ranker.open(made.folder).retrieve(RetrieveRequest())
    with pytest.raises(RetrievalOff, match="publish it with --index flat"):
        Ranker.open(tiny_release(tmp_path).folder, retrieval=True).retrieve(RetrieveRequest())


# --- releases


def test_a_release_is_tried_out_on_its_recorded_requests(made: TinyRelease, tmp_path: Path) -> None:
    assert Ranker.open(made.folder, made.users).warm_up() > 0
    broken = tiny_release(tmp_path, warmup=[{"candidates": [100], "user": {"agee": 1}}])
    with pytest.raises(RequestError, match="agee"):
        Ranker.open(broken.folder).warm_up()


def test_a_tower_that_answers_otherwise_than_its_probe_is_refused(made: TinyRelease) -> None:
    ranker = Ranker.open(made.folder)
    sizes = [made.spec.owner(f).size for f in made.spec.user_fields for _ in range(f.length)]
    path = made.users.with_name("other.onnx")
    write_tower(path, sizes, made.head.user_size, seed=99)
    other = Ranker(ranker.document, ranker.bundle, ranker.items, tower=type(ranker.bundle.user_tower())(path))
    with pytest.raises(BundleError, match="probe"):
        other.check()


def test_a_snapshot_of_another_bundle_is_refused(tmp_path: Path) -> None:
    mine, other = tiny_release(tmp_path / "a", seed=1), tiny_release(tmp_path / "b", seed=2)
    ranker = Ranker.open(mine.folder)
    with pytest.raises(ReleaseError, match="publish the release again"):
        Ranker(ranker.document, ranker.bundle, Ranker.open(other.folder).items)
    with pytest.raises(ReleaseError, match="publish the release again"):
        Ranker(Ranker.open(other.folder).document, ranker.bundle, ranker.items)


@pytest.mark.parametrize("size", [7, 26])
def test_records_of_another_size_are_refused(tmp_path: Path, size: int) -> None:
    release = tiny_release(tmp_path)
    head = replace(release.head, item_heads=1, dim=size - 1)
    write_table(release.folder / ITEMS, "items", release.bundle.id, [1, 2], np.zeros((2, size), np.float32), head)
    seal_release(release.folder, bundle_id=release.bundle.id, head=release.head)
    with pytest.raises(ReleaseError, match=f"int', {size}"):
        Ranker.open(release.folder)


def test_packed_items_under_a_head_that_has_its_own_graph_are_refused(tmp_path: Path) -> None:
    release = tiny_release(tmp_path, kind="onnx")
    packed = replace(HEADS["maxsim"], item_heads=1, dim=release.head.item_size - 1)
    records = np.zeros((2, release.head.item_size), np.float32)
    write_table(release.folder / ITEMS, "items", release.bundle.id, [1, 2], records, packed)
    seal_release(release.folder, bundle_id=release.bundle.id, head=release.head)
    with pytest.raises(
        SnapshotError, match=r"its records are \('quads', 20, 144\) .*, the head reads \('plain', 20, 128\)"
    ):
        Ranker.open(release.folder)


def test_a_user_table_of_another_specification_is_refused(made: TinyRelease, tmp_path: Path) -> None:
    other = write_users(tmp_path / "users.snap", tiny_spec(items=5), made.user_ids, made.item_ids)
    with pytest.raises(ReleaseError, match="publish the users again"):
        Ranker.open(made.folder, other)


def test_a_folder_that_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankTowerError, match=r"release\.json"):
        Ranker.open(tmp_path)


def test_samples_are_distinct_known_ids_and_repeat_with_the_seed(ranker: Ranker, made: TinyRelease) -> None:
    items, users = ranker.sample(20, 5, seed=1)
    assert len({*items}) == 20
    assert {*items} <= {*made.item_ids}
    assert {*users} <= {*made.user_ids}
    assert ranker.sample(20, 5, seed=1) == (items, users)
    assert ranker.sample(20, 5, seed=2) != (items, users)
    assert len(ranker.sample(1000, 1000, seed=0)[0]) == len(made.item_ids)


def test_the_description_names_what_is_served(ranker: Ranker, made: TinyRelease) -> None:
    document = ranker.describe()
    assert document["items"] == len(made.item_ids)
    assert document["fields"] == {"user": ["user_id", "age", "tastes"], "context": ["device", "hour"]}
    assert document["head"]["kind"] == "maxsim"
    assert document["retrieval"]


# --- the cache of user records


def test_a_cached_user_changes_no_answer(made: TinyRelease) -> None:
    looks = {"hit": 0, "miss": 0}
    cache = UserCache(
        2,
        on_hit=lambda: looks.update(hit=looks["hit"] + 1),
        on_miss=lambda: looks.update(miss=looks["miss"] + 1),
    )
    plain = Ranker.open(made.folder, made.users)
    cached = Ranker.open(made.folder, user_cache=cache).with_users(made.users)
    for number in (4, 4, 5, 4):
        request = Rank(user_id=number, candidates=made.item_ids)
        assert cached.rank(request).scores.tobytes() == plain.rank(request).scores.tobytes()
    assert looks == {"hit": 2, "miss": 2}
    assert cached.rank(Rank(user_id=4, candidates=[100], context={"hour": 3})).ids == [100]
    assert looks["miss"] == 3


def test_what_the_deadline_cuts_off_follows_in_the_order_of_the_caller(ranker: Ranker) -> None:
    cut = ranker.rank(Rank(candidates=[9, 101, 100], top_k=5), deadline_ns=1)
    assert (cut.ids, cut.scored, cut.missing.tolist()) == ([9, 101, 100], 0, [])
    assert np.isnan(cut.scores).all()
    assert ranker.rank(Rank(candidates=[9, 101, 100], on_missing="drop"), deadline_ns=1).ids == [9, 101, 100]


# --- heads that are graphs


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    release = tiny_release(tmp_path_factory.mktemp("graph"), kind="onnx", items=700, calibration={"a": 0.1, "b": -1.0})
    return Ranker.open(release.folder, release.users)


def test_a_graph_ranks_a_batch_as_one_by_one(graph: Ranker) -> None:
    candidates = [*range(90, 800), 100, 101]  # ten are unknown, two come twice, three blocks
    requests = [Rank(user_id=user, candidates=candidates[user:], top_k=30) for user in (3, 4, 99)]
    for together, request in zip(graph.rank_batch(requests), requests, strict=True):
        alone = graph.rank(request)
        assert together.scores.tobytes() == alone.scores.tobytes()
        assert (together.ids, together.missing.tolist()) == (alone.ids, alone.missing.tolist())
        assert (alone.scored, alone.candidates) == (
            len(request.candidates) - len(alone.missing),
            len(request.candidates),
        )
        assert alone.probabilities is not None
        np.testing.assert_allclose(alone.probabilities, 1 / (1 + np.exp(1 - 0.1 * alone.scores)), rtol=1e-5)


def test_a_graph_scores_duplicates_alike_and_ties_keep_the_order(graph: Ranker) -> None:
    ranking = graph.rank(Rank(candidates=[100, 101, 102] * 200, top_k=600))
    assert ranking.positions is not None
    for start in (0, 200, 400):
        assert len({*ranking.ids[start : start + 200]}) == 1
        assert (np.diff(ranking.positions[start : start + 200]) == 3).all()


def test_threads_that_share_a_graph_get_the_scores_of_their_own_users(graph: Ranker) -> None:
    requests = [Rank(user_id=1 + number % 12, candidates=list(range(100, 800)), top_k=700) for number in range(48)]
    alone = [graph.rank(request).scores.tobytes() for request in requests[:12]]
    with ThreadPoolExecutor(4) as pool:
        assert [ranking.scores.tobytes() for ranking in pool.map(graph.rank, requests)] == 4 * alone
    assert len({*alone}) == 12


def test_a_graph_stops_at_the_deadline(graph: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1, 1, 9])
    monkeypatch.setattr(engine, "monotonic_ns", lambda: next(moments))
    cut = graph.rank(Rank(candidates=[9, *range(100, 800)], top_k=1000), deadline_ns=5)
    assert (cut.scored, cut.missing.tolist()) == (511, [9])
    assert not np.isnan(cut.scores[:511]).any()
    assert cut.ids[511:] == [9, *range(611, 800)]
    assert np.isnan(cut.scores[511:]).all()


@pytest.mark.parametrize("place", ["", "requests[1]."])
def test_a_graph_explains_nothing_and_says_so(graph: Ranker, place: str) -> None:
    right, wrong = Rank(candidates=[100]), Rank(candidates=[100], explain=True)
    ask = partial(graph.rank_batch, [right, wrong]) if place else partial(graph.rank, wrong)
    with pytest.raises(RequestError, match=r"head of kind onnx.*: leave explain out") as caught:
        ask()
    assert caught.value.field == f"{place}explain"


def test_a_graph_has_no_vectors_to_retrieve_with(graph: Ranker) -> None:
    with pytest.raises(RetrievalOff, match=r"no vectors to search: send candidates to /v1/rank"):
        graph.retrieve(RetrieveRequest())


def test_another_user_table_opens_no_other_graph(graph: Ranker) -> None:
    other = graph.with_users(None)
    assert other.table is graph.table
    assert (graph.describe()["kernel"], graph.describe()["dtype"]) == ("onnxruntime", "f32")
    assert other.warm_up() == other.candidate_ns > 0
    other.check()
