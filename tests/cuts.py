"""A tiny catalogue, whole as one ranker and published in four shards, to compare what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson

from cache.embed import build_release
from cache.shards import Shard, shard_url, shards_of
from cache.store import open_store
from kernel.ids import Texts
from service.answers import encode_ranking
from service.ranker import Ranker
from service.settings import Settings
from service.shard import ShardReplica
from tests.catalogues import Shop, open_shop

COUNT, ITEMS = 4, 300


class Cut:
    """A shop, whole as one ranker, and as replicas of its shards."""

    def __init__(self, folder: Path, string_ids: bool = False, seed: int = 0) -> None:
        self.shop = open_shop(folder / "shop", items=ITEMS, string_ids=string_ids, seed=seed)
        self.folder, self.url = folder, f"file://{folder}/store"
        self.whole = Ranker.open(
            build_release(self.shop.bundle, self.shop.items, folder / "whole", index="flat"), retrieval=True
        )
        for number in range(COUNT):
            self.publish(number, self.shop)
        self.replicas = [ShardReplica(self.settings(number)) for number in range(COUNT)]
        ids = self.whole.items.ids(np.arange(ITEMS, dtype=np.int32)).tolist()
        self.ids = np.random.default_rng(1).permutation(np.array(ids, object)).tolist()

    def settings(self, number: int) -> Settings:
        url = shard_url(self.url, Shard(number, COUNT))
        return Settings(store=url, retrieval=True, refresh_s=0.1, cache_dir=self.folder / "cache", huge_pages=False)

    def publish(self, number: int, shop: Shop, name: str = "first") -> None:
        shard = Shard(number, COUNT)
        store = open_store(shard_url(self.url, shard))
        built = build_release(shop.bundle, shop.items, self.folder / name / str(shard), index="flat", shard=shard)
        store.activate(store.publish(built))

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()

    def shard_of(self, item: Any) -> int:
        return int(shards_of(np.array([item]) if isinstance(item, int) else Texts.of([item]), COUNT)[0])


def alone(ranker: Ranker, body: dict[str, Any], verb: str = "rank") -> dict[str, Any]:
    ranking = getattr(ranker, verb)(getattr(ranker.decoders, verb)(orjson.dumps(body)))
    found: dict[str, Any] = orjson.loads(encode_ranking(ranking))
    return found


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(found[name] == wanted[name] for name in ("user_known", "items", "missing", "counts"))
