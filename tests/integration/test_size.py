"""The verb `ranktower size`, and what it says of Redis beside what a real one takes."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from cache.cli import app
from cache.redis_store import RedisStore
from cache.release import ITEMS
from cache.size import REDIS_SHARE
from tests.catalogues import open_shop
from tests.redis_server import running_redis
from tests.releases import HEAD, write_release

ITEMS_COUNT, KEPT = 20_000, 2


def said(*options: str) -> dict[str, float]:
    result = CliRunner().invoke(app, ["size", *options, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


def test_redis_takes_what_was_said(tmp_path: Path) -> None:
    """By its keys, without buffers of connections; these releases have no fingerprints."""
    heads = ["--heads", str(HEAD.item_heads), "--dim", str(HEAD.dim), "--dtype", "f32"]
    figures = said("--items", str(ITEMS_COUNT), *heads, "--releases", str(KEPT))
    with running_redis() as server:
        client, store = server.client(), RedisStore(server.url)
        for number in range(KEPT):
            release = write_release(tmp_path / str(number), number, items=ITEMS_COUNT)
            store.publish(tmp_path / str(number))
            assert release.file(ITEMS).size == figures["snapshot"]  # type: ignore[union-attr]
        taken = sum(client.memory_usage(key, samples=0) or 0 for key in client.scan_iter())
    inputs = KEPT * REDIS_SHARE * figures["inputs"]
    assert taken <= figures["redis"] - inputs <= 1.06 * taken
    assert figures["redis"] < figures["redis_publishing"]


def test_the_verb_reads_a_bundle_and_prints_a_table(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    result = CliRunner().invoke(app, ["size", "--items", "3000", "--bundle", str(shop.bundle)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith("3,000 items, maxsim, 2 heads of 8, int8 records of 32 bytes")
    assert "give --bundle" not in result.stdout
