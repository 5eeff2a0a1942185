"""The table of known users: every user's encoded features and latest history, and samples of users from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache.snapshot import Snapshot
from cache.users import build_user_table, sample_users
from model.bundle import open_bundle
from model.datasets.log import PADDING, latest_histories
from model.errors import DataError
from model.features import HISTORY
from tests.catalogues import Shop, open_shop
from tests.graphs import write_bundle
from tests.logs import write_tiny_log


@pytest.fixture(scope="module", params=["int", "string"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(tmp_path_factory.mktemp("shop"), string_ids=request.param == "string")


def test_every_user_is_there_with_features_and_history(shop: Shop, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = build_user_table(shop.spec, shop.folder / "log", tmp_path / "u.snap", lambda *at: seen.append(at))
    table = Snapshot.open(path)
    assert (table.kind, table.owner, table.id_type) == ("users", shop.spec.id, shop.spec.user_id_type)
    histories = latest_histories(shop.log, 8)
    assert (histories != PADDING).any()
    rows = table.lookup(shop.log.users.ids)
    for user in range(len(shop.log.users)):
        row = {name: column[user] for name, column in shop.log.users.columns.items()}
        row |= {"user_id": shop.log.users.ids[user], HISTORY: shop.log.items.ids[histories[user][histories[user] >= 0]]}
        np.testing.assert_array_equal(table.records[rows[user]], shop.spec.encode_row("user", row))
    assert seen == [("users", 60, 60)]


def test_context_is_left_to_the_request(shop: Shop, tmp_path: Path) -> None:
    table = Snapshot.open(build_user_table(shop.spec, shop.folder / "log", tmp_path / "u.snap"))
    columns = shop.spec.columns("user")
    assert not table.records[:, columns["device"]].any()
    assert table.records[:, columns["user_id"]].all()


def test_users_of_another_id_type_are_refused(shop: Shop, tmp_path: Path) -> None:
    other = write_tiny_log(tmp_path / "other", string_ids=shop.spec.user_id_type == "int")
    with pytest.raises(DataError, match="the bundle was trained with"):
        build_user_table(shop.spec, other, tmp_path / "u.snap")
    assert not (tmp_path / "u.snap").exists()


def users_log(shop: Shop, folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the shop's log, some text of its log.toml replaced."""
    copied = shutil.copytree(shop.folder / "log", folder)
    text = (copied / "log.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (copied / "log.toml").write_text(text)
    return copied


def test_users_of_a_log_with_another_id_column_are_refused(shop: Shop, tmp_path: Path) -> None:
    other = users_log(shop, tmp_path / "other", ("user_id", "member"))
    for name in ("users", "events"):
        table = pq.read_table(other / f"{name}.parquet")
        pq.write_table(table.rename_columns({"user_id": "member"}), other / f"{name}.parquet")
    with pytest.raises(DataError, match=r"'member', the bundle was trained with 'user_id': publish the users of"):
        build_user_table(shop.spec, other, tmp_path / "u.snap")
    assert not (tmp_path / "u.snap").exists()


def test_users_without_a_column_that_the_bundle_reads_are_refused(shop: Shop, tmp_path: Path) -> None:
    wanted = next(f for f in shop.spec.fields if f.side == "user" and f.name not in ("user_id", HISTORY))
    other = users_log(shop, tmp_path / "other", (f'name = "{wanted.name}"', 'name = "other"'))
    table = pq.read_table(other / "users.parquet")
    pq.write_table(table.rename_columns({wanted.name: "other"}), other / "users.parquet")
    with pytest.raises(DataError, match=f"no field '{wanted.name}' of the users, which the bundle reads: publish the"):
        build_user_table(shop.spec, other, tmp_path / "u.snap")


def test_samples_come_from_the_table_else_from_requests_else_from_the_probe(shop: Shop, tmp_path: Path) -> None:
    bundle = open_bundle(shop.bundle)
    path = build_user_table(shop.spec, shop.folder / "log", tmp_path / "u.snap")
    records, source = sample_users(bundle, path, 10)
    assert records.shape == (10, bundle.head.user_size)
    assert source == "published users"
    table = Snapshot.open(path)
    known = bundle.user_tower().embed(np.ascontiguousarray(table.records))
    assert all((known == record).all(axis=1).any() for record in records)
    records, source = sample_users(bundle, None, 3)
    assert records.shape == (3, bundle.head.user_size)
    assert "probe" in source
    body = {"user_id": shop.log.users.ids.tolist()[1], "context": {"device": "phone"}, "history": [], "candidates": []}
    recorded = open_bundle(write_bundle(tmp_path / "recorded", shop.spec, bundle.head, warmup=[body]))
    records, source = sample_users(recorded, None, 3)
    row = {"user_id": body["user_id"], "device": "phone", HISTORY: []}
    features = shop.spec.encode_row("user", row)[None]
    np.testing.assert_array_equal(records, recorded.user_tower().embed(features))
    assert "recorded requests" in source
