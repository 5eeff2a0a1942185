"""A change log as one Redis Stream: entries get their place and time from the server, a position is an entry's id.

prefix:<log>        the stream; an entry has one field
prefix:<log>:floor  the highest position announced for trimming, 20 digits

No command names two keys, so a log lies in whatever slot of a cluster its name gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from redis.exceptions import ResponseError

from cache.changes import ENTRY_BYTES, Entry
from cache.errors import StoreError
from cache.redis_client import Clients

BULK_BYTES = 1 << 20  # from here on a write may take a slow line longer than an answer may take
SERIAL_BITS = (
    20  # of a position, for the number within a millisecond; 43 more hold the milliseconds until the year 2248
)
FIELD = b"e"

APPEND = """
local id
for place = 2, #ARGV do id = redis.call('XADD', KEYS[1], '*', ARGV[1], ARGV[place]) end
return id
"""
NOW = "return redis.call('TIME')"
RAISE = """
if ARGV[1] > (redis.call('GET', KEYS[1]) or '') then
  redis.call('DEL', KEYS[1])  -- a script that has written is not refused where memory has run out: trimming frees some
  redis.call('SET', KEYS[1], ARGV[1])
end
"""


class RedisLog:
    """The log in one stream. `errors` turns what the clients raise."""

    def __init__(self, clients: Clients, key: str, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._clients, self._key, self._floor_key, self._errors = clients, key, f"{key}:floor", errors

    @property
    def _client(self) -> Any:
        return self._clients.quick

    def append(self, payloads: Sequence[bytes]) -> int:
        largest = max((len(payload) for payload in payloads), default=0)
        if not payloads or largest > ENTRY_BYTES:
            raise StoreError(
                f"an append of {len(payloads)} entries, the largest of {largest:,} octets: send fewer rows"
            )
        with self._errors():
            client = self._client if sum(map(len, payloads)) < BULK_BYTES else self._clients.bulk
            return _position(client.eval(APPEND, 1, self._key, FIELD, *payloads))

    def read(self, after: int, limit: int) -> list[Entry]:
        with self._errors():
            found = self._client.xrange(self._key, min=_id(after + 1), count=limit)
        return [_entry(*each) for each in found]

    def last(self) -> int:
        with self._errors():
            try:
                return _position(self._client.xinfo_stream(self._key)["last-generated-id"])
            except ResponseError as error:
                if "no such key" not in str(error):
                    raise
                return 0

    def newest(self) -> Entry | None:
        with self._errors():
            found = self._client.xrevrange(self._key, count=1)
        return _entry(*found[0]) if found else None

    def position_at(self, at_ms: int) -> int:
        """By the server's clock."""
        return min(self.last(), max(0, at_ms + 1 << SERIAL_BITS) - 1)

    def now_ms(self) -> int:
        """Asked of the server that has the stream, whichever of a cluster that is."""
        with self._errors():
            seconds, microseconds = self._client.eval(NOW, 1, self._key)
        return int(seconds) * 1_000 + int(microseconds) // 1_000

    def trim(self, up_to: int) -> None:
        with self._errors():
            self._clients.bulk.xtrim(self._key, minid=_id(up_to + 1), approximate=False)

    def floor(self) -> int:
        with self._errors():
            return int(self._client.get(self._floor_key) or 0)

    def raise_floor(self, position: int) -> None:
        with self._errors():
            self._client.eval(RAISE, 1, self._floor_key, f"{position:020}")


def _id(position: int) -> str:
    return f"{position >> SERIAL_BITS}-{position & (1 << SERIAL_BITS) - 1}"


def _position(identity: bytes) -> int:
    milliseconds, serial = (int(part) for part in identity.split(b"-"))
    if serial >> SERIAL_BITS:
        raise StoreError(f"entry {identity.decode()} is the {serial:,}th of its millisecond: set the server's clock")
    return milliseconds << SERIAL_BITS | serial


def _entry(identity: bytes, fields: dict[bytes, bytes]) -> Entry:
    position = _position(identity)
    return Entry(position, position >> SERIAL_BITS, fields.get(FIELD, b""))  # nothing, where another program added it
