"""Work side by side: results in order, few at a time, an error where it belongs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cache.parallel import in_order

WITHIN_S = 30.0


def test_results_come_in_order_whoever_is_first() -> None:
    second = threading.Event()

    def work(value: int) -> int:
        if value == 0:
            assert second.wait(WITHIN_S)  # the first ends after the second
        if value == 1:
            second.set()
        return 10 * value

    assert list(in_order(work, range(9), threads=2)) == [10 * value for value in range(9)]
    assert list(in_order(work, [], threads=2)) == []


def test_no_more_is_taken_than_threads_and_their_results_that_wait() -> None:
    taken: list[int] = []

    def values() -> Iterator[int]:
        for value in range(100):
            taken.append(value)
            yield value

    results = in_order(lambda value: value, values(), threads=3)
    for value in range(20):
        assert next(results) == value
        assert len(taken) <= value + 6
    results.close()
    assert len(taken) < 30


def test_the_first_error_ends_it_and_results_before_it_are_kept() -> None:
    begun: list[int] = []

    def work(value: int) -> int:
        begun.append(value)
        if value >= 5:
            raise ValueError(f"value {value}")
        return value

    results = in_order(work, range(1000), threads=2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="value 5"):
        next(results)
    assert max(begun) < 12
