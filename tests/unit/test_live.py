"""Which release answers whom: always the same one, in the shares that were asked for, in every process."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from math import sqrt
from pathlib import Path

import pytest

from cache.rollout import SLOTS, Change, Live, Rollout, Shadow, State, changed
from service.live import Serving, slot_of, why_not_beside
from service.ranker import Ranker
from tests.tiny_releases import tiny_release

ROOT = Path(__file__).resolve().parents[2]
USERS = 20_000


@pytest.fixture(scope="module")
def rankers(tmp_path_factory: pytest.TempPathFactory) -> list[Ranker]:
    folder = tmp_path_factory.mktemp("made")
    return [Ranker.open(tiny_release(folder / str(seed), seed=seed).folder) for seed in range(3)]


def serving(rankers: list[Ranker], *weights: float) -> Serving:
    """The first is current, the others are canaries with these weights."""
    state = State(live=Live(current=rankers[0].release))
    for ranker, weight in zip(rankers[1:], weights, strict=False):
        state = changed(state, Change(verb="canary", release=ranker.release, share=weight), [])
    return Serving(rankers[0], state.live.rollout, {ranker.release: ranker for ranker in rankers[1:]})


@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize("weights", [(0.5,), (0.1, 0.02)])
def test_every_release_has_its_share_of_the_users(
    rankers: list[Ranker], weights: tuple[float, ...], kind: type
) -> None:
    subject = serving(rankers, *weights)
    found = Counter(subject.of(kind(user)).release for user in range(USERS))
    for ranker, weight in zip(rankers[1:], weights, strict=False):
        off = 5 * sqrt(USERS * weight * (1 - weight))  # five deviations of a binomial
        assert abs(found[ranker.release] - USERS * weight) < off
    assert found[rankers[0].release] > USERS * (1 - sum(weights)) * 0.9


def test_users_of_a_canary_stay_in_it_while_it_grows(rankers: list[Ranker]) -> None:
    small, large = (serving(rankers[:2], weight) for weight in (0.1, 0.2))
    inside = [user for user in range(USERS) if small.of(user) is rankers[1]]
    assert len(inside) > 0
    assert all(large.of(user) is rankers[1] for user in inside)


def test_slots_are_used_evenly_whatever_the_ids_are() -> None:
    for ids in (range(USERS), range(0, USERS * 1024, 1024), [f"user-{k}" for k in range(USERS)]):
        found = Counter(slot_of(user) * 100 // SLOTS for user in ids)
        assert min(found[part] for part in range(100)) > USERS / 100 - 5 * sqrt(USERS / 100)
        assert all(0 <= slot_of(user) < SLOTS for user in ids)


def test_the_slot_of_a_user_is_the_same_in_every_process() -> None:
    ids = [0, -1, 2**63 - 1, "7", "é", "user-1"]
    script = f"from service.live import slot_of; print([slot_of(each) for each in {ids!r}])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == str([slot_of(each) for each in ids])
    assert [slot_of(each) for each in (1, "1", 123456789)] == [5571, 5571, 5794]  # of record: users would move


def test_who_does_not_say_who_he_is_meets_the_current_release(rankers: list[Ranker]) -> None:
    assert serving(rankers, 0.99).of(None) is rankers[0]


def test_the_share_of_a_canary_that_is_not_here_stays_with_the_current_release(rankers: list[Ranker]) -> None:
    whole = serving(rankers, 0.4, 0.4)
    rollout = Rollout(canaries=tuple(whole.canaries), shadow=Shadow(release="nowhere", share=1.0))
    lame = Serving(rankers[0], rollout, {rankers[2].release: rankers[2]})
    for user in range(1000):
        assert lame.of(user) is (rankers[2] if whole.of(user) is rankers[2] else rankers[0])
    assert lame.shadow is None


def test_a_release_alone_answers_everybody(rankers: list[Ranker]) -> None:
    alone = Serving(rankers[0])
    assert alone.is_alone
    assert {alone.of(user) for user in (None, 1, "1")} == {rankers[0]}
    shadowed = Serving(
        rankers[0], Rollout(shadow=Shadow(release=rankers[0].release, share=0.5)), {rankers[0].release: rankers[0]}
    )
    assert not shadowed.is_alone
    assert shadowed.shadow is rankers[0]


def test_the_slowest_release_decides_what_is_quick(rankers: list[Ranker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(rankers[0]), "candidate_ns", 10.0)
    monkeypatch.setitem(vars(rankers[1]), "candidate_ns", 900.0)
    assert Serving(rankers[0]).candidate_ns == 10.0
    assert serving(rankers[:2], 0.1).candidate_ns == 900.0


def test_releases_with_other_ids_do_not_stand_beside_each_other(rankers: list[Ranker], tmp_path: Path) -> None:
    other = Ranker.open(tiny_release(tmp_path / "other", ids="string").folder)
    assert "has ids of types ('string', 'string')" in (why_not_beside(rankers[0], other) or "")
    assert why_not_beside(rankers[0], rankers[1]) is None
