"""What is live and how it changes: every verb, whom a weight moves, what is refused, what the trail says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cache.errors import RolloutRefused, StoreError
from cache.rollout import (
    HISTORY,
    MOST_CANARIES,
    SLOTS,
    Audited,
    Canary,
    Change,
    Live,
    Rollout,
    Shadow,
    State,
    changed,
    check_rollout,
    decode_audited,
    decode_rollout,
    encode,
    newly_live,
    this_user,
    told,
    weights,
)

NAMES = [f"2026010{day}T000000000-{day:012x}" for day in range(1, 9)]
A, B, C, D = NAMES[:4]
START = State(live=Live(current=A), previous=(B,))


def after(*changes: Change, state: State = START) -> State:
    for change in changes:
        state = changed(state, change, NAMES)
    return state


def canary(release: str, weight: float) -> Change:
    return Change(verb="canary", release=release, share=weight)


def shadow(release: str, share: float) -> Change:
    return Change(verb="shadow", release=release, share=share)


def slots(state: State, release: str) -> set[int]:
    found = [each for each in state.live.rollout.canaries if each.release == release]
    return {slot for each in found for first, stop in each.slots for slot in range(first, stop)}


# --- weights


def test_a_canary_takes_its_weight_of_the_slots() -> None:
    state = after(canary(C, 0.1))
    assert len(slots(state, C)) == SLOTS // 10
    assert weights(state.live) == {A: 0.9, C: 0.1}
    assert (state.live.current, state.previous) == (A, (B,))


def test_users_of_a_canary_stay_in_it_while_it_grows_and_none_come_to_it_while_it_shrinks() -> None:
    state, seen = START, set()
    for weight in (0.0001, 0.01, 0.1, 0.2, 0.9):
        state = after(canary(C, weight), state=state)
        assert seen < slots(state, C)
        seen = slots(state, C)
    for weight in (0.5, 0.3, 0.0001):
        state = after(canary(C, weight), state=state)
        assert slots(state, C) < seen
        seen = slots(state, C)


def test_no_weight_moves_users_of_another_canary() -> None:
    state = after(canary(C, 0.4), canary(D, 0.3))
    first, second = slots(state, C), slots(state, D)
    state = after(canary(C, 0.6), canary(B, 0.05), canary(C, 0.2), state=state)
    assert slots(state, D) == second
    assert slots(state, C) < first
    assert not slots(state, B) & (slots(state, C) | second)


def test_not_the_same_users_try_out_every_release() -> None:
    groups = [slots(after(canary(name, 0.01)), name) for name in NAMES[1:]]
    assert len(set.union(*groups)) > 5 * SLOTS // 100


def test_a_weight_of_nothing_ends_a_canary_and_its_users_return() -> None:
    state = after(canary(C, 0.1), canary(D, 0.1), canary(C, 0))
    assert [each.release for each in state.live.rollout.canaries] == [D]
    assert after(canary(C, 0)) == START


# --- verbs


def test_promotion_makes_the_canary_current_in_the_same_step() -> None:
    state = after(canary(C, 0.1), shadow(D, 0.5), Change(verb="promote"))
    assert state.live == Live(current=C, rollout=Rollout(shadow=Shadow(release=D, share=0.5)))
    assert state.previous == (A, B)


def test_other_canaries_outlast_a_promotion() -> None:
    state = after(canary(C, 0.1), canary(D, 0.2), Change(verb="promote", release=C))
    assert weights(state.live) == {C: 0.8, D: 0.2}


def test_a_shadow_is_promoted_by_its_name() -> None:
    assert after(shadow(D, 0.5), Change(verb="promote", release=D)).live == Live(current=D)


def test_activating_a_canary_promotes_it() -> None:
    by_name = after(canary(C, 0.1), Change(verb="activate", release=C))
    assert by_name == after(canary(C, 0.1), Change(verb="promote"))


def test_rollback_ends_canaries_first_and_then_goes_back() -> None:
    state = after(canary(C, 0.1), canary(D, 0.1), shadow(D, 1), Change(verb="rollback"))
    assert state == after(shadow(D, 1))
    state = after(Change(verb="rollback"), state=state)
    assert (state.live.current, state.previous) == (B, ())
    assert state.live.rollout.shadow is not None


def test_rollback_passes_over_releases_that_are_gone() -> None:
    state = State(live=Live(current=A), previous=(B, C, D))
    assert changed(state, Change(verb="rollback"), [A, C, D]) == State(live=Live(current=C), previous=(D,))


def test_abort_leaves_the_current_release_alone() -> None:
    assert after(canary(C, 0.1), shadow(D, 0.1), Change(verb="abort")) == START


def test_a_release_is_its_own_shadow() -> None:
    assert after(shadow(A, 1)).live.releases == (A,)


def test_a_share_of_nothing_ends_the_shadow_that_it_names() -> None:
    state = after(shadow(C, 0.5))
    assert after(shadow(D, 0), state=state) == state
    assert after(shadow(C, 0), state=state) == START


def test_history_is_bounded() -> None:
    state = START
    for number in range(HISTORY + 5):
        state = changed(state, Change(verb="activate", release=f"r{number}"), NAMES)
    assert len(state.previous) == HISTORY
    assert state.previous[0] == f"r{HISTORY + 3}"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ([Change(verb="promote")], "there is no canary"),
        ([canary(C, 0.1), canary(D, 0.1), Change(verb="promote")], "there are 2 canaries"),
        ([canary(C, 0.1), Change(verb="promote", release=D)], "is neither canary nor shadow"),
        ([Change(verb="abort")], "no canary and no shadow"),
        ([Change(verb="rollback"), Change(verb="rollback")], "nothing was current before"),
        ([canary(A, 0.1)], "is the current release"),
        ([canary(C, 1.0)], "use a number from 0 to below 1"),
        ([canary(C, -0.1)], "use a number from 0"),
        ([canary(C, float("nan"))], "use a number from 0"),
        ([Change(verb="canary", release=C)], "weight of .* is None"),
        ([Change(verb="canary", share=0.1)], "of which release"),
        ([Change(verb="activate")], "of which release"),
        ([canary(C, 0.00001)], "is below 0.0001"),
        ([canary(C, 0.99999)], "would take 0.99999 of the users"),
        ([canary(C, 0.6), canary(D, 0.4)], "would take 1 of the users"),
        ([canary(name, 0.1) for name in NAMES[1 : MOST_CANARIES + 2]], f"there are {MOST_CANARIES} canaries"),
        ([shadow(C, 1.1)], "use a number from 0 to 1 at most"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: list[Change], why: str) -> None:
    state = after(*changes[:-1])
    with pytest.raises(RolloutRefused, match=why):
        changed(state, changes[-1], NAMES)


@pytest.mark.parametrize("change", [canary(C, 0.1), shadow(C, 0.1)])
def test_nothing_stands_beside_nothing(change: Change) -> None:
    with pytest.raises(RolloutRefused, match="nothing is current"):
        changed(State(), change, NAMES)


def test_a_rollback_of_nothing_does_not_speak_of_none() -> None:
    with pytest.raises(RolloutRefused, match="nothing is current, and nothing was before: publish"):
        changed(State(), Change(verb="rollback"), NAMES)


def test_what_becomes_live_is_checked_but_for_going_back_and_ending() -> None:
    named = after(canary(C, 0.1))
    assert newly_live(START.live, named.live, canary(C, 0.1)) == [C]
    assert newly_live(named.live, START.live, canary(C, 0)) == []
    promoted = after(Change(verb="promote"), state=named)
    assert newly_live(named.live, promoted.live, Change(verb="promote")) == [C]
    assert newly_live(promoted.live, START.live, Change(verb="rollback")) == []


# --- on the wire


def test_a_rollout_is_read_as_it_was_written() -> None:
    rollout = after(canary(C, 0.1), canary(D, 0.2), canary(C, 0.3), shadow(B, 0.5)).live.rollout
    assert decode_rollout(encode(rollout), "here", "mend") == rollout
    check_rollout(Rollout())


@pytest.mark.parametrize(
    "rollout",
    [
        b"{",
        b"\xff",
        b'{"canaries": 5}',
        encode(Rollout(canaries=(Canary(release=A, slots=((0, 5), (4, 9))),))),
        encode(Rollout(canaries=(Canary(release=A, slots=((0, SLOTS),)),))),
        encode(Rollout(canaries=(Canary(release=A, slots=((5, 5),)),))),
        encode(Rollout(canaries=(Canary(release="../x", slots=((0, 5),)),))),
        encode(Rollout(shadow=Shadow(release=A, share=2.0))),
    ],
)
def test_a_rollout_that_could_not_have_been_written_is_refused(rollout: bytes) -> None:
    with pytest.raises(StoreError, match=r"here holds no rollout .*: mend"):
        decode_rollout(rollout, "here", "mend")


def test_a_change_is_told_with_what_was_live_before_and_after() -> None:
    before, now = START.live, after(canary(C, 0.1), shadow(D, 0.05)).live
    audited = Audited.of("canary", "me@here", before, now)
    assert decode_audited(encode(audited), "here") == audited
    assert (audited.before, audited.after) == ({A: 1.0}, {A: 0.9, C: 0.1})
    assert (audited.shadow_before, audited.shadow_after) == ({}, {D: 0.05})
    assert Audited.of("canary", "x" * 1000, before, now).who == "x" * 200
    with pytest.raises(StoreError, match="holds no change"):
        decode_audited(b"{}", "here")


def test_a_person_reads_what_is_live() -> None:
    assert told(Live()) == "nothing"
    assert told(after(canary(C, 0.1), shadow(D, 0.05)).live) == f"{A} 90 %, {C} 10 %, shadow {D} 5 %"


def test_who_runs_a_verb_has_a_name_and_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "@" in this_user()

    def nameless() -> Any:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("cache.rollout.getpass.getuser", nameless)
    assert this_user().startswith("unknown@")


def test_changes_that_change_nothing_leave_the_state_as_it_is() -> None:
    assert after(Change(verb="activate", release=A)) is START
    state = after(canary(C, 0.1))
    assert replace(after(canary(C, 0.1), state=state)) == state
