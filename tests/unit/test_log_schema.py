"""The schema of a log: model/datasets/schema.py."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.datasets.schema import Lists, parse_schema, read_schema
from model.errors import DataError
from model.features import Field

Document = dict[str, Any]
Change = Callable[[Document], Any]


def document() -> Document:
    return {
        "columns": {"user": "user_id", "item": "item_id", "time": "t"},
        "feedback": {"ladder": ["click", "buy"]},
        "fields": [
            {"name": "user_id", "side": "user", "kind": "categorical"},
            {"name": "item_id", "side": "item", "kind": "categorical"},
        ],
    }


def changed(change: Change) -> Document:
    value = document()
    change(value)
    return value


def test_a_small_document_gets_the_documented_defaults() -> None:
    schema = parse_schema(document(), "log.toml")
    assert schema.name == "log"
    assert schema.rungs == ("click", "buy")
    assert schema.negative == ()
    assert schema.soft_label.expression == "click + buy"
    assert (schema.split.by, schema.split.valid, schema.split.test) == ("time", 0.1, 0.1)
    assert schema.lists == Lists(gap_s=1800.0, max_impressions=50)
    assert schema.fields[0] == Field(name="user_id", side="user", kind="categorical", dim=16)
    assert schema.history is None


def test_lists_get_a_length_of_their_own() -> None:
    def add(value: Document) -> None:
        value["fields"] += [
            {"name": "tags", "side": "item", "kind": "multi"},
            {"name": "history", "side": "user", "kind": "sequence", "shares": "item_id"},
        ]

    schema = parse_schema(changed(add), "log.toml")
    assert [field.length for field in schema.fields] == [1, 1, 5, 30]
    assert schema.history is not None
    assert [field.name for field in schema.on("user")] == ["user_id"]  # the history is no column


@pytest.mark.parametrize(
    ("columns", "by"),
    [({"time": "t"}, "time"), ({"order": "n"}, "order"), ({}, "hash")],
)
def test_the_split_follows_what_the_log_has(columns: dict[str, str], by: str) -> None:
    value = document()
    value["columns"] = {"user": "user_id", "item": "item_id", **columns}
    assert parse_schema(value, "log.toml").split.by == by


def test_dates_are_moments_and_without_a_zone_utc(tmp_path: Path) -> None:
    (tmp_path / "log.toml").write_text(
        'columns = {user = "user_id", item = "item_id", time = "t"}\n'
        'feedback = {ladder = ["click"]}\n'
        "split = {valid_from = 2024-03-01, test_from = 2024-03-02T00:00:00+08:00}\n"
        'fields = [{name = "user_id", side = "user", kind = "categorical"},\n'
        '          {name = "item_id", side = "item", kind = "categorical"}]\n'
    )
    split = read_schema(tmp_path / "log.toml").split
    assert split.valid_from == datetime(2024, 3, 1, tzinfo=UTC)
    assert split.test_from == datetime(2024, 3, 1, 16, tzinfo=UTC)


def put(path: str, value: Any) -> Change:
    """Set one key of the document: `split.by`."""

    def change(target: Document) -> None:
        *tables, key = path.split(".")
        for table in tables:
            target = target.setdefault(table, {})
        target[key] = value

    return change


def field(**options: Any) -> Change:
    return lambda value: value["fields"].append({"name": "extra", "side": "item", "kind": "numeric"} | options)


MISTAKES: list[tuple[Change, str]] = [
    (lambda v: v.pop("columns"), r"table \[columns\] is missing"),
    (lambda v: v.pop("feedback"), r"table \[feedback\] is missing"),
    (lambda v: v.pop("fields"), r"\[\[fields\]\] is missing"),
    (put("fields", []), r"\[\[fields\]\] is missing"),
    (put("fields", {"name": "x"}), r"\[\[fields\]\] is missing"),
    (put("colums", {}), "unknown key 'colums': did you mean 'columns'"),
    (put("columns", "user"), "columns is 'user': write it as a table"),
    (put("columns.usr", "u"), r"\[columns\]: unknown key 'usr': did you mean 'user'"),
    (lambda v: v["columns"].pop("user"), r"\[columns\]: user is missing"),
    (put("columns.user", 3), r"\[columns\]: user is 3: write a text"),
    (put("columns.user", ""), "user is '': write a text"),
    (put("columns.order", "n"), "order is 'n': time is 't' already"),
    (put("columns.time_unit", "m"), "time_unit is 'm': use one of s, ms, us, ns"),
    (put("columns.teacher", {"clck": "p"}), r"\[columns.teacher\]: unknown key 'clck': did you mean 'click'"),
    (put("columns.teacher", {"click": "p"}), "no column for buy"),
    (put("columns.teacher", {"click": "p", "buy": 3}), r"\[columns.teacher\]: buy is 3: write a text"),
    (put("feedback.ladder", []), "ladder is .*: name the feedback columns"),
    (put("feedback.ladder", "click"), "ladder is 'click': write a list"),
    (put("feedback.ladder", ["click", "click"]), "'click' stands there 2 times"),
    (put("feedback.ladder", ["add-to-cart"]), "'add-to-cart' cannot stand in soft_label, rename"),
    (put("feedback.ladder", ["in"]), "'in' cannot stand in soft_label"),
    (put("feedback.negative", ["click"]), "negative is .*: 'click' is a rung of the ladder too"),
    (put("feedback.soft_label", "clik"), r"\[feedback\]: soft_label 'clik' reads 'clik', which is not a rung"),
    (put("feedback.soft_label", 3), "soft_label is 3: write a text"),
    (put("split.by", "date"), "by is 'date': use one of time, order, hash"),
    (put("split.valid", 0), "valid is 0: write a fraction"),
    (put("split.valid", "a"), "valid is 'a': write a number"),
    (put("split.valid", True), "valid is True: write a number"),
    (put("split.test", 0.9), "test is 0.9: with valid 0.1 nothing is left to train on"),
    (put("split.valid_from", 3), "give valid_from and test_from, or the fractions"),
    (put("split", {"valid_from": 3, "test_from": 3}), "test_from is 3: it must come after valid_from"),
    (put("split", {"valid_from": 3, "test_from": 4, "test": 0.1}), "not a mixture"),
    (put("split", {"valid_from": 3, "test_from": datetime(2024, 1, 1)}), "in the same way"),
    (put("split", {"valid_from": "3", "test_from": 4}), "valid_from is '3': write a date"),
    (put("split", {"valid_from": 3.5, "test_from": 4}), "valid_from is 3.5: write a date"),
    (put("split", {"by": "hash", "valid_from": 3, "test_from": 4}), "a split by hash takes the fractions"),
    (put("lists.gap_s", 0), "gap_s is 0: write a number of seconds above 0"),
    (put("lists.max_impressions", 0), "max_impressions is 0: write a whole number of at least 1"),
    (put("lists.max_impressions", 2.5), "max_impressions is 2.5: write a whole number"),
    (put("lists.gap_s", float("nan")), "gap_s is nan: write a finite number"),
    (put("lists.gap_s", float("inf")), "gap_s is inf: write a finite number"),
    (put("lists.gap_s", 10**400), "gap_s is 10{79}\\.\\.\\.: write a smaller number"),
    (put("lists.gap_s", 16**5000), "gap_s is too long to show: write a smaller number"),
    (put("lists.max_impressions", 10**30), "max_impressions is 10+: write a whole number of at most 1,000,000"),
    (put("split.valid", float("nan")), "valid is nan: write a finite number"),
    (put("split", {"valid_from": 3, "test_from": 2**63}), "test_from is .*: no column of 64-bit integers reaches it"),
    (put("split", {"valid_from": -(10**30), "test_from": 3}), "valid_from is -10+: no column of 64-bit integers"),
    (put("lists.gap", 3), r"\[lists\]: unknown key 'gap': did you mean 'gap_s'"),
    (field(kind="categoric"), r"\[\[fields\]\] number 3 \(extra\): kind is 'categoric': did you mean 'categorical'"),
    (field(side="users"), r"\(extra\): side is 'users': did you mean 'user'"),
    (field(pooling="sum"), "pooling is 'sum': known are attention, mean"),
    (field(width=3), r"number 3: unknown key 'width'"),
    (field(vocabulary=[1]), "unknown key 'vocabulary'"),
    (field(dim=0), "dim is 0: write a whole number of at least 1"),
    (field(dim=2**40), "dim is 1099511627776: write a whole number of at most 4,096"),
    (field(kind="multi", length=10**20), "length is 10+: write a whole number of at most 4,096"),
    (field(length=3), "a numeric field has length 1, not 3"),
    (field(kind="sequence", side="user"), "the sequence field is named 'history'"),
    (field(name="history", kind="sequence"), "side is 'item': a sequence holds the user's past items"),
    (field(name="item_id"), "field item_id is declared 2 times"),
    (field(shares="nothing"), "field extra shares nothing, which is not a field"),
    (field(kind="categorical", dim=8, shares="item_id"), r"field extra \(dim 8\) cannot share the table of item_id"),
    (
        field(name="history", side="user", kind="sequence", shares="user_id"),
        "history: holds items, so shares = 'item_id', or leave it out",
    ),
    (lambda v: v["fields"].pop(0), r"\[\[fields\]\] has none on the user side"),
    (lambda v: v["fields"].pop(1), r"\[\[fields\]\] has none on the item side"),
    (lambda v: v["fields"][0].pop("kind"), "kind is missing"),
]


ROLES = {  # column of events: what log.toml makes it, and the remedy
    "click": "a rung of the ladder: it is known after the request only, remove the field",
    "buy": "a rung of the ladder: it is known",
    "hidden": "negative feedback: it is known after the request only",
    "p_buy": "a logged score of the teacher: it is known after the request only",
    "stage": "the stage: it is known after the request only",
    "request_id": "the request's id: it never comes again, remove the field",
    "t": "the time: it never comes again, make a column of its hour or weekday",
    "n": "the order: it never comes again, make a column",
    "user_id": "the user's id: use side user",
    "item_id": "the item's id: use side item",
}


@pytest.mark.parametrize("name", ROLES)
def test_a_column_with_a_role_of_its_own_is_no_context(name: str) -> None:
    value = document()
    value["columns"] |= {"stage": "stage", "request": "request_id", "teacher": {"click": "p_click", "buy": "p_buy"}}
    value["feedback"]["negative"] = ["hidden"]
    if name == "n":
        value["columns"]["order"] = value["columns"].pop("time") and "n"
    value["fields"] = [one | {"name": f"{one['side']}_feature"} for one in value["fields"]]
    parse_schema(value, "log.toml")
    value["fields"].append({"name": name, "side": "context", "kind": "categorical"})
    with pytest.raises(
        DataError, match=rf"^log.toml: \[\[fields\]\] {name}: side is 'context', but this is {ROLES[name]}"
    ):
        parse_schema(value, "log.toml")
    value["fields"][-1]["side"] = "item"  # a column of items.parquet of the same name is another thing
    parse_schema(value, "log.toml")


@pytest.mark.parametrize(("change", "problem"), MISTAKES, ids=[problem for _, problem in MISTAKES])
def test_a_mistake_is_named_with_its_key_and_remedy(change: Change, problem: str) -> None:
    with pytest.raises(DataError, match="^log.toml.*" + problem):
        parse_schema(changed(change), "log.toml")


def test_a_date_cannot_divide_an_order() -> None:
    value = document()
    value["columns"] = {"user": "user_id", "item": "item_id", "order": "n"}
    value["split"] = {"by": "time", "valid_from": datetime(2024, 1, 1), "test_from": datetime(2024, 1, 2)}
    with pytest.raises(DataError, match="'n' is an order, not a time, write a number"):
        parse_schema(value, "log.toml")


def test_a_log_without_time_cannot_be_split_by_time() -> None:
    value = document()
    value["columns"] = {"user": "user_id", "item": "item_id"}
    value["split"] = {"by": "time"}
    with pytest.raises(DataError, match="no time or order column, use hash or name one"):
        parse_schema(value, "log.toml")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"name = ", "cannot be read as TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"name = " + b"9" * 5000, "cannot be read as TOML .*digits"),
        (b"name = " + b"[" * 5000, "cannot be read as TOML .*recursion"),
    ],
)
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "log.toml").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_schema(tmp_path / "log.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log.toml does not exist: write it as docs/data.md shows"):
        read_schema(tmp_path / "log.toml")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**63, -(10**30), 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["t", "click", "time"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
places = st.sampled_from(
    (
        *("name", "columns", "columns.time", "columns.teacher", "feedback.ladder", "feedback.negative"),
        *("split", "split.by", "split.valid", "split.valid_from", "lists", "lists.gap_s", "lists.max_impressions"),
        "fields",
    )
)


@given(places, values)
def test_no_document_gives_another_error_than_ours(place: str, value: Any) -> None:
    try:
        parse_schema(changed(put(place, value)), "log.toml")
    except DataError:
        return
