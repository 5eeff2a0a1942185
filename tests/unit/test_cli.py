"""`ranktower rank` and how the command line says what is wrong."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import pytest

from cache.file_store import FileStore
from cache.rollout import Change
from service.cli import main
from tests.changed import embedded, happened
from tests.tiny_releases import publish, tiny_release


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli")
    store = FileStore(f"file://{folder}/store")
    publish(tiny_release(folder / "made", calibration={"a": 0.1, "b": 0.0}), store)
    return store.url


def ranktower(monkeypatch: pytest.MonkeyPatch, *arguments: str, given: bytes = b"") -> int:
    """The exit code of a verb run in this process."""
    monkeypatch.setattr(sys, "argv", ["ranktower", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_rank_prints_a_table_without_a_server(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--user-id", "4", "--candidates", "100,101,9", "--explain"]
    assert ranktower(monkeypatch, "rank", "--store", url, *flags) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].endswith(", user known")
    assert "item heads" in printed
    assert "unknown" in printed.splitlines()[-1]


def test_rank_answers_with_what_came_after_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, made = FileStore(f"file://{tmp_path}/store"), tiny_release(tmp_path / "made")
    release = publish(made, store)
    end = happened(store)
    embedded(store, made, 0, end, [100])
    arguments = ["--store", store.url, "--candidates", "100,101", "--cache-dir", str(tmp_path / "cache")]
    assert ranktower(monkeypatch, "rank", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"release {release}, watermark {end}"
    assert lines[-1].split()[1:] == ["100", "unknown"]
    assert not list((tmp_path / "cache").iterdir())


def test_rank_shows_heads_only_where_asked_for(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranktower(monkeypatch, "rank", "--store", url, "--candidates", "100") == 0
    assert "item heads" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["-", "file"])
def test_rank_reads_the_body_of_a_request(
    url: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.dumps({"candidates": [123]}).encode()
    path = tmp_path / "body.json"
    path.write_bytes(body)
    named = str(path) if source == "file" else "-"
    assert ranktower(monkeypatch, "rank", "--store", url, "--json", named, given=body) == 0
    assert "123" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--user-id", "x", "--candidates", "1"], 'error: user_id is "x"'),
        (["--candidates", "1,two"], 'error: candidates[1] is "two"'),
        (["--candidates", str(2**63)], "error: candidates[0] is"),
        ([], "error: there are no candidates"),
        (["--candidates", ""], "error: there are no candidates"),
        (["--candidates", " ,"], "error: there are no candidates"),
        (["--json", "/nowhere.json"], "error: /nowhere.json cannot be read"),
        (["--json", "-", "--user-id", "4"], "error: --json is a whole request"),
        (["--json", "-"], "error: the body is empty"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    url: str, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranktower(monkeypatch, "rank", "--store", url, *arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(said)
    assert output.err.count("\n") == 1


def test_a_store_without_a_release_says_how_to_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranktower(monkeypatch, "rank", "--store", f"file://{tmp_path}", "--candidates", "1") == 2
    assert "ranktower publish --store" in capsys.readouterr().err


BRACKETS = ("[/red]x", "[black on black]", "[conceal]", "[bold")


@pytest.mark.parametrize("who", BRACKETS)
def test_the_trail_shows_who_as_he_called_himself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], who: str
) -> None:
    store = FileStore(f"file://{tmp_path}/store")
    a, b = (publish(tiny_release(tmp_path / str(k), seed=k), store, activate=k == 0) for k in range(2))
    store.change(Change(verb="activate", release=b), by=f"{who}@127.0.0.1 by admin call")
    assert ranktower(monkeypatch, "releases", "audit", "--store", store.url) == 0
    assert f" {who}@127.0.0.1 by admin call activate: {a} 100 % -> {b} 100 %" in capsys.readouterr().out


@pytest.mark.parametrize("name", BRACKETS)
def test_paths_and_urls_with_brackets_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / name
    release = tiny_release(tmp_path / "made").folder
    url = f"file://{folder}/store"
    assert ranktower(monkeypatch, "releases", "push", str(release), "--store", url, "--cache", str(folder)) == 0
    assert f" to {url}: 60 items" in capsys.readouterr().out
    (folder / "store" / "releases" / "20260101T000000000-0123456789ab").mkdir()
    assert ranktower(monkeypatch, "releases", "list", "--store", url) == 0
    assert (
        f"damaged: {folder}/store/releases/20260101T000000000-0123456789ab is not a release" in capsys.readouterr().out
    )


VERBS = [
    ["publish", "--bundle", "{bundle}", "--items", "items.parquet", "--work", "{file}/work"],
    ["users", "publish", "--bundle", "{bundle}", "--log", "log", "--work", "{file}/work"],
    ["verify", "--cache", "{file}"],
    ["releases", "verify", "--cache", "{file}/cache"],
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb[:2]))
def test_a_file_where_a_folder_should_be_is_one_line(
    url: str, verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    bundle = Path(url.removeprefix("file://")).parent / "made" / "release" / "bundle"
    arguments = [part.format(file=file, bundle=bundle) for part in verb]
    assert ranktower(monkeypatch, *arguments, "--store", url) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}")
    assert said.endswith("a file is where a folder should be: move it away, or name another folder\n")
    assert said.count("\n") == 1


def test_a_folder_that_may_not_be_written_is_one_line(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache"))

    monkeypatch.setattr("cache.cli.tempfile.TemporaryDirectory", refuse)  # root may write anywhere
    assert ranktower(monkeypatch, "releases", "verify", "--store", url, "--cache", str(tmp_path / "cache")) == 2
    said = f"error: {tmp_path}/cache: Permission denied: give this user the right to read and write there\n"
    assert capsys.readouterr().err == said


def test_a_wrong_setting_ends_serve_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranktower(monkeypatch, "serve", "--workers", "0") == 2
    assert capsys.readouterr().err.startswith("error: --workers is 0: ")


def test_a_release_is_tried_out_by_verbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FileStore(f"file://{tmp_path}/store")
    a, b = (publish(tiny_release(tmp_path / str(k), seed=k), store, activate=k == 0) for k in range(2))

    def said(*arguments: str, code: int = 0) -> str:
        assert ranktower(monkeypatch, "releases", *arguments, "--store", store.url) == code
        return "".join(capsys.readouterr())

    assert said("canary", b, "--weight", "0.1") == f"live is {a} 90 %, {b} 10 %; was {a} 100 %\n"
    assert said("canary", b, "--weight", "0.1").startswith("nothing to change: live is")
    assert (
        said("shadow", a, "--share", "0.05") == f"live is {a} 90 %, {b} 10 %, shadow {a} 5 %; was {a} 90 %, {b} 10 %\n"
    )
    listed = said("list").splitlines()
    assert listed[1].endswith("current shadow 5 %")
    assert listed[2].endswith("canary 10 %")
    assert "the canaries have ended; once more goes back" in said("rollback")
    assert "nothing was current before" in said("rollback", code=2)
    assert said("abort") == f"live is {a} 100 %; was {a} 100 %, shadow {a} 5 %\n"
    said("canary", b, "--weight", "0.5")
    assert said("promote") == f"live is {b} 100 %; was {a} 50 %, {b} 50 %\n"
    assert "there is no canary" in said("promote", code=2)
    trail = said("audit").splitlines()
    assert [line.split()[2] for line in trail] == [
        *("activate:", "canary:", "shadow:", "rollback:", "abort:", "canary:", "promote:")
    ]
    assert trail[-1].endswith(f"{a} 50 %, {b} 50 % -> {b} 100 %")
    assert len(said("audit", "--last", "2").splitlines()) == 2
