"""Which forms are taken and sent, by the headers."""

from __future__ import annotations

import pytest

from service.answers import ARROW, JSON, answer_batch, answer_rank
from service.errors import UnsupportedBody
from service.media import check_encoding, form_of, spoken


@pytest.mark.parametrize(
    ("content_type", "form"),
    [
        ("application/json", JSON),
        ("Application/JSON ; charset=UTF-8", JSON),
        ('application/json;charset="utf-8"', JSON),
        (ARROW, ARROW),
    ],
)
def test_forms_that_rankings_are_asked_in(content_type: str, form: str) -> None:
    assert form_of(content_type, answer_rank) == form


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/json; charset=latin-1", "application/jsonx"])
def test_others_are_named(content_type: str) -> None:
    with pytest.raises(UnsupportedBody, match=f"Content-Type is {content_type or 'absent'}"):
        form_of(content_type, answer_rank)


def test_arrow_is_for_single_rankings() -> None:
    with pytest.raises(UnsupportedBody):
        form_of(ARROW, answer_batch)
    assert spoken(ARROW, answer_batch, JSON) is answer_batch


def test_compressed_bodies_are_refused() -> None:
    check_encoding("")
    check_encoding(" Identity")
    with pytest.raises(UnsupportedBody, match="Content-Encoding is br"):
        check_encoding("br")


def test_an_answer_has_the_form_of_the_body_unless_another_is_asked() -> None:
    assert spoken("*/*", answer_rank, JSON) is answer_rank
    assert spoken("", answer_rank, JSON) is answer_rank
    assert spoken(ARROW, answer_rank, JSON) is not answer_rank
    assert spoken(JSON, answer_rank, ARROW) is not answer_rank
