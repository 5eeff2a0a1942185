from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from model.datasets import DATASETS, adopt, userbehavior
from model.datasets.log import TEST, TRAIN, VALID, Log, read_log
from model.errors import DataError
from tests.leaks import assert_no_feature_differs

FIRST_S = userbehavior.FIRST_MS // 1000
DAY_S = 86_400
Row = tuple[int, int, int, str, int]


def behaviours(seed: int = 0) -> list[Row]:
    """Rows of user, item, category, behaviour and seconds, sorted by user as in the official file."""
    rng = np.random.default_rng(seed)
    rows = [
        (user, int(item), int(item) % 5, str(rng.choice(["pv", "fav", "cart", "buy"], p=[0.7, 0.1, 0.1, 0.1])), second)
        for user in range(10)
        for day in range(9)
        for second, item in zip(
            range(FIRST_S + day * DAY_S + 3600 * user, FIRST_S + DAY_S * 9, 60), rng.integers(0, 30, 5), strict=False
        )
    ]
    return rows


def write(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / "UserBehavior.csv").write_text(text)
    return folder


@pytest.fixture
def shop(tmp_path: Path) -> Log:
    return read_log(DATASETS["userbehavior"](write(tmp_path / "source", behaviours()), tmp_path / "out"))


def test_behaviours_are_rungs_and_a_favourite_stands_beside_a_cart(tmp_path: Path) -> None:
    kinds = ["pv", "fav", "cart", "buy"]
    early = [(1, item, 7, what, FIRST_S + 60 * item) for item, what in enumerate(kinds)]
    late = [(2, 5, 8, "pv", FIRST_S + day * DAY_S + 3600) for day in (7, 8)]
    log = read_log(userbehavior.convert(write(tmp_path / "source", early + late), tmp_path / "out"))
    assert log.grade[:4].tolist() == [1, 2, 2, 3]
    np.testing.assert_array_equal(log.feedback.sum(axis=1), log.grade)  # each rung implies those below
    assert log.items.columns["category_id"].tolist() == [7, 7, 7, 7, 8]
    assert log.context["hour"].tolist() == [0, 0, 0, 0, 1, 1]


def test_the_last_day_in_china_is_test_and_the_one_before_it_valid(shop: Log) -> None:
    day = (shop.time // 1000 - FIRST_S) // DAY_S
    np.testing.assert_array_equal(shop.split, np.select([day < 7, day == 7], [TRAIN, VALID], TEST))


def test_rows_outside_the_nine_days_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shop: Log
) -> None:
    outside: list[Row] = [(3, 3, 3, "pv", second) for second in (-1_800_000_000, FIRST_S - 1, FIRST_S + 9 * DAY_S)]
    with caplog.at_level(logging.WARNING):
        log = read_log(userbehavior.convert(write(tmp_path / "other", behaviours() + outside), tmp_path / "out-2"))
    assert "dropped 3 of 453 rows outside the nine days" in caplog.text
    np.testing.assert_array_equal(log.time, shop.time)


def test_shuffled_test_labels_change_no_feature(shop: Log, tmp_path: Path) -> None:
    rows = behaviours()
    late = [k for k, row in enumerate(rows) if row[4] >= FIRST_S + 8 * DAY_S]
    given = np.random.default_rng(0).permutation([rows[k][3] for k in late]).tolist()
    for k, what in zip(late, given, strict=True):
        rows[k] = (*rows[k][:3], what, rows[k][4])
    shuffled = read_log(userbehavior.convert(write(tmp_path / "shuffled", rows), tmp_path / "out-shuffled"))
    assert_no_feature_differs(shop, shuffled)


def test_userbehavior_is_known_by_its_file(tmp_path: Path) -> None:
    out = adopt(write(tmp_path / "source", behaviours()), tmp_path / "out")
    assert (out / "log.toml").read_text().startswith('name = "userbehavior"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1,2,3,pw,1511550000\n",
            r"UserBehavior.csv: column 'behaviour', row 0 .*: is 'pw': known are buy, cart, fav, pv",
        ),
        ("1,2,3,pv,soon\n", r"UserBehavior.csv cannot be read as a file of UserBehavior .*'soon'"),
        (",2,3,pv,1511550000\n", r"UserBehavior.csv: column 'user_id', row 0 .*: is null: give every row an id"),
        ("1,2,pv,1511550000\n", r"UserBehavior.csv has 4 columns, files of UserBehavior have 5 \(user_id, "),
        ("1,2,3,pv,1400000000\n", r"none of 1 rows lies within 25 November to 3 December 2017"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "UserBehavior.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        userbehavior.convert(tmp_path, tmp_path / "out")


def test_a_source_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"userbehavior has no default place: give the folder that holds UserBehavior"):
        userbehavior.convert(None, tmp_path / "out")
    with pytest.raises(DataError, match=r"UserBehavior.csv does not exist: give the folder"):
        userbehavior.convert(tmp_path, tmp_path / "out")
