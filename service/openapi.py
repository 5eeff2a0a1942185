"""The OpenAPI document: `schema.py` on the routes of `app.py`. `python -m service.openapi FILE` writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import problems, schema
from service.answers import ARROW, JSON

ADMIN = "admin"  # name of the security scheme
TITLE, VERSION = "RankTower", "1"
REFERENCE = "#/components/schemas/{model}"
ARROW_BODY = (
    "An Arrow IPC stream of one record batch, not compressed: a column `candidates` (int64, or utf8 or large_utf8), "
    "and the other fields of the JSON body, as JSON, in the schema's metadata under `request`."
)
ARROW_ANSWER = (
    "An Arrow IPC stream of one record batch: id, score, probability where calibrated, position, and item_heads and "
    "similarities where explained; release, user_known, missing and counts as JSON in the schema's metadata."
)
TIMING = "Milliseconds by stage: queue, decode, encode, user, score, topk, respond."


class Operation(NamedTuple):
    """What one route reads and sends."""

    answer: type[BaseModel] | None  # None: plain text
    body: type[BaseModel] | None = None
    refusals: tuple[int, ...] = ()
    arrow: bool = False  # bodies and answers may be Arrow IPC streams, too
    admin: bool = False  # asks for the token


RANKING = (409, 413, 415, 422, 429, 503, 504)
OPERATIONS = {
    "rank": Operation(schema.RankAnswer, schema.RankBody, tuple(s for s in RANKING if s != 409), arrow=True),
    "batch": Operation(schema.BatchAnswer, schema.BatchBody, tuple(s for s in RANKING if s != 409)),
    "retrieve": Operation(schema.RankAnswer, schema.RetrieveBody, RANKING),
    "release": Operation(schema.ReleaseAnswer, refusals=(503,)),
    "sample": Operation(schema.Sample, refusals=(422, 503)),
    "livez": Operation(schema.Alive),
    "readyz": Operation(schema.Ready, refusals=(503,)),
    "metrics": Operation(None),
    "admin_releases": Operation(schema.AdminAnswer, refusals=(401, 404, 503), admin=True),
    "admin_change": Operation(schema.ChangeAnswer, schema.ChangeBody, (401, 404, 409, 413, 422, 503), admin=True),
}


def documented(name: str) -> dict[str, Any]:
    """Arguments of a route: its name and its exact documentation."""
    operation = OPERATIONS[name]
    extra: dict[str, Any] = {"responses": {"200": _success(operation)}}
    for status in operation.refusals:
        extra["responses"][str(status)] = _refusal(status)
    if operation.admin:
        extra["security"] = [{ADMIN: []}]
    if operation.body:
        extra["requestBody"] = {
            "required": not operation.admin,
            "content": _content(operation.body, ARROW_BODY, operation.arrow),
        }
    return {"operation_id": name, "openapi_extra": extra, "response_model": None}


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    document = get_openapi(
        title=TITLE,
        version=VERSION,
        summary="The pre-ranking stage of a recommender cascade.",
        description="Every error is a problem document (RFC 9457) that names field and remedy. See docs/api.md.",
        routes=app.routes,
    )
    models = {model for o in OPERATIONS.values() for model in (o.answer, o.body) if model} | {schema.Problem}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=REFERENCE)
    scheme = {"type": "http", "scheme": "bearer", "description": "RANKTOWER_ADMIN_TOKEN; without one all is 404."}
    document["components"] = {"schemas": definitions["$defs"], "securitySchemes": {ADMIN: scheme}}
    for operations in document["paths"].values():
        for operation in operations.values():
            _drop_defaults(operation)
    return document


def _drop_defaults(operation: dict[str, Any]) -> None:
    """FastAPI adds its own 422 to routes with parameters; ours is a problem."""
    responses = operation["responses"]
    if "application/json" in responses.get("422", {}).get("content", {}):
        responses["422"] = _refusal(422)


def _success(operation: Operation) -> dict[str, Any]:
    if operation.answer is None:
        return {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}
    response: dict[str, Any] = {
        "description": (operation.answer.__doc__ or "").splitlines()[0],
        "content": _content(operation.answer, ARROW_ANSWER, operation.arrow),
    }
    if operation.body and not operation.admin:
        text = {"type": "string"}
        response["headers"] = {
            "Server-Timing": {"description": TIMING, "schema": text},
            "X-RankTower-Release": {"description": "The release that answered.", "schema": text},
        }
    return response


def _content(model: type[BaseModel], arrow: str, with_arrow: bool) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": _reference(model)}}
    if with_arrow:
        content[ARROW] = {"schema": {"type": "string", "format": "binary", "description": arrow}}
    return content


def _refusal(status: int) -> dict[str, Any]:
    titles = sorted({kind.title for kind in problems.KINDS.values() if kind.status == status})
    response: dict[str, Any] = {
        "description": "; ".join(titles),
        "content": {problems.MEDIA_TYPE: {"schema": _reference(schema.Problem)}},
    }
    if status == 429:
        response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return response


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}


def render() -> str:
    """The document as committed in docs/openapi.json."""
    from service.app import create_app
    from service.settings import Settings

    return json.dumps(create_app(Settings()).openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
