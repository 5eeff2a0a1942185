"""When to try again what was refused: after a second, then after twice as long each time; anything else at once."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

STORE_PAUSE_S = 1.0  # before asking a store again that did not answer
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before trying a release again that was refused


@dataclass(frozen=True, slots=True)
class Retry:
    """Which release or user table was refused, and when to try it again; another one may be tried at once."""

    name: str | None = None
    at_s: float = 0.0
    pause_s: float = 0.0

    def allows(self, name: str | None) -> bool:
        return name != self.name or monotonic() >= self.at_s

    def later(self, name: str | None) -> Retry:
        again = name == self.name and self.pause_s > 0
        pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S) if again else FIRST_PAUSE_S
        return Retry(name, monotonic() + pause_s, pause_s)
