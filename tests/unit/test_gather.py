"""Scatter and gather without Ray: equal to one service bit for bit, and honest about what is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import orjson
import pytest

from cache.embed import build_release
from cache.file_store import FileStore
from cache.shards import shards_of
from service.admission import Permit
from service.answers import Limits
from service.errors import DeadlineExceeded, NotReady, RequestError, RetrievalOff
from service.gather import Gatherer, choose_bundle, split
from service.ranker import Ranker
from service.schema import GatheredAnswer
from service.settings import Settings
from service.shard import Held, Outcome, ShardReplica
from service.telemetry import StageClock
from tests.catalogues import open_shop
from tests.cuts import COUNT, ITEMS, Cut, alone, same


@pytest.fixture(scope="module", params=[False, True], ids=["int", "string"])
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cut]:
    cut = Cut(tmp_path_factory.mktemp("cut"), request.param)
    yield cut
    cut.close()


class Faulty:
    """A shard whose answers come when `hold` lets them."""

    def __init__(self, shard: Any, hold: Callable[[], Awaitable[None]]) -> None:
        self.shard, self.hold = shard, hold
        self.cancelled = False

    async def held(self) -> list[Held]:
        return list(await self.shard.held())

    async def rank(self, *asked: Any) -> Outcome:
        return await self._late(self.shard.rank, *asked)

    async def retrieve(self, *asked: Any) -> Outcome:
        return await self._late(self.shard.retrieve, *asked)

    async def _late(self, verb: Any, *asked: Any) -> Outcome:
        try:
            await self.hold()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        outcome: Outcome = await verb(*asked)
        return outcome


async def for_ever() -> None:
    await asyncio.Event().wait()


async def dies() -> None:
    raise ConnectionError("the actor died")


def gatherer(shards: Any, *, partial: bool = True, deadline_ms: int = 10_000) -> Gatherer:
    limits = Limits(max_candidates=1000, max_batch=1)
    return Gatherer(shards, deadline_ms=deadline_ms, partial=partial, limits=limits)


def ask(gather: Gatherer, body: dict[str, Any], verb: str = "rank") -> dict[str, Any]:
    """The answer of a gatherer that has looked at its shards."""

    async def answer() -> tuple[bytes, str]:
        await asyncio.gather(*(gather.look(number) for number in range(COUNT)))
        found: tuple[bytes, str] = await getattr(gather, verb)(
            orjson.dumps(body), Permit(perf_counter_ns()), StageClock()
        )
        return found

    content = asyncio.run(answer())[0]
    GatheredAnswer.model_validate_json(content)
    found: dict[str, Any] = orjson.loads(content)
    return found


BODIES: list[dict[str, Any]] = [
    {},
    {"top_k": 7},
    {"top_k": 0},
    {"top_k": 1000, "on_missing": "drop"},
    {"top_k": 1000, "explain": True},
    {"top_k": 5, "explain": True, "on_missing": "last"},
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("count", [0, 1, 2, 50, ITEMS])
def test_the_answer_is_that_of_one_service_bit_for_bit(cut: Cut, body: dict[str, Any], count: int) -> None:
    unknown = [-5, -7, -5] if isinstance(cut.ids[0], int) else ["none", "", "none"]
    candidates = [*unknown[:1], *cut.ids[:count], *unknown[1:], *cut.ids[: count // 2]]
    body = body | {"candidates": candidates[: count and None]}
    found = ask(gatherer(cut.replicas), body)
    assert same(found, alone(cut.whole, body))
    assert found["partial"] is False
    assert all(shard["failure"] is None for shard in found["shards"])
    assert found["release"] == cut.whole.bundle.id


def test_ties_keep_the_callers_order_across_shards(cut: Cut) -> None:
    body = {"candidates": cut.ids[:40] * 5, "top_k": 200}
    found = ask(gatherer(cut.replicas), body)
    assert same(found, alone(cut.whole, body))
    scores = [(-item["score"], item["position"]) for item in found["items"]]
    assert scores == sorted(scores)


def test_only_shards_with_candidates_are_asked(cut: Cut) -> None:
    item = cut.ids[0]
    found = ask(gatherer(cut.replicas), {"candidates": [item]})
    assert [shard["shard"] for shard in found["shards"]] == [cut.shard_of(item)]


def test_retrieval_finds_what_one_service_finds(cut: Cut) -> None:
    """With room for all items; with less, every shard brings as many as the one service does: never worse ones."""
    body = {"per_head": 2 * ITEMS, "top_k": 50}  # two heads each
    assert same(ask(gatherer(cut.replicas), body, "retrieve"), alone(cut.whole, body, "retrieve"))
    body = {"per_head": 5, "top_k": 10}
    found, wanted = (ask(gatherer(cut.replicas), body, "retrieve"), alone(cut.whole, body, "retrieve"))
    assert all(f["score"] >= w["score"] for f, w in zip(found["items"], wanted["items"], strict=True))


@pytest.mark.parametrize(
    ("body", "verb"),
    [
        ({"candidates": "no list"}, "rank"),
        ({"candidates": [True]}, "rank"),
        ({}, "rank"),
        ({"candidates": [], "user": {"no_such": 1}}, "rank"),
        ({"candidates": [], "topk": 1}, "rank"),
        ({"candidates": [], "on_missing": "perhaps"}, "rank"),
        ({"context": {"no_such": 1}}, "retrieve"),
        ({"per_head": 0}, "retrieve"),
    ],
)
def test_a_wrong_body_is_refused_as_one_service_does(cut: Cut, body: dict[str, Any], verb: str) -> None:
    with pytest.raises(RequestError) as wanted:
        alone(cut.whole, body, verb)
    with pytest.raises(RequestError) as found:
        ask(gatherer(cut.replicas), body, verb)
    assert (type(found.value), found.value.field) == (type(wanted.value), wanted.value.field)
    assert found.value.remedy == wanted.value.remedy
    without = str(wanted.value).partition("release")[0]  # each shard has one of its own
    assert str(found.value).startswith(without)


def test_an_unknown_item_is_named_by_its_place_in_the_whole_list(cut: Cut) -> None:
    unknown = [-5, -7] if isinstance(cut.ids[0], int) else ["none", "nothing"]
    body = {"candidates": [*cut.ids[:30], *unknown], "on_missing": "error"}
    with pytest.raises(RequestError) as wanted:
        alone(cut.whole, body)
    with pytest.raises(RequestError) as found:
        ask(gatherer(cut.replicas), body)
    assert found.value.field == wanted.value.field == "candidates[30]"
    assert "the first of 2 such among 32 candidates" in str(found.value)


def test_too_many_candidates_are_refused(cut: Cut) -> None:
    with pytest.raises(RequestError, match="1001 entries, this service takes 1000"):
        ask(gatherer(cut.replicas), {"candidates": (cut.ids * 4)[:1001]})


@pytest.mark.parametrize("hold", [for_ever, dies])
def test_an_answer_without_a_shard_says_so(cut: Cut, hold: Any) -> None:
    lost, body = cut.shard_of(cut.ids[0]), {"candidates": cut.ids, "top_k": ITEMS, "deadline_ms": 300}
    shards: list[Any] = [*cut.replicas]
    shards[lost] = faulty = Faulty(cut.replicas[lost], hold)
    found = ask(gatherer(shards), body)
    absent = [item for item in cut.ids if cut.shard_of(item) == lost]
    whole = alone(cut.whole, body | {"candidates": [item for item in cut.ids if item not in absent]})
    assert [item["id"] for item in found["items"]] == [item["id"] for item in whole["items"]] + absent
    assert [item["score"] for item in found["items"][-len(absent) :]] == [None] * len(absent)
    assert found["missing"] == []
    assert found["counts"] == {"candidates": ITEMS, "scored": ITEMS - len(absent), "returned": ITEMS}
    assert found["partial"] is True
    failed = [shard for shard in found["shards"] if shard["failure"]]
    why = "did not answer within 300 ms" if hold is for_ever else "failed"
    assert failed == [
        {"shard": lost, "release": None, "watermark": None, "candidates": len(absent), "scored": 0, "failure": why}
    ]
    assert faulty.cancelled == (hold is for_ever)


def test_a_shard_that_failed_is_asked_again_once_it_answers(cut: Cut) -> None:
    shards: list[Any] = [*cut.replicas]
    lost = cut.shard_of(cut.ids[0])
    shards[lost] = faulty = Faulty(cut.replicas[lost], dies)
    gather = gatherer(shards)
    assert ask(gather, {"candidates": cut.ids})["partial"] is True
    assert not gather.held[lost]
    faulty.hold = lambda: asyncio.sleep(0)
    assert ask(gather, {"candidates": cut.ids})["partial"] is False


def test_a_shard_that_is_not_there_costs_no_time(cut: Cut) -> None:
    class Gone(Faulty):
        async def held(self) -> list[Held]:
            raise ConnectionError("no replica")

    shards: list[Any] = [Gone(cut.replicas[0], for_ever), *cut.replicas[1:]]
    found = ask(gatherer(shards, deadline_ms=3_600_000), {"candidates": cut.ids})
    assert found["partial"] is True
    assert found["shards"][0]["failure"] == "does not answer"


def test_retrieval_without_a_shard_says_so(cut: Cut) -> None:
    shards: list[Any] = [Faulty(cut.replicas[0], for_ever), *cut.replicas[1:]]
    found = ask(gatherer(shards, deadline_ms=300), {"top_k": ITEMS, "per_head": ITEMS}, "retrieve")
    assert found["partial"] is True
    assert found["shards"][0]["failure"] == "did not answer within 300 ms"
    assert {cut.shard_of(item["id"]) for item in found["items"]} == {1, 2, 3}


def test_where_answers_must_be_whole_a_missing_shard_is_an_error(cut: Cut) -> None:
    shards: list[Any] = [Faulty(cut.replicas[0], dies), *cut.replicas[1:]]
    with pytest.raises(NotReady, match="shard 0 failed"):
        ask(gatherer(shards, partial=False), {"candidates": cut.ids})
    assert ask(gatherer(cut.replicas, partial=False), {"candidates": cut.ids})["partial"] is False


def test_without_any_shard_there_is_no_answer(cut: Cut) -> None:
    shards: list[Any] = [Faulty(replica, for_ever) for replica in cut.replicas]
    with pytest.raises(DeadlineExceeded, match="shard 0 did not answer within 50 ms; shard 1 "):
        ask(gatherer(shards), {"candidates": cut.ids, "deadline_ms": 50})
    with pytest.raises(NotReady):
        ask(gatherer(shards, deadline_ms=50), {"candidates": cut.ids})
    nobody: list[Any] = [None] * COUNT
    with pytest.raises(NotReady, match="none of 4 shards answers"):
        ask(gatherer(nobody), {"candidates": cut.ids})


# --- bundles ---------------------------------------------------------------------------------------------------------


def test_shards_are_swapped_one_after_the_other_and_no_answer_mixes_bundles(tmp_path: Path) -> None:
    cut = Cut(tmp_path)
    other = open_shop(tmp_path / "other", items=ITEMS, seed=1)
    new = Ranker.open(build_release(other.bundle, other.items, tmp_path / "new"))
    body = {"candidates": cut.ids, "top_k": ITEMS}
    gather = gatherer(cut.replicas)
    assert same(ask(gather, body), alone(cut.whole, body))
    try:
        for number in range(COUNT):
            cut.publish(number, other, "second")
            replica = cut.replicas[number]
            assert replica._refresher.wait_until(
                lambda s: s.ranker is not None and s.ranker.bundle.id == new.bundle.id, 20
            )
            found = ask(gather, body)
            wanted = new if number == COUNT - 1 else cut.whole
            assert found["release"] == wanted.bundle.id
            assert same(found, alone(wanted, body))
    finally:
        cut.close()


def test_a_shard_that_lacks_the_bundle_is_missing(cut: Cut) -> None:
    class Elsewhere(Faulty):
        async def held(self) -> list[Held]:
            return [Held("ffffffffffffffff", "int", "int")]

    shards: list[Any] = [Elsewhere(cut.replicas[0], dies), *cut.replicas[1:]]
    found = ask(gatherer(shards), {"candidates": cut.ids})
    assert found["shards"][0]["failure"] == "has another bundle"
    assert found["release"] == cut.whole.bundle.id
    assert found["partial"] is True


def test_the_bundle_that_most_can_answer_with_is_taken() -> None:
    a, b = Held("a", "int", "int"), Held("b", "int", "int")
    assert choose_bundle([]) is None
    assert choose_bundle([(), ()]) is None
    assert choose_bundle([[a], [a], [b]]) == a
    assert choose_bundle([[b, a], [a], [a]]) == a
    assert choose_bundle([[b, a], [b, a], [a]]) == a
    assert choose_bundle([[b, a], [b, a], [b, a]]) == b
    assert choose_bundle([[b, a], [b, a], ()]) == b
    assert choose_bundle([[b, a], [a, b]]) == choose_bundle([[a, b], [b, a]])


def test_a_release_without_index_is_refused(cut: Cut, tmp_path: Path) -> None:
    store = FileStore(f"file://{tmp_path}/store")
    store.activate(store.publish(build_release(cut.shop.bundle, cut.shop.items, tmp_path / "built")))
    replica = ShardReplica(Settings(store=store.url, huge_pages=False))
    try:
        with pytest.raises(RetrievalOff, match="has no index"):
            ask(gatherer([replica] * COUNT), {}, "retrieve")
    finally:
        replica.close()


def test_split_keeps_the_order() -> None:
    ids = np.arange(1000)[::-1].copy()
    places = split(ids, 3)
    assert sorted(np.concatenate([*places.values()]).tolist()) == list(range(1000))
    for number, at in places.items():
        assert (np.diff(at) > 0).all()
        assert set(shards_of(ids[at], 3).tolist()) == {number}
