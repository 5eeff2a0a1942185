"""A shard's replica: what it says it holds, what it refuses, and what it sends back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from cache.file_store import FileStore
from cache.rollout import Change
from kernel.ids import Texts
from service.errors import NotReady, RequestError
from service.ranker import Ranker
from service.settings import Settings
from service.shard import Held, Outcome, Part, Refusal, ShardReplica, packed
from tests.tiny_releases import TinyRelease, publish, tiny_release


@pytest.fixture
def release(tmp_path: Path) -> TinyRelease:
    return tiny_release(tmp_path / "made", seed=1)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(f"file://{tmp_path}/store")


@pytest.fixture
def replica(store: FileStore, release: TinyRelease) -> Iterator[ShardReplica]:
    publish(release, store)
    replica = ShardReplica(Settings(store=store.url, huge_pages=False, refresh_s=0.1))
    yield replica
    replica.close()


def held(replica: ShardReplica) -> list[Held]:
    return asyncio.run(replica.held())


def ask(replica: ShardReplica, release: TinyRelease, within_ms: float = 10_000.0, **body: Any) -> Outcome:
    request = Ranker.open(release.folder).decoders.rank(orjson.dumps({"on_missing": "drop", **body}))
    return asyncio.run(replica.rank(release.bundle.id, request, within_ms))


def test_it_says_what_it_holds(replica: ShardReplica, release: TinyRelease) -> None:
    assert held(replica) == [Held(release.bundle.id, "int", "int")]


def test_unknown_items_are_told_by_their_places(replica: ShardReplica, release: TinyRelease) -> None:
    part = ask(replica, release, candidates=[9, 100, 8, 101, 9])
    assert isinstance(part, Part)
    assert part.missing.tolist() == [0, 2, 4]
    assert part.ranking.positions is not None
    assert sorted(part.ranking.positions.tolist()) == [1, 3]
    assert len(part.ranking.kept) == len(part.ranking.missing) == 0


def test_scoring_ends_when_the_time_is_up(replica: ShardReplica, release: TinyRelease) -> None:
    part = ask(replica, release, within_ms=-1.0, candidates=[100, 101, 9])
    assert isinstance(part, Part)
    assert part.ranking.scored == 0
    assert part.missing.tolist() == []


def test_what_is_wrong_with_a_request_comes_back_as_a_value(replica: ShardReplica, release: TinyRelease) -> None:
    refusal = ask(replica, release, candidates=[], user={"shoe": 1})
    assert isinstance(refusal, Refusal)
    assert (refusal.error, refusal.field) == (RequestError, "user.shoe")


def test_a_bundle_that_is_not_at_hand_is_refused(replica: ShardReplica, tmp_path: Path) -> None:
    refusal = ask(replica, tiny_release(tmp_path / "other", seed=7), candidates=[100])
    assert isinstance(refusal, Refusal)
    assert refusal.error is NotReady


def test_a_store_without_a_release_holds_nothing(tmp_path: Path) -> None:
    replica = ShardReplica(Settings(store=f"file://{tmp_path}/empty"))
    assert held(replica) == []
    replica.close()


def test_the_bundle_before_stays_at_hand(
    replica: ShardReplica, store: FileStore, release: TinyRelease, tmp_path: Path
) -> None:
    """Two swaps: the first bundle goes, the second stays beside the third; another release of it takes its place."""
    second, third = (tiny_release(tmp_path / str(seed), seed=seed) for seed in (2, 3))
    names = [each.bundle.id for each in (release, second, third)]
    assert [each.bundle for each in held(replica)] == names[:1]
    for number, following in enumerate((second, third), 2):
        swaps = replica._refresher.standing.swaps
        publish(following, store, users=False)
        assert replica._refresher.wait_until(lambda now, past=swaps: now.swaps > past, 20)  # type: ignore[misc]
        assert [each.bundle for each in held(replica)] == names[number - 2 : number][::-1]
    outcome = ask(replica, second, candidates=[100])
    assert isinstance(outcome, Part)
    assert outcome.ranking.release != replica._refresher.ranker().release


def test_a_shadow_is_at_hand_before_it_is_current(
    replica: ShardReplica, store: FileStore, release: TinyRelease, tmp_path: Path
) -> None:
    second = tiny_release(tmp_path / "2", seed=2)
    name = publish(second, store, users=False, activate=False)
    store.change(Change(verb="shadow", release=name, share=0.01))
    assert replica._refresher.wait_until(lambda now: now.serving is not None and name in now.serving.beside, 20)
    assert [each.bundle for each in held(replica)] == [release.bundle.id, second.bundle.id]


def test_packed_texts_take_nothing_else_with_them() -> None:
    body = Texts.of([f"text {number}" for number in range(1000)] + ["", "ü"])
    few = packed(body[np.array([7, 1000, 1001, 3])])
    assert isinstance(few, Texts)
    assert few.tolist() == ["text 7", "", "ü", "text 3"]
    assert len(few.data) == 14
    assert packed(body[:0]).tolist() == []
    ids = np.arange(3)
    assert packed(ids) is ids
