"""Build the request bodies of a load test once, as bytes ready to send, from ids that the service itself names.

Users follow a Zipf law (few send most requests), candidate counts a log-normal one (retrieval answers vary), candidates
are drawn without repetition and without regard to popularity, which is the hardest case for caches. A share of the
requests brings a history of its own, as clients do whose user clicked something since the user table was published.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

from loadtest.errors import SampleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The shape of the requests."""

    median_candidates: int = 1000
    spread: float = 0.5  # sigma of the logarithm: 95 % lie between 0.37 and 2.7 times the median
    zipf: float = 1.1  # exponent of user popularity; 0 is uniform
    history_share: float = 0.2  # of requests that bring a history of their own
    history_length: int = 20
    top_k: int = 200
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Ids of one release, as `GET /v1/sample` gives them."""

    release: str
    items: tuple[int | str, ...]
    users: tuple[int | str, ...]  # empty where no user table is published: requests then carry histories only


def fetch_sample(url: str, *, items: int, users: int, seed: int, timeout_s: float = 10.0) -> Sample:
    """Ask the service at `url` for ids. Raises SampleError when it has none to give."""
    address = f"{url.rstrip('/')}/v1/sample?{urlencode({'items': items, 'users': users, 'seed': seed})}"
    try:
        with urllib.request.urlopen(address, timeout=timeout_s) as answer:
            document = json.load(answer)
    except urllib.error.HTTPError as error:
        raise SampleError(f"{address} answered {error.code}: is a release active in its store?") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SampleError(f"{address} gave no sample ({error}): is the service running there?") from error
    return _sample(document, address)


def build_corpus(sample: Sample, traffic: Traffic, count: int) -> list[bytes]:
    """`count` request bodies; equal arguments give equal bytes."""
    rng = np.random.default_rng(traffic.seed)
    sizes = candidate_counts(rng, traffic, count, limit=len(sample.items))
    users = user_picks(rng, traffic, count, len(sample.users)) if sample.users else np.full(count, -1)
    return [_body(rng, sample, traffic, size, user) for size, user in zip(sizes.tolist(), users.tolist(), strict=True)]


def candidate_counts(
    rng: np.random.Generator, traffic: Traffic, count: int, *, limit: int
) -> npt.NDArray[np.int64]:  # (count,)
    """Candidates per request: log-normal around the median, at least 1, at most `limit`."""
    drawn = rng.lognormal(np.log(traffic.median_candidates), traffic.spread, count)
    return np.clip(np.rint(drawn), 1, limit).astype(np.int64)


def user_picks(
    rng: np.random.Generator, traffic: Traffic, count: int, users: int
) -> npt.NDArray[np.int64]:  # (count,), positions in the sample
    """Which user asks: position r with probability proportional to (r + 1) ** -zipf."""
    weights = np.arange(1, users + 1, dtype=np.float64) ** -traffic.zipf
    return rng.choice(users, count, p=weights / weights.sum())


def _body(rng: np.random.Generator, sample: Sample, traffic: Traffic, size: int, user: int) -> bytes:
    document: dict[str, Any] = {"candidates": _pick(rng, sample.items, size), "top_k": min(traffic.top_k, size)}
    if user >= 0:
        document["user_id"] = sample.users[user]
    if user < 0 or rng.random() < traffic.history_share:
        document["history"] = _pick(rng, sample.items, min(traffic.history_length, len(sample.items)))
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _pick(rng: np.random.Generator, ids: tuple[int | str, ...], size: int) -> list[int | str]:
    return [ids[position] for position in rng.choice(len(ids), size, replace=False).tolist()]


def _sample(document: Any, address: str) -> Sample:
    try:
        sample = Sample(
            release=str(document["release"]), items=tuple(document["items"]), users=tuple(document["users"])
        )
    except (KeyError, TypeError) as error:
        raise SampleError(f"{address} sent no release, items and users: is that a RankTower service?") from error
    if not sample.items:
        raise SampleError(f"{address} names no items: publish a release with items first")
    return sample
