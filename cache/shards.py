"""Which shard holds an item, and where the release of a shard lies: a catalogue cut into N by a hash of the ids.

The hash is the same in every process, on every machine and in every version: `mix` is the finaliser of splitmix64 and
`hash_strings` its chain over the octets of a text (both in kernel/reference.py, where they are defined in full);

    key   = the id as 64 bits, or hash_strings(id, 0)
    shard = (mix(key ^ SALT) >> 32) * N >> 32

The salt keeps shards apart from the buckets of the id index, which come from mix(key) as well: without it all ids of a
shard would want the same Nth of its buckets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

import numpy as np
from numpy.typing import NDArray

from cache.errors import StoreError
from kernel.engine import hash_texts
from kernel.ids import Ids, Texts
from kernel.reference import mix

SALT = np.uint64(0x5AD0F172E4C6B839)
MOST = 1024
PART = 1 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """Number `number`, counted from 0, of `count` shards."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"shard-{self.number}-of-{self.count}"

    def holds(self, ids: Ids) -> NDArray[np.bool_]:
        """(n,) which of the ids belong here."""
        held = np.empty(len(ids), np.bool_)
        for start in range(0, len(ids), PART):  # the hash takes five times the memory of what it hashes
            part = slice(start, start + PART)
            held[part] = shards_of(ids[part], self.count) == self.number
        return held


def read_shard(text: str) -> Shard:
    """`2/4` is the third of four. Raises StoreError."""
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if found is None:
        raise StoreError(f"--shard {text!r}: write its number and how many there are, as in 0/4")
    number, count = int(found[1]), int(found[2])
    if not number < count <= MOST:
        raise StoreError(f"--shard {text}: of {count} shards the numbers go from 0 to {count - 1}, and {MOST} is most")
    return Shard(number, count)


def shards_of(ids: Ids, count: int) -> NDArray[np.int64]:
    """(n,) the shard of each id."""
    keys = hash_texts(ids, 0) if isinstance(ids, Texts) else np.ascontiguousarray(ids, np.int64).view(np.uint64)
    high = mix(keys ^ SALT) >> np.uint64(32)
    return (high * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def shard_url(url: str, shard: Shard) -> str:
    """URL of a shard's own store: a folder below that of the whole, or a prefix that goes on from its prefix."""
    from cache.redis_client import PREFIX  # redis comes into memory with the stores that need it

    if url.startswith("file://"):
        return f"{url.rstrip('/')}/{shard}"
    place, _, query = url.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    options["prefix"] = f"{options.get('prefix', PREFIX)}:{shard}"
    return f"{place}?{urlencode(options, safe=':/')}"
