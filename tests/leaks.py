"""Compare a log with the same one whose test labels were shuffled in its source: no feature may differ."""

from __future__ import annotations

import numpy as np

from model.datasets.log import TEST, Log
from model.features import HISTORY
from model.requests import encode_items, encode_users, fit_log_spec, requests_of, user_columns
from model.sampling import fit_retrieval, popularity


def assert_no_feature_differs(log: Log, shuffled: Log) -> None:
    """Vocabularies, buckets, encoded rows, popularity and retrieval are equal, and yet test labels differ.

    Histories of test requests alone may differ: they hold what the user took earlier in the test split.
    """
    assert (log.grade != shuffled.grade).any()
    assert (log.grade == shuffled.grade)[log.split != TEST].all()
    spec, other = fit_log_spec(log), fit_log_spec(shuffled)
    assert spec == other
    np.testing.assert_array_equal(encode_items(spec, log), encode_items(other, shuffled))
    for split in range(TEST):
        pair = [encode_users(spec, one, requests_of(one, split)) for one in (log, shuffled)]
        np.testing.assert_array_equal(*pair)
    columns = [user_columns(one, requests_of(one, TEST)) for one in (log, shuffled)]
    for name in columns[0].keys() - {HISTORY}:
        assert repr(list(columns[0][name])) == repr(list(columns[1][name])), name  # lists, NaN and None included
    np.testing.assert_array_equal(popularity(log), popularity(shuffled))
    np.testing.assert_array_equal(fit_retrieval(log).factors, fit_retrieval(shuffled).factors)
