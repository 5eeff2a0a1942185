"""Embedding on a Ray cluster of three nodes on this machine: equal to local bit for bit, with nodes dying under it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
import ray
from ray.cluster_utils import Cluster

from cache import on_ray as room
from cache.catalogue import Catalogue, open_catalogue
from cache.embed import build_release, compare
from cache.errors import StoreError
from cache.on_ray import on_ray
from cache.release import INPUTS, ITEMS, read_release
from model.errors import DataError
from tests.catalogues import Shop, open_shop
from tests.integration.test_publish import run

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
HOME = "127.0.0.2"  # Ray takes 127.0.0.1 for the address that others know the machine by
NODE = {"object_store_memory": 100 << 20, "node_ip_address": HOME}
ITEMS_COUNT, GROUP_ROWS, PART_ROWS = 6_000, 150, 300  # 20 blocks


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without processors, where this process is, and two nodes of two each."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False},
    )
    try:
        ray.init(cluster.address, _node_ip_address=HOME, log_to_driver=False, logging_level="warning")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def nodes(cluster: Cluster) -> Iterator[list[Any]]:
    added = [cluster.add_node(num_cpus=2, **NODE) for _ in range(2)]
    yield added
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), items=ITEMS_COUNT, string_ids=True)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "READ_ROWS", PART_ROWS)


def cut(shop: Shop, folder: Path, price: tuple[int, float] | None = None) -> Path:
    """The items in many row groups, one of them perhaps with another price."""
    table = pq.read_table(shop.items)
    if price:
        prices = table["price"].to_numpy().copy()
        prices[price[0]] = price[1]
        table = table.set_column(table.column_names.index("price"), "price", pa.array(prices))
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "items.parquet", row_group_size=GROUP_ROWS)
    return folder / "items.parquet"


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (ITEMS, INPUTS))


def actors_on(node: Any) -> int:
    """Embedders that live on a node."""
    known = ray._private.state.actors(actor_state_name="ALIVE").values()
    return sum("Embedder" in actor["ActorClassName"] and actor["Address"]["NodeID"] == node.node_id for actor in known)


@dataclass
class Killer:
    """Kills a node once half of the items are embedded."""

    cluster: Cluster
    node: Any
    dones: list[int] = field(default_factory=list)
    actors: int = 0  # that died with it

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "embed":
            if 2 * done >= total and self.node in self.cluster.worker_nodes:
                self.actors = actors_on(self.node)
                self.cluster.remove_node(self.node, allow_graceful=False)
            self.dones.append(done)


def test_a_node_that_dies_half_way_changes_no_bit(
    shop: Shop, tmp_path: Path, cluster: Cluster, nodes: list[Any]
) -> None:
    items = cut(shop, tmp_path)
    local = build_release(shop.bundle, items, tmp_path / "local")
    killer = Killer(cluster, nodes[0])
    found = build_release(shop.bundle, items, tmp_path / "ray", engine=on_ray(), progress=killer)
    assert nodes[0] not in cluster.worker_nodes
    assert killer.actors > 0
    assert killer.dones == list(range(PART_ROWS, ITEMS_COUNT + 1, PART_ROWS))
    assert same(found, local)
    assert read_release(found).report["embedded"] == ITEMS_COUNT


def test_what_did_not_change_is_used_again(shop: Shop, tmp_path: Path, nodes: list[Any]) -> None:
    first = build_release(shop.bundle, cut(shop, tmp_path / "a"), tmp_path / "first")
    items = cut(shop, tmp_path / "b", price=(3_500, 1e9))
    local = build_release(shop.bundle, items, tmp_path / "local", previous=first)
    found = build_release(shop.bundle, items, tmp_path / "ray", previous=first, engine=on_ray(workers=2))
    assert same(found, local)
    assert read_release(found).report["embedded"] == read_release(local).report["embedded"] <= 1
    assert read_release(found).report["reused"] >= ITEMS_COUNT - 1


def test_a_wrong_row_is_named_and_leaves_nothing(shop: Shop, tmp_path: Path, nodes: list[Any]) -> None:
    items = cut(shop, tmp_path / "items", price=(4_000, float("inf")))
    with pytest.raises(DataError) as local:
        build_release(shop.bundle, items, tmp_path / "local")
    with pytest.raises(DataError) as found:
        build_release(shop.bundle, items, tmp_path / "ray", engine=on_ray())
    assert str(found.value).startswith(str(local.value))  # Ray adds to it
    assert "row 4000" in str(found.value)
    assert not (tmp_path / "ray").exists()


def test_the_command_publishes_by_ray(
    shop: Shop, tmp_path: Path, nodes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = run("publish", "--bundle", shop.bundle, "--items", cut(shop, tmp_path), "--engine", "ray", "--workers", 2)
    assert f"{ITEMS_COUNT:,} embedded" in told


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("ray://somewhere:10001", "run this on a node of the cluster"),
        ("somewhere", "give host:port"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 "),
    ],
)
def test_an_address_that_cannot_do_is_refused_at_once(shop: Shop, tmp_path: Path, address: str, problem: str) -> None:
    with pytest.raises(StoreError, match=problem):
        build_release(shop.bundle, shop.items, tmp_path / "ray", engine=on_ray(address))
    assert not (tmp_path / "ray").exists()


def test_parts_cover_the_row_groups_once(shop: Shop, tmp_path: Path) -> None:
    items, spec = cut(shop, tmp_path), shop.spec
    catalogue = open_catalogue(items, spec)
    groups = list(range(ITEMS_COUNT // GROUP_ROWS))
    for rows in (1, GROUP_ROWS, 7 * GROUP_ROWS + 1, ITEMS_COUNT, 10 * ITEMS_COUNT):
        parts = catalogue.parts(rows)
        assert [group for part in parts for group in part] == groups
        read = [block for part in parts for block in compare(catalogue, None, part)]
        assert [block.start for block in read] == np.cumsum([0, *(len(block.rows) for block in read[:-1])]).tolist()
        assert np.concatenate([block.prints for block in read]).tobytes() == whole_prints(catalogue)


def whole_prints(catalogue: Catalogue) -> bytes:
    return np.concatenate([block.prints for block in compare(catalogue, None)]).tobytes()
