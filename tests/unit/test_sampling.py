"""Full-stage lists: what a list may hold, what it never holds, and that nothing but the seed decides it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets import taobao
from model.datasets.log import CANDIDATE, IMPRESSION, PADDING, RANDOM, TEST, TRAIN, VALID, Log, read_log
from model.requests import NONE, requests_of
from model.sampling import (
    RECENT,
    SAMPLERS,
    Retrieval,
    Sampler,
    TrainingSet,
    covisited,
    evaluation_lists,
    first_occurrences,
    fit_retrieval,
    item_factors,
    on_offer,
    retrieve,
    taken_pairs,
    tastes,
    training_set,
)
from tests.logs import write_tiny_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("log"), users=50, items=300))


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("staged"), users=40, stages=True))


@pytest.fixture(scope="module")
def data(log: Log) -> TrainingSet:
    return training_set(log, soft=np.where(log.stage == IMPRESSION, 0.5, 0.0).astype(np.float32))


def pairs_taken(log: Log, events: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(log.user[events].tolist(), log.item[events].tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("full", {IMPRESSION, CANDIDATE, RANDOM}),
        ("without-random", {IMPRESSION, CANDIDATE}),
        ("without-candidates", {IMPRESSION, RANDOM}),
        ("impressions", {IMPRESSION}),
    ],
)
def test_each_sampler_draws_its_stages(data: TrainingSet, name: str, stages: set[int]) -> None:
    rows = np.arange(len(data))
    lists = SAMPLERS[name](candidates=5, random=7).draw(data, rows, np.random.default_rng(0))
    assert set(np.unique(lists.stage).tolist()) - {PADDING} == stages
    counts = [(lists.stage == stage).sum(axis=1).max() for stage in (CANDIDATE, RANDOM)]
    assert counts[0] <= 5
    assert counts[1] <= 7


@pytest.mark.parametrize("name", SAMPLERS)
def test_impressions_keep_their_grades_and_soft_labels(log: Log, data: TrainingSet, name: str) -> None:
    lists = SAMPLERS[name]().draw(data, np.arange(len(data)), np.random.default_rng(0))
    shown = lists.stage == IMPRESSION
    assert shown.sum() == (data.requests.end - data.requests.first).sum()
    assert lists.grade[~shown].max(initial=0) == 0
    assert lists.soft[~shown].max(initial=0) == 0
    assert (lists.soft[shown] == 0.5).all()
    first = data.requests.first[0]
    assert lists.item[0][shown[0]].tolist() == log.item[first : data.requests.end[0]].tolist()


def test_a_taken_item_is_never_a_drawn_negative(log: Log, data: TrainingSet) -> None:
    taken = pairs_taken(log, (log.grade > 0) & (log.split == TRAIN))
    lists = Sampler(candidates=40, random=80).draw(data, np.arange(len(data)), np.random.default_rng(1))
    list_of, place = np.nonzero((lists.stage == CANDIDATE) | (lists.stage == RANDOM))
    drawn = set(zip(data.requests.user[list_of].tolist(), lists.item[list_of, place].tolist(), strict=True))
    assert len(drawn) > 1000
    assert not drawn & taken


def test_no_item_stands_twice_in_a_list(data: TrainingSet) -> None:
    lists = Sampler(candidates=40, random=80).draw(data, np.arange(len(data)), np.random.default_rng(2))
    for items, mask in zip(lists.item, lists.mask, strict=True):
        assert len(set(items[mask].tolist())) == mask.sum()


def test_random_items_are_drawn_anew_but_repeat_under_one_seed(data: TrainingSet) -> None:
    rows = np.arange(8)
    first, again, other = (Sampler().draw(data, rows, np.random.default_rng(seed)).digest for seed in (3, 3, 4))
    assert first == again != other


def test_popularity_power_prefers_what_was_taken_often(data: TrainingSet) -> None:
    def mean_weight(power: float) -> float:
        lists = Sampler(candidates=0, random=60, power=power).draw(data, np.arange(len(data)), np.random.default_rng(5))
        taken = dict(zip(data.offered.tolist(), data.weight.tolist(), strict=True))
        return float(np.mean([taken[item] for item in lists.item[lists.stage == RANDOM].tolist()]))

    assert mean_weight(0.75) > 1.2 * mean_weight(0.0)


def test_an_item_that_only_later_events_name_is_no_negative_of_earlier_lists(log: Log) -> None:
    later = with_new_items(log)
    assert set(range(290, 300)).isdisjoint(on_offer(later))
    data = training_set(later)
    rows = np.arange(len(data))
    for power in (0.0, 0.75):
        lists = Sampler(random=250, power=power).draw(data, rows, np.random.default_rng(0))
        assert lists.item[lists.mask].max() < 290
    _, lists = evaluation_lists(later, VALID)
    assert set(np.unique(lists.item[lists.mask & (lists.stage != IMPRESSION)])) <= set(on_offer(later, VALID).tolist())
    _, lists = evaluation_lists(later, TEST)
    assert set(range(290, 300)) <= set(np.unique(lists.item[lists.stage == RANDOM]))  # all are named by then


def test_lists_can_be_kept_free_of_items_that_training_never_saw(log: Log) -> None:
    later = with_new_items(log)
    requests, lists = evaluation_lists(later, TEST, new_items=False)
    everything, found = evaluation_lists(later, TEST)
    assert lists.item[lists.mask].max() < 290 <= found.item[found.mask].max()
    np.testing.assert_array_equal(requests.first, everything.first)
    old = found.grade * (found.item < 290)
    np.testing.assert_array_equal((lists.grade > 0).sum(axis=1), (old > 0).sum(axis=1))


def with_new_items(log: Log) -> Log:
    """The log with its last ten items in no event but some of the test's."""
    item, test = log.item % 290, np.flatnonzero(log.split == TEST)
    item[test[::7]] = np.resize(np.arange(290, 300), len(test[::7]))
    return replace(log, item=item)


def test_nothing_named_is_all_on_offer(log: Log) -> None:
    assert len(on_offer(replace(log, split=np.full(len(log), TEST, np.int8)))) == len(log.items)


def test_without_times_retrieval_asks_with_what_the_user_took_in_training(tmp_path: Path) -> None:
    log = read_log(write_pairs(tmp_path, users=30, items=40, pairs=300))
    requests = requests_of(log, TRAIN)
    known = tastes(log, requests)
    for user, asked in zip(requests.user.tolist(), known.tolist(), strict=True):
        taken = log.item[(log.split == TRAIN) & (log.grade > 0) & (log.user == user)]
        assert [item for item in asked if item != NONE] == taken[:RECENT].tolist()


def write_pairs(folder: Path, *, users: int, items: int, pairs: int) -> Path:
    """A log of Taobao's form: pairs without times, divided by a hash."""
    rng = np.random.default_rng(0)
    pair = np.unique(rng.integers(0, users * items, pairs))
    source = folder / "source"
    source.mkdir()
    view = np.ones(len(pair), np.int8)
    cart = rng.random(len(pair)) < 0.3
    columns = {"user_id": pair // items, "item_id": pair % items, "view": view, "cart": cart, "buy": cart & False}
    pq.write_table(
        pa.table({name: np.asarray(column, np.int64) for name, column in columns.items()}), source / taobao.PAIRS
    )
    return taobao.convert(source, folder / "log")


def test_lists_without_a_positive_are_not_trained_on(log: Log, data: TrainingSet) -> None:
    assert ((data.logged.grade > 0).any(axis=1)).all()
    assert len(data) < len(requests_of(log, TRAIN))


def test_impressions_are_thinned_to_the_bound_and_positives_stay(data: TrainingSet) -> None:
    lists = Sampler(impressions=3, candidates=0, random=0).draw(data, np.arange(len(data)), np.random.default_rng(0))
    assert lists.mask.sum(axis=1).max() == 3
    wanted = np.minimum((data.logged.grade > 0).sum(axis=1), 3)
    assert ((lists.grade > 0).sum(axis=1) == wanted).all()


def test_retrieval_follows_the_history_and_falls_back_to_popularity() -> None:
    factors = np.eye(6, dtype=np.float32)[:, :4]
    retrieval = Retrieval(factors=factors, popular=np.array([5, 4, 3, 2, 1, 0], dtype=np.int32))
    history = np.array([[2, NONE, NONE], [NONE, NONE, NONE]], dtype=np.int32)
    found = retrieve(retrieval, history, 2)
    assert found[0, 0] == 2
    assert found[1].tolist() == [5, 4]


def test_factors_bring_together_what_the_same_users_take() -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(80), 6)
    item = np.where(user % 2 == 0, rng.integers(0, 10, len(user)), rng.integers(10, 20, len(user)))
    factors = item_factors(user, item, 20, dim=4)
    similarity = factors @ factors.T
    within = similarity[:10, :10].mean() + similarity[10:, 10:].mean()
    assert within > 10 * abs(similarity[:10, 10:].mean())


def test_factors_of_few_items_are_the_same_every_time() -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 45, 120), rng.integers(0, 29, 120)  # 29 items taken of 40, and 32 factors
    first, *others = (item_factors(user, item, 40) for _ in range(3))
    assert first[:29].any()
    assert not first[29:].any()
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_retrieval_learns_from_training_alone(log: Log) -> None:
    later = log.split != TRAIN
    shuffled = replace(log, item=np.where(later, np.roll(log.item, 7), log.item))
    np.testing.assert_array_equal(fit_retrieval(log).factors, fit_retrieval(shuffled).factors)
    np.testing.assert_array_equal(covisited(log), covisited(shuffled))


def test_too_small_a_log_has_zero_factors() -> None:
    assert not item_factors(np.array([0]), np.array([1]), 3).any()


@pytest.mark.parametrize("split", [VALID, TEST])
def test_evaluation_lists_are_frozen_full_and_hold_no_taken_negative(log: Log, split: int) -> None:
    requests, lists = evaluation_lists(log, split, size=100)
    assert lists.digest == evaluation_lists(log, split, size=100)[1].digest
    assert lists.digest != evaluation_lists(log, split, size=100, seed=1)[1].digest
    assert (lists.mask.sum(axis=1) == 100).all()
    taken = pairs_taken(log, log.grade > 0)
    for user, items, stage in zip(requests.user.tolist(), lists.item, lists.stage, strict=True):
        assert len(set(items.tolist())) == 100
        assert not {(user, item) for item in items[stage != IMPRESSION].tolist()} & taken


def test_evaluation_lists_mix_candidates_and_random_items(log: Log) -> None:
    _, lists = evaluation_lists(log, TEST, size=100)
    room = 100 - (lists.stage == IMPRESSION).sum(axis=1)
    candidates, random = (np.mean((lists.stage == stage).sum(axis=1) / room) for stage in (CANDIDATE, RANDOM))
    assert candidates == pytest.approx(0.5, abs=0.1)
    assert random == pytest.approx(0.5, abs=0.1)
    _, only = evaluation_lists(log, TEST, size=100, random_only=True)
    assert not (only.stage == CANDIDATE).any()


def test_evaluation_lists_take_what_a_small_catalogue_allows(tmp_path: Path) -> None:
    small = read_log(write_tiny_log(tmp_path, users=30, items=40))
    _, lists = evaluation_lists(small, TEST)
    assert 25 < lists.mask.sum(axis=1).mean() <= 40


def test_logged_stages_switch_simulation_off(staged: Log) -> None:
    assert staged.has_stages
    logged = pairs_taken(staged, np.ones(len(staged.user), dtype=bool))
    data = training_set(staged)
    assert data.pool is None
    rows = np.arange(len(data))
    for requests, lists in (
        (data.requests, Sampler().draw(data, rows, np.random.default_rng(0))),
        evaluation_lists(staged, TEST),
    ):
        row, place = np.nonzero(lists.mask)
        assert set(np.unique(lists.stage).tolist()) >= {IMPRESSION, CANDIDATE, RANDOM}
        assert set(zip(requests.user[row].tolist(), lists.item[row, place].tolist(), strict=True)) <= logged


def test_an_unshown_row_that_its_user_takes_is_no_logged_negative(staged: Log) -> None:
    """As a drawn one: takes in training for training lists, ever for evaluation lists."""
    took_in_training = pairs_taken(staged, (staged.grade > 0) & (staged.split == TRAIN))
    ever = pairs_taken(staged, staged.grade > 0)
    data = training_set(staged)
    drawn = Sampler().draw(data, np.arange(len(data)), np.random.default_rng(0))
    for requests, lists, taken, split in (
        (data.requests, drawn, took_in_training, TRAIN),
        (*evaluation_lists(staged, TEST), ever, TEST),
    ):
        row, place = np.nonzero((lists.stage != IMPRESSION) & lists.mask & (lists.grade == 0))
        unshown = set(zip(requests.user[row].tolist(), lists.item[row, place].tolist(), strict=True))
        logged = pairs_taken(staged, (staged.split == split) & (staged.stage != IMPRESSION))
        assert logged & taken  # the log holds some
        assert len(unshown) > 100
        assert not unshown & taken
    assert pairs_taken(staged, staged.stage == IMPRESSION) & took_in_training  # shown ones stay, whatever came later


def test_a_label_of_a_later_split_leaves_training_lists_unchanged(staged: Log) -> None:
    later = (staged.split != TRAIN) & (staged.stage == IMPRESSION)
    flipped = replace(staged, grade=np.where(later, 3 - staged.grade, staged.grade).astype(np.int8))
    assert training_set(staged).logged.digest == training_set(flipped).logged.digest


def test_an_evaluation_request_of_which_nothing_is_left_is_left_out(staged: Log) -> None:
    requests = requests_of(staged, TEST)
    first, end = int(requests.first[0]), int(requests.end[0])
    stage, grade, user, item = (getattr(staged, name).copy() for name in ("stage", "grade", "user", "item"))
    stage[first:end], grade[first:end] = CANDIDATE, 0
    other = np.flatnonzero(staged.split == TRAIN)[: end - first]
    user[other], item[other], grade[other] = user[first], item[first:end], 1  # all of it is taken elsewhere
    changed = replace(staged, stage=stage, grade=grade, user=user, item=item)
    kept, lists = evaluation_lists(changed, TEST)
    assert len(kept) == len(lists) == len(requests) - 1
    assert lists.mask.any(axis=1).all()


@pytest.mark.parametrize(("name", "absent"), [("without-random", RANDOM), ("without-candidates", CANDIDATE)])
def test_ablations_hold_with_logged_stages_too(staged: Log, name: str, absent: int) -> None:
    data = training_set(staged)
    lists = SAMPLERS[name]().draw(data, np.arange(len(data)), np.random.default_rng(0))
    assert not (lists.stage == absent).any()


def test_first_occurrences_skip_repeats_and_gaps() -> None:
    items = np.array([[3, NONE, 3, 1, NONE, 1], [2, 2, 2, 2, 2, 0]], dtype=np.int32)
    np.testing.assert_array_equal(first_occurrences(items), [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]])


def test_taken_pairs_answer_by_user_and_item(log: Log) -> None:
    taken = taken_pairs(log, np.ones(len(log.user), dtype=bool))
    expected = pairs_taken(log, log.grade > 0)
    users = np.arange(len(log.users))
    items = np.broadcast_to(np.arange(len(log.items)), (len(users), len(log.items)))
    found = {(int(u), int(i)) for u, i in zip(*np.nonzero(taken.has(users, items)), strict=True)}
    assert found == expected
    assert not taken.has(np.array([0]), np.array([[NONE]])).any()
