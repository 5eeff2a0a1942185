"""Index, lookup, scores and top-k in NumPy: what serves without a native kernel, and what a native one must equal.

Scores. With user heads u_p (Hu, d), item heads v_q (Hi, d), temperature tau = 1/scale and the item's bias b:

    maxsim            s = scale * sum_p max_q <u_p, v_q> + b               (the towers have normalised u and v already)
    cross_attention   P  = softmax_q(A E_i^T / sqrt(d))      R = softmax_p(B E_i^T / sqrt(d))        (Hu, Hi)
                      E_u' = E_u + G_u * (P V_i)             E_i' = E_i + G_i * (R^T V_u)
                      s  = scale * sum_p max_q cos(E_u'_p, E_i'_q) + b,    cos divides by max(norm, 1e-6)

Index. Buckets of 16 words of 32 bits: five keys of two words, five rows + 1 (0 is empty), 1 if an entry had to go on
from here to the next bucket. A key belongs to bucket (mix(key) >> 32) * buckets >> 32, mix being the finaliser
of splitmix64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernel.head import HeadSpec

NORM_FLOOR = 1e-6
BUCKET_WORDS, ENTRIES, SPILLED = 16, 5, 15
CHUNK = 2048  # candidates scored at a time by cross-attention: keeps the intermediates in the cache

Floats = NDArray[Any]  # float32 to serve, float64 as an oracle
FloatType = type[np.float32] | type[np.float64]


# --- scores ----------------------------------------------------------------------------------------------------------


class UserParts(NamedTuple):
    """Views into one user record, each (Hu, d). maxsim has only E."""

    e: Floats
    v: Floats
    g: Floats
    a: Floats
    b: Floats


def score(head: HeadSpec, user: Floats, items: Floats) -> NDArray[np.float32]:
    """Scores (n,) of item records (n, item_size) for one user record (user_size,)."""
    return _score(head, user, items, np.float32).astype(np.float32)


def score_oracle(head: HeadSpec, user: Floats, items: Floats) -> NDArray[np.float64]:
    """The same in float64, for tests."""
    return _score(head, user, items, np.float64).astype(np.float64)


def explain(head: HeadSpec, user: Floats, items: Floats) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The winning item head and its similarity for each user head: (n, Hu) and (n, Hu)."""
    similarity = np.concatenate([_similarity(head, user, part, np.float32) for part in _chunks(items)])
    winner = similarity.argmax(axis=2)
    return winner.astype(np.int32), np.take_along_axis(similarity, winner[..., None], axis=2)[..., 0].astype(np.float32)


def _score(head: HeadSpec, user: Floats, items: Floats, dtype: FloatType) -> Floats:
    check_records(head, user, items)
    scores = np.empty(len(items), dtype)
    for start in range(0, len(items), CHUNK):
        part = items[start : start + CHUNK]
        best = _similarity(head, user, part, dtype).max(axis=2)  # (n, Hu)
        scores[start : start + CHUNK] = best.sum(axis=1) * dtype(head.scale)
    if head.item_bias:
        scores += items[:, -1]
    return scores


def check_records(head: HeadSpec, user: Floats, items: Floats) -> None:
    """Raise ValueError unless user is (user_size,) and items is (n, item_size)."""
    if user.shape != (head.user_size,):
        raise ValueError(f"user record has shape {user.shape}, the {head.kind} head reads ({head.user_size},)")
    if items.ndim != 2 or items.shape[1] != head.item_size:
        raise ValueError(f"item records have shape {items.shape}, the {head.kind} head reads (n, {head.item_size})")


def _chunks(items: Floats) -> list[Floats]:
    return [items[start : start + CHUNK] for start in range(0, max(len(items), 1), CHUNK)]


def _similarity(head: HeadSpec, user: Floats, items: Floats, dtype: FloatType) -> Floats:
    """Similarity of every user head with every item head, (n, Hu, Hi)."""
    hu, hi, d = head.user_heads, head.item_heads, head.dim
    width = hi * d
    user = user.astype(dtype, copy=False).reshape(-1, hu, d)
    if head.kind == "maxsim":
        flat = items[:, :width].astype(dtype, copy=False).reshape(-1, d)
        dots: Floats = (flat @ user[0].T).reshape(len(items), hi, hu).transpose(0, 2, 1)
        return dots
    if head.kind != "cross_attention":
        raise ValueError(f"no kernel scores a {head.kind!r} head: it runs its own ONNX graph")
    parts = UserParts(*user)
    e, v, g = items[:, : 3 * width].astype(dtype, copy=False).reshape(len(items), 3, hi, d).transpose(1, 0, 2, 3)
    root = dtype(1 / np.sqrt(d))
    looks = _softmax(_affinity(parts.a, e) * root, axis=2)  # (n, Hu, Hi): user heads look at item heads
    seen = _softmax(_affinity(parts.b, e) * root, axis=1)  # (n, Hu, Hi): item heads look at user heads
    user_attended = parts.e + parts.g * (looks @ v)  # (n, Hu, d)
    item_attended = e + g * (seen.transpose(0, 2, 1) @ parts.v)  # (n, Hi, d)
    cosines: Floats = _normalise(user_attended) @ _normalise(item_attended).transpose(0, 2, 1)
    return cosines


def _affinity(user: Floats, items: Floats) -> Floats:
    """<user_p, item_q> as (n, Hu, Hi) by one matrix product over all items."""
    n, hi, d = items.shape
    product: Floats = (np.ascontiguousarray(items).reshape(-1, d) @ user.T).reshape(n, hi, len(user)).transpose(0, 2, 1)
    return product


def _softmax(x: Floats, axis: int) -> Floats:
    weight = np.exp(x - x.max(axis=axis, keepdims=True))
    normalised: Floats = weight / weight.sum(axis=axis, keepdims=True)
    return normalised


def _normalise(x: Floats) -> Floats:
    norm = np.sqrt(np.einsum("...d,...d->...", x, x))[..., None]
    normalised: Floats = x / np.maximum(norm, x.dtype.type(NORM_FLOOR))
    return normalised


# --- top-k -----------------------------------------------------------------------------------------------------------


def top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    """Positions of the k highest scores, best first; ties keep the lower position first; k is clamped."""
    k = min(max(k, 0), len(scores))
    if k == 0:
        return np.empty(0, np.int32)
    if k == len(scores) or np.isnan(scores).any():  # NaN is last, which argsort keeps to
        return np.argsort(-scores, kind="stable").astype(np.int32)[:k]
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]  # the k-th highest
    above = np.flatnonzero(scores > threshold)
    level = np.flatnonzero(scores == threshold)[: k - len(above)]
    kept = np.concatenate([above, level])
    return kept[np.lexsort((kept, -scores[kept]))].astype(np.int32)


# --- index -----------------------------------------------------------------------------------------------------------


def mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014): spreads every bit of the key."""
    x = keys.astype(np.uint64, copy=True)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def bucket_count(count: int) -> int:
    """Buckets of an index over `count` keys: one for every two and a half."""
    return max(1, -(-2 * count // 5))


def _home(keys: NDArray[np.uint64], buckets: int) -> NDArray[np.int64]:
    return (((mix(keys) >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def build_index(keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Buckets (m, 16) uint32 over distinct keys (n,). Raises ValueError on a repeated key."""
    count = len(keys)
    if count >= 2**31 - 1:
        raise ValueError(f"{count} keys do not fit a 32-bit index: shard the catalogue")
    order = np.sort(keys)
    if count > 1 and bool((order[1:] == order[:-1]).any()):
        raise ValueError("keys repeat: an index needs distinct keys")
    buckets = np.zeros((bucket_count(count), BUCKET_WORDS), np.uint32)
    entries, rows = buckets[:, : 2 * ENTRIES].view("<u8"), buckets[:, 2 * ENTRIES : SPILLED]
    used = np.zeros(len(buckets), np.int64)
    place = _home(keys, len(buckets))
    waiting = np.arange(count)
    while len(waiting):  # every round, each bucket takes as many as it has room for, the others move one on
        waiting = waiting[np.argsort(place[waiting], kind="stable")]
        there = place[waiting]
        nth = np.arange(len(there)) - np.searchsorted(there, there)  # of those that wait for the same bucket
        entry = used[there] + nth
        fits = entry < ENTRIES
        entries[there[fits], entry[fits]] = keys[waiting[fits]]
        rows[there[fits], entry[fits]] = waiting[fits] + 1
        used += np.bincount(there[fits], minlength=len(buckets))
        waiting = waiting[~fits]
        buckets[place[waiting], SPILLED] = 1
        place[waiting] = (place[waiting] + 1) % len(buckets)
    return buckets


def has_twins(buckets: NDArray[np.uint32]) -> bool:
    """Whether a bucket holds a key twice: a search would make a third row of the two."""
    entries, used = buckets[:, : 2 * ENTRIES].view("<u8"), buckets[:, 2 * ENTRIES : SPILLED] > 0
    pairs = ((one, other) for other in range(ENTRIES) for one in range(other))
    return any(bool((used[:, a] & used[:, b] & (entries[:, a] == entries[:, b])).any()) for a, b in pairs)


def lookup(buckets: NDArray[np.uint32], wanted: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Rows (n,) int32 of the wanted keys, -1 where unknown."""
    found = np.full(len(wanted), -1, np.int32)
    entries, rows = buckets[:, : 2 * ENTRIES].view("<u8"), buckets[:, 2 * ENTRIES : SPILLED]
    place = _home(wanted, len(buckets))
    waiting = np.arange(len(wanted))
    while len(waiting):
        there = place[waiting]
        hit = (entries[there] == wanted[waiting, None]) & (rows[there] > 0)
        found[waiting] = np.where(hit, rows[there].astype(np.int64), 0).sum(axis=1) - 1
        waiting = waiting[(found[waiting] < 0) & (buckets[there, SPILLED] > 0)]
        place[waiting] = (place[waiting] + 1) % len(buckets)
    return found


def hash_strings(ids: Sequence[str], salt: int) -> NDArray[np.uint64]:
    """Salted 64-bit hashes (n,) of strings: h = mix(salt ^ bytes), then h = mix(h ^ w) for each little-endian 8-byte
    word w of the UTF-8 text, the last one padded with zeros. Not cryptographic: callers compare the strings too."""
    encoded = [text.encode() for text in ids]
    sizes = np.fromiter((len(text) for text in encoded), np.int64, len(encoded))
    longest = int(sizes.max(initial=0))
    words = -(-longest // 8)
    padded = np.zeros((len(encoded), words * 8), np.uint8)
    flat = np.frombuffer(b"".join(encoded), np.uint8)
    padded[np.arange(words * 8) < sizes[:, None]] = flat
    blocks = padded.view("<u8")
    hashes = mix(np.uint64(salt) ^ sizes.astype(np.uint64))
    for word in range(words):
        live = sizes > 8 * word
        hashes[live] = mix(hashes[live] ^ blocks[live, word])
    return hashes
