"""Pauses between attempts: doubled for the same thing, none for another."""

from __future__ import annotations

import pytest

from cache import retry
from cache.retry import Retry


def test_a_refused_release_is_tried_again_later_and_another_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("cache.retry.monotonic", lambda: now_s[0])
    course = Retry().later("r1")
    assert not course.allows("r1")
    assert course.allows("r2")
    now_s[0] += retry.FIRST_PAUSE_S
    assert course.allows("r1")
    for _ in range(20):
        course = course.later("r1")
    assert course.pause_s == retry.LONGEST_PAUSE_S
    assert course.later("r2").pause_s == retry.FIRST_PAUSE_S
