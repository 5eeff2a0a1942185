"""What is kept of a study: scores of the test lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.study import TRAINS, RunError, Study, code_version, load_scores, places, save_scores
from model.metrics import ndcg, rank, recall


@pytest.mark.parametrize(("width", "kind"), [(1, np.uint8), (200, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_places_are_ordered_and_tied_as_the_scores_are(width: int, kind: type) -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(-width, width, (50, width)) / 8.0
    scores[0] = np.arange(width)  # as many values as there can be
    found = places(scores)
    assert found.dtype == kind
    assert found[0].tolist() == list(range(width))
    lower = scores[:, :, None] < scores[:, None, :]
    np.testing.assert_array_equal(found[:, :, None] < found[:, None, :], lower)


def test_what_is_kept_has_the_metrics_of_the_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scores, grade = rng.normal(size=(40, 30)).round(1), rng.integers(0, 3, (40, 30))
    mask = np.arange(30) < rng.integers(5, 31, 40)[:, None]
    save_scores(tmp_path, {"full": scores, "random": scores})
    np.testing.assert_array_equal(load_scores(tmp_path, "full"), scores.astype(np.float32))
    kept = load_scores(tmp_path, "random")
    assert kept.dtype == np.uint8
    for metric in (recall, ndcg):
        expected = metric(rank(scores, grade, mask), 5)
        np.testing.assert_array_equal(metric(rank(kept, grade, mask), 5), expected)


def test_words_decide_no_result_and_code_does(tmp_path: Path) -> None:
    native, model = tmp_path / "cpp", tmp_path / "model"
    for folder in (native, model):
        folder.mkdir()
    for name in TRAINS:
        (native / name).write_text("")

    def version(text: str) -> str:
        (model / "loss.py").write_text(text)
        return code_version(model, native)

    first = version('def f(x):\n    """One."""\n    if x < 0:\n        raise ValueError(f"{x} is low")\n    return x\n')
    assert (
        version('def f(x):\n    """Two."""\n    if x < 0:\n        raise ValueError(f"{x}: low")\n    return x\n')
        == first
    )
    assert (
        version('def f(x):\n    """One."""\n    if x < 1:\n        raise ValueError(f"{x} is low")\n    return x\n')
        != first
    )


def test_results_of_another_machine_do_not_mix(tmp_path: Path) -> None:
    study = Study(tmp_path, "tiny", folder=tmp_path / "tiny")
    study.claim({"device": "cpu", "threads": 1})
    study.claim({"device": "cpu", "threads": 1})
    with pytest.raises(RunError, match=r"made with .*'threads': 1.*, this command has .*'threads': 2"):
        study.claim({"device": "cpu", "threads": 2})
