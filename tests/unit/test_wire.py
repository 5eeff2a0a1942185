"""The fast decoder against the schema of record, and its refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kernel import candidates
from kernel.ids import Texts
from model.features import IdType
from service.errors import MalformedBody, RequestError
from service.schema import BatchBody, RankBody, RetrieveBody, UserBody
from service.wire import BatchRequest, RankRequest, RetrieveRequest, decoders

BODIES: dict[str, Any] = {"rank": RankBody, "batch": BatchBody, "retrieve": RetrieveBody}
IDS: tuple[IdType, ...] = ("int", "string")

integers = st.one_of(
    st.integers(-3, 3), st.integers(), st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**30])
)
numbers = st.one_of(integers, st.floats(), st.booleans())
scalars = st.one_of(numbers, st.text(max_size=5), st.none())
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ids: dict[IdType, st.SearchStrategy[Any]] = {"int": st.integers(-9, 9), "string": st.text(max_size=3)}
values = st.one_of(scalars, st.lists(scalars, max_size=3))
named = st.dictionaries(st.text(max_size=3), st.one_of(st.floats(-9, 9), st.text(max_size=3), values), max_size=2)


def likely(user_ids: IdType, item_ids: IdType) -> dict[str, st.SearchStrategy[Any]]:
    """Values that each field mostly takes."""
    return {
        "user_id": st.one_of(ids[user_ids], st.none()),
        "user": named,
        "context": named,
        "history": st.lists(ids[item_ids], max_size=3),
        "top_k": st.integers(0, 5),
        "explain": st.booleans(),
        "deadline_ms": st.integers(1, 5),
        "candidates": st.lists(ids[item_ids], max_size=4),
        "on_missing": st.sampled_from(["last", "drop", "error"]),
        "per_head": st.integers(1, 5),
    }


@st.composite
def documents(draw: st.DrawFn, model: type[UserBody], user_ids: IdType, item_ids: IdType) -> dict[str, Any]:
    """Bodies of which about half are right; the others have an unlikely value, a field too many or one too few."""
    usual = likely(user_ids, item_ids)
    fields = {name: usual[name] for name in model.model_fields}
    spoilt = draw(st.sampled_from([*[None] * 10, *fields, "other"]))
    if spoilt is not None:
        fields[spoilt] = anything
    required = {name: fields.pop(name) for name in ("candidates", spoilt) if name in fields}
    document = draw(st.fixed_dictionaries(required, optional=fields))
    if draw(st.integers(0, 9)) == 9:
        document.pop("candidates", None)
    return document


def ids_are(document: dict[str, Any], user_ids: IdType, item_ids: IdType) -> bool:
    """Whether a body that the schema accepts holds ids of these types."""
    kinds = {"int": int, "string": str}
    items = [*(document.get("history") or []), *(document.get("candidates") or [])]
    user = document.get("user_id")
    return (user is None or isinstance(user, kinds[user_ids])) and all(isinstance(i, kinds[item_ids]) for i in items)


def recorded(kind: str, body: bytes, user_ids: IdType, item_ids: IdType) -> str | None:
    """What the schema of record reads in a body, None where it refuses it. repr tells 1, 1.0 and True apart."""
    try:
        document = BODIES[kind].model_validate_json(body).model_dump()
    except ValidationError:
        return None
    parts = document["requests"] if kind == "batch" else [document]
    return repr(document) if all(ids_are(part, user_ids, item_ids) for part in parts) else None


def decoded(kind: str, body: bytes, user_ids: IdType, item_ids: IdType) -> str | None:
    try:
        found = getattr(decoders(user_ids, item_ids), kind)(body)
    except RequestError:
        return None
    if kind == "batch":
        return repr({"requests": [fields(part, item_ids) for part in found.requests]})
    return repr(fields(found, item_ids))


def fields(request: Any, item_ids: IdType) -> dict[str, Any]:
    """What a request holds by name, its candidates as a list, whose bulk form is checked."""
    found = {
        name: getattr(request, name)
        for name in BODIES["retrieve" if hasattr(request, "per_head") else "rank"].model_fields
    }
    if "candidates" in found:
        assert isinstance(found["candidates"], np.ndarray if item_ids == "int" else Texts)
        assert item_ids == "string" or found["candidates"].dtype == np.int64
        found["candidates"] = found["candidates"].tolist()
    return found


def same(kind: str, body: bytes, user_ids: IdType, item_ids: IdType) -> None:
    assert decoded(kind, body, user_ids, item_ids) == recorded(kind, body, user_ids, item_ids)


def outcome(kind: str, body: bytes, item_ids: IdType) -> str:
    """What a decoder reads in a body, or all that it says in refusing it."""
    try:
        found = getattr(decoders("int", item_ids), kind)(body)
    except RequestError as error:
        return repr((type(error), error.detail, error.field, error.remedy))
    return repr([fields(part, item_ids) for part in (found.requests if kind == "batch" else [found])])


@pytest.mark.parametrize("user_ids", IDS)
@pytest.mark.parametrize("item_ids", IDS)
@pytest.mark.parametrize("kind", ["rank", "retrieve"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fast_decoder_reads_what_the_schema_reads(
    kind: str, item_ids: IdType, user_ids: IdType, data: st.DataObject
) -> None:
    document = data.draw(documents(BODIES[kind], user_ids, item_ids))
    same(kind, json.dumps(document).encode(), user_ids, item_ids)


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.lists(documents(RankBody, "int", "string"), max_size=2), anything))
def test_fast_decoder_reads_batches_as_the_schema_does(requests: Any) -> None:
    same("batch", json.dumps({"requests": requests}).encode(), "int", "string")


@settings(max_examples=150, deadline=None)
@given(
    documents(RankBody, "int", "int"),
    st.integers(0, 200),
    st.one_of(st.binary(max_size=3), st.sampled_from([b"\xff", b"NaN", b"1e999", b"[" * 500, b"//"])),
)
@example({"candidates": [1]}, 0, b"\xef\xbb\xbf")
@example({"candidates": [1]}, 17, b"\\ud800")
def test_damaged_bodies_are_read_alike(document: dict[str, Any], at: int, damage: bytes) -> None:
    body = json.dumps(document).encode()
    body = body[:at] + damage + body[at + 1 :]
    if b'"' in damage:
        return  # it could name a field twice: the record keeps the last one, the decoder checks both
    same("rank", body, "int", "int")


# --- the candidates taken out by the kernel

PIECES = [b'"', b"\\", b"[", b"]", b"{", b"}", b":", b",", b"-", b"0", b"00", b"1.0", b"1e3", b"null", b"[]", b"[7]",
          b" \n\t\r", b"candidates", b'"candidates":[8]', b'"candidates":[8],', b'"user":{"candidates":[9]},',
          b'"requests":[{"candidates":[5]}],', b'"candi\\u0064ates":[3],', b"9223372036854775807",
          b"9223372036854775808", b"-9223372036854775808", b"123456789012345678901234567890", b"\\u00fc", b"\xc3\xbc",
          b"\xff", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\x00", b"\x1f", b"\x7f", b'"x"', b"x" * 1025,
          b"\xef\xbb\xbf"]  # fmt: skip


def spaced(document: Any, draw: st.DataObject) -> bytes:
    """JSON with blanks between its parts, or none, and with escapes, or none."""
    space = draw.draw(st.sampled_from(["", " ", "\n\t ", "\r\n"]))
    escaped = draw.draw(st.booleans())
    return json.dumps(document, separators=(f"{space},{space}", f"{space}:{space}"), ensure_ascii=escaped).encode(
        errors="surrogatepass"
    )


def damaged(body: bytes, draw: st.DataObject) -> bytes:
    """The body with up to three places cut out, doubled, replaced, or with something put in."""
    for _ in range(draw.draw(st.integers(0, 3))):
        start = draw.draw(st.integers(0, len(body)))
        end = draw.draw(st.integers(start, min(len(body), start + 12)))
        new = draw.draw(st.one_of(st.sampled_from([*PIECES, body[start:end] * 2, b""]), st.binary(max_size=2)))
        body = body[:start] + new + body[end:]
    return body[: draw.draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))]


@pytest.mark.skipif(candidates.native is None, reason="the extension was not built")
@pytest.mark.parametrize("item_ids", IDS)
@pytest.mark.parametrize("kind", ["rank", "batch"])
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_fast_path_changes_neither_what_is_read_nor_what_is_said(
    kind: str, item_ids: IdType, data: st.DataObject
) -> None:
    document: Any = data.draw(documents(RankBody, "int", item_ids))
    if kind == "batch":
        document = {"requests": [document, *data.draw(st.lists(documents(RankBody, "int", item_ids), max_size=2))]}
    body = damaged(spaced(document, data), data)
    fast = outcome(kind, body, item_ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "native", None)
        assert fast == outcome(kind, body, item_ids)


@pytest.mark.parametrize(
    ("kind", "body", "ids"),
    [
        ("rank", b'{"candidates":[1],"candidates":[2]}', [[2]]),
        ("rank", b'{"candidates":[1],"candi\\u0064ates":[2]}', [[2]]),
        ("rank", b'{"user":{"candidates":[1]},"candidates":[2],"context":{"candidates":[3]}}', [[2]]),
        ("rank", b'{"on_missing":"last","context":{"a":"\\"candidates\\":[1]"},"candidates":[2]}', [[2]]),
        ("batch", b'{"requests":[{"candidates":[1]}],"requests":[{"candidates":[2]}]}', [[2]]),
        ("batch", b'{"requests":[],"requests":[{"candidates":[2]},{"candidates":[3]}]}', [[2], [3]]),
        ("batch", b'{"requests":[{"candidates":[1],"user":{"candidates":[4]}},{"candidates":[]}]}', [[1], []]),
        ("batch", b'{"requests":[]}', []),
    ],
)
def test_candidates_are_those_of_their_place(kind: str, body: bytes, ids: list[list[int]]) -> None:
    found: Any = getattr(decoders("int", "int"), kind)(body)
    parts = found.requests if kind == "batch" else [found]
    assert [part.candidates.tolist() for part in parts] == ids


@pytest.mark.parametrize(
    "literal",
    [
        "1.0",
        "1e3",
        "-0",
        "-0.0",
        "1e400",
        "1.7976931348623159e308",
        "01",
        "0x1",
        "NaN",
        "Infinity",
        "-Infinity",
        "true",
        "null",
    ],
)
@pytest.mark.parametrize(
    "form", ['{"candidates":[%s]}', '{"candidates":[],"user":{"a":%s}}', '{"candidates":[],"top_k":%s}']
)
def test_odd_numbers_are_read_alike(form: str, literal: str) -> None:
    same("rank", (form % literal).encode(), "int", "int")


@pytest.mark.parametrize(
    "text", ['"\\ud800"', '"\\udc00"', '"\\u0000"', '"\x01"', '"\x7f"', '"' + "x" * 1024 + '"', '"' + "x" * 1025 + '"']
)
def test_odd_strings_are_read_alike(text: str) -> None:
    same("rank", f'{{"candidates":[{text}]}}'.encode(), "int", "string")


def test_the_requests_have_the_fields_of_the_record() -> None:
    pairs = ((RankRequest, RankBody), (BatchRequest, BatchBody), (RetrieveRequest, RetrieveBody))
    for request, body in pairs:
        assert sorted(request.__struct_fields__) == sorted(body.model_fields)


@pytest.mark.parametrize(
    ("kind", "body", "field", "detail", "remedy"),
    [
        (
            "rank",
            b'{"candidates":[1,"a"]}',
            "candidates[1]",
            'candidates[1] is "a": expected int',
            "integers within int64",
        ),
        (
            "rank",
            b'{"candidates":[1,99999999999999999999]}',
            "candidates[1]",
            "is 99999999999999999999:",
            "integers within int64",
        ),
        ("rank", b"{}", "candidates", "candidates is absent", "a list of item ids"),
        ("rank", b'{"candidates":[],"candidats":[]}', "candidats", "is not a field", "did you mean candidates?"),
        ("rank", b'{"candidates":[],"per_head":1}', "per_head", "is not a field", "use one of: candidates, context"),
        ("rank", b'{"candidates":[],"user_id":"x"}', "user_id", 'user_id is "x"', "integers"),
        ("rank", b'{"candidates":[],"user":{"a":1,"b":[[2]]}}', "user.b[0]", "user.b[0] is [2]", "flat lists"),
        ("rank", b'{"candidates":[],"context":{"b":{"c":1}}}', "context.b", 'context.b is {"c":1}', "flat lists"),
        ("rank", b'{"candidates":[],"top_k":-1}', "top_k", "top_k is -1", "from 0 on"),
        ("rank", b'{"candidates":[],"on_missing":"first"}', "on_missing", "first", "last, drop or error"),
        ("rank", b'{"candidates":[],"deadline_ms":0}', "deadline_ms", "deadline_ms is 0", "from 1 to"),
        ("rank", b'{"candidates":[],"explain":1}', "explain", "explain is 1", "true or false"),
        ("rank", b"[]", None, "the body is []", "one JSON object"),
        (
            "batch",
            b'{"requests":[{"candidates":[]},{"candidates":[],"topk":3}]}',
            "requests[1].topk",
            "is not a field",
            "did you mean top_k?",
        ),
        ("batch", b'{"requests":[{"candidates":["x"]}]}', "requests[0].candidates[0]", '"x"', "integers within int64"),
        ("batch", b'{"request":[]}', "request", "is not a field", "did you mean requests?"),
        ("batch", b'{"requests":[{"user":{}}]}', "requests[0].candidates", "is absent", "a list of item ids"),
        ("rank", b'{"candidates":[],"user":{"a":1,"b":1e999}}', "user.b", "out of range", "a finite number"),
        (
            "rank",
            b'{"candidates":[],"user":{"b":1' + b"0" * 40 + b"}}",
            "user.b",
            "user.b is 100000",
            "a finite number",
        ),
        ("rank", b'{"candidates":[],"user":{"b":-1' + b"0" * 9_000 + b"}}", "user.b", "", "a finite number"),
        ("rank", b'{"candidates":[],"context":{"b":[1,-1e999]}}', "context.b[1]", "out of range", "a finite number"),
        ("batch", b'{"requests":[{"candidates":[],"user":{"b":1e999}}]}', "requests[0].user.b", "", "a finite number"),
        ("rank", b'{"candidates":[],"user":{"\\ud800aaaa":1e999},"top_k":1}', None, "half a character", "whole"),
        ("retrieve", b'{"candidates":[1]}', "candidates", "is not a field", "use one of"),
        ("rank", b'{"candidates":[], "x - at `$.a[99999999999999999999]":1}', None, "", "send"),
    ],
)
def test_a_refusal_names_field_value_and_remedy(
    kind: str, body: bytes, field: str | None, detail: str, remedy: str
) -> None:
    with pytest.raises(RequestError) as caught:
        getattr(decoders("int", "int"), kind)(body)
    assert caught.value.field == field
    assert detail in caught.value.detail
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "body", [b"", b" \n", b"{", b'{"candidates":[NaN]}', b"\xff", b'{"candidates":[]}x', b'{"\xff":1}']
)
def test_a_body_that_is_no_json_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody) as caught:
        decoders("int", "int").rank(body)
    assert "JSON" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "half"), [("\\ud800", "\\ud800"), ("\\ud83d\\ude00 \\uDE00", "\\uDE00"), ("\\ud800abcdefgh", "\\ud800")]
)
def test_half_a_character_is_named(text: str, half: str) -> None:
    with pytest.raises(MalformedBody) as caught:
        decoders("int", "string").rank(f'{{"candidates":["{text}"]}}'.encode())
    assert f"the lone surrogate {half}" in caught.value.detail


def test_a_body_that_is_cut_within_a_character_was_cut() -> None:
    with pytest.raises(MalformedBody, match="truncated"):
        decoders("int", "string").rank(b'{"candidates":["\\ud83d')


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "document",
    [
        {"candidates": [LONG]},
        {"candidates": [], LONG: 1},
        {"candidates": [], "user": {LONG: {}}},
        {"candidates": [], "on_missing": LONG},
        {"candidates": [], "top_k": LONG},
    ],
)
def test_what_is_long_is_shown_in_part(document: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        decoders("int", "int").rank(json.dumps(document).encode())
    assert len(str(caught.value)) < 800
    assert len(caught.value.field or "") <= 200
