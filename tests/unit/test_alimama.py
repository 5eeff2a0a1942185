from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from model.datasets import DATASETS, adopt, alimama
from model.datasets.log import TEST, TRAIN, VALID, Log, read_log
from model.errors import DataError
from tests.leaks import assert_no_feature_differs

FIRST_S = 1_494_000_000  # 6 May 2017, 00:00 in China
DAY_S = 86_400
USERS, ADS, PLACES = 12, 20, ("430548_1007", "430539_1007")
PROFILE_HEADER = (
    "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation,"
    "new_user_class_level "  # the official header ends with a blank
)


def exposures(seed: int = 0) -> list[list[int]]:
    """Rows of user, seconds, ad, place and click: three for each user and day."""
    rng = np.random.default_rng(seed)
    return [
        [user, FIRST_S + day * DAY_S + 3600 * (9 + k), ad, k % 2, int(rng.random() < 0.4)]
        for day in range(8)
        for user in range(USERS)
        for k, ad in enumerate(rng.permutation(ADS)[:3].tolist())
    ]


def write_files(folder: Path, rows: list[list[int]], behaviours: list[str] | None = None) -> Path:
    """The official files. User 0 has no profile; brand and price of ad 1 are missing."""
    folder.mkdir(exist_ok=True)
    samples = [f"{user},{second},{ad},{PLACES[pid]},{1 - clk},{clk}" for user, second, ad, pid, clk in rows]
    ads = [f"{ad},{ad % 3},{ad % 5},{ad % 4},{'NULL' if ad == 1 else 100 + ad % 2},{ad + 0.5}" for ad in range(ADS)]
    profiles = [
        f"{user},{user % 7},2,{1 + user % 2},3,{'' if user % 2 else 2},3,0,{user % 4 or ''}" for user in range(1, USERS)
    ]
    files = {
        "raw_sample.csv": ["user,time_stamp,adgroup_id,pid,nonclk,clk", *samples],
        "ad_feature.csv": ["adgroup_id,cate_id,campaign_id,customer,brand,price", *ads],
        "user_profile.csv": [PROFILE_HEADER, *profiles],
    }
    if behaviours is not None:
        files["behavior_log.csv"] = ["user,time_stamp,btag,cate,brand", *behaviours]
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


BEFORE = FIRST_S + 9 * 3600 - 1  # a second before the first exposure
BEHAVIOURS = [
    *(f"1,{BEFORE - k},pv,2,101" for k in range(3)),
    *(f"1,{BEFORE - k},cart,1,100" for k in range(2)),
    f"1,{BEFORE},buy,0,NULL",
    f"1,{BEFORE + 1},pv,7,777",  # not before the first exposure
    f"99,{BEFORE},pv,7,777",  # nobody of the log
    *(f"2,{BEFORE},pv,{cate},100" for cate in range(12)),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_files(tmp_path / "alimama", exposures(), BEHAVIOURS)


@pytest.fixture
def ads(source: Path, tmp_path: Path) -> Log:
    return read_log(DATASETS["alimama"](source, tmp_path / "out"))


def test_every_exposure_is_an_event_with_its_click(ads: Log) -> None:
    wanted = sorted((user, 1000 * second, ad, clk) for user, second, ad, _, clk in exposures())
    columns = (ads.users.ids[ads.user], ads.time, ads.items.ids[ads.item], ads.grade)
    assert sorted(zip(*(column.tolist() for column in columns), strict=True)) == wanted
    assert ads.schema.rungs == ("click",)


def test_the_last_day_in_china_is_test_and_the_one_before_it_valid(ads: Log) -> None:
    day = (ads.time // 1000 - FIRST_S) // DAY_S
    np.testing.assert_array_equal(ads.split, np.select([day < 6, day == 6], [TRAIN, VALID], TEST))


def test_context_is_the_place_and_the_hour_in_china(ads: Log) -> None:
    assert ads.context["hour"][:3].tolist() == [9, 10, 11]
    assert ads.context["pid"][:3].tolist() == [PLACES[0], PLACES[1], PLACES[0]]


def test_missing_values_are_null_and_users_without_a_profile_stay(ads: Log) -> None:
    assert sorted(ads.users.ids.tolist()) == list(range(USERS))
    stranger = ads.users.ids.tolist().index(0)
    assert all(np.isnan(ads.users.columns[name][stranger]) for name in alimama.PROFILE_CODES)
    place = ads.users.ids.tolist().index(3)
    assert np.isnan(ads.users.columns["pvalue_level"][place])
    assert ads.users.columns["new_user_class_level"][place] == 3
    assert np.isnan(ads.items.columns["brand"][1])
    assert (ads.items.columns["brand"][2], ads.items.columns["price"][2]) == (100, 2.5)


def test_interests_are_what_came_most_before_the_first_exposure(ads: Log) -> None:
    rows = {user: place for place, user in enumerate(ads.users.ids.tolist())}
    cates, brands = (ads.users.columns[name] for name in ("cates", "brands"))
    assert cates[rows[1]].tolist() == [2, 1, 0]
    assert brands[rows[1]].tolist() == [101, 100]
    assert cates[rows[2]].tolist() == list(range(alimama.KEPT))
    assert cates[rows[0]] is None


def test_interests_do_not_depend_on_how_often_they_are_counted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ads: Log
) -> None:
    monkeypatch.setattr(alimama, "PENDING", 1)
    monkeypatch.setattr("model.datasets.csv_files.BLOCK_BYTES", 128)
    other = read_log(alimama.convert(source, tmp_path / "out-2"))
    for name in ("cates", "brands"):
        assert repr(ads.users.columns[name]) == repr(other.users.columns[name])


def test_without_the_behaviours_their_fields_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_files(tmp_path / "alimama", exposures())
    with caplog.at_level(logging.WARNING):
        log = read_log(alimama.convert(source, tmp_path / "out"))
    assert "behavior_log.csv does not exist: users get no categories" in caplog.text
    assert not {"cates", "brands"} & {field.name for field in log.schema.fields}


def test_shuffled_test_labels_change_no_feature(ads: Log, tmp_path: Path) -> None:
    rows = exposures()
    late = [k for k, row in enumerate(rows) if row[1] >= FIRST_S + 7 * DAY_S]
    for k, other in zip(late, np.random.default_rng(0).permutation(late).tolist(), strict=True):
        rows[k][4] = exposures()[other][4]
    source = write_files(tmp_path / "shuffled", rows, BEHAVIOURS)
    assert_no_feature_differs(ads, read_log(alimama.convert(source, tmp_path / "out-shuffled")))


def test_alimama_is_known_by_its_file(source: Path, tmp_path: Path) -> None:
    assert (adopt(source, tmp_path / "adopted") / "log.toml").read_text().startswith('name = "alimama"')


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("raw_sample.csv", ",1,0\n", ",1,2\n", r"raw_sample.csv: column 'clk', row \d+ .*: is 2: feedback is 0 or 1"),
        (
            "raw_sample.csv",
            "time_stamp",
            "time",
            r"raw_sample.csv has no column 'time_stamp', which files of Alimama have",
        ),
        ("ad_feature.csv", "\n2,", "\n3,", r"ad_feature.csv: column 'adgroup_id', row 3 .*: id 3 stands in row 2"),
        ("ad_feature.csv", "\n2,2", "\n2,cheap", r"ad_feature.csv cannot be read as a file of Alimama .*'cheap'"),
        ("user_profile.csv", "\n3,", "\n,", r"user_profile.csv: column 'userid', row 2 .*: is null"),
        (
            "behavior_log.csv",
            "buy,0,",
            "buy,-4,",
            r"behavior_log.csv: column 'cate', row 5 .*: is -4: codes lie from 0",
        ),
    ],
)
def test_a_wrong_value_is_named(source: Path, tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    path = source / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        alimama.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_file_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"alimama has no default place: give the folder that holds raw_sample.csv"):
        alimama.convert(None, tmp_path / "out")
    (source / "ad_feature.csv").unlink()
    with pytest.raises(DataError, match=r"ad_feature.csv does not exist: give the folder"):
        alimama.convert(source, tmp_path / "out")
    (source / "ad_feature.csv").write_text("adgroup_id,cate_id,campaign_id,customer,brand,price\n")
    with pytest.raises(DataError, match=r"ad_feature.csv has no rows"):
        alimama.convert(source, tmp_path / "out")
