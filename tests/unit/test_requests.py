"""Requests made of events: their histories end before them, and a body says what the encoded columns say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from model.datasets.log import TEST, TRAIN, VALID, Log, read_log
from model.features import FeatureSpec
from model.requests import (
    encode_items,
    encode_users,
    fit_log_spec,
    item_columns,
    plain,
    request_body,
    requests_of,
    user_features,
)
from tests.logs import write_tiny_log


@pytest.fixture(scope="module", params=[False, True], ids=["int ids", "string ids"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("log"), users=25, items=40, string_ids=request.param))


@pytest.fixture(scope="module")
def spec(log: Log) -> FeatureSpec:
    return fit_log_spec(log)


def test_every_request_stands_in_one_split(log: Log) -> None:
    parts = [requests_of(log, split) for split in (TRAIN, VALID, TEST)]
    assert sum(len(part) for part in parts) == len(requests_of(log))
    for split, part in zip((TRAIN, VALID, TEST), parts, strict=True):
        assert (log.split[part.first] == split).all()
        assert (log.split[part.end - 1] == split).all()


def test_a_history_holds_what_was_taken_strictly_before_whatever_the_split(log: Log) -> None:
    requests = requests_of(log, TEST)
    crossed = 0
    for row in range(len(requests)):
        mine = (log.user == requests.user[row]) & (log.grade > 0) & (log.time < requests.time[row])
        crossed += int((log.split[mine] == TEST).any())
        taken = log.items.ids[log.item[mine]].tolist()  # events are in the order of time
        body = request_body(log, requests, row, log.item[:1])
        assert sorted(body["history"]) == sorted(taken[-requests.history.shape[1] :])
    assert crossed, "no test request had a take of the test split behind it"


def test_a_body_encodes_to_the_columns_that_trained(log: Log, spec: FeatureSpec) -> None:
    requests = requests_of(log, VALID)
    columns = encode_users(spec, log, requests)
    for row in range(len(requests)):
        body = json.loads(json.dumps(request_body(log, requests, row, log.item[:3])))
        features = user_features(log, int(requests.user[row]))
        sent = {**features, **body["context"], "user_id": body["user_id"], "history": body["history"]}
        np.testing.assert_array_equal(spec.encode_row("user", sent), columns[row])


def test_items_encode_alike_in_a_table_and_one_by_one(log: Log, spec: FeatureSpec) -> None:
    rows = np.array([7, 0, 3])
    columns = item_columns(log, rows)
    for place, row in enumerate(rows.tolist()):
        one = {name: plain(column[place]) for name, column in columns.items()}
        np.testing.assert_array_equal(spec.encode_row("item", one), encode_items(spec, log)[row])


def test_a_body_holds_plain_values_and_leaves_out_what_is_missing(log: Log) -> None:
    requests = requests_of(log)
    kind = str if log.users.id_type == "string" else int
    devices = set()
    for row in range(len(requests)):
        body = request_body(log, requests, row, log.item[:2])
        ids = [body["user_id"], *body["history"], *body["candidates"]]
        assert {type(value) for value in ids} == {kind}
        assert None not in body["context"].values()
        devices.add("device" in body["context"])
    assert devices == {True, False}  # every fiftieth request was logged without one


def test_missing_features_of_a_user_are_left_out(log: Log) -> None:
    assert user_features(log, 0).keys() == {"user_id"}
    assert user_features(log, 1).keys() == {"user_id", "segment", "age"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (float("nan"), None),
        (np.float64("nan"), None),
        (None, None),
        ("a", "a"),
        (np.array([1, 2]), [1, 2]),
        (("a", None), ["a", None]),
    ],
)
def test_plain_values_are_those_of_json(value: Any, expected: Any) -> None:
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)


def test_a_specification_knows_only_what_training_touched(log: Log, spec: FeatureSpec) -> None:
    train = log.split == TRAIN
    known = {field.name: set(field.vocabulary) for field in spec.fields}
    assert known["user_id"] == set(log.users.ids[np.unique(log.user[train])].tolist())
    assert known["item_id"] == set(log.items.ids[np.unique(log.item[train])].tolist())
