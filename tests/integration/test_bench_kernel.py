"""The benchmark of the kernel at its tiny size: it runs, its file is tidy, and a wrong contestant is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import kernel, plots, scoring
from benchmarks.client import AnswerError
from benchmarks.mapped import Catalogue, Pool, Users, catalogue
from benchmarks.report import read
from benchmarks.rivals import scorers
from benchmarks.rounds import Entry, in_rounds
from benchmarks.scoring import Scorer
from kernel import engine
from kernel.record import Dtype
from tests.kernels import KINDS, head_of

ROOT = Path(__file__).resolve().parents[2]
RIVALS = ("NumPy", "maxsim-cpu")


@pytest.fixture(scope="module", params=KINDS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalogue]:
    head = head_of(request.param, (4, 4, 32), scale=1.0)
    folder = tmp_path_factory.mktemp("tables")
    with catalogue(head, 500, ("f32", "f16", "int8"), folder, with_vectors=True) as made:
        yield made
    assert not list(folder.iterdir())


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run as `make` starts it: it pins itself to a core, so not in this process."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "benchmarks.kernel", "--size", "tiny", "--seconds", "0.01", "--out", str(folder)]
    done = subprocess.run([*command, "--rivals", *RIVALS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["kernel-tiny.json"]
    return folder


def test_every_contestant_is_measured_at_every_level(run: Path) -> None:
    document = read(run / "kernel-tiny.json")
    rows = document["rows"]
    scores = [row for row in rows if row["kind"] in KINDS]
    absent = {note.partition(":")[0] for note in document["notes"] if "n/a" in note}
    assert {row["contestant"] for row in scores} >= {"ours", *RIVALS} - absent
    assert {row["dtype"] for row in scores if row["contestant"] == "ours"} == {"f32", "f16", "int8"}
    assert {row["level"] for row in scores if row["contestant"] == "ours"} == set(engine.levels())
    assert {row["shape"] for row in scores} == {"4x4x32", "1x1x64"}
    assert all(0 < row["median_us"] <= row["p90_us"] for row in rows if row["kind"] != "ratio")
    assert {row["kind"] for row in rows} >= {*KINDS, "lookup", "top_k", "rank", "batch", "pack"}
    assert str(run) not in (run / "kernel-tiny.json").read_text()


@pytest.mark.skipif(engine.native is None, reason="no floor without native code")
def test_the_bars_are_ratios_at_the_best_level(run: Path) -> None:
    document = read(run / "kernel-tiny.json")
    ratios = {(row["contestant"], row["level"]): row["ratio"] for row in document["rows"] if row["kind"] == "ratio"}
    best = engine.levels()[-1]
    bars = {bar["name"].removesuffix(f", {best}"): bar["value"] for bar in document["bars"]}
    assert list(bars) == list(kernel.BARS)
    assert bars["MaxSim int8 / gather floor"] == ratios["MaxSim int8 / gather floor", best] > 0
    assert bars["np.searchsorted / lookup"] > 1


def test_the_page_is_filled_from_the_result(run: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "performance.md", tmp_path)
    assert plots.main(["--results", str(run), "--docs", str(tmp_path), "--size", "tiny"]) == 0
    page = (tmp_path / "performance.md").read_text()
    for words in (
        "| maxsim | ours | int8 |",
        "| cross_attention | NumPy | f32 |",
        "| lookup | - | dict |",
        "fastest rival",
    ):
        assert words in page
    assert (tmp_path / "plots" / "kernel-candidates.svg").is_file()


# --- the referee -----------------------------------------------------------------------------------------------------


def right(found: Catalogue, dtype: Dtype) -> Scorer:
    return next(scoring.ours(found, (dtype,), engine.levels()[-1:]))


def with_scores(scorer: Scorer, change: Callable[[np.ndarray], Any]) -> Scorer:
    def score(user: np.ndarray, rows: np.ndarray) -> Any:
        return change(np.array(scorer.score(user, rows)))

    return Scorer(contestant="somebody", dtype=scorer.dtype, level=None, score=score)


WRONG: dict[str, tuple[Dtype, Callable[[np.ndarray], Any], str]] = {
    "scores of other candidates": ("f32", lambda scores: scores[::-1], "off the reference"),
    "one score that is off": ("f32", lambda scores: scores + 0.01 * (np.arange(len(scores)) == 7), "off the reference"),
    "no number": ("int8", lambda scores: scores * np.nan, "off the reference"),
    "a score too few": ("f16", lambda scores: scores[1:], "scores, not"),
    "scores too coarse to choose by": ("int8", lambda scores: np.round(scores * 8) / 8, "of the best 100"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_contestant_is_refused(found: Catalogue, what: str) -> None:
    dtype, change, message = WRONG[what]
    scoring.check(found, [right(found, dtype)])
    with pytest.raises(AnswerError, match=f"somebody.* answers wrongly: .*{message}"):
        scoring.check(found, [right(found, dtype), with_scores(right(found, dtype), change)])


@pytest.mark.parametrize("name", scorers.RIVALS)
def test_rivals_score_as_the_reference(found: Catalogue, name: str) -> None:
    absent: dict[str, str] = {}
    present = list(scoring.rivals(found, [name], absent))
    if not present:
        assert found.head.kind != "maxsim" or "pip install" in absent[name]
        pytest.skip("not installed, or for MaxSim alone")
    scoring.check(found, present)


def test_a_rival_that_is_not_installed_is_named_with_what_installs_it(
    found: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)  # an import of it fails from here on
    absent: dict[str, str] = {}
    assert list(scoring.rivals(found, ["numba"], absent)) == []
    assert absent["numba"].startswith("n/a: pip install numba")


# --- rounds and draws ------------------------------------------------------------------------------------------------


def test_contestants_take_turns_and_never_get_the_same_list_again() -> None:
    asked: list[tuple[str, int]] = []
    lists = Pool(np.arange(1_000_000))

    def entry(name: str) -> Entry:
        return Entry(
            fields={"contestant": name},
            call=lambda one: asked.append((name, int(one[0]))),
            draw=lambda: (lists.next(10),),
        )

    first, second = in_rounds([entry("a"), entry("b")], 0.0, least=3)
    assert len(first.rounds) == len(second.rounds) == 3
    assert len({start for _, start in asked}) == len(asked)
    turns = [name for k, (name, _) in enumerate(asked) if k == 0 or asked[k - 1][0] != name]
    assert len(turns) >= 5
    assert first.row()["calls"] == len(first.calls) == len(first.wall)


def test_a_pool_starts_again_after_its_last_slice() -> None:
    pool = Pool(np.arange(5))
    assert [pool.next(2).tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_users_differ_from_call_to_call() -> None:
    users = Users(head_of("cross_attention", (4, 4, 32)))
    assert len(np.unique(users.several(50), axis=0)) == 50
