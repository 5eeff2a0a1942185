"""What a row gets to train on: what leaves, and that histories and the other splits stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.views import missing, no_context, with_context
from model.datasets.kuairand import convert
from model.datasets.log import TEST, TRAIN, VALID, Log, histories, read_log, requests, without
from model.requests import fit_log_spec
from model.sampling import popularity, training_set
from tests.logs import write_tiny_log
from tests.real_data import FOLDER, needs


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Without context in every third request and in the first rows of others; device is missing in some of its own."""
    read = read_log(write_tiny_log(tmp_path_factory.mktemp("log"), users=40, items=60))
    place = np.arange(len(read)) - np.repeat(requests(read).first, np.bincount(read.request))
    bare = (read.request % 3 == 0) | ((read.request % 3 == 1) & (place < 3))
    device = np.where(bare, None, read.context["device"])
    return replace(read, context={"device": device, "hour": np.where(bare, np.nan, read.context["hour"])})


def test_rows_without_context_are_not_trained_on(log: Log) -> None:
    whole = without(log, TEST)
    seen = with_context(whole)
    has = ~missing(log.context["hour"])[log.split != TEST]
    np.testing.assert_array_equal(seen.split == TRAIN, (whole.split == TRAIN) & has)
    lists = training_set(seen)
    rows = np.concatenate([np.arange(a, b) for a, b in zip(lists.requests.first, lists.requests.end, strict=True)])
    assert has[rows].all()
    taken = (whole.split == TRAIN) & has & (whole.grade > 0)
    assert set(rows) >= set(np.flatnonzero(taken))  # what is left of a request is still a list
    assert popularity(seen).sum() == taken.sum()


def test_histories_and_validation_lists_are_as_before(log: Log) -> None:
    before, after = requests(log), requests(with_context(log))
    for split in (VALID, TEST):
        kept, same = before.split == split, after.split == split
        np.testing.assert_array_equal(before.first[kept], after.first[same])
        np.testing.assert_array_equal(histories(log, 20)[kept], histories(with_context(log), 20)[same])
    late = np.flatnonzero(after.split == TRAIN)[-1]
    past = histories(with_context(log), 20)[late]
    mine = (log.user == after.user[late]) & (log.time < after.time[late]) & (log.grade > 0)
    assert past[past >= 0].tolist() == log.item[mine][np.argsort(log.time[mine], kind="stable")][-20:].tolist()


def test_a_log_whose_lists_all_have_context_stays(tmp_path: Path) -> None:
    whole = read_log(write_tiny_log(tmp_path, users=20, items=30))
    np.testing.assert_array_equal(with_context(whole).split, whole.split)
    np.testing.assert_array_equal(with_context(whole).request, whole.request)
    np.testing.assert_array_equal(with_context(no_context(whole)).split, whole.split)


def test_without_context_no_field_of_it_is_fitted(log: Log) -> None:
    spec = fit_log_spec(no_context(log))
    assert {field.side for field in spec.fields} == {"user", "item"}
    assert len(no_context(log)) == len(log)


def test_missing_is_nan_or_none() -> None:
    assert missing(np.array([1.0, np.nan])).tolist() == [False, True]
    assert missing(np.array(["a", None], object)).tolist() == [False, True]
    assert missing(np.array([0, 1])).tolist() == [False, False]


@needs("kuairand")
def test_seven_of_eight_training_rows_of_kuairand_lack_context(tmp_path: Path) -> None:
    """The file with times has 115,775 rows before 2 May, the other 817,187; repeats within a request become one."""
    log = read_log(convert(FOLDER / "kuairand", tmp_path / "log"))
    kept = int((with_context(log).split == TRAIN).sum())
    assert 0.95 * 115_775 < kept < 115_775
    assert (log.split == TRAIN).sum() == 906_295
