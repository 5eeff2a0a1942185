"""The committed OpenAPI document is the one that the service gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from service import schema
from service.openapi import OPERATIONS, render

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads(render())


def test_the_committed_document_is_current() -> None:
    committed = (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")
    assert committed == render(), "run: python -m service.openapi docs/openapi.json"


def test_every_reference_leads_somewhere(document: Any) -> None:
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert named == set(document["components"]["schemas"])


def test_every_operation_documents_body_answer_and_refusals(document: Any) -> None:
    found = {op["operationId"]: op for path in document["paths"].values() for op in path.values()}
    assert set(found) == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        responses = found[name]["responses"]
        assert set(responses) == {"200", *map(str, operation.refusals)}
        assert all([*r["content"]] == ["application/problem+json"] for s, r in responses.items() if s != "200")
        assert ("requestBody" in found[name]) == (operation.body is not None)


def test_each_path_has_one_operation(document: Any) -> None:
    assert {len(operations) for operations in document["paths"].values()} == {1}


def test_bodies_are_the_models_of_record(document: Any) -> None:
    properties = document["components"]["schemas"]["RankBody"]["properties"]
    assert set(properties) == set(schema.RankBody.model_fields)
    assert document["components"]["schemas"]["RankBody"]["additionalProperties"] is False
    assert document["paths"]["/v1/rank"]["post"]["requestBody"]["required"] is True


def test_every_route_is_in_the_documentation(document: Any) -> None:
    documentation = (ROOT / "docs" / "api.md").read_text()
    assert [path for path in document["paths"] if f"{path}`" not in documentation] == []
