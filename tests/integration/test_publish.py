"""The verbs between a bundle and a service, as a person or a batch job runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cache.cli import app
from cache.errors import StoreError
from cache.release import INDEX, ITEMS, read_release
from cache.snapshot import Snapshot
from cache.store import open_store
from model.errors import DataError
from tests.catalogues import CROSS, Shop, open_shop
from tests.redis_server import redis_server


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
    assert f"published {current} to {store.url}: 400 items (400 embedded, 0 reused, 0 removed)" in said
    assert "current, was none" in said
    folder = store.fetch(current, Path("var/cache"))
    assert (folder / INDEX).is_file()
    users = store.fetch_users(shop.spec.id, Path("var/cache"))
    assert users is not None
    assert len(Snapshot.open(users)) == 60
    assert not list(Path("var/build").iterdir())


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
    assert "would publish 399 items: 1 to embed, 398 unchanged, 1 removed; nothing was written" in run(
        *arguments, "--dry-run"
    )
    assert open_store(url).current() == first
    assert len(open_store(url).list()) == 1
    said = run(*arguments)
    assert "399 items (1 embedded, 398 reused, 1 removed)" in said
    assert f"was {first}" in said


def test_releases_can_be_listed_switched_and_pruned(shop: Shop, url: str) -> None:
    publish(shop, url)
    publish(shop, url, "--no-activate")
    first, second = (info.id for info in open_store(url).list())
    assert open_store(url).current() == first
    listed = run("releases", "list", "--store", url)
    assert listed.index(first) < listed.index("current") < listed.index(second)
    assert run("releases", "activate", second, "--store", url) == f"current is {second}, was {first}"
    assert run("releases", "rollback", "--store", url) == f"current is {first}, was {second}"
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


def test_verify_prints_the_curve_for_cross_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shop = open_shop(tmp_path, items=150, head=CROSS)
    url = f"file://{tmp_path}/store"
    publish(shop, url, "--index", "ivf-sq8")
    said = run("verify", "--store", url)
    assert "recall@100 of the ivf-sq8 index against scoring all items, 4 random users of the bundle's probe" in said


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


def test_a_release_that_could_not_be_stored_can_be_pushed_later(shop: Shop, url: str, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "releases").write_text("in the way")
    with pytest.raises(StoreError):
        publish(shop, f"file://{blocked}")
    (built,) = Path("var/build").glob("*/release")
    assert "current, was none" in run("releases", "push", built, "--store", url)
    assert open_store(url).current() == read_release(built).id


def test_wrong_items_change_nothing(shop: Shop, url: str, tmp_path: Path) -> None:
    publish(shop, url)
    before = open_store(url).current()
    pq.write_table(pq.read_table(shop.items).drop_columns(["price"]), tmp_path / "items.parquet")
    with pytest.raises(DataError, match="no column 'price'"):
        run("publish", "--bundle", shop.bundle, "--items", tmp_path / "items.parquet", "--store", url)
    assert open_store(url).current() == before
    assert len(open_store(url).list()) == 1
    assert not list(Path("var/build").iterdir())


def test_without_a_current_release_verbs_say_what_to_do(url: str) -> None:
    for arguments in (["verify"], ["releases", "verify"], ["releases", "rollback"], ["releases", "activate", "x"]):
        with pytest.raises(StoreError, match=r"publish|releases"):
            run(*arguments, "--store", url)
    assert "nothing to delete" in run("releases", "prune", "--keep", 2, "--store", url)
