"""Which forms a body comes in and an answer goes out in, by the headers."""

from __future__ import annotations

import sys

from service.answers import ARROW, JSON, Answerer, answer_rank
from service.errors import UnsupportedBody

ARROW_ROOM = "service.arrow"


def is_loaded(*headers: str) -> bool:
    """Whether what these headers name is in memory: pyarrow, 25 MB and 200 ms, comes only where somebody speaks it."""
    return ARROW_ROOM in sys.modules or not any(ARROW in header for header in headers)


def form_of(content_type: str, answerer: Answerer) -> str:
    """The media type of a body. Raises UnsupportedBody unless the answerer reads it; JSON is read in UTF-8 alone."""
    forms = (JSON, ARROW) if answerer is answer_rank else (JSON,)
    media_type, _, parameters = content_type.partition(";")
    form = media_type.strip().lower()
    charset = parameters.strip().lower().replace('"', "")
    if form not in forms or (form == JSON and charset not in ("", "charset=utf-8")):
        raise UnsupportedBody(
            f"Content-Type is {content_type[:80] or 'absent'}",
            field="Content-Type",
            remedy=f"send {' or '.join(forms)}",
        )
    return form


def check_encoding(content_encoding: str) -> None:
    """Raise UnsupportedBody where a body is compressed."""
    if content_encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedBody(
            f"Content-Encoding is {content_encoding[:80]}",
            field="Content-Encoding",
            remedy="send the body without encoding",
        )


def spoken(accept: str, answerer: Answerer, form: str) -> Answerer:
    """The answerer for the forms that the caller speaks. An answer has the form of the body unless another is asked."""
    sends = ARROW in accept or (form == ARROW and JSON not in accept)
    if answerer is not answer_rank or not (sends or form == ARROW):
        return answerer
    from service import arrow

    return arrow.answerer(takes=form == ARROW, sends=sends)
