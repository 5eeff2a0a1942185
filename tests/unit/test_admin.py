"""The admin calls over HTTP: off without a token, closed to others, one call for each change, audited."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cache.file_store import FileStore
from service.admin import Admin, caller_of, read_change
from service.app import create_app
from service.errors import RequestError
from service.live import slot_of
from service.schema import AdminAnswer, ChangeAnswer, Ready, ReleaseAnswer
from service.settings import Settings
from tests.services import Running, running
from tests.tiny_releases import TinyRelease, publish, tiny_release

TOKEN = "t0ken-é"
MINE = {"Authorization": f"Bearer {TOKEN}".encode(), "X-RankTower-Caller": "alice"}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[TinyRelease]:
    folder = tmp_path_factory.mktemp("made")
    return [tiny_release(folder / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(f"file://{tmp_path}/store")


@pytest.fixture
def names(store: FileStore, releases: list[TinyRelease]) -> list[str]:
    return [publish(made, store, activate=made is releases[0]) for made in releases]


@pytest.fixture
def service(store: FileStore, names: list[str]) -> Iterator[Running]:
    with running(store, admin_token=TOKEN, refresh_s=0.05) as service:
        service.until_ready()
        yield service


def call(service: Running, verb: str, **body: Any) -> httpx.Response:
    return service.http.post(f"/admin/releases/{verb}", json=body, headers=MINE)


def problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    document: dict[str, Any] = response.json()
    assert (response.status_code, document["type"]) == (status, f"urn:ranktower:problem:{kind}"), document
    assert document["remedy"]
    return document


def test_without_a_token_there_are_no_admin_calls(store: FileStore, names: list[str]) -> None:
    with running(store) as service:
        for headers in ({}, MINE, {"Authorization": "Bearer x"}):
            for answer in (
                service.http.get("/admin/releases", headers=headers),
                service.http.post("/admin/releases/promote", headers=headers),
                service.http.post("/admin/releases/nonsense", headers=headers),
            ):
                problem(answer, 404, "not-found")


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"])
def test_another_token_is_refused_and_changes_nothing(service: Running, store: FileStore, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given.encode()}
    for verb in ("canary", "nonsense"):
        answer = service.http.post(f"/admin/releases/{verb}", content=b"{", headers=headers)
        problem(answer, 401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    problem(service.http.get("/admin/releases", headers=headers), 401, "unauthorized")
    assert [change.verb for change in store.audit()] == ["activate"]


def test_a_canary_is_set_promoted_and_rolled_back_by_calls(
    service: Running, store: FileStore, names: list[str]
) -> None:
    a, b = names
    answer = call(service, "canary", release=b, weight=0.5)
    assert answer.status_code == 200
    ChangeAnswer.model_validate(answer.json(), strict=True)
    assert answer.json()["live"] == {"current": a, "weights": {a: 0.5, b: 0.5}, "shadow": None}
    service.until(lambda standing: b in standing.serving.beside)  # type: ignore[union-attr]
    assert call(service, "canary", release=b, weight=0.5).json()["change"] is None
    assert call(service, "promote").json()["live"]["weights"] == {b: 1.0}
    assert call(service, "rollback").json()["live"]["weights"] == {a: 1.0}
    assert call(service, "shadow", release=b, share=0.25).json()["live"]["shadow"] == {"release": b, "share": 0.25}
    assert call(service, "abort").json()["live"]["shadow"] is None
    assert call(service, "activate", release=b).json()["live"]["current"] == b
    trail = store.audit()
    assert [change.verb for change in trail] == [
        *("activate", "canary", "promote", "rollback", "shadow", "abort", "activate")
    ]
    assert {change.who for change in trail[1:]} == {"alice@127.0.0.1 by admin call"}


def test_what_is_live_and_how_it_came_about_is_told(service: Running, names: list[str]) -> None:
    a, b = names
    call(service, "shadow", release=a, share=1.0)
    call(service, "canary", release=b, weight=0.3)
    service.until(lambda standing: {a, b} <= standing.serving.beside.keys())  # type: ignore[union-attr]
    for user in range(1, 13):
        assert service.post("/v1/rank", {"user_id": user, "candidates": [*range(100, 150)]}).status_code == 200
    service.until(lambda standing: bool(service.service.compared()["shadow"]["compared"]))
    document = service.http.get("/admin/releases", headers=MINE).json()
    AdminAnswer.model_validate(document, strict=True)
    assert [change["verb"] for change in document["changes"]] == ["canary", "shadow", "activate"]
    assert document["here"]["canaries"] == [{"release": b, "weight": 0.3, "serving": True, "refused": None}]
    assert {each["against"] for each in document["here"]["shadow"]["compared"]} <= {a, b}
    release = service.http.get("/v1/release").json()
    ReleaseAnswer.model_validate(release, strict=True)
    assert release["release"] == a
    ready = service.http.get("/readyz").json()
    Ready.model_validate(ready, strict=True)
    assert ready["rollout"]["canaries"] == document["here"]["canaries"]


@pytest.mark.parametrize(
    ("verb", "body", "status", "kind", "said"),
    [
        ("promote", {}, 409, "change-refused", "there is no canary"),
        ("abort", {}, 409, "change-refused", "no canary and no shadow"),
        ("rollback", {}, 409, "change-refused", "nothing was current before"),
        ("canary", {"release": "r", "weight": 2}, 409, "change-refused", "use a number|weight of r"),
        ("canary", {"release": "20260101T000000000-0123456789ab", "weight": 0.1}, 409, "change-refused", "no release"),
        ("canary", {"release": 5}, 422, "invalid-request", "release"),
        ("canary", {"releases": "r"}, 422, "invalid-request", "releases"),
        ("canary", {"release": "r", "share": 0.1}, 422, "invalid-request", "takes no share"),
        ("promote", {"weight": 0.1}, 422, "invalid-request", "takes no weight"),
        ("rollback", {"release": "r"}, 422, "invalid-request", "rollback takes no release"),
        ("abort", {"release": "r"}, 422, "invalid-request", "abort takes no release"),
        ("explode", {}, 422, "invalid-request", "is no verb"),
        ("canary", {"release": "r" * 5000}, 413, "body-too-large", "octets"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(
    service: Running, verb: str, body: dict[str, Any], status: int, kind: str, said: str
) -> None:
    assert re.search(said, problem(call(service, verb, **body), status, kind)["detail"])


def test_a_body_that_is_too_large_names_the_remedy_of_this_call(service: Running) -> None:
    remedy = problem(call(service, "canary", release="r" * 5000), 413, "body-too-large")["remedy"]
    assert remedy == "send one change, with no more than the fields of /openapi.json"


def test_nothing_to_end_has_a_remedy(service: Running, names: list[str]) -> None:
    document = problem(call(service, "abort"), 409, "change-refused")
    assert document["detail"] == f"there is no canary and no shadow to end, {names[0]} is live alone"
    assert document["remedy"] == "see `ranktower releases list`"


def test_a_call_that_is_cut_off_at_the_end_is_no_defect(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server cancels what has not ended in time."""
    asked, answered = threading.Event(), threading.Event()

    def audit(admin: Admin) -> dict[str, Any]:
        asked.set()
        answered.wait(60)
        return {}

    monkeypatch.setattr(Admin, "audit", audit)
    app = create_app(Settings(admin_token=TOKEN), store)

    async def cut_off() -> int:
        heard: list[dict[str, Any]] = []
        scope = {"type": "http", "method": "GET", "path": "/admin/releases", "query_string": b"", "app": app}
        headers = [(b"authorization", f"Bearer {TOKEN}".encode())]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            heard.append(message)

        answering = asyncio.ensure_future(app({**scope, "headers": headers}, receive, send))
        await asyncio.get_running_loop().run_in_executor(None, asked.wait, 60)
        answering.cancel()
        try:
            await answering
        finally:
            answered.set()
        return int(heard[0]["status"])

    assert asyncio.run(cut_off()) == 503


def test_a_store_that_cannot_be_written_is_told(service: Running, store: FileStore, names: list[str]) -> None:
    (store.root / "current").write_text("{")
    problem(call(service, "activate", release=names[1]), 503, "store-failed")
    problem(service.http.get("/admin/releases", headers=MINE), 503, "store-failed")


def test_a_call_without_a_body_is_one_without_fields(service: Running) -> None:
    problem(service.http.post("/admin/releases/promote", headers=MINE), 409, "change-refused")


def test_a_batch_is_answered_by_each_users_release(service: Running, names: list[str]) -> None:
    a, b = names
    call(service, "canary", release=b, weight=0.5)
    service.until(lambda standing: b in standing.serving.beside)  # type: ignore[union-attr]
    serving = service.service.refresher.serving()
    asked = [{"user_id": user, "candidates": [100, 101, 102]} for user in range(1, 13)] + [{"candidates": [100]}]
    document = service.post("/v1/rank:batch", {"requests": asked}).json()
    alone = [service.post("/v1/rank", each).json() for each in asked]
    assert document["rankings"] == alone
    assert document["release"] == a
    assert {each["release"] for each in alone} == {a, b}
    for each, answer in zip(asked, alone, strict=True):
        assert answer["release"] == serving.of(each.get("user_id")).release  # type: ignore[arg-type]
    assert alone[-1]["release"] == a
    wrong = [*asked[:5], {"user_id": 3, "candidates": [100], "user": {"nobody": 1}}]
    assert service.post("/v1/rank:batch", {"requests": wrong}).json()["field"] == "requests[5].user.nobody"
    text = service.http.get("/metrics").text
    assert f'ranktower_release_share{{release="{b}",role="canary"}} 0.5' in text
    assert f'ranktower_release_rankings_total{{release="{b}"}}' in text
    assert slot_of(1) != slot_of(2)


def test_the_log_says_what_answers_whom(store: FileStore, names: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), running(store, admin_token=TOKEN, refresh_s=0.05) as service:
        service.until_ready()
        call(service, "canary", release=names[1], weight=0.25)
        service.until(lambda standing: names[1] in standing.serving.beside)  # type: ignore[union-attr]
        call(service, "shadow", release=names[0], share=0.5)
        service.until(lambda standing: standing.serving.shadow is not None)  # type: ignore[union-attr]
        call(service, "abort")
        service.until(lambda standing: standing.serving.is_alone)  # type: ignore[union-attr]
    assert f"canary {names[1]} answers 25 % of the users" in caplog.text
    assert f"shadow {names[0]} scores 50 % of the requests" in caplog.text
    assert TOKEN not in caplog.text


# --- without HTTP


def test_callers_are_named_by_their_own_word_cut_to_size() -> None:
    assert caller_of({"X-RankTower-Caller": "bob"}, "10.0.0.1") == "bob@10.0.0.1 by admin call"
    assert caller_of({}, "10.0.0.1") == "unnamed@10.0.0.1 by admin call"
    assert caller_of({"X-RankTower-Caller": "a\n\x00b" + "c" * 500}, "x") == f"ab{'c' * 98}@x by admin call"


def test_a_change_is_read_from_verb_and_body() -> None:
    change = read_change("canary", b'{"release": "r", "weight": 0.5}')
    assert (change.verb, change.release, change.share) == ("canary", "r", 0.5)
    with pytest.raises(RequestError, match="the body"):
        read_change("canary", b"{")
