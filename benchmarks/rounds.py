"""Time contestants in turns: every round asks each of them a few times, in another order, with other inputs.

A shared machine is fast for a second and slow for the next. What slows a whole round down cancels out of ratios taken
within it, and whoever comes after one that sweeps the caches is another in every round. Times are those of this process
on its processor, all its threads together: while another process has the core, the clock stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns, process_time_ns
from typing import Any

import numpy as np

from benchmarks.report import median, no_collection, quantile

BURST_US = 3_000.0  # that a contestant has in a round
MOST_CALLS = 16  # of a burst
SHORT_US = 20_000.0  # calls below this are preceded by an untimed one: the one before has swept the caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Somebody to be timed: `call(*draw())`, the draw before the clock starts."""

    fields: Mapping[str, Any]  # of its row in the report: contestant, dtype, level
    call: Callable[..., Any]
    draw: Callable[[], tuple[Any, ...]]

    def once_us(self) -> tuple[float, float]:
        """Microseconds on the processor, and by the clock on the wall."""
        inputs = self.draw()
        wall, begun = perf_counter_ns(), process_time_ns()
        self.call(*inputs)
        ended = process_time_ns()
        return (ended - begun) / 1e3, (perf_counter_ns() - wall) / 1e3


@dataclass(slots=True)
class Times:
    """Microseconds: of every call, and the median of each round."""

    calls: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        return {
            "median_us": median(self.calls),
            "p90_us": quantile(self.calls, 0.9),
            "wall_median_us": median(self.wall),
            "rounds": len(self.rounds),
            "calls": len(self.calls),
        }


def in_rounds(entries: Sequence[Entry], budget_s: float, *, least: int = 5, most: int = 40) -> list[Times]:
    """Times of each entry: as many rounds as the budget has room for, at least and at most so many.

    Where others have the core, too, rounds end when twice the budget has passed on the wall.
    """
    give_up_ns = perf_counter_ns() + int(2e9 * budget_s)
    with no_collection():
        expected = [min(entry.once_us()[0] for _ in range(3)) for entry in entries]
        calls = [int(np.clip(BURST_US / cost, 1, MOST_CALLS)) for cost in expected]
        a_round_us = sum(cost * (count + (cost < SHORT_US)) for cost, count in zip(expected, calls, strict=True))
        found = [Times() for _ in entries]
        rng = np.random.default_rng(0)
        for number in range(int(np.clip(budget_s * 1e6 / max(a_round_us, 1.0), least, most))):
            if number >= least and perf_counter_ns() > give_up_ns:
                break
            for place in rng.permutation(len(entries)).tolist():
                entry, times = entries[place], found[place]
                if expected[place] < SHORT_US:
                    entry.once_us()
                burst = [entry.once_us() for _ in range(calls[place])]
                times.calls += [on_processor for on_processor, _ in burst]
                times.wall += [by_the_wall for _, by_the_wall in burst]
                times.rounds.append(median(times.calls[-len(burst) :]))
    return found
