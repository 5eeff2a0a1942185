"""Embedding on a Spark cluster of two executors here: equal to local bit for bit, with one dying under it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("pyspark", reason="Spark is not installed: pip install '.[spark]'")
from pyspark.sql import SparkSession

from cache import catalogue
from cache.embed import build_release
from cache.errors import StoreError
from cache.on_spark import QUIET, on_spark
from cache.release import INPUTS, ITEMS, read_release
from model.errors import DataError
from tests.catalogues import Shop, open_shop
from tests.integration.test_publish import run

pytestmark = pytest.mark.filterwarnings("ignore")  # Spark's own
ROOT = Path(__file__).resolve().parents[2]
ITEMS_COUNT, BLOCK_ROWS = 6_000, 300  # 20 blocks


@pytest.fixture(scope="module")
def session() -> Iterator[SparkSession]:
    """Two executors of one processor each, processes of their own, with this Python and its packages."""
    builder = SparkSession.builder.master("local-cluster[2,1,1024]").config(map=QUIET)
    for name in ("spark.driver.host", "spark.driver.bindAddress"):
        builder = builder.config(name, "127.0.0.1")
    session = builder.config("spark.executorEnv.PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path])).getOrCreate()
    session.sparkContext.pythonExec = sys.executable
    yield session
    session.stop()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=ITEMS_COUNT, string_ids=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "BLOCK_ROWS", BLOCK_ROWS)


def changed(shop: Shop, path: Path, row: int, price: float) -> Path:
    """The items with another price of one of them."""
    table = pq.read_table(shop.items)
    prices = table["price"].to_numpy().copy()
    prices[row] = price
    pq.write_table(table.set_column(table.column_names.index("price"), "price", pa.array(prices)), path)
    return path


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (ITEMS, INPUTS))


def processes() -> Iterator[tuple[int, int, str]]:
    """Number, parent and command line of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue


def executors(app_id: str) -> set[int]:
    return {pid for pid, _, line in processes() if "ExecutorBackend" in line and f"--app-id\0{app_id}" in line}


def python_workers(executor: int) -> set[int]:
    """Those that an executor's daemon has forked."""
    known = list(processes())
    daemons = {pid for pid, parent, line in known if parent == executor and "pyspark.daemon" in line}
    return {pid for pid, parent, _ in known if parent in daemons}


@dataclass
class Killer:
    """Kills an executor, or the Python worker of one, once half of the items are embedded."""

    app_id: str
    whole: bool
    killed: int = 0
    dones: list[int] = field(default_factory=list)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "embed":
            if 2 * done >= total and not self.killed:
                executor, worker = next((each, min(python_workers(each))) for each in executors(self.app_id))
                self.killed = executor if self.whole else worker
                os.kill(self.killed, signal.SIGKILL)
            self.dones.append(done)


@pytest.mark.parametrize("whole", [True, False], ids=["executor", "worker"])
def test_one_that_dies_half_way_changes_no_bit(shop: Shop, tmp_path: Path, session: SparkSession, whole: bool) -> None:
    local = build_release(shop.bundle, shop.items, tmp_path / "local")
    killer = Killer(session.sparkContext.applicationId, whole)
    found = build_release(shop.bundle, shop.items, tmp_path / "spark", engine=on_spark(), progress=killer)
    assert killer.killed
    assert killer.killed not in executors(killer.app_id)
    assert killer.dones == list(range(BLOCK_ROWS, ITEMS_COUNT + 1, BLOCK_ROWS))
    assert same(found, local)
    assert read_release(found).report["embedded"] == ITEMS_COUNT


def test_what_did_not_change_is_used_again(shop: Shop, tmp_path: Path, session: SparkSession) -> None:
    first = build_release(shop.bundle, shop.items, tmp_path / "first")
    items = changed(shop, tmp_path / "items.parquet", 3_500, 1e9)
    local = build_release(shop.bundle, items, tmp_path / "local", previous=first)
    found = build_release(shop.bundle, items, tmp_path / "spark", previous=first, engine=on_spark())
    assert same(found, local)
    assert read_release(found).report["embedded"] == read_release(local).report["embedded"] == 1


def test_a_wrong_row_is_named_and_leaves_nothing(shop: Shop, tmp_path: Path, session: SparkSession) -> None:
    items = changed(shop, tmp_path / "items.parquet", 4_000, float("inf"))
    with pytest.raises(DataError, match="row 4000"):
        build_release(shop.bundle, items, tmp_path / "spark", engine=on_spark())
    assert not (tmp_path / "spark").exists()


def test_what_fails_on_an_executor_is_told(
    shop: Shop, tmp_path: Path, session: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(rows: object, graph: object) -> object:
        raise OSError("no room for a graph")

    monkeypatch.setattr("cache.on_spark.run", fails)
    with pytest.raises(StoreError, match=r"(?s)Spark gave up .*no room for a graph"):
        build_release(shop.bundle, shop.items, tmp_path / "spark", engine=on_spark())
    assert not (tmp_path / "spark").exists()


def test_the_command_publishes_by_spark(
    shop: Shop, tmp_path: Path, session: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = run("publish", "--bundle", shop.bundle, "--items", shop.items, "--engine", "spark", "--workers", 2)
    assert f"{ITEMS_COUNT:,} embedded" in told
