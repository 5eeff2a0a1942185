from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from model.errors import BundleError
from model.tower import EMBED_BATCH, GraphHead, Tower
from tests.graphs import write_tower


def test_a_tower_maps_index_rows_to_records(tmp_path: Path) -> None:
    tables = write_tower(tmp_path / "user.onnx", sizes=[5, 7], size=6, seed=1)
    tower = Tower(tmp_path / "user.onnx")
    assert (tower.width, tower.size) == (2, 6)
    rows = np.array([[0, 6], [4, 0]], np.int32)
    np.testing.assert_allclose(tower.run(rows), tables[0][rows[:, 0]] + tables[1][rows[:, 1]], rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, EMBED_BATCH - 1, EMBED_BATCH, EMBED_BATCH + 1])
def test_a_record_does_not_depend_on_its_neighbours(tmp_path: Path, count: int) -> None:
    write_tower(tmp_path / "item.onnx", sizes=[50, 50], size=24, seed=2)
    tower = Tower(tmp_path / "item.onnx")
    rows = np.random.default_rng(0).integers(0, 50, (count, 2)).astype(np.int32)
    together = tower.embed(rows)
    assert together.shape == (count, 24)
    for i in range(0, count, 37):
        np.testing.assert_array_equal(tower.embed(rows[i : i + 1])[0], together[i])


def test_threads_that_share_a_tower_get_the_records_of_their_own_rows(tmp_path: Path) -> None:
    write_tower(tmp_path / "user.onnx", sizes=[50, 50], size=24, seed=3)
    tower = Tower(tmp_path / "user.onnx")
    rows = np.random.default_rng(0).integers(0, 50, (2000, 1, 2)).astype(np.int32)
    alone = [tower.run(row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        np.testing.assert_array_equal([*pool.map(tower.run, rows)], alone)


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "user.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="cannot load it"):
        Tower(tmp_path / "user.onnx")
    with pytest.raises(BundleError, match="cannot load it"):
        Tower(tmp_path / "nowhere.onnx")


def test_a_graph_with_other_names_is_refused(tmp_path: Path) -> None:
    write_tower(tmp_path / "user.onnx", sizes=[5], size=6, seed=1, output="logits")
    with pytest.raises(BundleError, match="one output 'record'"):
        Tower(tmp_path / "user.onnx")


def test_a_tower_is_no_head(tmp_path: Path) -> None:
    write_tower(tmp_path / "head.onnx", sizes=[5], size=6, seed=1)
    with pytest.raises(BundleError, match="a head has the inputs user, items and one output 'scores'"):
        GraphHead(tmp_path / "head.onnx")
