"""The errors a call can end in, read from the service's RFC 9457 problem details.

RankTowerError
+-- BadRequest          4xx: the request is wrong; `field` and `remedy` say what to change; never tried again
+-- Overloaded          429: the service sheds load; `retry_after_s` says for how long
+-- Unavailable         503, or no connection: the service is down, draining or not ready
+-- DeadlineExceeded    the time given to the call is over, here or (504) in the service
+-- BadAnswer           what came back is not what the API promises: another status, or no JSON
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx


class RankTowerError(Exception):
    """Any failed call. `status` is None when no answer came; `problem` is the problem document as received."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        field: str | None = None,
        remedy: str | None = None,
        retry_after_s: float | None = None,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.remedy = remedy
        self.retry_after_s = retry_after_s
        self.problem = dict(problem or {})


class BadRequest(RankTowerError):
    """The request is wrong: `field` names where, `remedy` what to do."""


class Overloaded(RankTowerError):
    """The service has no room now; `retry_after_s` is what it asked for, None when it did not say."""


class Unavailable(RankTowerError):
    """The service cannot be reached or is not ready."""


class DeadlineExceeded(RankTowerError):
    """No answer within the time given to the call."""


class BadAnswer(RankTowerError):
    """The answer is not one of the service's."""


RETRIED = (Overloaded, Unavailable)

_BY_STATUS: dict[int, type[RankTowerError]] = {429: Overloaded, 503: Unavailable, 504: DeadlineExceeded}


def error_of(answer: httpx.Response) -> RankTowerError:
    """The error that a non-2xx answer stands for, from its problem details where it carries them."""
    problem = _problem_of(answer)
    kind = _BY_STATUS.get(answer.status_code) or (BadRequest if 400 <= answer.status_code < 500 else BadAnswer)
    sentence = [problem.get("title") or answer.reason_phrase, problem.get("detail"), problem.get("remedy")]
    return kind(
        f"{answer.status_code} " + ": ".join(str(part) for part in sentence if part),
        status=answer.status_code,
        field=problem.get("field"),
        remedy=problem.get("remedy"),
        retry_after_s=retry_after_s(answer.headers.get("retry-after")),
        problem=problem,
    )


def transport_error_of(error: httpx.HTTPError, url: str) -> RankTowerError:
    """The error that a failure below HTTP stands for."""
    if isinstance(error, httpx.TimeoutException):
        return DeadlineExceeded(f"no answer from {url} in time: {type(error).__name__}")
    if isinstance(error, httpx.TransportError):
        return Unavailable(f"cannot reach {url}: {error or type(error).__name__}")
    return BadAnswer(f"{url} sent an answer that cannot be read: {error or type(error).__name__}")


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds of a Retry-After header, which is a number or an HTTP date; None when absent or unreadable."""
    if not value:
        return None
    if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value):
        return max(0.0, float(value))
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:  # "-0000" in the header: UTC without saying so
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())


def _problem_of(answer: httpx.Response) -> dict[str, Any]:
    try:
        problem = json.loads(answer.content)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}
