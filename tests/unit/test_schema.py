"""The models of record: what each field of a body may be, and that the documentation names them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.schema import BatchBody, Problem, RankAnswer, RankBody, RankedItem, RetrieveBody

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "body",
    [
        {"candidates": []},
        {"candidates": [1, -(2**63), 2**63 - 1]},
        {"candidates": ["a", ""]},
        {"candidates": [], "user_id": None, "user": None, "context": None, "history": None, "top_k": None},
        {"candidates": [], "user": {"a": 1, "b": 1.5, "c": "x", "d": True, "e": None, "f": [1, "x", None]}},
        {"candidates": [1], "history": ["mixed types are the release's affair"]},
    ],
)
def test_a_good_body_is_read(body: Any) -> None:
    assert RankBody.model_validate(body).model_dump(exclude_unset=True) == body


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"candidates": None},
        {"candidates": 1},
        {"candidates": [1, "a"]},
        {"candidates": [1.5]},
        {"candidates": [True]},
        {"candidates": [2**63]},
        {"candidates": ["x" * 1025]},
        {"candidates": [], "top_k": -1},
        {"candidates": [], "deadline_ms": 0},
        {"candidates": [], "on_missing": "first"},
        {"candidates": [], "explain": 1},
        {"candidates": [], "user": {"a": [[1]]}},
        {"candidates": [], "user": {"a": {"b": 1}}},
        {"candidates": [], "user": {"a": 2**63}},
        {"candidates": [], "user": {"a": float("inf")}},
        {"candidates": [], "more": 1},
    ],
)
def test_a_bad_body_is_refused(body: Any) -> None:
    with pytest.raises(ValidationError):
        RankBody.model_validate(body)


@pytest.mark.parametrize("model", [RankBody, BatchBody, RetrieveBody, RankAnswer, RankedItem, Problem])
def test_every_field_is_in_the_documentation(model: Any) -> None:
    documentation = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in model.model_fields if f"`{name}`" not in documentation] == []
