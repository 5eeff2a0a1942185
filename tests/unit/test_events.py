"""What reading does with the events of a log that is wrong, incomplete or unusual."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets.log import CANDIDATE, IMPRESSION, RANDOM, TEST, TRAIN, VALID, read_log, requests
from model.errors import DataError
from tests.logs import write_tiny_log

Values = list[Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_log(tmp_path / "log", users=12, items=20, days=5)


def edit(folder: Path, file: str, **columns: Callable[[Values], Any] | None) -> None:
    """Rewrite columns of a Parquet file: a function of the values gives the new ones, None removes the column."""
    path = folder / f"{file}.parquet"
    table = pq.read_table(path)
    for name, change in columns.items():
        if change is None:
            table = table.drop_columns([name])
            continue
        values = table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
        made = pa.array(change(values))
        place = table.column_names.index(name) if name in table.column_names else table.num_columns
        table = table.drop_columns([name]) if place < table.num_columns else table
        table = table.add_column(place, name, made)
    pq.write_table(table, path)


def retell(folder: Path, pattern: str, replacement: str) -> None:
    """Replace text of log.toml."""
    path = folder / "log.toml"
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count, pattern
    path.write_text(text)


def write_events(folder: Path, columns: dict[str, Values]) -> None:
    pq.write_table(pa.table(columns), folder / "events.parquet")


def with_first(value: object) -> Callable[[Values], Values]:
    return lambda values: [value, *values[1:]]


def with_third(value: object) -> Callable[[Values], Values]:
    return lambda values: [*values[:2], value, *values[3:]]


@pytest.mark.parametrize("file", ["users.parquet", "items.parquet", "events.parquet", "log.toml"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(DataError, match=f"{file} does not exist"):
        read_log(folder)


@pytest.mark.parametrize(
    ("file", "column", "change", "problem"),
    [
        ("users", "segment", None, "users.parquet has no column 'segment', which log.toml names"),
        ("items", "price", None, "items.parquet has no column 'price'"),
        ("events", "click", None, "events.parquet has no column 'click'"),
        ("events", "time", None, "events.parquet has no column 'time'"),
        ("events", "device", None, "events.parquet has no column 'device'"),
        ("users", "user_id", with_third(None), r"users.parquet: column 'user_id', row 2 \(from 0\): is null"),
        (
            "items",
            "item_id",
            lambda v: [v[0], v[0], *v[2:]],
            "items.parquet: column 'item_id', row 1 .*stands in row 0",
        ),
        ("items", "price", with_third(float("nan")), "items.parquet: column 'price', row 2 .*: is nan"),
        ("items", "category", lambda v: [[x] for x in v], "column 'category' is list.*use kind multi"),
        ("items", "tags", lambda v: [str(x) for x in v], "column 'tags' is string: .*use kind categorical"),
        ("items", "title", lambda v: list(range(len(v))), "column 'title' is int64: a title is text"),
        ("events", "user_id", with_third(None), "events.parquet: column 'user_id', row 2 .*: is null"),
        ("events", "item_id", lambda v: [str(x) for x in v], "column 'item_id' is string: ids are integers in items"),
        ("events", "time", with_third(None), "events.parquet: column 'time', row 2 .*: is null"),
        ("events", "time", lambda v: [x / 1000 for x in v], "column 'time' is double"),
        ("events", "cart", with_third(2), "events.parquet: column 'cart', row 2 .*: is 2: feedback is 0 or 1"),
        ("events", "buy", with_third(None), "events.parquet: column 'buy', row 2 .*: is null: write 0"),
        ("events", "hour", with_third(None), None),  # context may be missing
        ("users", "age", lambda v: [None for _ in v], None),  # so may features
        ("items", "tags", lambda v: [None for _ in v], None),
    ],
)
def test_a_wrong_column_is_named_with_file_row_and_remedy(
    folder: Path, file: str, column: str, change: Callable[[Values], Any] | None, problem: str | None
) -> None:
    edit(folder, file, **{column: change})
    if problem is None:
        assert len(read_log(folder)) > 0
        return
    with pytest.raises(DataError, match=problem):
        read_log(folder)


def test_a_log_without_events_is_refused(folder: Path) -> None:
    path = folder / "events.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match=r"events.parquet has no rows"):
        read_log(folder)


def test_events_of_unknown_users_and_items_are_dropped_and_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = read_log(folder)
    edit(folder, "events", user_id=with_first(-1), item_id=lambda v: [-1, v[1], -2, *v[3:]])
    with caplog.at_level(logging.WARNING):
        after = read_log(folder)
    assert (after.report["unknown_user"], after.report["unknown_item"]) == (1, 1)
    assert after.report["events"] == before.report["events"]
    assert len(after) == len(before) - 2
    assert "dropped 2 of" in caplog.text


def test_a_log_whose_files_share_no_id_is_refused(folder: Path) -> None:
    edit(folder, "events", user_id=lambda v: [-x for x in v])
    with pytest.raises(DataError, match=r"none of .* events has a user of users.parquet .* use the same ids"):
        read_log(folder)


def test_an_empty_split_is_named_with_the_time_that_the_events_cover(folder: Path) -> None:
    retell(folder, "valid = 0.15\ntest = 0.15", "valid_from = 2030-01-01\ntest_from = 2031-01-01")
    with pytest.raises(DataError, match=r"log.toml: \[split\]: no event falls into valid \(2024-01-01 .* to 2024-01-0"):
        read_log(folder)


def test_a_split_without_positives_is_refused(folder: Path) -> None:
    log = read_log(folder)
    last = int(log.time[log.split == TEST].min())
    times = pq.read_table(folder / "events.parquet")["time"].to_pylist()
    silent = {
        rung: (lambda v: [x if t < last else 0 for x, t in zip(v, times, strict=True)]) for rung in log.schema.rungs
    }
    edit(folder, "events", **silent)
    with pytest.raises(DataError, match=r"none of the .* events of the test split has any of click, cart, buy"):
        read_log(folder)


def test_an_item_shown_twice_in_a_request_is_one_event_with_the_feedback_of_both(folder: Path) -> None:
    before = read_log(folder)
    table = pq.read_table(folder / "events.parquet")
    again = table.slice(0, 1).to_pylist()[0] | {"click": 1, "cart": 0, "buy": 1}
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([again], table.schema)]), folder / "events.parquet")
    after = read_log(folder)
    assert after.report["repeats"] == 1
    assert len(after) == len(before)
    changed = np.flatnonzero(after.grade != before.grade)
    assert len(changed) <= 1
    row = np.flatnonzero(
        (after.users.ids[after.user] == again["user_id"])
        & (after.items.ids[after.item] == again["item_id"])
        & (after.time == again["time"])
    )
    assert after.grade[row].tolist() == [3]


def test_the_order_of_rows_in_the_file_changes_nothing(folder: Path) -> None:
    before = read_log(folder)
    path = folder / "events.parquet"
    table = pq.read_table(path)
    order = np.random.default_rng(1).permutation(table.num_rows)
    pq.write_table(table.take(order), path)
    after = read_log(folder)
    for name in ("user", "item", "time", "request", "grade", "split"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_negative_feedback_makes_the_grade_0(folder: Path) -> None:
    retell(folder, r"ladder = \[", 'negative = ["hate"]\nladder = [')
    edit(folder, "events", hate=lambda v: [k % 3 == 0 for k in range(len(v))])
    log = read_log(folder)
    untouched = read_log(write_tiny_log(folder, users=12, items=20, days=5))
    hated = (untouched.grade > 0) & (log.grade == 0)
    assert log.report["negative"] > hated.sum() > 0
    assert not log.feedback[hated].any()
    np.testing.assert_array_equal(log.grade[~hated], untouched.grade[~hated])


def test_logged_stages_are_kept_and_need_no_feedback(tmp_path: Path) -> None:
    folder = write_tiny_log(tmp_path, users=12, items=40, days=5, stages=True, requests=True)
    stages = pq.read_table(folder / "events.parquet")["stage"].to_pylist()
    hidden = lambda v: [x if s == "impression" else None for x, s in zip(v, stages, strict=True)]  # noqa: E731
    edit(folder, "events", click=hidden, cart=hidden, buy=hidden)
    log = read_log(folder)
    assert log.has_stages
    assert np.bincount(log.stage).tolist() == [len(log) // 2, len(log) // 4, len(log) // 4]
    assert not log.grade[log.stage != IMPRESSION].any()
    for first, end in zip(requests(log).first, requests(log).end, strict=True):
        assert set(log.stage[first:end].tolist()) == {IMPRESSION, CANDIDATE, RANDOM}


def test_an_unknown_stage_is_named_with_the_nearest(tmp_path: Path) -> None:
    folder = write_tiny_log(tmp_path, users=12, items=40, days=5, stages=True)
    edit(folder, "events", stage=with_third("candidates"))
    with pytest.raises(DataError, match=r"column 'stage', row 2 .*: is 'candidates': did you mean 'candidate'"):
        read_log(folder)


def test_a_stage_column_of_impressions_alone_is_not_a_log_of_stages(folder: Path) -> None:
    edit(folder, "events", stage=lambda v: ["impression"] * len(v))
    retell(folder, 'title = "title"', 'title = "title"\nstage = "stage"')
    assert not read_log(folder).has_stages


def test_logged_scores_are_read_for_each_rung(tmp_path: Path) -> None:
    log = read_log(write_tiny_log(tmp_path, users=12, items=20, days=5, teacher=True))
    assert log.teacher is not None
    assert log.teacher.shape == (len(log), 3)
    np.testing.assert_allclose(log.teacher[:, 1], 0.4 * log.teacher[:, 0], rtol=1e-5)
    assert log.teacher[log.grade > 0, 0].mean() > log.teacher[log.grade == 0, 0].mean()


def test_request_ids_group_what_they_name(tmp_path: Path) -> None:
    folder = write_tiny_log(tmp_path, users=12, items=20, days=5, requests=True)
    log = read_log(folder)
    assert len(requests(log)) == len(set(pq.read_table(folder / "events.parquet")["request_id"].to_pylist()))


def chain(count: int, users: int = 4) -> dict[str, Values]:
    """Events of a few users in turn, a place after the other, every second one taken."""
    return {
        "user_id": [k % users for k in range(count)],
        "item_id": [k // users % 10 for k in range(count)],
        "n": list(range(count)),
        "click": [int(k // users % 2 == 0) for k in range(count)],
    }


def bare(folder: Path, columns: str, split: str = "", lists: str = "", users: int = 4) -> Path:
    """A log of ids alone, its [columns], [split] and [lists] as given."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"user_id": list(range(users))}), folder / "users.parquet")
    pq.write_table(pa.table({"item_id": list(range(10))}), folder / "items.parquet")
    (folder / "log.toml").write_text(
        f'columns = {{user = "user_id", item = "item_id"{columns}}}\nfeedback = {{ladder = ["click"]}}\n'
        f"split = {{{split}}}\nlists = {{{lists}}}\n"
        'fields = [{name = "user_id", side = "user", kind = "categorical"},'
        ' {name = "item_id", side = "item", kind = "categorical"}]\n'
    )
    return folder


def test_an_order_divides_each_user_at_the_same_share(tmp_path: Path) -> None:
    folder = bare(tmp_path, ', order = "n"', "valid = 0.2, test = 0.2", "max_impressions = 3")
    write_events(folder, chain(40))
    log = read_log(folder)
    for user in range(4):
        assert np.bincount(log.split[log.user == user]).tolist() == [6, 2, 2]
    assert log.report["repeats"] == 0
    assert (np.bincount(log.request) <= 3).all()


def test_an_order_may_be_divided_at_places_of_all_users(tmp_path: Path) -> None:
    folder = bare(tmp_path, ', order = "n"', 'by = "time", valid_from = 24, test_from = 32')
    write_events(folder, chain(40))
    assert np.bincount(read_log(folder).split).tolist() == [24, 8, 8]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("moment", [2**63 - 2, -(2**63)])
def test_a_moment_that_no_time_can_reach_leaves_a_split_empty(tmp_path: Path, unit: str, moment: int) -> None:
    columns = f', time = "n", time_unit = "{unit}"'
    folder = bare(tmp_path, columns, f"valid_from = {moment}, test_from = {moment + 1}")
    write_events(folder, chain(40))
    with pytest.raises(DataError, match=r"\[split\]: no event falls into (train|valid)"):
        read_log(folder)


def test_moments_are_in_the_unit_of_the_column(tmp_path: Path) -> None:
    folder = bare(tmp_path, ', time = "n", time_unit = "us"', "valid_from = 24000, test_from = 32000")
    write_events(folder, chain(40) | {"n": [k * 1000 for k in range(40)]})
    log = read_log(folder)
    assert sorted(log.time.tolist()) == list(range(40))
    assert np.bincount(log.split).tolist() == [24, 8, 8]


@pytest.mark.parametrize("clock", ["", ', time = "n"', ', order = "n"'])
def test_a_hash_split_keeps_pairs_on_one_side_and_later_splits_later(tmp_path: Path, clock: str) -> None:
    folder = bare(tmp_path, clock, 'by = "hash", valid = 0.2, test = 0.3', "max_impressions = 4", users=50)
    write_events(folder, chain(1000, users=50))
    log = read_log(folder)
    sides: dict[tuple[int, int], set[int]] = {}
    for user, item, split in zip(log.user.tolist(), log.item.tolist(), log.split.tolist(), strict=True):
        sides.setdefault((user, item), set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    for user in range(50):
        times = [log.time[(log.user == user) & (log.split == split)] for split in (TRAIN, VALID, TEST)]
        held = [part for part in times if len(part)]
        assert all(early.max() < late.min() for early, late in pairwise(held))


def test_a_hash_split_without_time_does_not_order_events_by_their_labels(tmp_path: Path) -> None:
    folder = bare(tmp_path, "", lists="max_impressions = 10", users=100)
    columns = chain(1000, users=100)
    columns["click"] = [int(k < 500) for k in range(1000)]  # the file lists what was taken first
    write_events(folder, columns)
    log = read_log(folder)
    per_request = np.bincount(log.request, log.grade > 0) / np.bincount(log.request)
    long = np.bincount(log.request) >= 5
    assert ((per_request[long] > 0) & (per_request[long] < 1)).mean() > 0.9
    half = log.time < 5
    assert abs(log.grade[half].mean() - log.grade[~half].mean()) < 0.1
