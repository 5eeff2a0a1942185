from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.datasets import lists
from model.datasets.lists import TEST, TRAIN, VALID

Ints = NDArray[np.int64]
HOUR = 100

events = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400), st.integers(0, 5)), min_size=1, max_size=60)
largest = st.integers(1, 7)


def columns(rows: list[tuple[int, int, int]]) -> tuple[Ints, Ints, Ints]:
    user, when, third = np.array(rows, np.int64).T
    return user, when, third


def test_an_event_at_the_moment_itself_belongs_to_the_later_side() -> None:
    assert lists.split_at(np.array([1, 9, 10, 11, 19, 20, 21]), 10, 20).tolist() == [0, 0, 1, 1, 1, 2, 2]


@given(events)
def test_fractions_divide_time_strictly(rows: list[tuple[int, int, int]]) -> None:
    _, when, _ = columns(rows)
    split = lists.split_at(when, *lists.moments_of_fractions(when, 0.2, 0.3))
    for early, late in ((TRAIN, VALID), (TRAIN, TEST), (VALID, TEST)):
        if (split == early).any() and (split == late).any():
            assert when[split == early].max() < when[split == late].min()


def test_fractions_give_the_shares_that_they_name() -> None:
    when = np.random.default_rng(0).permutation(1000)
    split = lists.split_at(when, *lists.moments_of_fractions(when, 0.1, 0.2))
    assert np.bincount(split).tolist() == [700, 100, 200]


@given(events)
def test_each_user_is_divided_in_order(rows: list[tuple[int, int, int]]) -> None:
    user, when, _ = columns(rows)
    split = lists.split_each_user(user, when, 0.2, 0.2)
    for one in np.unique(user):
        mine = user == one
        assert (np.diff(split[mine][np.argsort(when[mine], kind="stable")]) >= 0).all()
        assert (split[mine] == TEST).sum() == np.floor(mine.sum() * 0.2 + 0.5)


def test_a_hash_split_gives_the_shares_that_it_names_and_does_not_move() -> None:
    user, item = (part.ravel() for part in np.meshgrid(np.arange(200), np.arange(200)))
    ids = np.arange(1000, 1200)
    split = lists.split_by_hash(lists.pair_hashes(ids, ids, user, item), 0.1, 0.2)
    np.testing.assert_allclose(np.bincount(split) / len(split), [0.7, 0.1, 0.2], atol=0.01)
    turned = np.random.default_rng(0).permutation(200)  # the same users in another order of the table
    moved = lists.split_by_hash(lists.pair_hashes(ids[turned], ids, np.argsort(turned)[user], item), 0.1, 0.2)
    np.testing.assert_array_equal(split, moved)


def test_a_pair_and_its_mirror_have_different_hashes() -> None:
    ids = np.arange(50)
    user, item = (part.ravel() for part in np.meshgrid(ids, ids))
    hashes = lists.pair_hashes(ids, ids, user, item)
    assert len(np.unique(hashes)) == len(hashes)


def test_ids_of_both_types_can_be_hashed() -> None:
    names = np.array(["a", "b", "ö"], object)
    hashes = lists.pair_hashes(names, np.array([7]), np.array([0, 1, 2]), np.zeros(3, np.int64))
    assert len(set(hashes.tolist())) == 3


@given(events, largest)
def test_a_derived_request_is_one_sitting_of_one_user_in_one_split(rows: list[tuple[int, int, int]], size: int) -> None:
    user, when, _ = columns(rows)
    split = lists.split_at(when, 250, 320)
    request = lists.derived_requests(user, when, split, HOUR, size)
    assert sorted(set(request.tolist())) == list(range(len(set(request.tolist()))))
    for one in np.unique(request):
        mine = request == one
        assert len(set(user[mine])) == 1
        assert len(set(split[mine])) == 1
        assert mine.sum() <= size
        assert (np.diff(np.sort(when[mine])) <= HOUR).all()


@given(events)
def test_without_a_limit_requests_break_only_at_pauses_and_splits(rows: list[tuple[int, int, int]]) -> None:
    user, when, _ = columns(rows)
    split = lists.split_at(when, 250, 320)
    request = lists.derived_requests(user, when, split, HOUR, len(user))
    order = np.lexsort((when, user))
    together = request[order][1:] == request[order][:-1]
    same = (user[order][1:] == user[order][:-1]) & (split[order][1:] == split[order][:-1])
    np.testing.assert_array_equal(together, same & (np.diff(when[order]) <= HOUR))


def test_a_long_sitting_is_cut_into_equal_parts() -> None:
    zeros = np.zeros(11, np.int64)
    request = lists.derived_requests(zeros, np.arange(11), zeros.astype(np.int8), None, 10)
    assert np.bincount(request).tolist() == [6, 5]
    assert (np.diff(request) >= 0).all()


def test_request_ids_need_to_be_unique_within_a_user_only() -> None:
    request = lists.logged_requests(np.array([0, 0, 1, 1]), np.array([5, 6, 5, 5]))
    assert len(set(request.tolist())) == 3
    assert request[2] == request[3]


def test_a_request_takes_the_split_of_its_first_event() -> None:
    request, when = np.array([0, 0, 1, 1]), np.array([9, 5, 30, 10])
    split = lists.split_of_requests(request, when, np.array([2, 0, 2, 1], np.int8))
    assert split.tolist() == [0, 0, 1, 1]


@given(events)
def test_places_follow_the_splits_within_each_user_and_keep_requests_whole(rows: list[tuple[int, int, int]]) -> None:
    user, when, _ = columns(rows)
    split = lists.split_by_hash(lists.pair_hashes(np.arange(4), np.arange(401), user, when), 0.3, 0.3)
    request = lists.derived_requests(user, when, split, None, 3)
    place = lists.places_in_user(user, split, when, request)
    for one in np.unique(user):
        order = np.argsort(place[user == one])
        assert sorted(place[user == one]) == list(range(len(order)))
        assert (np.diff(split[user == one][order]) >= 0).all()
        _, _, lengths = lists.runs(request[user == one][order])
        assert len(lengths) == len(set(request[user == one].tolist()))


@given(events)
def test_repeats_leave_one_event_for_each_item_of_a_request(rows: list[tuple[int, int, int]]) -> None:
    request, item, stage = columns(rows)
    item = item % 5
    stage = (stage % 3).astype(np.int8)
    kept, group = lists.repeats(request, item, stage)
    assert (np.diff(kept) > 0).all()
    pairs = list(zip(request.tolist(), item.tolist(), strict=True))
    assert sorted(pairs[k] for k in kept) == sorted(set(pairs))
    for row, pair in enumerate(pairs):
        assert pairs[kept[group[row]]] == pair
        assert stage[kept[group[row]]] <= stage[row]


def test_runs_of_nothing_are_none() -> None:
    assert [len(part) for part in lists.runs(np.zeros(0))] == [0, 0, 0]
