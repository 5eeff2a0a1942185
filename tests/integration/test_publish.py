"""The verbs between a bundle and a service, as a person or a batch job runs them."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cache.cli import app, building_in, check_recall
from cache.errors import StoreError
from cache.file_store import FileStore
from cache.release import INDEX, ITEMS, RELEASE, USER_TABLE, Progress, no_progress, read_release
from cache.snapshot import Snapshot
from cache.store import STORES, open_store
from kernel.errors import KernelError
from model.errors import DataError
from tests.catalogues import CROSS, GRAPH, MAXSIM, Shop, open_shop
from tests.redis_server import redis_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=400)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(params=["file", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # build and cache folders are relative
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"{request.getfixturevalue('redis_url')}?prefix={tmp_path.name}"


def run(*arguments: object) -> str:
    """The output of a verb; what it raises, it raises here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def publish(shop: Shop, url: str, *more: object) -> str:
    return run("publish", "--bundle", shop.bundle, "--items", shop.items, "--store", url, *more)


def test_publish_makes_a_release_current_with_users_and_index(shop: Shop, url: str) -> None:
    said = publish(shop, url, "--index", "flat", "--users", shop.folder / "log")
    store = open_store(url)
    current = store.current()
    assert current is not None
    assert f"published {current} to {store.url}: 400 items (400 embedded), " in said
    assert "current, was none" in said
    folder = store.fetch(current, Path("var/cache"))
    assert (folder / INDEX).is_file()
    users = store.fetch_users(shop.spec.id, Path("var/cache"))
    assert users is not None
    assert len(Snapshot.open(users)) == 60
    assert not list(Path("var/build").glob("release-*"))


def test_an_incremental_publish_embeds_only_changes(shop: Shop, url: str, tmp_path: Path) -> None:
    publish(shop, url)
    first = open_store(url).current()
    table = pq.read_table(shop.items)
    categories = table["category"].to_pylist()
    categories[5] = (categories[5] + 1) % 4
    table = table.set_column(table.column_names.index("category"), "category", pa.array(categories)).slice(0, 399)
    pq.write_table(table, tmp_path / "new.parquet")
    arguments = [
        "publish",
        "--bundle",
        shop.bundle,
        "--items",
        tmp_path / "new.parquet",
        "--store",
        url,
        "--incremental",
    ]
    assert "would publish 399 items, 400 before: 1 to embed, 398 unchanged, 1 removed; nothing was written" in run(
        *arguments, "--dry-run"
    )
    assert open_store(url).current() == first
    assert len(open_store(url).list()) == 1
    said = run(*arguments)
    assert "399 items, 400 before (1 embedded, 398 reused, 1 removed)" in said
    assert f"was {first}" in said


def test_what_an_incremental_publish_reads_no_service_drops(
    shop: Shop, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"{redis_url}?prefix={tmp_path.name}"
    publish(shop, url)
    first = open_store(url).current()
    publish(shop, url, "--incremental")
    assert open_store(url).drop_cached(Path("var/cache"), set()) == []
    assert [path.name for path in Path("var/cache").rglob("*-*") if path.is_dir()] == [first]


def test_the_user_table_is_published_shown_and_deleted_by_itself(shop: Shop, url: str) -> None:
    chosen = ["--bundle", shop.bundle, "--store", url]
    with pytest.raises(StoreError, match=r"has no user table .* run `ranktower users publish`"):
        run("users", "show", *chosen)
    said = run("users", "publish", *chosen, "--log", shop.folder / "log")
    version = open_store(url).users_version(shop.spec.id)
    assert f"published the users of {shop.folder / 'log'} to {open_store(url).url}, version {version}" in said
    assert open_store(url).list() == []
    shown = run("users", "show", *chosen)
    assert f"version {version}: 60 users, 0.0 MB, 0:00:0" in shown
    assert f"of specification {shop.spec.id}" in shown
    assert run("users", "delete", *chosen) == f"deleted version {version} from {open_store(url).url}"
    assert open_store(url).users(shop.spec.id) is None
    assert run("users", "delete", *chosen) == "nothing to delete"
    assert not list(Path("var/build").glob("release-*"))


def test_releases_can_be_listed_switched_and_pruned(shop: Shop, url: str) -> None:
    publish(shop, url)
    publish(shop, url, "--no-activate")
    first, second = (info.id for info in open_store(url).list())
    assert open_store(url).current() == first
    listed = run("releases", "list", "--store", url)
    assert listed.index(first) < listed.index("current") < listed.index(second)
    assert run("releases", "activate", second, "--store", url) == f"current is {second}, was {first}"
    assert run("releases", "rollback", "--store", url) == f"live is {first} 100 %; was {second} 100 %"
    run("releases", "activate", second, "--store", url)
    assert f"{second}: all hashes" in run("releases", "verify", "--store", url)
    assert f"{first}: all hashes" in run("releases", "verify", first, "--store", url)
    assert run("releases", "prune", "--keep", 1, "--store", url) == f"deleted 1: {first}"
    assert run("releases", "prune", "--keep", 1, "--store", url) == "nothing to delete"


def test_verify_prints_the_recall_of_retrieval(shop: Shop, url: str) -> None:
    publish(shop, url, "--index", "flat", "--users", shop.folder / "log")
    said = run("verify", "--store", url, "--users", 10)
    assert "all hashes of" in said
    assert "recall@100 of the flat index against scoring all items, 10 published users" in said
    assert "2,000 1.0000" in said
    with pytest.raises(StoreError, match=r"with 1 candidates per head is 0\.\d+, below 0.95"):
        run("verify", "--store", url, "--per-head", 1)
    publish(shop, url)
    assert "it has no index" in run("verify", "--store", url)


def test_a_head_that_is_a_graph_is_published_like_any_other(tmp_path: Path, url: str) -> None:
    shop = open_shop(tmp_path / "shop", items=150, head=GRAPH)
    said = publish(shop, url)
    assert "150 items (150 embedded)" in said
    assert "records are f16: f16 keeps " in said
    assert "150 items, 150 before (150 reused)" in publish(shop, url, "--incremental")
    said = run("verify", "--store", url)
    assert "all hashes of" in said
    assert "it has no index (its head is a graph)" in said
    with pytest.raises(StoreError, match="no vectors to search: publish with --index none"):
        publish(shop, url, "--index", "flat")
    with pytest.raises(KernelError, match="use auto, f32 or f16"):
        publish(shop, url, "--dtype", "int8")


def test_verify_prints_the_curve_for_cross_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shop = open_shop(tmp_path, items=150, head=CROSS)
    url = f"file://{tmp_path}/store"
    publish(shop, url, "--index", "ivf-sq8")
    said = run("verify", "--store", url)
    assert "recall@100 of the ivf-sq8 index against scoring all items, 4 random users of the bundle's probe" in said


@pytest.mark.parametrize("recall", [0.94, 0.0, np.nan])
def test_maxsim_that_does_not_find_enough_is_refused(recall: float) -> None:
    with pytest.raises(StoreError, match=r"below 0\.95"):
        check_recall("r1", MAXSIM, recall, 500)
    check_recall("r1", MAXSIM, 0.95, 500)
    check_recall("r1", CROSS, recall, 500)


NUMBERS = [
    ("publish", "--bundle", "b", "--items", "i", "--workers", 0),
    ("publish", "--bundle", "b", "--items", "i", "--workers", -2),
    ("verify", "--users", 0),
    ("verify", "--users", -1),
    ("verify", "--seed", -1),
    ("verify", "--per-head", -5),
    ("verify", "--per-head", 0),
    ("releases", "prune", "--keep", 0),
]


@pytest.mark.parametrize("arguments", NUMBERS, ids=lambda arguments: " ".join(map(str, arguments)))
def test_numbers_below_the_least_are_refused_by_name(tmp_path: Path, arguments: tuple[object, ...]) -> None:
    result = CliRunner().invoke(app, [*map(str, arguments), "--store", f"file://{tmp_path}"])
    assert result.exit_code == 2
    assert f"'{arguments[-2]}'" in result.output
    assert not isinstance(result.exception, StoreError)


def test_an_unknown_index_is_refused_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["publish", "--bundle", "b", "--items", "i", "--index", "flot"])
    assert result.exit_code == 2
    assert "ivf-sq8" in result.output
    assert not list(tmp_path.iterdir())


def test_verify_finds_damage_in_the_store(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/store"
    publish(shop, url)
    folder = open_store(url).fetch(open_store(url).current() or "", tmp_path)
    content = bytearray((folder / ITEMS).read_bytes())
    content[5000] ^= 1
    (folder / ITEMS).write_bytes(content)
    with pytest.raises(StoreError, match=r"items\.snap .*not as it was written"):
        run("verify", "--store", url)


class FailingStore(FileStore):
    """A store whose disk fails once the release is built."""

    def publish(self, folder: Path, progress: Progress = no_progress, *, owned: bool = False) -> str:
        raise StoreError(f"{self.url}: no space left: free some")


def test_a_release_that_could_not_be_stored_can_be_pushed_later(
    shop: Shop, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(STORES, "file", FailingStore)
        with pytest.raises(StoreError, match="no space left"):
            publish(shop, f"file://{tmp_path}/failing")
    (built,) = Path("var/build").glob("*/release")
    with building_in(Path("var/build")):  # the next publisher leaves it alone
        assert built.is_dir()
    assert "current, was none" in run("releases", "push", built, "--store", url)
    assert open_store(url).current() == read_release(built).id


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(STORES, "file", FailingStore)
        yield


def built() -> list[str]:
    """Names of the releases that lie in the work folder."""
    return [read_release(folder).id for folder in Path("var/build").glob("*/release")]


def test_what_could_not_be_stored_is_kept_once_and_stored_by_the_same_command(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it fails: a schedule against a full store must not fill the disk of the publisher, too."""
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/store"
    with failing(monkeypatch):
        for _ in range(3):
            with pytest.raises(StoreError, match="no space left"):
                publish(shop, url)
        (first,) = built()
        assert len(list(Path("var/build").glob("release-*"))) == 1
        with pytest.raises(StoreError, match="no space left"):
            publish(shop, url, "--index", "flat")  # another order
        (second,) = built()
        assert second != first
    run("users", "publish", "--bundle", shop.bundle, "--store", url, "--log", shop.folder / "log")
    assert built() == [second], "who builds no release leaves it alone"
    publish(shop, f"file://{tmp_path}/other", "--index", "flat", "--no-activate")
    assert [info.id for info in open_store(f"file://{tmp_path}/other").list()] != [second], "it is of another store"
    with failing(monkeypatch), pytest.raises(StoreError, match="no space left"):
        publish(shop, url)
    (third,) = built()
    assert f"taking release {third}, which a publisher had built and not stored" in publish(shop, url)
    assert open_store(url).current() == third
    assert not list(Path("var/build").glob("release-*"))


def test_what_was_built_and_damaged_since_is_built_anew(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/store"
    with failing(monkeypatch), pytest.raises(StoreError, match="no space left"):
        publish(shop, url)
    (left,) = Path("var/build").glob("*/release")
    content = bytearray((left / ITEMS).read_bytes())
    content[5000] ^= 1
    (left / ITEMS).write_bytes(content)
    assert "building anew what a publisher had left: " in publish(shop, url)
    assert "all hashes" in run("releases", "verify", "--store", url)
    assert not list(Path("var/build").glob("release-*"))


def test_a_store_or_a_log_that_will_not_do_is_found_before_the_work(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "releases").write_text("in the way")
    with pytest.raises(StoreError, match="a file is where a folder should be"):
        publish(shop, f"file://{tmp_path}/blocked")
    assert not Path("var/build").exists()
    url = f"file://{tmp_path}/store"
    with monkeypatch.context() as patch:
        patch.setattr("cache.embed.build_release", None)  # it is not come to
        with pytest.raises(DataError, match="nothing"):
            publish(shop, url, "--users", tmp_path / "nothing")
    assert not list(Path("var/build").glob("release-*"))
    assert open_store(url).list() == []


BUILD_UNTIL_KILLED = """
import sys
from pathlib import Path
from cache.cli import building_in

with building_in(Path(sys.argv[1])) as folder:
    (folder / "release").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_publisher_was_building_goes_with_the_next_publish(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD_UNTIL_KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as publisher:
        assert publisher.stdout is not None
        folder = Path(publisher.stdout.readline().strip())
        with building_in(tmp_path):
            assert folder.is_dir(), "its publisher is alive"
        publisher.kill()
    with building_in(tmp_path) as own:
        assert list(tmp_path.glob("release-*")) == [own]
    assert not list(tmp_path.glob("release-*"))


PUBLISH_UNTIL_STORED = """
import sys
import cache.cli
from cache.file_store import FileStore

def stop(store, folder, progress, owned):
    print("built", flush=True)
    sys.stdin.read()

FileStore.publish = stop
cache.cli.app(sys.argv[1:])
"""


def test_what_a_killed_publisher_had_built_is_stored_by_the_next(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/store"
    wanted = ["publish", "--bundle", str(shop.bundle), "--items", str(shop.items), "--store", url]

    def build_and_die() -> str:
        command = [sys.executable, "-c", PUBLISH_UNTIL_STORED, *wanted]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, env=environment, text=True
        ) as publisher:
            assert publisher.stdout is not None
            assert any(line == "built\n" for line in publisher.stdout)
            publisher.kill()
        (built,) = Path("var/build").glob("*/release")
        return read_release(built).id

    first = build_and_die()
    assert f"taking release {first}" in run(*wanted)
    assert open_store(url).current() == first
    assert not list(Path("var/build").glob("release-*"))
    second = build_and_die()
    assert "which a publisher left" in run(*wanted, "--index", "flat")  # another order
    assert second not in [info.id for info in open_store(url).list()]
    assert len(open_store(url).list()) == 2


def test_a_catalogue_that_lost_most_of_its_items_is_warned_of(shop: Shop, url: str, tmp_path: Path) -> None:
    publish(shop, url)
    first = open_store(url).current()
    items = tmp_path / "one.parquet"
    pq.write_table(pq.read_table(shop.items).slice(0, 1), items)
    arguments = ["publish", "--bundle", shop.bundle, "--items", items, "--store", url]
    warning = f"warning: 399 of the 400 items of {first} are gone"
    planned = run(*arguments, "--dry-run")
    assert "would publish 1 items, 400 before: 1 to embed, 0 unchanged; nothing was written" in planned
    assert re.search(
        rf"the release would be [\d,]+ bytes, .* sent to {re.escape(open_store(url).url)}: about ", planned
    )
    assert warning in planned
    said = run(*arguments)
    assert "1 items, 400 before (1 embedded), " in said
    assert warning in said
    assert "warning" not in publish(shop, url), "a catalogue may grow"


def test_a_release_that_loses_the_index_is_warned_of(shop: Shop, url: str) -> None:
    publish(shop, url)
    assert "warning" not in publish(shop, url, "--index", "flat")
    indexed = open_store(url).current()
    warning = f"warning: the current release {indexed} has the index flat, this one will have none"
    assert warning in publish(shop, url, "--dry-run")
    result = CliRunner().invoke(
        app, ["publish", "--bundle", f"{shop.bundle}", "--items", f"{shop.items}", "--store", url]
    )
    assert warning in result.stderr
    assert warning not in result.stdout
    publish(shop, url, "--index", "flat")
    assert "warning" not in publish(shop, url, "--index", "none"), "it was meant"


def test_a_damaged_release_does_not_hide_the_others(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/store"
    publish(shop, url)
    publish(shop, url, "--no-activate")
    first, second = (info.id for info in open_store(url).list())
    (tmp_path / "store" / "releases" / first / RELEASE).write_bytes(bytes(9))
    listed = run("releases", "list", "--store", url)
    assert f"{first} damaged current: " in listed
    assert f"{second} 400" in listed
    assert "current, was " + first in publish(shop, url)


def test_verify_checks_the_user_table_of_the_release_too(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/store"
    publish(shop, url)
    assert "no user table is published for it" in run("releases", "verify", "--store", url)
    chosen = ["--bundle", shop.bundle, "--store", url]
    run("users", "publish", *chosen, "--log", shop.folder / "log")
    version = open_store(url).users_version(shop.spec.id)
    assert f"user table {version}: all hashes of 60 users are right" in run("releases", "verify", "--store", url)
    home = tmp_path / "store" / "users" / shop.spec.id
    content = bytearray((home / str(version) / USER_TABLE).read_bytes())
    content[5000] ^= 1
    (home / str(version) / USER_TABLE).write_bytes(content)
    with pytest.raises(StoreError, match=r"users\.snap .*not as it was written"):
        run("releases", "verify", "--store", url)
    (home / "current").write_bytes(bytes(31))
    with pytest.raises(StoreError, match="publish the users again"):
        run("releases", "verify", "--store", url)
    assert run("users", "delete", *chosen).startswith("deleted version unknown")
    assert open_store(url).users_version(shop.spec.id) is None


def test_wrong_items_change_nothing(shop: Shop, url: str, tmp_path: Path) -> None:
    publish(shop, url)
    before = open_store(url).current()
    pq.write_table(pq.read_table(shop.items).drop_columns(["price"]), tmp_path / "items.parquet")
    with pytest.raises(DataError, match="no column 'price'"):
        run("publish", "--bundle", shop.bundle, "--items", tmp_path / "items.parquet", "--store", url)
    assert open_store(url).current() == before
    assert len(open_store(url).list()) == 1
    assert not list(Path("var/build").glob("release-*"))


def test_without_a_current_release_verbs_say_what_to_do(url: str) -> None:
    for arguments in (["verify"], ["releases", "verify"], ["releases", "rollback"], ["releases", "activate", "x"]):
        with pytest.raises(StoreError, match=r"publish|releases"):
            run(*arguments, "--store", url)
    assert "nothing to delete" in run("releases", "prune", "--keep", 2, "--store", url)


def test_a_full_disk_where_a_release_is_built_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=f"^{tmp_path}: No space left on device: free space there, or name another"),
        building_in(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
