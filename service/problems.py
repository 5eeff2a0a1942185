"""Every error as problem details (RFC 9457), and the one table that decides their HTTP status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.errors import (
    AdminOff,
    BodyTooLarge,
    Busy,
    ChangeRefused,
    DeadlineExceeded,
    MalformedBody,
    NotReady,
    RequestError,
    RetrievalOff,
    ServiceError,
    StoreFailed,
    Unauthorized,
    UnsupportedBody,
)

MEDIA_TYPE = "application/problem+json"


class Kind(NamedTuple):
    """What a kind of error is called on the wire."""

    status: int
    type: str
    title: str


URN = "urn:ranktower:problem:"
NOT_FOUND = Kind(404, f"{URN}not-found", "No such resource")
METHOD = Kind(405, f"{URN}method-not-allowed", "Method not allowed")
INVALID = Kind(422, f"{URN}invalid-request", "The request cannot be answered as sent")
INTERNAL = Kind(500, f"{URN}internal", "The service failed")
GONE_AWAY = Kind(400, f"{URN}disconnected", "The client went away")

KINDS: dict[type[Exception], Kind] = {  # the nearest class of an error decides
    MalformedBody: Kind(422, f"{URN}malformed-body", "The body cannot be read"),
    UnsupportedBody: Kind(415, f"{URN}unsupported-body", "Unsupported media type"),
    BodyTooLarge: Kind(413, f"{URN}body-too-large", "The body is too large"),
    RetrievalOff: Kind(409, f"{URN}retrieval-off", "No retrieval here"),
    DeadlineExceeded: Kind(504, f"{URN}deadline-exceeded", "The deadline passed"),
    RequestError: INVALID,
    RequestValidationError: INVALID,
    AdminOff: NOT_FOUND,
    Unauthorized: Kind(401, f"{URN}unauthorized", "Not allowed"),
    ChangeRefused: Kind(409, f"{URN}change-refused", "The change makes no sense as things stand"),
    StoreFailed: Kind(503, f"{URN}store-failed", "The store did not do it"),
    Busy: Kind(429, f"{URN}busy", "Too many requests"),
    NotReady: Kind(503, f"{URN}not-ready", "Not ready"),
    ClientDisconnect: GONE_AWAY,
    Exception: INTERNAL,
}
HTTP_KINDS = {404: NOT_FOUND, 405: METHOD}


def kind_of(error: Exception) -> Kind:
    if isinstance(error, HTTPException):  # the router's own
        return HTTP_KINDS.get(error.status_code, Kind(error.status_code, "about:blank", error.detail))
    return next(KINDS[cls] for cls in type(error).__mro__ if cls in KINDS)


def problem_of(request: Request, error: Exception) -> Response:
    """The response that an error stands for. What is not one of ours says nothing about itself: the log does."""
    kind = kind_of(error)
    detail, field, remedy = _explain(request, error, kind)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, Busy):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if kind == INTERNAL:  # the server closes the connection after it: said so, nobody sends the next request into it
        headers["Connection"] = "close"
    return problem(kind, detail, instance=_path(request), field=field, remedy=remedy, headers=headers)


def problem(
    kind: Kind,
    detail: str,
    *,
    instance: str,
    field: str | None,
    remedy: str,
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Response:
    document = {
        "type": kind.type,
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "instance": instance,
        "field": field,
        "remedy": remedy,
        **(more or {}),
    }
    return Response(orjson.dumps(document), kind.status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def not_ready(request: Request, state: Mapping[str, Any], why: str) -> Response:
    """The state of a replica that should get no requests, as a problem. `why` no release is loaded, if none is."""
    detail = "the service is going away" if state["draining"] else f"no release is loaded: {why}"
    remedy = "ask another replica" if state["draining"] else "publish and activate a release; this service picks it up"
    return problem(KINDS[NotReady], detail, instance=_path(request), field=None, remedy=remedy, more=state)


def _path(request: Request) -> str:
    """The path without what the Host header claims, which need not even be a host."""
    return str(request.scope["path"])[:200]


def _explain(request: Request, error: Exception, kind: Kind) -> tuple[str, str | None, str]:
    """Detail, field and remedy."""
    path = _path(request)
    if isinstance(error, ServiceError):
        return error.detail, error.field, error.remedy
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return f"{name} is {str(first['input'])[:80]!r}: {first['msg']}", name, "send what /openapi.json documents"
    if kind == NOT_FOUND:
        return f"there is no {path}", None, "see /openapi.json for what there is"
    if kind == METHOD:
        allowed = (getattr(error, "headers", None) or {}).get("Allow", "another method")
        return f"{path} does not take {request.method}", None, f"use {allowed}"
    if isinstance(error, HTTPException):
        return error.detail, None, "see /openapi.json"
    return "an unexpected error, named in the service's log", None, "try again; report it if it comes back"
