"""The cache of user records: what is kept, what goes, what is counted, and what threads do to it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.user_cache import UserCache


def features(number: int) -> Any:
    return np.array([number, 7], np.int32)


def record(number: int) -> Any:
    return np.full(3, number, np.float32)


def made(entries: int) -> tuple[UserCache, Counter[str]]:
    counted: Counter[str] = Counter()
    return UserCache(entries, on_hit=lambda: counted.update(["hit"]), on_miss=lambda: counted.update(["miss"])), counted


def test_what_was_put_is_found_under_its_release_and_its_features_alone() -> None:
    cache, counted = made(4)
    cache.put("r1", features(1), record(1))
    np.testing.assert_array_equal(cache.get("r1", features(1)), record(1))
    assert cache.get("r2", features(1)) is None
    assert cache.get("r1", features(2)) is None
    assert counted == {"hit": 1, "miss": 2}


def test_nobody_changes_a_record_that_is_kept() -> None:
    cache, _ = made(1)
    output = np.zeros((1, 3), np.float32)
    cache.put("r1", features(1), output[0])
    output[:] = 9
    found = cache.get("r1", features(1))
    assert found is not None
    assert found.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_the_entry_that_was_not_used_longest_goes(entries: int, steps: list[tuple[bool, int]]) -> None:
    cache, _ = made(entries)
    known: list[int] = []  # in the order of their last use
    for puts, number in steps:
        if puts or number in known:
            known = [other for other in known if other != number] + [number]
        if puts:
            cache.put("r1", features(number), record(number))
            known = known[-entries:]
        else:
            assert (cache.get("r1", features(number)) is not None) == (number in known)
        assert len(cache) == len(known)


def test_a_cache_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        made(0)


def test_threads_that_share_a_cache_find_what_belongs_to_their_features() -> None:
    cache, _ = made(5)

    def work(number: int) -> bool:
        found = cache.get("r1", features(number % 9))
        if found is None:
            cache.put("r1", features(number % 9), record(number % 9))
        return found is None or found.tolist() == [number % 9] * 3

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(5000)))
    assert len(cache) == 5
