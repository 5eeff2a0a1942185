"""The client against the real service over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cache.file_store import FileStore
from ranktower_client import AsyncRankTower, BadRequest, DeadlineExceeded, Overloaded, Query, RankTower, Unavailable
from service.telemetry import STAGES
from tests.services import Running, running, running_release
from tests.tiny_releases import TinyRelease, tiny_release

RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class Served:
    """A release, the service that answers from it, and a client of that service."""

    release: TinyRelease
    url: str
    tower: RankTower


def url_of(service: Running) -> str:
    return str(service.http.base_url)


@pytest.fixture(scope="module", params=["int", "string"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("client")
    release = tiny_release(folder / "made", ids=request.param, index="flat", calibration={"a": 0.01, "b": 0.0})
    with (
        running_release(release, folder / "store", retrieval=True) as service,
        RankTower(url_of(service), timeout_s=10.0) as tower,
    ):
        yield Served(release, url_of(service), tower)


def test_a_ranking_is_sorted_whole_and_timed(served: Served) -> None:
    candidates = np.array(served.release.item_ids)
    ranking = served.tower.rank(candidates, user_id=served.release.user_ids[0], top_k=10)
    assert len(ranking) == 10
    assert np.all(np.diff(ranking.scores) <= 0)
    assert ranking.ids.tolist() == candidates[ranking.positions].tolist()
    assert ranking.probabilities is not None
    assert np.all((ranking.probabilities > 0) & (ranking.probabilities < 1))
    assert ranking.user_known is True
    assert tuple(ranking.timings) == STAGES
    assert ranking.release == served.tower.release().id


def test_arrow_answers_what_json_answers(served: Served) -> None:
    ids = served.release.item_ids
    unknown = -5 if isinstance(ids[0], int) else "nobody"
    with RankTower(served.url, timeout_s=10.0, arrow=True) as tower:
        for candidates in ([*ids, unknown], np.array(ids), []):
            found = tower.rank(candidates, user_id=served.release.user_ids[0], top_k=100, explain=True)
            expected = served.tower.rank(candidates, user_id=served.release.user_ids[0], top_k=100, explain=True)
            for name in ("ids", "scores", "probabilities", "positions", "missing"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert (found.release, found.user_known) == (expected.release, expected.user_known)
            assert [one and one["item_heads"] for one in found.explanations] == [
                one and one["item_heads"] for one in expected.explanations
            ]
            assert tuple(found.timings) == STAGES


def test_unknown_items_come_last_without_score_and_are_named(served: Served) -> None:
    unknown = -5 if isinstance(served.release.item_ids[0], int) else "nobody"
    ranking = served.tower.rank([unknown, *served.release.item_ids[:3]])
    assert ranking.missing.tolist() == [unknown]
    assert ranking.ids[-1] == unknown
    assert np.isnan(ranking.scores).tolist() == [False, False, False, True]
    assert len(served.tower.rank([unknown, *served.release.item_ids[:3]], on_missing="drop")) == 3
    with pytest.raises(BadRequest) as caught:
        served.tower.rank([unknown], on_missing="error")
    assert caught.value.field == "candidates[0]"


def test_explanations_name_a_head_for_each_user_head(served: Served) -> None:
    (explanation, *_) = served.tower.rank(served.release.item_ids[:3], explain=True).explanations
    assert explanation is not None
    assert len(explanation["item_heads"]) == served.release.head.user_heads


def test_a_batch_answers_as_single_requests_do(served: Served) -> None:
    queries = [
        Query(candidates=served.release.item_ids[:20], user_id=served.release.user_ids[0]),
        Query(
            candidates=np.array(served.release.item_ids[10:40]),
            history=served.release.item_ids[:2],
            context={"hour": 3},
        ),
    ]
    first, second = served.tower.rank_batch(queries)
    alone = served.tower.rank(queries[0].candidates, user_id=queries[0].user_id)
    assert np.array_equal(first.scores, alone.scores)
    assert first.ids.tolist() == alone.ids.tolist()
    assert (first.user_known, second.user_known) == (True, None)


def test_retrieval_finds_what_ranking_the_whole_catalogue_finds(served: Served) -> None:
    user = served.release.user_ids[1]
    found = served.tower.retrieve(user_id=user, top_k=5, per_head=60)
    best = served.tower.rank(served.release.item_ids, user_id=user, top_k=5)
    assert found.ids.tolist() == best.ids.tolist()
    assert found.positions.tolist() == [-1] * 5


def test_a_wrong_field_is_named_with_its_remedy(served: Served) -> None:
    with pytest.raises(BadRequest) as caught:
        served.tower.rank(served.release.item_ids[:2], context={"hour": "late"})
    assert caught.value.status == 422
    assert caught.value.field == "context.hour"
    assert caught.value.remedy
    with pytest.raises(BadRequest, match="did you mean top_k"):
        served.tower.rank(served.release.item_ids[:2], topk=3)  # type: ignore[call-arg]


def test_awaited_calls_answer_the_same(served: Served) -> None:
    candidates, user = served.release.item_ids, served.release.user_ids[2]

    async def ask() -> tuple[list[float], bool]:
        async with AsyncRankTower(served.url, timeout_s=10.0) as tower:
            rankings = await asyncio.gather(*(tower.rank(candidates, user_id=user) for _ in range(8)))
            assert all(np.array_equal(ranking.ids, rankings[0].ids) for ranking in rankings)
            return rankings[0].scores.tolist(), await tower.ready()

    scores, ready = asyncio.run(ask())
    assert scores == served.tower.rank(candidates, user_id=user).scores.tolist()
    assert ready


def test_retrieval_that_is_off_is_said_so(tmp_path: Path) -> None:
    release = tiny_release(tmp_path / "made")
    with running_release(release, tmp_path / "store") as service, RankTower(url_of(service)) as tower:
        with pytest.raises(BadRequest) as caught:
            tower.retrieve(user_id=release.user_ids[0])
        assert caught.value.status == 409


def test_a_service_without_a_release_is_unavailable_and_not_ready(tmp_path: Path) -> None:
    with running(FileStore(f"file://{tmp_path}")) as service, RankTower(url_of(service), retries=1) as tower:
        assert tower.ready() is False
        with pytest.raises(Unavailable, match="503"):
            tower.rank([1])


def test_a_crowd_is_told_to_come_back_and_does(tmp_path: Path) -> None:
    release = tiny_release(tmp_path / "made")

    async def crowd(url: str, retries: int) -> list[object]:
        async with AsyncRankTower(url, timeout_s=15.0, retries=retries) as tower:
            return await asyncio.gather(*(tower.rank(release.item_ids) for _ in range(40)), return_exceptions=True)

    with running_release(release, tmp_path / "store", max_in_flight=1, max_queue=1) as service:
        at_once = asyncio.run(crowd(url_of(service), retries=0))
        patient = asyncio.run(crowd(url_of(service), retries=8))
    refused = [answer for answer in at_once if isinstance(answer, Overloaded)]
    assert refused
    assert {error.retry_after_s for error in refused} == {RETRY_AFTER_S}
    assert sum(isinstance(answer, BaseException) for answer in patient) < len(refused)


def test_an_absent_service_is_unavailable(tmp_path: Path) -> None:
    with running(FileStore(f"file://{tmp_path}")) as service:
        url = url_of(service)
    with RankTower(url, timeout_s=1.0) as tower:
        assert tower.ready() is False
        with pytest.raises((Unavailable, DeadlineExceeded)):
            tower.release()
