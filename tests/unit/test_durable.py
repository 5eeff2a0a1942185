"""Files that survive: replaced in one step or not at all; locks that exclude, and die with their holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.durable import (
    holding,
    is_held,
    locked,
    locked_now,
    rename_durably,
    replace_file,
    sharing,
    sync_tree,
    write_durably,
)

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from cache.durable import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("replace", [write_durably, replace_file])
def test_a_file_is_replaced_whole(tmp_path: Path, replace: Callable[[Path, bytes], None]) -> None:
    path = tmp_path / "current"
    for content in (b"first", b"second", b""):
        replace(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["current"]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "current"
    write_durably(path, b"old")
    with pytest.raises(TypeError):
        write_durably(path, "text, not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["current"]


def test_a_folder_is_renamed_with_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "made" / "deep").mkdir(parents=True)
    (tmp_path / "made" / "deep" / "file").write_text("x")
    sync_tree(tmp_path / "made")
    rename_durably(tmp_path / "made", tmp_path / "put")
    assert (tmp_path / "put" / "deep" / "file").read_text() == "x"


def test_a_lock_excludes_others_until_it_is_given_back(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), locked_now(tmp_path / "lock") as had:
        assert not had
    with locked_now(tmp_path / "lock") as had:
        assert had


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with locked_now(tmp_path / "lock") as had:
            assert not had
        holder.send_signal(signal.SIGKILL)
    with locked(tmp_path / "lock"):
        pass


def test_a_lock_that_is_shared_keeps_out_who_wants_it_alone(tmp_path: Path) -> None:
    with sharing(tmp_path / "lock"), sharing(tmp_path / "lock"), locked_now(tmp_path / "lock") as had:
        assert not had
    with locked_now(tmp_path / "lock") as had:
        assert had


def test_a_folder_is_held_as_long_as_its_holder_lives(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with holding(tmp_path):
        assert is_held(tmp_path)
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".current.k1lled_").write_bytes(b"ha")
    (tmp_path / ".currently").write_bytes(b"another's")
    write_durably(tmp_path / "current", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".currently", "current"]
