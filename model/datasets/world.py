"""A world of users and items whose tastes are known: every utility is a function of a seed and two ids.

Nothing is stored: the properties of a user or an item are computed from a hash of its row (splitmix64), so that ten
million items take no more memory than ten, and an experiment can ask for the true utility of any pair. All of it is our
own design; the point is that the truth is known, not that it is anybody's.

    item i    topic t = i mod topics, place in its topic r = i div topics (0 is the most popular)
              vector v = c_t + SPREAD n / sqrt(dim), c_t a random direction, n noise of deviation 1
              quality q = QUALITY n' + POPULAR (1 - log(1 + r) / log(1 + places)); price p = n''
    user u    vectors a_1 .. a_K, each c_t + TASTE n / sqrt(dim) for a random topic t; budget b = n'
    click     logit = CLICK + AFFINITY max_k <a_k, v> + q        if the item is looked at: the utility
    cart      logit = CART + AFFINITY / 2 max_k <a_k, v> - |p - b|   if it was clicked
    buy       logit = BUY - 2 |p - b|                                if it was put into the cart
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernel.reference import mix
from model.datasets.schema import nearest
from model.errors import DataError

FILE = "truth.toml"  # lies beside a simulated log: the settings that the whole world follows from
MOST = {
    "users": 100_000_000, "items": 10_000_000, "requests": 100_000_000, "days": 366, "seed": 2**32 - 1,
    "topics": 10_000, "dim": 256, "interests": 64,
}  # fmt: skip
MOST_PLACES = 10_000  # of one stage of a request

CLICK, CART, BUY = -6.0, -1.5, 0.5
AFFINITY, POPULAR, QUALITY = 2.0, 1.5, 0.7
SPREAD, TASTE = 1.5, 1.0
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd constant of splitmix64
USER, ITEM, SHOWN_USER, SHOWN_ITEM = range(1, 5)  # what a hash is for

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a simulated log follows from."""

    users: int = 2_000
    items: int = 20_000
    requests: int = 20_000
    days: int = 14
    seed: int = 0
    topics: int = 32
    dim: int = 16  # of latent vectors
    interests: int = 3  # topics of a user
    popularity: float = 0.8  # skew of users' activity and of retrieval, 0 (none) to 0.99
    retrieved: int = 100  # items of a request that each stage keeps
    pre_ranked: int = 40
    ranked: int = 20
    shown: int = 10
    random: int = 20  # items logged beside them, drawn uniformly from the catalogue
    pre_rank_noise: float = 1.0  # deviation of the pre-ranker's logits from the true ones
    rank_noise: float = 0.5
    position_bias: float = 0.7  # an impression at place k = 1, 2, ... is looked at with chance k^-position_bias

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            _check(key, value)
        for smaller, larger in (
            ("shown", "ranked"), ("ranked", "pre_ranked"), ("pre_ranked", "retrieved"), ("retrieved", "items"),
            ("topics", "items"),
        ):  # fmt: skip
            if getattr(self, smaller) > getattr(self, larger):
                raise DataError(
                    f"cascade: {smaller} is {getattr(self, smaller):,}, above {larger} ({getattr(self, larger):,}): "
                    f"lower it, or raise {larger}"
                )

    @cached_property
    def id(self) -> str:
        """16 hex digits that name these settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        return "".join(f"{key} = {value}\n" for key, value in asdict(self).items())


def _check(key: str, value: Any) -> None:
    whole = isinstance(Settings.__dataclass_fields__[key].default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise DataError(f"cascade: {key} is {value!r}: write a {'whole ' if whole else ''}number")
    least = 1 if whole and key not in ("seed", "random") else 0
    most = MOST.get(key, MOST_PLACES) if whole else 0.99 if key == "popularity" else 100.0
    if not least <= value <= most:
        raise DataError(f"cascade: {key} is {value:,}: write a number from {least} to {most:,}")


def read_settings(path: Path) -> Settings:
    """Settings from a TOML file of `key = value`; what it leaves out has its default."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give the file with the settings, or the folder of a log") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as TOML ({error}): correct it") from error
    known = [field.name for field in fields(Settings)]
    for key in document:
        if key not in known:
            raise DataError(f"{path}: unknown key {key!r}: {nearest(key, known)}")
    try:
        return Settings(**document)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def open_world(folder: Path) -> World:
    """The world of a simulated log, from the file beside it."""
    return World(read_settings(folder / FILE))


@dataclass(frozen=True)
class Items:
    """Properties of some items, of any shape (...)."""

    topic: Rows  # (...)
    vector: Floats  # (..., dim)
    noise: Floats  # (..., dim), what the vector adds to its topic's
    quality: Floats  # (...)
    price: Floats  # (...), deviation 1


@dataclass(frozen=True)
class Users:
    """Properties of some users."""

    topics: Rows  # (n, interests)
    vectors: Floats  # (n, interests, dim)
    budget: Floats  # (n,), deviation 1


@dataclass(frozen=True)
class World:
    """Users and items by row, and what each user thinks of each item. Ids are rows in another order."""

    settings: Settings

    @cached_property
    def centres(self) -> Floats:
        """(topics, dim) directions, each of length 1."""
        drawn = np.random.default_rng(self.settings.seed).normal(size=(self.settings.topics, self.settings.dim))
        return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)

    def utility(self, users: NDArray[Any], items: NDArray[Any]) -> Floats:
        """True logit of a click on an item that is looked at; (n,) or (n, m) for user ids (n,) and items of that
        shape."""
        return self._logits(users, items)[..., 0].reshape(items.shape)

    def chances(self, users: NDArray[Any], items: NDArray[Any]) -> Floats:
        """(..., 3) true chances of click, cart and buy of items that are looked at, each of all that come so far."""
        return chances(self._logits(users, items)).reshape(*items.shape, 3)

    def _logits(self, users: NDArray[Any], items: NDArray[Any]) -> Floats:
        rows = self.item_rows(np.asarray(items, np.int64).reshape(len(users), -1))
        return self.judge(self.users(self.user_rows(np.asarray(users, np.int64))), self.items(rows))

    def judge(self, users: Users, items: Items) -> Floats:
        """(n, m, 3) logits of click, cart and buy, each given the one before, for users (n) and items (n, m)."""
        affinity = AFFINITY * (items.vector @ users.vectors.transpose(0, 2, 1)).max(axis=2)
        misfit = np.abs(items.price - users.budget[:, None])
        click = CLICK + affinity + items.quality
        return np.stack([click, CART + affinity / 2 - misfit, BUY - 2 * misfit], axis=-1, dtype=np.float32)

    def items(self, rows: Rows) -> Items:
        settings = self.settings
        topic, place = rows % settings.topics, rows // settings.topics
        noise = self.noise(ITEM, rows, settings.dim + 2)
        own = noise[..., : settings.dim]
        vector = self.centres[topic] + np.float32(SPREAD / math.sqrt(settings.dim)) * own
        fame = 1 - np.log1p(place, dtype=np.float32) / np.float32(math.log1p(settings.items / settings.topics))
        quality = np.asarray(QUALITY * noise[..., -2] + POPULAR * fame, np.float32)
        return Items(topic, vector, own, quality, noise[..., -1])

    def users(self, rows: Rows) -> Users:
        settings = self.settings
        noise = self.noise(USER, rows, settings.interests * (settings.dim + 1) + 1)
        chosen, own = np.split(noise[:, :-1], [settings.interests], axis=1)
        topics = np.minimum((share(chosen) * settings.topics).astype(np.int64), settings.topics - 1)
        own = own.reshape(len(rows), settings.interests, settings.dim)
        vectors = self.centres[topics] + np.float32(TASTE / math.sqrt(settings.dim)) * own
        return Users(topics, vectors, noise[:, -1])

    def noise(self, what: int, rows: Rows, lanes: int) -> Floats:
        """(..., lanes) numbers of mean 0 and deviation 1, evenly spread, the same for the same row and purpose."""
        salt = mix(np.array([self.settings.seed * 64 + what], np.uint64))
        words = np.arange(1, -(-lanes // 4) + 1, dtype=np.uint64) * GOLDEN
        keys = mix(mix(rows.astype(np.uint64) + salt)[..., None] + words)
        shorts = keys.astype("<u8", copy=False).view("<u2")[..., :lanes]  # four numbers of each hash
        return (shorts.astype(np.float32) + np.float32(0.5)) * np.float32(math.sqrt(12) / 65536) - np.float32(
            math.sqrt(3)
        )

    def item_ids(self, rows: Rows) -> Rows:
        """Ids of items: their rows in an order that says nothing about topic or popularity."""
        return _shuffled(rows, self.settings.items)

    def item_rows(self, ids: Rows) -> Rows:
        return _unshuffled(ids, self.settings.items)

    def user_ids(self, rows: Rows) -> Rows:
        return _shuffled(rows, self.settings.users)

    def user_rows(self, ids: Rows) -> Rows:
        return _unshuffled(ids, self.settings.users)


def chances(logits: Floats) -> Floats:
    """(..., 3) chances of click, cart and buy from the logits of each given the one before."""
    return np.cumprod(1 / (1 + np.exp(-logits)), axis=-1, dtype=np.float32)


def share(noise: Floats) -> Floats:
    """Noise as a share of its range, above 0 and below 1."""
    return noise / np.float32(math.sqrt(12)) + np.float32(0.5)


def _shuffled(rows: Rows, count: int) -> Rows:
    return (rows * _step(count) + count // 3) % count


def _unshuffled(ids: Rows, count: int) -> Rows:
    return (ids - count // 3) * pow(_step(count), -1, count) % count if count > 1 else ids


def _step(count: int) -> int:
    """The first number from the golden section of `count` on that shares no divisor with it: a step that meets all."""
    step = max(1, round(count * 0.6180339887))
    while math.gcd(step, count) > 1:
        step += 1
    return step
