"""The releases that answer, as one reference: the current one, canaries by the slots of their users, a shadow."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from cache.rollout import SLOTS, Rollout
from service.ranker import Ranker

SALT = b"ranktower canary"  # so that slots follow no other split of users by hash


def slot_of(user_id: int | str) -> int:
    """The slot of a user, the same in every process and on every machine: below SLOTS, all equally likely."""
    digest = blake2b(str(user_id).encode(), digest_size=8, key=SALT).digest()
    return int.from_bytes(digest, "big") * SLOTS >> 64


class Serving:
    """Immutable: build another to change what answers, and swap the reference."""

    def __init__(
        self, current: Ranker, rollout: Rollout | None = None, beside: Mapping[str, Ranker] | None = None
    ) -> None:
        """beside: rankers of the rollout's releases by name; the share of one that lacks stays with `current`."""
        rollout, beside = rollout or Rollout(), beside or {}
        self.current, self.beside = current, beside
        self.canaries = [canary for canary in rollout.canaries if canary.release in beside]
        shadow = rollout.shadow
        self.shadow = None if shadow is None else beside.get(shadow.release)
        self.share = 0.0 if shadow is None or self.shadow is None else shadow.share
        self._rankers = [current, *(beside[canary.release] for canary in self.canaries)]
        self._numbers: bytes | None = None  # of the ranker, by slot
        if self.canaries:
            numbers = bytearray(SLOTS)
            for number, canary in enumerate(self.canaries, 1):
                for first, stop in canary.slots:
                    numbers[first:stop] = bytes([number]) * (stop - first)
            self._numbers = bytes(numbers)

    def of(self, user_id: int | str | None) -> Ranker:
        """Who answers this user; the current one answers whoever does not say who he is."""
        if self._numbers is None or user_id is None:
            return self.current
        return self._rankers[self._numbers[slot_of(user_id)]]

    @property
    def is_alone(self) -> bool:
        """Whether the current release answers everybody and nothing is compared with it."""
        return self._numbers is None and self.shadow is None

    @property
    def candidate_ns(self) -> float:
        """What a candidate costs at most."""
        if self._numbers is None:
            return self.current.candidate_ns
        return max(ranker.candidate_ns for ranker in self._rankers)


def why_not_beside(current: Ranker, other: Ranker) -> str | None:
    """Why one cannot stand in for the other, None where it can: bodies are read before it is known who answers."""
    ours, theirs = ((r.spec.user_id_type, r.spec.item_id_type) for r in (current, other))
    if ours == theirs:
        return None
    return f"release {other.release} has ids of types {theirs}, {current.release} of {ours} (users, items)"
