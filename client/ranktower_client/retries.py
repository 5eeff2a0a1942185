"""When a failed attempt is tried again: full jitter, never before Retry-After, never past the deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from ranktower_client.errors import RETRIED, DeadlineExceeded, RankTowerError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently. Every call only reads, so trying again is always safe."""

    retries: int = 2
    first_pause_s: float = 0.02
    longest_pause_s: float = 1.0

    def pause_s(self, attempt: int, retry_after_s: float | None, jitter: float) -> float:
        """Seconds to wait after failed attempt `attempt` (0 is the first); `jitter` is uniform in [0, 1).

        Without Retry-After: between 0 and first_pause_s * 2**attempt (full jitter). With it: that long, plus up
        to first_pause_s, so that callers told the same do not come back together.
        """
        if retry_after_s is not None:
            return retry_after_s + jitter * self.first_pause_s
        return jitter * min(self.longest_pause_s, self.first_pause_s * 2.0**attempt)


class Course:
    """One call from its first attempt to its end, within `timeout_s` in all."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._jitter = jitter
        self._timeout_s = timeout_s
        self._ends_at = clock() + timeout_s
        self._failed = 0

    def left_s(self) -> float:
        """Seconds that the next attempt may take. Raises DeadlineExceeded when none are left."""
        left_s = self._ends_at - self._clock()
        if left_s <= 0:
            raise DeadlineExceeded(f"no answer within {self._timeout_s:g} s: give the call a longer timeout_s")
        return left_s

    def pause_after(self, error: RankTowerError) -> float:
        """Seconds to wait before the next attempt. Raises `error` when it is final or no time would be left."""
        if not isinstance(error, RETRIED) or self._failed >= self._policy.retries:
            raise error
        pause_s = self._policy.pause_s(self._failed, error.retry_after_s, self._jitter())
        if self._clock() + pause_s >= self._ends_at:
            raise error
        self._failed += 1
        return pause_s
