"""Which releases are live: the current one, canaries with their slots of users, a shadow; and each change, audited.

Users fall into SLOTS slots (service/live.py hashes their ids). A canary owns slots; all others are the current one's.
It takes them from a place that its name gives, so that not the same users try out every release, and keeps them while
it grows: nobody is moved but those whom a change of weight takes in or lets go.
"""

from __future__ import annotations

import getpass
import hashlib
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Literal

import msgspec

from cache.errors import RolloutRefused, StoreError
from cache.release import NAME, utc_now

SLOTS = 10_000  # of users: the smallest weight is 0.0001
MOST_CANARIES = 4  # each is mapped and warm in every worker
HISTORY = 16  # releases that `rollback` can go back through
AUDITED = 1000  # changes that the audit trail holds
WHO_LENGTH = 200  # characters of who made a change

Verb = Literal["activate", "rollback", "canary", "shadow", "promote", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A release that answers the users of its slots."""

    release: str
    slots: tuple[tuple[int, int], ...]  # [first, stop), rising, apart

    @property
    def weight(self) -> float:
        return len(self) / SLOTS

    def __len__(self) -> int:
        return sum(stop - first for first, stop in self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """A release that scores a share of the requests beside the one that answers them."""

    release: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What is live beside the current release."""

    canaries: tuple[Canary, ...] = ()
    shadow: Shadow | None = None

    @property
    def releases(self) -> tuple[str, ...]:
        """Names, each once, canaries first."""
        shadow = () if self.shadow is None else (self.shadow.release,)
        return tuple(dict.fromkeys([*(canary.release for canary in self.canaries), *shadow]))

    def without(self, release: str | None) -> Rollout:
        kept = tuple(canary for canary in self.canaries if canary.release != release)
        gone = self.shadow is not None and self.shadow.release == release
        return Rollout(canaries=kept, shadow=None if gone else self.shadow)


ALONE = Rollout()


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What replicas follow. Either part may change without the other."""

    current: str | None = None
    rollout: Rollout = ALONE

    @property
    def releases(self) -> tuple[str, ...]:
        """Names of all that is live, the current one first."""
        return tuple(dict.fromkeys([*filter(None, [self.current]), *self.rollout.releases]))


NOTHING = Live()


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a change reads and writes, in one step."""

    live: Live = NOTHING
    previous: tuple[str, ...] = ()  # current before, newest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One verb: activate, promote (no release: the one canary), rollback, canary, shadow, abort."""

    verb: Verb
    release: str | None = None
    share: float | None = None  # of users for a canary, of requests for a shadow; 0 ends it


# --- changing --------------------------------------------------------------------------------------------------------


def changed(state: State, change: Change, names: Collection[str]) -> State:
    """The state after a change; `names` are the releases that the store holds. Raises RolloutRefused."""
    return VERBS[change.verb](state, change, names)


def newly_live(before: Live, after: Live, change: Change) -> list[str]:
    """Releases to check before they are live. Going back does not wait for that."""
    if change.verb == "rollback":
        return []
    named = [change.release] if change.release is not None and change.share != 0 else []
    moved = [after.current] if after.current is not None and after.current != before.current else []
    return list(dict.fromkeys([*named, *moved]))


def _activate(state: State, change: Change, names: Collection[str]) -> State:
    return _point(state, _named(change))


def _promote(state: State, change: Change, names: Collection[str]) -> State:
    rollout = state.live.rollout
    canaries = [canary.release for canary in rollout.canaries]
    if change.release is None and len(canaries) != 1:
        found = f"there are {len(canaries)} canaries, {', '.join(canaries)}" if canaries else "there is no canary"
        raise RolloutRefused(f"{found}: name the release to promote")
    release = change.release or canaries[0]
    if release not in rollout.releases:
        shown = ", ".join(rollout.releases) or "nothing"
        raise RolloutRefused(
            f"{release} is neither canary nor shadow, {shown} is: choose one, or use `ranktower releases activate`"
        )
    return _point(state, release)


def _rollback(state: State, change: Change, names: Collection[str]) -> State:
    """A canary is what has changed last, so it ends first, and the current release takes its users back."""
    live = state.live
    if live.rollout.canaries:
        return replace(state, live=replace(live, rollout=replace(live.rollout, canaries=())))
    alive = [name for name in state.previous if name in names]
    if not alive and live.current is None:
        raise RolloutRefused("nothing is current, and nothing was before: publish a release")
    if not alive:
        raise RolloutRefused(f"nothing was current before {live.current}: choose with `ranktower releases activate`")
    to = Live(current=alive[0], rollout=live.rollout.without(alive[0]))
    return State(live=to, previous=tuple(alive[1:]))


def _canary(state: State, change: Change, names: Collection[str]) -> State:
    live, release = state.live, _named(change)
    share = _share(change, "weight")
    _check_beside(live, release)
    if release == live.current:
        raise RolloutRefused(f"{release} is the current release: it answers already")
    others = [canary for canary in live.rollout.canaries if canary.release != release]
    before = next((canary for canary in live.rollout.canaries if canary.release == release), None)
    wanted = round(share * SLOTS)
    if share and not wanted:
        raise RolloutRefused(f"weight {share:g} of {release} is below {1 / SLOTS:g}: use more, or 0 to end it")
    if sum(map(len, others)) + wanted >= SLOTS:
        raise RolloutRefused(
            f"the canaries would take {sum(map(len, others)) / SLOTS + share:g} of the users: leave some to "
            f"{live.current}, or use `ranktower releases promote`"
        )
    if wanted and len(others) == MOST_CANARIES:
        raise RolloutRefused(f"there are {MOST_CANARIES} canaries: end one with --weight 0")
    grown = _with_slots(release, before, others, wanted)
    kept = [canary if canary.release != release else grown for canary in live.rollout.canaries]
    canaries = kept if before else [*kept, grown]
    rollout = replace(live.rollout, canaries=tuple(canary for canary in canaries if canary.slots))
    return replace(state, live=replace(live, rollout=rollout))


def _shadow(state: State, change: Change, names: Collection[str]) -> State:
    """The current release may be its own shadow: all that is compared must then be equal."""
    live, release = state.live, _named(change)
    share = _share(change, "share")
    _check_beside(live, release)
    known = live.rollout.shadow
    if not share and (known is None or known.release != release):
        return state
    shadow = Shadow(release=release, share=share) if share else None
    return replace(state, live=replace(live, rollout=replace(live.rollout, shadow=shadow)))


def _abort(state: State, change: Change, names: Collection[str]) -> State:
    if not state.live.rollout.releases:
        raise RolloutRefused(
            f"there is no canary and no shadow to end, {state.live.current or 'nothing'} is live alone: see `ranktower "
            "releases list`"
        )
    return replace(state, live=replace(state.live, rollout=ALONE))


VERBS: dict[Verb, Callable[[State, Change, Collection[str]], State]] = {
    "activate": _activate,
    "promote": _promote,
    "rollback": _rollback,
    "canary": _canary,
    "shadow": _shadow,
    "abort": _abort,
}


def _point(state: State, release: str) -> State:
    """Make it current: it leaves the rollout, the others stay in it."""
    live = state.live
    if live.current == release:
        return state
    kept = [name for name in (live.current, *state.previous) if name is not None]
    return State(live=Live(current=release, rollout=live.rollout.without(release)), previous=tuple(kept[:HISTORY]))


def _named(change: Change) -> str:
    if change.release is None:
        raise RolloutRefused(f"{change.verb} of which release: name one of `ranktower releases list`")
    return change.release


def _share(change: Change, name: str) -> float:
    most = "below 1" if change.verb == "canary" else "1 at most"
    if change.share is None or not 0 <= change.share <= 1 or (change.share == 1 and change.verb == "canary"):
        raise RolloutRefused(f"{name} of {change.release} is {change.share}: use a number from 0 to {most}")
    return change.share


def _check_beside(live: Live, release: str) -> None:
    if live.current is None:
        raise RolloutRefused(f"nothing is current beside {release}: use `ranktower releases activate`")


def _with_slots(release: str, before: Canary | None, others: Iterable[Canary], wanted: int) -> Canary:
    """Its own slots first, then free ones, both in the order in which the release goes through them."""
    start = int.from_bytes(hashlib.sha256(release.encode()).digest()[:8], "big") % SLOTS
    own = {slot for first, stop in (before.slots if before else ()) for slot in range(first, stop)}
    taken = {slot for other in others for first, stop in other.slots for slot in range(first, stop)}
    order = [slot % SLOTS for slot in range(start, start + SLOTS)]
    free = [slot for slot in order if slot not in own and slot not in taken]
    chosen = sorted([*(slot for slot in order if slot in own), *free][:wanted])
    runs = [[slot for _, slot in run] for _, run in groupby(enumerate(chosen), lambda pair: pair[1] - pair[0])]
    return Canary(release=release, slots=tuple((run[0], run[-1] + 1) for run in runs))


# --- the audit trail -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """One change: when, by whom, what was live before and after."""

    at: str
    who: str
    verb: str
    before: dict[str, float]  # release -> share of the users; the current one has what is left
    after: dict[str, float]
    shadow_before: dict[str, float]  # release -> share of the requests
    shadow_after: dict[str, float]

    @classmethod
    def of(cls, verb: str, who: str, before: Live, after: Live) -> Audited:
        return cls(
            at=utc_now().isoformat(timespec="milliseconds"),
            who=who[:WHO_LENGTH],
            verb=verb,
            before=weights(before),
            after=weights(after),
            shadow_before=_shadow_of(before),
            shadow_after=_shadow_of(after),
        )


def weights(live: Live) -> dict[str, float]:
    """Share of the users by release, the current one first."""
    canaries = {canary.release: canary.weight for canary in live.rollout.canaries}
    left = (SLOTS - sum(map(len, live.rollout.canaries))) / SLOTS
    return ({} if live.current is None else {live.current: left}) | canaries


def told(live: Live) -> str:
    """A line for a person."""
    return shares_told(weights(live), _shadow_of(live))


def shares_told(users: Mapping[str, float], requests: Mapping[str, float]) -> str:
    """The same of the shares of users and, for a shadow, of requests by release."""
    parts = [f"{release} {100 * weight:g} %" for release, weight in users.items()] or ["nothing"]
    return ", ".join([*parts, *(f"shadow {release} {100 * share:g} %" for release, share in requests.items())])


def _shadow_of(live: Live) -> dict[str, float]:
    shadow = live.rollout.shadow
    return {} if shadow is None else {shadow.release: shadow.share}


def this_user() -> str:
    """Who runs this process, and where."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user id without a name, as containers have
        name = "unknown"
    return f"{name}@{socket.gethostname()}"


# --- on the wire -----------------------------------------------------------------------------------------------------


def encode(value: Rollout | Audited) -> bytes:
    return msgspec.json.encode(value)


def decode_rollout(raw: bytes, where: str, remedy: str) -> Rollout:
    """The rollout of a store. Raises StoreError where it is none, or none that could have been written."""
    try:
        rollout = msgspec.json.decode(raw, type=Rollout)
        check_rollout(rollout)
    except (ValueError, UnicodeDecodeError) as error:  # msgspec's errors are ValueErrors
        raise StoreError(f"{where} holds no rollout ({error}): {remedy}") from error
    return rollout


def check_rollout(rollout: Rollout) -> None:
    """Raise ValueError unless `changed` could have made it."""
    runs = sorted(run for canary in rollout.canaries for run in canary.slots)
    apart = all(left[1] <= right[0] for left, right in pairwise(runs))
    within = all(0 <= first < stop <= SLOTS for first, stop in runs) and sum(map(len, rollout.canaries)) < SLOTS
    share = 0.0 if rollout.shadow is None else rollout.shadow.share
    names = rollout.releases
    if not (apart and within and 0 <= share <= 1 and all(NAME.fullmatch(name) for name in names)):
        raise ValueError(f"slots, share or names of {', '.join(names)} cannot be")


def decode_audited(raw: bytes, where: str) -> Audited:
    try:
        return msgspec.json.decode(raw, type=Audited)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(f"{where} holds no change ({error}): {raw[:100]!r}") from error
