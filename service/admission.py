"""Let a bounded number of requests in, make a bounded number wait, refuse the rest at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic_ns, perf_counter_ns

from service.errors import Busy, DeadlineExceeded

RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to work on one request. Whoever works takes it as an argument, so that it cannot be forgotten."""

    arrived_ns: int  # perf_counter_ns when the request came

    def check_deadline(self, deadline_ms: int | None) -> None:
        """Raise DeadlineExceeded when more than `deadline_ms` have passed since the request came."""
        spent_ms = (perf_counter_ns() - self.arrived_ns) / 1e6
        if deadline_ms is not None and spent_ms > deadline_ms:
            raise DeadlineExceeded(
                f"{spent_ms:.1f} ms passed before scoring, deadline_ms is {deadline_ms}",
                field="deadline_ms",
                remedy="allow more time, send fewer candidates, or add replicas",
            )

    def left_ms(self, deadline_ms: int) -> float:
        """Milliseconds until the deadline; negative where it has passed."""
        return deadline_ms - (perf_counter_ns() - self.arrived_ns) / 1e6

    def ends_ns(self, deadline_ms: int | None) -> int:
        """When the deadline passes, by time.monotonic_ns, which the kernel reads while it scores; 0 without one."""
        if deadline_ms is None:
            return 0
        return monotonic_ns() + self.arrived_ns + deadline_ms * 1_000_000 - perf_counter_ns()


class Admission:
    """The door of one event loop: `in_flight` requests at work, `queue` waiting in the order of their coming."""

    def __init__(self, *, in_flight: int, queue: int) -> None:
        self._slots = asyncio.Semaphore(in_flight)
        self._queue = queue
        self.waiting = 0
        self.working = 0

    @property
    def has_room(self) -> bool:
        """Whether another request may wait."""
        return self.waiting < self._queue

    @property
    def is_full(self) -> bool:
        """Whether all slots are taken."""
        return self._slots.locked()

    def check_room(self) -> None:
        """Raise Busy when no more requests may wait."""
        if not self.has_room:
            raise Busy(
                f"{self.working} requests are at work and {self.waiting} wait",
                remedy=f"try again after {RETRY_AFTER_S} s, add replicas, or raise RANKTOWER_MAX_QUEUE",
                retry_after_s=RETRY_AFTER_S,
            )

    def admit(self, arrived_ns: int) -> _Admitted:
        """`async with` waits for a slot and holds it. Raises Busy at once when the queue is full."""
        return _Admitted(self, arrived_ns)

    async def enter(self) -> None:
        """Wait for a slot and take it, to be given back by `leave`.

        Requests that came in the same turn of the event loop all stand in the queue before the first is let in, because
        work runs inline and a loop that never turns would never see a crowd.
        """
        self.check_room()
        self.waiting += 1
        try:
            await asyncio.sleep(0)
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.working += 1

    def leave(self) -> None:
        """Give the slot to the next."""
        self.working -= 1
        self._slots.release()


class _Admitted:
    """One stay behind the door. A class, because contextlib's generators cost 2 us more."""

    __slots__ = ("_admission", "_arrived_ns")

    def __init__(self, admission: Admission, arrived_ns: int) -> None:
        self._admission, self._arrived_ns = admission, arrived_ns

    async def __aenter__(self) -> Permit:
        await self._admission.enter()
        return Permit(self._arrived_ns)

    async def __aexit__(self, *error: object) -> None:
        self._admission.leave()
