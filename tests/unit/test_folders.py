from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import RankTowerError
from model.folders import replacing_folder


def fill(out: Path, text: str) -> None:
    with replacing_folder(out, "mark") as folder:
        (folder / "mark").write_text(text)


def test_a_folder_appears_and_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    fill(out, "one")
    (out / "stray").write_text("from before")
    fill(out, "two")
    assert (out / "mark").read_text() == "two"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mark"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "one")
    with pytest.raises(ZeroDivisionError), replacing_folder(out, "mark") as folder:
        (folder / "mark").write_text(str(1 // 0))
    assert (out / "mark").read_text() == "one"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(RankTowerError, match="holds no mark"):
        fill(tmp_path / "thesis", "one")
    assert (tmp_path / "thesis" / "chapter1").read_text() == "years of work"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "one")
    assert (tmp_path / "out" / "mark").read_text() == "one"
