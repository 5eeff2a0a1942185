from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets import DATASETS, adopt, retailrocket
from model.datasets.log import TEST, TRAIN, VALID, Log, read_log, requests
from model.errors import DataError
from tests.leaks import assert_no_feature_differs
from tests.real_data import FOLDER, needs

START_S = 1_430_622_000  # 3 May 2015, 03:00 UTC, a Sunday


def events(count: int = 600, seed: int = 0) -> dict[str, Any]:
    """Buyers' events in the columns of the selection: sittings of a few minutes."""
    rng = np.random.default_rng(seed)
    sitting = np.sort(rng.integers(0, count // 6, count))
    return {
        "user_id": (sitting * 7 % 23).astype(np.int16),
        "item_id": rng.integers(0, 30, count).astype(np.int32),
        "timestamp": (START_S + sitting * 5_000 + np.arange(count) % 60).astype(np.int32),
        "behavior": rng.choice(["view", "addtocart", "purchase"], count, p=[0.7, 0.2, 0.1]).astype(object),
    }


def write(folder: Path, columns: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "events.parquet")
    return folder


def write_official(folder: Path, columns: dict[str, Any]) -> Path:
    """The same events as the official events.csv has them: milliseconds, and a transaction where the other buys."""
    folder.mkdir(exist_ok=True)
    rows = ["timestamp,visitorid,event,itemid,transactionid"]
    for user, item, second, what in zip(*columns.values(), strict=True):
        bought = what == "purchase"
        rows.append(f"{int(second) * 1000},{user},{'transaction' if bought else what},{item},{'17' if bought else ''}")
    (folder / "events.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "retailrocket", events())


def test_a_sitting_makes_of_an_item_its_strongest_event(tmp_path: Path) -> None:
    columns = {
        "user_id": [1, 1, 1, 1, 1, 2, 2, 2],
        "item_id": [5, 6, 5, 5, 5, 5, 6, 7],
        "timestamp": [START_S + 60 * k for k in (0, 1, 2, 3, 60, 90, 120, 150)],
        "behavior": ["view", "view", "purchase", "addtocart", "view", "addtocart", "view", "purchase"],
    }
    log = read_log(DATASETS["retailrocket"](write(tmp_path / "source", columns), tmp_path / "out"))
    made = zip(log.users.ids[log.user].tolist(), log.items.ids[log.item].tolist(), log.grade.tolist(), strict=True)
    assert list(made) == [(1, 5, 3), (1, 6, 1), (1, 5, 1), (2, 5, 2), (2, 6, 1), (2, 7, 3)]
    np.testing.assert_array_equal(log.feedback.sum(axis=1), log.grade)  # each rung implies those below
    assert log.report["repeats"] == 2
    assert len(requests(log)) == 5  # a pause and the boundaries of splits begin new ones


def test_moments_come_with_hour_and_weekday(source: Path, tmp_path: Path) -> None:
    log = read_log(retailrocket.convert(source, tmp_path / "out"))
    assert log.time.min() == START_S * 1000
    assert (log.context["hour"][0], log.context["weekday"][0]) == (3, 6)


def test_the_split_is_strict_in_time(source: Path, tmp_path: Path) -> None:
    log = read_log(retailrocket.convert(source, tmp_path / "out"))
    bounds = [log.time[log.split == side] for side in (TRAIN, VALID, TEST)]
    assert bounds[0].max() < bounds[1].min() <= bounds[1].max() < bounds[2].min()


def test_the_official_file_gives_the_same_log(source: Path, tmp_path: Path) -> None:
    official = write_official(tmp_path / "official", events())
    logs: list[Log] = [
        read_log(retailrocket.convert(folder, tmp_path / f"out-{folder.name}")) for folder in (source, official)
    ]
    for name in ("user", "item", "time", "request", "grade", "split"):
        np.testing.assert_array_equal(getattr(logs[0], name), getattr(logs[1], name), err_msg=name)


def test_shuffled_test_labels_change_no_feature(source: Path, tmp_path: Path) -> None:
    log = read_log(retailrocket.convert(source, tmp_path / "out"))
    columns = events()
    rows = np.flatnonzero(columns["timestamp"].astype(np.int64) * 1000 >= log.time[log.split == TEST].min())
    columns["behavior"][rows] = columns["behavior"][np.random.default_rng(0).permutation(rows)]
    shuffled = read_log(retailrocket.convert(write(tmp_path / "shuffled", columns), tmp_path / "out-shuffled"))
    assert_no_feature_differs(log, shuffled)


def test_retailrocket_is_known_by_its_columns(source: Path, tmp_path: Path) -> None:
    assert (adopt(source, tmp_path / "out") / "log.toml").read_text().startswith('name = "retailrocket"')
    assert retailrocket.holds(write_official(tmp_path / "official", events(10)))
    assert not retailrocket.holds(write(tmp_path / "another", {"user_id": [1], "item_id": [2], "click": [1]}))
    (tmp_path / "another" / "events.csv").write_text("user_id,item_id\n")
    assert not retailrocket.holds(tmp_path / "another")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("behavior", ["view", "vieww"], r"column 'behavior', row 1 .*: is 'vieww': did you mean 'view'\?"),
        ("timestamp", [None, START_S], r"column 'timestamp', row 0 .*: is null: give every event its time"),
        ("timestamp", [START_S * 1_000_000, START_S], r"row 0 .*: is \d+, beyond the year 9999 in s"),
        ("item_id", [1.5, 2.0], r"column 'item_id' is double: ids are integers or text"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, column: str, values: list[Any], message: str) -> None:
    fine = {"user_id": [1, 1], "item_id": [1, 2], "timestamp": [START_S, START_S + 1], "behavior": ["view", "view"]}
    source = write(tmp_path / "source", fine | {column: values})
    with pytest.raises(DataError, match=message):
        retailrocket.convert(source, tmp_path / "out")


def test_a_source_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"retailrocket has no default place: give the folder that holds events.csv"):
        retailrocket.convert(None, tmp_path / "out")
    with pytest.raises(DataError, match=r"holds neither events.csv .* nor events.parquet"):
        retailrocket.convert(tmp_path, tmp_path / "out")


@needs("retailrocket")
def test_the_selection_has_its_counts(tmp_path: Path) -> None:
    log = read_log(retailrocket.convert(FOLDER / "retailrocket", tmp_path / "out"))
    assert (log.report["events"], len(log.users), len(log.items)) == (97_381, 2_174, 29_905)
    assert log.report["kept"] + log.report["repeats"] == 97_381
    assert len(np.unique(log.user[log.grade == 3])) == 2_174  # every buyer buys
    np.testing.assert_allclose(np.bincount(log.split) / len(log), [0.8, 0.1, 0.1], atol=0.01)
