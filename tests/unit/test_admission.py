"""Permits: so many at work, so many waiting in the order of their coming, the rest refused at once."""

from __future__ import annotations

import asyncio
from time import monotonic_ns, perf_counter_ns

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.admission import Admission, Permit
from service.errors import Busy, DeadlineExceeded


class Crowd:
    """Requests that work until they are let go, and a record of who came in when."""

    def __init__(self, *, in_flight: int, queue: int) -> None:
        self.admission = Admission(in_flight=in_flight, queue=queue)
        self.entered: list[int] = []
        self.refused: list[int] = []
        self.most = 0
        self.go = asyncio.Event()

    async def come(self, number: int) -> None:
        try:
            async with self.admission.admit(perf_counter_ns()):
                self.entered.append(number)
                self.most = max(self.most, self.admission.working)
                await self.go.wait()
        except Busy:
            self.refused.append(number)


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 15))
def test_no_more_than_the_bounds_ever_work_or_wait(in_flight: int, queue: int, comers: int) -> None:
    async def scene() -> None:
        crowd = Crowd(in_flight=in_flight, queue=queue)
        async with asyncio.TaskGroup() as group:
            for number in range(comers):
                group.create_task(crowd.come(number))
            await _turns(4)
            assert len(crowd.refused) == max(0, comers - queue)  # all came in one turn: all stood in the queue
            assert len(crowd.entered) == min(comers, queue, in_flight)
            crowd.go.set()
        assert crowd.entered == [n for n in range(comers) if n not in crowd.refused]
        assert crowd.most <= in_flight
        assert (crowd.admission.working, crowd.admission.waiting) == (0, 0)

    asyncio.run(scene())


def test_those_who_wait_leave_room_when_they_go_in() -> None:
    async def scene() -> None:
        crowd = Crowd(in_flight=1, queue=2)
        async with asyncio.TaskGroup() as group:
            for number in range(2):
                group.create_task(crowd.come(number))
            await _turns(4)
            group.create_task(crowd.come(2))
            group.create_task(crowd.come(3))
            await _turns(4)
            assert crowd.refused == [3]
            crowd.go.set()
        assert crowd.entered == [0, 1, 2]

    asyncio.run(scene())


def test_a_refusal_says_what_to_do() -> None:
    async def scene() -> None:
        admission = Admission(in_flight=1, queue=1)
        admission.waiting = 1
        with pytest.raises(Busy, match="RANKTOWER_MAX_QUEUE") as caught:
            async with admission.admit(0):
                pass
        assert caught.value.retry_after_s >= 1

    asyncio.run(scene())


def test_a_waiter_that_gives_up_frees_its_place() -> None:
    async def scene() -> None:
        crowd = Crowd(in_flight=1, queue=1)
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.come(0))
            await _turns(4)
            waiter = group.create_task(crowd.come(1))
            await _turns(4)
            waiter.cancel()
            await _turns(4)
            assert crowd.admission.waiting == 0
            group.create_task(crowd.come(2))
            await _turns(4)
            crowd.go.set()
        assert crowd.entered == [0, 2]

    asyncio.run(scene())


def test_a_slot_is_free_again_after_an_error() -> None:
    async def scene() -> None:
        admission = Admission(in_flight=1, queue=1)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                async with admission.admit(0):
                    raise ZeroDivisionError
        assert admission.working == 0

    asyncio.run(scene())


def test_a_permit_knows_when_its_request_is_late() -> None:
    permit = Permit(perf_counter_ns() - 5_000_000)
    permit.check_deadline(None)
    permit.check_deadline(60_000)
    with pytest.raises(DeadlineExceeded, match="deadline_ms is 4"):
        permit.check_deadline(4)


def test_the_end_of_a_deadline_counts_from_the_arrival() -> None:
    permit = Permit(perf_counter_ns() - 70_000_000_000)
    assert permit.ends_ns(None) == 0
    assert permit.ends_ns(100_000) - monotonic_ns() == pytest.approx(30e9, abs=5e9)
    assert permit.ends_ns(50_000) < monotonic_ns()
