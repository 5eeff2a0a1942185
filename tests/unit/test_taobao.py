from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets import DATASETS, adopt, taobao
from model.datasets.log import SPLITS, TEST, read_log, requests
from model.errors import DataError
from tests.leaks import assert_no_feature_differs
from tests.real_data import FOLDER, needs


def pairs(users: int = 30, items: int = 40, seed: int = 0) -> dict[str, Any]:
    """Every user beside a third of the items, in the columns of the published file."""
    rng = np.random.default_rng(seed)
    user, item = np.nonzero(rng.random((users, items)) < 1 / 3)
    level = rng.choice([1, 2, 3], len(user), p=[0.7, 0.2, 0.1])
    view = (level == 1) | (rng.random(len(user)) < 0.7)
    cart = (level == 2) | ((level == 3) & (rng.random(len(user)) < 0.2))
    flags = {"buy": level == 3, "cart": cart, "view": view, "level": level}
    return {"user_id": user.astype(np.int16), "item_id": item.astype(np.int16)} | {
        name: values.astype(np.int8) for name, values in flags.items()
    }


def write(folder: Path, columns: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "taobao", pairs())


def test_the_grade_of_a_pair_is_its_level(source: Path, tmp_path: Path) -> None:
    log = read_log(DATASETS["taobao"](source, tmp_path / "out"))
    published = pairs()
    level = {(u, i): g for u, i, g in zip(published["user_id"], published["item_id"], published["level"], strict=True)}
    assert len(log) == len(level)
    for user, item, grade in zip(log.users.ids[log.user], log.items.ids[log.item], log.grade, strict=True):
        assert level[user, item] == grade
    np.testing.assert_array_equal(log.feedback.sum(axis=1), log.grade)  # each rung implies those below
    assert not log.has_stages
    assert log.schema.history is None


def test_each_users_pairs_are_divided_the_same_way_whatever_their_order(source: Path, tmp_path: Path) -> None:
    log = read_log(taobao.convert(source, tmp_path / "out"))
    order = np.random.default_rng(1).permutation(len(log))
    mixed = {name: values[order] for name, values in pairs().items()}
    other = read_log(taobao.convert(write(tmp_path / "mixed", mixed), tmp_path / "out-mixed"))
    sides = [
        set(zip(one.users.ids[one.user], one.items.ids[one.item], one.split, one.grade, strict=True))
        for one in (log, other)
    ]
    assert sides[0] == sides[1]
    for split in range(len(SPLITS)):
        assert len(np.unique(log.user[log.split == split])) > 15


def test_shuffled_test_labels_change_no_feature(source: Path, tmp_path: Path) -> None:
    log = read_log(taobao.convert(source, tmp_path / "out"))
    tested = set(
        zip(log.users.ids[log.user[log.split == TEST]], log.items.ids[log.item[log.split == TEST]], strict=True)
    )
    columns = pairs()
    rows = np.flatnonzero([pair in tested for pair in zip(columns["user_id"], columns["item_id"], strict=True)])
    order = np.random.default_rng(0).permutation(rows)
    for name in ("view", "cart", "buy", "level"):
        columns[name][rows] = columns[name][order]
    shuffled = read_log(taobao.convert(write(tmp_path / "shuffled", columns), tmp_path / "out-shuffled"))
    assert_no_feature_differs(log, shuffled)


def test_taobao_is_known_by_its_file(source: Path, tmp_path: Path) -> None:
    assert (adopt(source, tmp_path / "out") / "log.toml").read_text().startswith('name = "taobao"')


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("buy", [2, 0], r"pairs.parquet: column 'buy', row 0 .*: is 2: feedback is 0 or 1"),
        ("cart", [0, None], r"pairs.parquet: column 'cart', row 1 .*: is null"),
        ("user_id", [None, 1], r"pairs.parquet: column 'user_id', row 0 .*: is null: give every row an id"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, column: str, values: list[int | None], message: str) -> None:
    fine = {"user_id": [0, 1], "item_id": [0, 1], "view": [1, 1], "cart": [0, 0], "buy": [0, 0]}
    source = write(tmp_path / "taobao", fine | {column: values})
    with pytest.raises(DataError, match=message):
        taobao.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_without_the_file_or_a_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"taobao has no default place: give the folder that holds pairs.parquet"):
        taobao.convert(None, tmp_path / "out")
    with pytest.raises(DataError, match=r"pairs.parquet does not exist: give the folder"):
        taobao.convert(tmp_path, tmp_path / "out")
    source = write(tmp_path / "taobao", {"user_id": [0], "item_id": [0], "view": [1], "cart": [0]})
    with pytest.raises(DataError, match=r"pairs.parquet has no column 'buy', which the taobao adapter names"):
        taobao.convert(source, tmp_path / "out")


@needs("taobao")
def test_the_published_pairs_have_their_published_counts(tmp_path: Path) -> None:
    log = read_log(taobao.convert(FOLDER / "taobao", tmp_path / "out"))
    assert (len(log), len(log.users), len(log.items)) == (938_679, 15_449, 11_953)
    assert np.bincount(log.grade).tolist() == [0, 683_909, 162_590, 92_180]
    assert log.report["repeats"] == log.report["unknown_user"] == log.report["unknown_item"] == 0
    np.testing.assert_allclose(np.bincount(log.split) / len(log), [0.8, 0.1, 0.1], atol=0.002)
    assert len(np.unique(requests(log).user)) == 15_449
