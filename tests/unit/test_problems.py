"""The one table from errors to problems."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from model.errors import RankTowerError
from service import errors
from service.problems import HTTP_KINDS, KINDS, kind_of, problem_of

ROOT = Path(__file__).resolve().parents[2]
OURS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.ServiceError)]


def request(path: str = "/v1/rank", method: str = "POST") -> Request:
    return Request(
        {"type": "http", "method": method, "path": path, "headers": [], "server": ("h", 1), "query_string": b""}
    )


def document(error: Exception) -> tuple[Any, dict[str, Any]]:
    response = problem_of(request(), error)
    return response, json.loads(bytes(response.body))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.RequestError("d", remedy="r"), 422),
        (errors.MalformedBody("d", remedy="r"), 422),
        (errors.UnsupportedBody("d", remedy="r"), 415),
        (errors.BodyTooLarge("d", remedy="r"), 413),
        (errors.RetrievalOff("d", remedy="r"), 409),
        (errors.DeadlineExceeded("d", remedy="r"), 504),
        (errors.Busy("d", remedy="r", retry_after_s=7), 429),
        (errors.NotReady("d", remedy="r"), 503),
        (RankTowerError("d"), 500),
        (ValueError("d"), 500),
        (HTTPException(404), 404),
        (HTTPException(405, headers={"Allow": "GET"}), 405),
        (HTTPException(400, "odd"), 400),
    ],
)
def test_each_error_has_its_status(error: Exception, status: int) -> None:
    response, problem = document(error)
    assert (response.status_code, problem["status"]) == (status, status)
    assert response.media_type == "application/problem+json"
    assert problem["instance"] == "/v1/rank"
    assert problem["remedy"]


def test_an_error_of_ours_speaks_for_itself() -> None:
    _, problem = document(errors.RequestError("candidates[3] is 7", field="candidates[3]", remedy="send text"))
    assert (problem["detail"], problem["field"], problem["remedy"]) == (
        "candidates[3] is 7",
        "candidates[3]",
        "send text",
    )


def test_a_defect_does_not_speak() -> None:
    assert "secret" not in json.dumps(document(ValueError("secret"))[1])


def test_headers_that_belong_to_an_error_are_sent() -> None:
    assert document(errors.Busy("d", remedy="r", retry_after_s=7))[0].headers["retry-after"] == "7"
    assert document(HTTPException(405, headers={"Allow": "GET"}))[0].headers["allow"] == "GET"


@pytest.mark.parametrize("cls", OURS)
def test_every_error_says_what_to_do_in_one_line(cls: type[errors.ServiceError]) -> None:
    more: Any = {"retry_after_s": 1} if cls is errors.Busy else {}
    assert str(cls("thing is wrong", remedy="mend it", **more)) == "thing is wrong: mend it"


def test_every_kind_of_problem_is_documented_with_its_status() -> None:
    documentation = (ROOT / "docs" / "api.md").read_text()
    for kind in {*KINDS.values(), *HTTP_KINDS.values()}:
        assert f"| {kind.status} | `{kind.type}` |" in documentation
    assert kind_of(ValueError()).status == 500
