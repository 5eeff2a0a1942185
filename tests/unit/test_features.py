from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.datasets.columns import Source, read_multi
from model.errors import FeatureError, SpecError
from model.features import MISSING, UNKNOWN, FeatureSpec, Field, fit_spec

FIELDS = (
    Field(name="user_id", side="user", kind="categorical"),
    Field(name="city", side="user", kind="categorical", dim=4),
    Field(name="age", side="user", kind="numeric"),
    Field(name="history", side="user", kind="sequence", length=3, shares="item_id"),
    Field(name="hour", side="context", kind="categorical"),
    Field(name="item_id", side="item", kind="categorical"),
    Field(name="tags", side="item", kind="multi", length=2),
    Field(name="price", side="item", kind="numeric"),
)
ROWS: dict[Any, Any] = {
    "user": {
        "user_id": np.array([7, 9, 11]),
        "city": np.array(["Oslo", "Bergen", None], object),
        "age": np.array([20.0, 30.0, np.nan]),
    },
    "context": {"hour": np.array([1.0, np.nan, 3.0])},
    "item": {
        "item_id": np.array([-5, 0, 2**62]),
        "tags": [["a", "b"], ["b"], []],
        "price": np.array([1, 2, 3]),
    },
}


@pytest.fixture(scope="module")
def spec() -> FeatureSpec:
    return fit_spec(FIELDS, ROWS, user_id_type="int", item_id_type="int")


ITEM_ID = st.sampled_from([-5, 0, 2**62, 4, -(2**63), 2**63 - 1])
NUMBER = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(2**62), 2**62)
USER_ROW = st.fixed_dictionaries(
    {},
    optional={
        "user_id": st.none() | st.sampled_from([7, 9, 11, 12, 7.0, 7.5, True]),
        "city": st.none() | st.sampled_from(["Oslo", "Bergen", "", "München", "oslo"]),
        "age": NUMBER,
        "history": st.none() | st.lists(st.none() | ITEM_ID, max_size=6),
        "hour": st.none() | st.integers(0, 4) | st.just(float("nan")),
    },
)
TAGS = st.none() | st.lists(st.none() | st.sampled_from(["a", "b", "c"]), max_size=4)
ITEM_ROW = st.fixed_dictionaries(
    {},
    optional={
        "item_id": ITEM_ID,
        "tags": TAGS,
        "price": NUMBER,
    },
)


@settings(max_examples=200)
@given(users=st.lists(USER_ROW, max_size=5), items=st.lists(ITEM_ROW, max_size=5))
def test_columns_and_rows_are_encoded_alike(
    spec: FeatureSpec, users: list[dict[str, Any]], items: list[dict[str, Any]]
) -> None:
    for tower, rows in (("user", users), ("item", items)):
        names = {name for row in rows for name in row}
        columns = {name: as_object_array([row.get(name) for row in rows]) for name in names}
        one_by_one = [spec.encode_row(tower, row) for row in rows]  # type: ignore[arg-type]
        together = spec.encode(tower, columns, len(rows))  # type: ignore[arg-type]
        width = spec.user_width if tower == "user" else spec.item_width
        np.testing.assert_array_equal(together, np.array(one_by_one, np.int32).reshape(len(rows), width))


@settings(max_examples=100)
@given(st.lists(TAGS, min_size=1, max_size=5))
def test_lists_of_a_parquet_file_and_of_a_request_are_encoded_alike(
    spec: FeatureSpec, rows: list[list[str | None] | None]
) -> None:
    column = read_multi(Source(Path("items.parquet"), pa.table({"t": pa.array(rows, pa.list_(pa.string()))})), "t")
    one_by_one = [spec.encode_row("item", {"tags": row}) for row in rows]
    np.testing.assert_array_equal(spec.encode("item", {"tags": column}, len(rows)), one_by_one)


def test_nulls_of_a_list_are_left_out_before_it_is_cut(spec: FeatureSpec) -> None:
    for tower, name, kept in (("item", "tags", ["b", "a"]), ("user", "history", [-5, 0, 2**62])):
        full = spec.encode_row(tower, {name: kept})  # type: ignore[arg-type]
        for value in ([None, None, *kept], [kept[0], None, *kept[1:], None, None]):
            np.testing.assert_array_equal(spec.encode_row(tower, {name: value}), full)  # type: ignore[arg-type]
            for column in ([value], [as_object_array(value)]):
                np.testing.assert_array_equal(spec.encode(tower, {name: column}, 1)[0], full)  # type: ignore[arg-type]


def as_object_array(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values
    return column


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint32, np.float64, object])
def test_the_type_of_a_column_does_not_change_its_codes(spec: FeatureSpec, dtype: Any) -> None:
    encoded = spec.encode("user", {"user_id": np.array([7, 8, 11], dtype)}, 3)
    assert encoded[:, 0].tolist() == [2, UNKNOWN, 4]


def test_missing_unknown_and_known_values_have_their_own_rows(spec: FeatureSpec) -> None:
    city = spec.columns("user")["city"].start
    codes = [spec.encode_row("user", row)[city] for row in ({}, {"city": None}, {"city": "Rome"}, {"city": "Oslo"})]
    assert codes[0] == codes[1] == MISSING
    assert codes[2] == UNKNOWN
    assert codes[3] > UNKNOWN


def test_a_history_keeps_its_latest_items_and_shares_the_items_table(spec: FeatureSpec) -> None:
    place = spec.columns("user")["history"]
    item = {value: spec.encode_row("item", {"item_id": value})[0] for value in (-5, 0, 2**62)}
    assert spec.encode_row("user", {"history": [0, -5, 0, 2**62]})[place].tolist() == [item[-5], item[0], item[2**62]]
    for short in spec.encode_row("user", {"history": [-5]}), spec.encode("user", {"history": [[-5]]}, 1)[0]:
        assert short[place].tolist() == [MISSING, MISSING, item[-5]], "its last column is the latest item"


def test_a_multi_field_keeps_its_first_values(spec: FeatureSpec) -> None:
    place = spec.columns("item")["tags"]
    full = spec.encode_row("item", {"tags": ["a", "b", "c"]})[place]
    assert full.tolist() == spec.encode_row("item", {"tags": ["a", "b"]})[place].tolist()


def test_context_follows_the_user_columns(spec: FeatureSpec) -> None:
    assert list(spec.columns("user")) == ["user_id", "city", "age", "history", "hour"]
    assert spec.user_width == 7
    assert spec.item_width == 4


def test_buckets_are_monotone_in_the_number(spec: FeatureSpec) -> None:
    place = spec.columns("item")["price"].start
    codes = [int(spec.encode_row("item", {"price": price})[place]) for price in (-1e9, 1, 2, 3, 1e9)]
    assert codes == sorted(codes)
    assert MISSING not in codes


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"city": 3}, "city"),
        ({"user_id": "7"}, "user_id"),
        ({"user_id": [7]}, "user_id"),
        ({"age": "old"}, "age"),
        ({"age": {}}, "age"),
        ({"age": 10**400}, "age"),
        ({"history": 5}, "history"),
        ({"history": "55"}, "history"),
        ({"history": ["5"]}, "history"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(spec: FeatureSpec, row: dict[str, Any], field: str) -> None:
    with pytest.raises(FeatureError, match=f"^{field}: expected") as caught:
        spec.encode_row("user", row)
    assert caught.value.field == field


def test_a_column_of_the_wrong_length_is_refused(spec: FeatureSpec) -> None:
    with pytest.raises(FeatureError, match="city: column has 2 values"):
        spec.encode("user", {"city": ["Oslo", "Oslo"]}, 3)


def test_a_spec_survives_its_file(spec: FeatureSpec, tmp_path: Any) -> None:
    spec.save(tmp_path / "spec.json")
    again = FeatureSpec.load(tmp_path / "spec.json")
    assert again == spec
    assert again.id == spec.id
    assert json.loads((tmp_path / "spec.json").read_text())["format"] == 2


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "fields": 3}'])
def test_a_damaged_spec_is_refused(tmp_path: Any, text: str) -> None:
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(SpecError):
        FeatureSpec.load(tmp_path / "spec.json")


def test_rare_values_are_unknown() -> None:
    field = Field(name="brand", side="item", kind="categorical")
    spec = fit_spec([field], {"item": {"brand": ["a", "a", "b"]}}, user_id_type="int", item_id_type="int", min_count=2)
    assert spec.fields[0].vocabulary == ("a",)


def test_many_distinct_numbers_get_quantile_buckets_of_equal_weight() -> None:
    field = Field(name="price", side="item", kind="numeric")
    prices = np.random.default_rng(0).lognormal(size=10_000)
    spec = fit_spec([field], {"item": {"price": prices}}, user_id_type="int", item_id_type="int", buckets=10)
    counts = np.bincount(spec.encode("item", {"price": prices}, len(prices))[:, 0])[1:]
    assert len(counts) == 10
    assert counts.min() > 900


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "users"}, "side is 'users'"),
        ({"kind": "number"}, "kind is 'number'"),
        ({"dim": 0}, "dim 0"),
        ({"length": 3}, "length 1, not 3"),
        ({"kind": "sequence"}, "is named 'history'"),
    ],
)
def test_an_impossible_field_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Field(**{"name": "x", "side": "user", "kind": "categorical", **options})


def test_fields_that_cannot_share_a_table_are_refused() -> None:
    item = Field(name="item_id", side="item", kind="categorical", dim=8)
    with pytest.raises(SpecError, match="cannot share"):
        FeatureSpec((item, Field(name="history", side="user", kind="sequence", dim=4, shares="item_id")), "int", "int")
    with pytest.raises(SpecError, match="not a field"):
        FeatureSpec((Field(name="history", side="user", kind="sequence", shares="nobody"),), "int", "int")
    with pytest.raises(SpecError, match="declared 2 times"):
        FeatureSpec((item, item), "int", "int")


def test_a_column_of_mixed_types_cannot_be_fitted() -> None:
    with pytest.raises(SpecError, match="mixes text and numbers"):
        fit_spec([FIELDS[1]], {"user": {"city": ["a", 3]}}, user_id_type="int", item_id_type="int")
    with pytest.raises(SpecError, match="use kind numeric"):
        fit_spec([FIELDS[1]], {"user": {"city": [0.5]}}, user_id_type="int", item_id_type="int")


def test_a_truth_value_is_no_number_in_a_row_but_is_one_in_a_column(spec: FeatureSpec) -> None:
    with pytest.raises(FeatureError, match="expected a number, got True: send a number") as caught:
        spec.encode_row("user", {"age": True})
    assert caught.value.field == "age"
    as_numbers = spec.encode("user", {"age": np.array([1.0, 0.0])}, 2)
    np.testing.assert_array_equal(spec.encode("user", {"age": np.array([True, False])}, 2), as_numbers)
