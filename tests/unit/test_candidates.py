"""The candidates of a body, taken out by the kernel: places, kinds of ids, and all that it leaves to decoders."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel import candidates
from kernel.candidates import BATCH_DEPTH, RANK_DEPTH, arrow_candidates, split_candidates

needs_native = pytest.mark.skipif(candidates.native is None, reason="the extension was not built")


def split(body: bytes, depth: int = RANK_DEPTH, *, texts: bool = False) -> tuple[bytes, list[list[Any]]] | None:
    found = split_candidates(body, depth, texts=texts)
    return found and (found[0], [ids.tolist() for ids in found[1]])


@needs_native
@pytest.mark.parametrize("texts", [False, True])
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_split_can_be_put_together(texts: bool, data: st.DataObject) -> None:
    ids = st.text(st.characters(exclude_characters='"\\', min_codepoint=32, exclude_categories=["Cs"]), max_size=20)
    lists = data.draw(st.lists(st.lists(ids if texts else st.integers(-(2**63), 2**63 - 1)), max_size=3))
    space = data.draw(st.sampled_from(["", " ", "\n\t"]))
    first = ["x"] if texts else [1]
    document = {"a": ["candidates", {"candidates": first}], "b": [{"x": "", "candidates": one} for one in lists]}
    body = json.dumps(document, separators=(f"{space},{space}", f":{space}"), ensure_ascii=False).encode()
    rest, found = split(body, BATCH_DEPTH, texts=texts) or (b"", [])
    emptied = {"a": ["candidates", {"candidates": []}], "b": [{"x": "", "candidates": []} for _ in lists]}
    assert json.loads(rest) == emptied
    assert found == [first, *lists]


@needs_native
@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b'{"candidates":[]}', []),
        (b' { "candidates" : [ 1 , -2 ] } ', [1, -2]),
        (b'{"candidates":[0,9223372036854775807,-9223372036854775808]}', [0, 2**63 - 1, -(2**63)]),
        (b'{"candidates":[12345678,123456789,1234567890123456,12345678901234567]}',
         [12345678, 123456789, 1234567890123456, 12345678901234567]),
        (b'{"candidates":[12345678]}', [12345678]),
    ],
)  # fmt: skip
def test_integers_of_any_length_are_read(body: bytes, ids: list[int]) -> None:
    assert split(body) == (b'{"candidates":[]}' if b" " not in body else b' { "candidates" : [] } ', [ids])


MIXED = st.one_of(st.integers(0, 9), st.integers(0, 10**16), st.integers(-(2**63), 2**63 - 1))


@needs_native
@settings(max_examples=200, deadline=None)
@given(st.lists(MIXED, min_size=12, max_size=60), st.sampled_from([",", ", ", " ,", ",\n", ",  "]), st.integers(0, 64))
def test_long_lists_of_integers_are_read_wherever_they_begin(ids: list[int], comma: str, shift: int) -> None:
    body = b'{%s"candidates":[%s]}' % (b" " * shift, comma.join(map(str, ids)).encode())
    assert split(body) == (b'{%s"candidates":[]}' % (b" " * shift), [ids])


ODD = ("01", "-0", "1.5", "1e3", "", "-", "+1", "1 2", "1:", "0x1", "12345678901234567890", '"1"', "null", "[1]")


@needs_native
@settings(max_examples=200, deadline=None)
@given(st.lists(MIXED, min_size=12, max_size=30), st.integers(0, 11), st.sampled_from(ODD))
def test_one_odd_integer_among_many_leaves_all_to_the_decoder(ids: list[int], place: int, odd: str) -> None:
    written = [*map(str, ids)]
    written[place] = odd
    assert split(b'{"candidates":[%s]}' % ",".join(written).encode()) is None


@needs_native
def test_all_integers_near_a_power_of_ten_are_read() -> None:
    ids = [sign * (10**k + d) for k in range(19) for d in (-1, 0, 1) for sign in (1, -1) if 10**k + d]
    assert split(json.dumps({"candidates": ids}).encode()) == (b'{"candidates": []}', [ids])


@needs_native
@pytest.mark.parametrize("octets", [*range(18), 1024])
def test_texts_of_any_length_are_read(octets: int) -> None:
    text = ("abcdefgh" * 128)[:octets]
    assert split(f'{{"candidates":["{text}","é€😀"]}}'.encode(), texts=True) == (b'{"candidates":[]}', [[text, "é€😀"]])


@needs_native
@pytest.mark.parametrize(
    "ids",
    ["01", "-0", "00", "1.0", "1e3", "1E3", "-", "+1", "9223372036854775808", "-9223372036854775809", "1" * 20,
     "1" * 400, "1,", ",1", "1 2", "1,,2", "null", "true", '"a"', "[1]", "{}", "0x1", "1\x00", "1\x0b"],
)  # fmt: skip
def test_odd_integers_are_left_to_the_decoder(ids: str) -> None:
    assert split(f'{{"candidates":[{ids}]}}'.encode()) is None


@needs_native
@pytest.mark.parametrize(
    "ids",
    [b'"\\n"', b'"\\u0041"', b'"\x1f"', b'"\x00"', b'"\n"', b'"\xff"', b'"\xc3"', b'"\xc0\x80"', b'"\xe0\x80\x80"',
     b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xf0\x80\x80\x80"', b'"\xf0\x9f\x98"', b'"\x80"', b'"a" "b"',
     b'"a",', b"1", b"null", b'"' + b"x" * 1025 + b'"', b'"' + "ü".encode() * 513 + b'"'],
)  # fmt: skip
def test_odd_texts_are_left_to_the_decoder(ids: bytes) -> None:
    assert split(b'{"candidates":[' + ids + b"]}", texts=True) is None


@needs_native
@pytest.mark.parametrize(
    "body",
    [b'{"candidates":[1],"candidates":[2]}', b'{"candidates":[1],"candi\\u0064ates":[2]}', b'{"candidates":null}',
     b'{"candidates":', b'{"candidates":[', b'{"candidates":[1', b'{"candidates":[1]', b'{"candidates', b'{"a":"\\',
     b'{"candidates":[1]]', b"]", b'{"a":' + b"[" * 64 + b"]" * 64 + b"}"],
)  # fmt: skip
def test_odd_bodies_are_left_to_the_decoder(body: bytes) -> None:
    assert split(body) is None


@needs_native
@pytest.mark.parametrize("body", [b"", b"[]", b'"candidates"', b'{"user":{"candidates":[1]}}', b'[{"candidates":[1]}]'])
def test_only_the_wanted_depth_counts(body: bytes) -> None:
    assert split(body) == (body, [])


def test_without_the_extension_nothing_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "native", None)
    assert split_candidates(b'{"candidates":[1]}', RANK_DEPTH, texts=False) is None


# --- Arrow -----------------------------------------------------------------------------------------------------------

STREAM = (
    bytes.fromhex(  # a schema with `request` {"top_k":2}, a batch of 7, -8 and 9, and the end, as pyarrow writes it
        """
    ffffffffc00000001000000000000a000e000600050008000a000000000104001000000000000a000c000000040008000a00
    00004000000004000000010000000c00000008000c00040008000800000018000000040000000b0000007b22746f705f6b22
    3a327d000700000072657175657374000100000014000000100014000800060007000c000000100010000000000001021000
    00002400000004000000000000000a00000063616e64696461746573000008000c0008000700080000000000000140000000
    ffffffff8800000014000000000000000c0016000600050008000c000c000000000304001800000018000000000000000000
    0a0018000c00040008000a0000003c0000001000000003000000000000000000000002000000000000000000000000000000
    0000000000000000000000001800000000000000000000000100000003000000000000000000000000000000070000000000
    0000f8ffffffffffffff0900000000000000ffffffff00000000
    """
    )
)
END = 8  # octets of the last message
BODY = 24 + END


@needs_native
def test_a_plain_stream_is_read_where_it_lies() -> None:
    for stream in (STREAM, STREAM[:-END]):
        document, ids = arrow_candidates(stream) or (b"", np.empty(0))
        assert (document, ids.tolist()) == (b'{"top_k":2}', [7, -8, 9])
        assert not ids.flags.owndata


@needs_native
def test_a_stream_that_is_cut_or_goes_on_is_left_to_pyarrow() -> None:
    whole = {len(STREAM), len(STREAM) - END}
    assert [size for size in range(len(STREAM)) if size not in whole and arrow_candidates(STREAM[:size])] == []
    assert arrow_candidates(STREAM + b"\0" * 8) is None
    assert arrow_candidates(b"") is None


@needs_native
def test_no_damage_to_a_stream_leads_out_of_it() -> None:
    """Every octet becomes every value: what is read still lies in the stream, and nothing else happens."""
    for place in range(len(STREAM) - BODY):
        for value in range(256):
            damaged = STREAM[:place] + bytes([value]) + STREAM[place + 1 :]
            found = arrow_candidates(damaged)
            if found is not None:
                assert len(found[0] or b"") <= len(STREAM)
                assert len(found[1]) <= 3
                assert found[1].flags.aligned


@needs_native
@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(STREAM) - 4), st.integers(0, 2**32 - 1)), min_size=1, max_size=4))
def test_nor_do_wild_offsets(writes: list[tuple[int, int]]) -> None:
    damaged = bytearray(STREAM)
    for place, value in writes:
        damaged[place : place + 4] = value.to_bytes(4, "little")
    found = arrow_candidates(bytes(damaged))
    assert found is None or (found[1].nbytes <= len(STREAM) and found[1].flags.aligned)


@needs_native
def test_a_schema_with_a_body_is_left_to_pyarrow() -> None:
    """It would shift all that follows to an odd place."""
    size = 8 + int.from_bytes(STREAM[4:8], "little")
    message = 8 + int.from_bytes(STREAM[8:12], "little")  # the table; here its fields have no room for a body's size
    assert STREAM[message : message + 4] != b""
    assert arrow_candidates(STREAM[:size] + bytes(4) + STREAM[size:]) is None


def test_without_the_extension_no_stream_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "native", None)
    assert arrow_candidates(STREAM) is None
