"""KuaiRand-Pure into the documented form: the official csv files, or their recovered parts in Parquet.

C. Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos, CIKM 2022. Standard
exposures only; the official video statistics average over the whole month, the test days included, and are never read.
docs/data.md says what is made of null clicks, uncertain labels and rows without a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.datasets.columns import Source, open_source
from model.datasets.csv_files import read_csv
from model.datasets.form import Form, fields_as_toml, write_form
from model.datasets.lists import runs
from model.errors import DataError
from model.features import Field

ADAPTER = "kuairand 1"  # the number rises when the conversion changes

OFFICIAL_LOGS = ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv")
OFFICIAL_USERS, OFFICIAL_VIDEOS = "user_features_pure.csv", "video_features_basic_pure.csv"
RECOVERED_LOG, RECOVERED_TAIL = "log_standard_0425_0504.parquet", "exposures_0408_0424_tail50.parquet"
RECOVERED_META = "user_history_meta_0424.parquet"
RECOVERED_USERS, RECOVERED_VIDEOS = "user_features.parquet", "video_features_basic.parquet"
MARKS = (OFFICIAL_LOGS[1], RECOVERED_LOG)  # a folder with one of them is KuaiRand-Pure

LIKES = ("is_like", "is_follow", "is_comment", "is_forward")
LOG_COLUMNS = ("user_id", "video_id", "time_ms", "hourmin", "tab", "is_click", "long_view", "is_hate", *LIKES)
TAIL_COLUMNS = ("user_id", "video_id", "rank_from_end", "is_click", "long_view", "is_like", "label_ambiguous")
META_COLUMNS = ("user_id", "last_time_ms")
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_CODES = ("user_active_degree", "is_live_streamer", "is_video_author", *(f"onehot_feat{k}" for k in range(18)))
USER_COLUMNS = ("user_id", *USER_CODES, *USER_NUMBERS)
VIDEO_CODES = ("video_type", "upload_dt", "upload_type", "music_type")
VIDEO_COLUMNS = ("video_id", *VIDEO_CODES, "video_duration", "server_width", "server_height", "tag", "author_id")

NOT_A_STREAMER = -124  # stands in is_live_streamer where nothing is known
TAIL_STEP_MS = 60_000  # made up: rows without a time are laid this far apart before the user's last one

HEAD = """\
name = "kuairand"

[columns]
user = "user_id"
item = "video_id"
time = "time_ms"
time_unit = "ms"

[feedback]
ladder = ["click", "long_view", "like"]     # like: liked, followed, commented or forwarded
negative = ["hate"]
soft_label = "click + 2*long_view + 4*like"

[split]                                     # days in China
by = "time"
valid_from = 2022-05-02T00:00:00+08:00
test_from = 2022-05-03T00:00:00+08:00

[lists]                                     # 1.2 of the 7,583 videos in a sitting of 30 minutes: a list takes a day
gap_s = 86400
max_impressions = 10
"""
WIDE_CODES = {"onehot_feat2": 8, "onehot_feat3": 16, "onehot_feat5": 8, "onehot_feat7": 8, "onehot_feat8": 16}
FIELDS = (
    Field(name="user_id", side="user", kind="categorical", dim=16),
    *(Field(name=name, side="user", kind="categorical", dim=WIDE_CODES.get(name, 4)) for name in USER_CODES),
    *(Field(name=name, side="user", kind="numeric", dim=8) for name in USER_NUMBERS),
    Field(name="history", side="user", kind="sequence", dim=128, length=30, shares="video_id"),
    Field(name="tab", side="context", kind="categorical", dim=8),
    Field(name="hour", side="context", kind="categorical", dim=4),
    Field(name="video_id", side="item", kind="categorical", dim=128),
    Field(name="author_id", side="item", kind="categorical", dim=16),
    Field(name="tag", side="item", kind="multi", dim=16, length=3),
    *(Field(name=name, side="item", kind="categorical", dim=4) for name in VIDEO_CODES),
    Field(name="duration_ms", side="item", kind="numeric", dim=8),
    Field(name="aspect", side="item", kind="numeric", dim=4),
)


def holds(folder: Path) -> bool:
    """Whether a folder, or its `data/`, has the files of KuaiRand-Pure."""
    return any((place / name).is_file() for place in (folder, folder / "data") for name in MARKS)


def convert(source: Path | None, out: Path) -> Path:
    """Write the log into `out`. `source` (or its `data/`) holds the official csv files or the recovered Parquet."""
    if source is None:
        raise DataError(
            "KuaiRand-Pure has no default place: give its folder as the source (kuairand.com says how to get the files)"
        )
    for folder in (source, source / "data"):
        if (folder / OFFICIAL_LOGS[1]).is_file():
            return _convert_official(folder, out)
        if (folder / RECOVERED_LOG).is_file():
            return _convert_recovered(folder, out)
    raise DataError(
        f"{source} holds neither {OFFICIAL_LOGS[1]} (the official files) nor {RECOVERED_LOG} (the recovered ones): "
        "give the folder that does"
    )


def _convert_official(folder: Path, out: Path) -> Path:
    files = [folder / name for name in (*OFFICIAL_LOGS, OFFICIAL_USERS, OFFICIAL_VIDEOS)]

    def build() -> Form:
        *logs, users, videos = files
        events = [_timed_events(_read_csv(path, LOG_COLUMNS)) for path in logs]
        return _form(events, _read_csv(users, USER_COLUMNS), _read_csv(videos, VIDEO_COLUMNS))

    return write_form(out, adapter=ADAPTER, sources=files, build=build)


def _convert_recovered(folder: Path, out: Path) -> Path:
    names = (RECOVERED_LOG, RECOVERED_TAIL, RECOVERED_META, RECOVERED_USERS, RECOVERED_VIDEOS)
    wanted = (LOG_COLUMNS, TAIL_COLUMNS, META_COLUMNS, USER_COLUMNS, VIDEO_COLUMNS)
    files = [folder / name for name in names]

    def build() -> Form:
        timed, tail, meta, users, videos = (
            open_source(path, columns, "the kuairand adapter") for path, columns in zip(files, wanted, strict=True)
        )
        return _form([_untimed_events(tail, meta), _timed_events(timed)], users, videos)

    return write_form(out, adapter=ADAPTER, sources=files, build=build)


def _form(events: list[pa.Table], users: Source, videos: Source) -> Form:
    return Form(
        users=_users(users),
        items=_videos(videos),
        events=pa.concat_tables(events),
        document=HEAD + fields_as_toml(FIELDS),
    )


def _read_csv(path: Path, columns: Sequence[str]) -> Source:
    """The named columns of a csv file. Codes that look like dates or numbers stay text where they are text."""
    text = {"upload_dt", "tag", "user_active_degree", "video_type", "upload_type"}
    return read_csv(path, {name: pa.string() if name in text else None for name in columns}, "KuaiRand-Pure")


def _timed_events(exposures: Source) -> pa.Table:
    """Rows with the official columns: each has its time, scenario and hour."""
    return _events(
        user=_array(exposures, "user_id"),
        video=_array(exposures, "video_id"),
        time_ms=_array(exposures, "time_ms"),
        click=_array(exposures, "is_click"),
        long_view=_array(exposures, "long_view"),
        like=np.logical_or.reduce([_array(exposures, name) > 0 for name in LIKES]),
        hate=_array(exposures, "is_hate"),
        tab=pa.array(_array(exposures, "tab"), pa.int8()),
        hour=pa.array(_array(exposures, "hourmin") // 100, pa.int8()),
    )


def _untimed_events(tail: Source, meta: Source) -> pa.Table:
    """The last exposures of each user before 25 April: in order, but without time, scenario and hour.

    Laid at made-up times, a minute apart, that end with the user's last known one. A null click counts as none.
    Uncertain repeats of one video are one event at their latest place: that one was taken is certain, which is not.
    """
    user, video, rank = (_array(tail, name).astype(np.int64) for name in ("user_id", "video_id", "rank_from_end"))
    kept = _one_of_uncertain(user, video, rank, _array(tail, "label_ambiguous") > 0)
    last_ms = _last_times(meta, user, tail)
    none = pa.nulls(int(kept.sum()), pa.int8())
    return _events(
        user=user[kept],
        video=video[kept],
        time_ms=(last_ms - (rank - 1) * TAIL_STEP_MS)[kept],
        click=np.asarray(pc.fill_null(tail.column("is_click"), 0).to_numpy(zero_copy_only=False))[kept],
        long_view=_array(tail, "long_view")[kept],
        like=_array(tail, "is_like")[kept],
        hate=np.zeros(int(kept.sum()), np.bool_),
        tab=none,
        hour=none,
    )


def _one_of_uncertain(
    user: NDArray[np.int64], video: NDArray[np.int64], rank: NDArray[np.int64], uncertain: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """(n,) False for all but the latest of the uncertain rows of a user and a video."""
    rows = np.flatnonzero(uncertain)
    rows = rows[np.lexsort((rank[rows], video[rows], user[rows]))]  # rank 1 is the latest
    _, first, _ = runs(user[rows] * (video.max(initial=0) + 1) + video[rows])
    kept = ~uncertain
    kept[rows[first]] = True
    return kept


def _last_times(meta: Source, user: NDArray[np.int64], tail: Source) -> NDArray[np.int64]:
    """(n,) epoch ms of the last event of each row's user."""
    known, times = _array(meta, "user_id").astype(np.int64), _array(meta, "last_time_ms")
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known[order], user), len(known) - 1)
    absent = np.flatnonzero(known[order][place] != user)
    if len(absent):
        raise tail.wrong(
            "user_id", int(absent[0]), f"user {user[absent[0]]} is not in {meta.path.name}: get both files again"
        )
    return np.asarray(times[order][place], np.int64)


def _events(
    *,
    user: NDArray[Any],
    video: NDArray[Any],
    time_ms: NDArray[Any],
    click: NDArray[Any],
    long_view: NDArray[Any],
    like: NDArray[Any],
    hate: NDArray[Any],
    tab: pa.Array,
    hour: pa.Array,
) -> pa.Table:
    flags = {"click": click, "long_view": long_view, "like": like, "hate": hate}
    return pa.table(
        {
            "user_id": pa.array(user, pa.int64()),
            "video_id": pa.array(video, pa.int64()),
            "time_ms": pa.array(time_ms, pa.int64()),
            **{name: pa.array(values.astype(np.bool_)) for name, values in flags.items()},
            "tab": tab,
            "hour": hour,
        }
    )


def _users(users: Source) -> pa.Table:
    table = users.table.select(USER_COLUMNS)
    place = table.column_names.index("is_live_streamer")
    flags = users.column("is_live_streamer")
    unknown = pc.equal(flags, NOT_A_STREAMER)
    return table.set_column(place, "is_live_streamer", pc.if_else(unknown, None, flags))


def _videos(videos: Source) -> pa.Table:
    width, height = (videos.column(name).cast(pa.float64()) for name in ("server_width", "server_height"))
    seen = pc.and_(pc.greater(width, 0), pc.greater(height, 0))
    return pa.table(
        {
            **{name: videos.column(name) for name in ("video_id", "author_id", *VIDEO_CODES)},
            "tag": pc.split_pattern(videos.column("tag"), ","),
            "duration_ms": videos.column("video_duration"),
            "aspect": pc.if_else(seen, pc.divide(width, height), None),
        }
    )


def _array(source: Source, name: str) -> NDArray[Any]:
    """A column without nulls."""
    array = source.column(name)
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise source.wrong(name, row, "is null: get the file again")
    return np.asarray(array.to_numpy(zero_copy_only=False))
