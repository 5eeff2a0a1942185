"""Divide events into train, valid and test, and group them into requests: pure functions over sorted arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernel.reference import hash_strings, mix

TRAIN, VALID, TEST = 0, 1, 2
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd constant of splitmix64: tells users' hashes from items'

Ints = NDArray[np.int64]
Splits = NDArray[np.int8]


def split_at(when: Ints, valid_from: int, test_from: int) -> Splits:
    """(n,) int8 by two moments; an event at the moment itself belongs to the later side."""
    return (when >= valid_from).astype(np.int8) + (when >= test_from).astype(np.int8)


def moments_of_fractions(when: Ints, valid: float, test: float) -> tuple[int, int]:
    """The moments that leave the last `test` of all events to test and the `valid` before them to valid, up to ties."""
    ordered = np.sort(when)
    last = len(ordered) - 1
    places = [min(last, round(len(ordered) * share)) for share in (1 - valid - test, 1 - test)]
    return int(ordered[places[0]]), int(ordered[places[1]])


def split_each_user(user: Ints, when: Ints, valid: float, test: float) -> Splits:
    """(n,) int8: of each user's events in order, the last `test` go to test and the `valid` before them to valid."""
    order = np.lexsort((when, user))
    _, starts, counts = runs(user[order])
    from_end = np.repeat(starts + counts, counts) - np.arange(len(order))  # 1 is the user's last event
    total = np.repeat(counts, counts)
    split = np.empty(len(order), np.int8)
    split[order] = (from_end <= np.floor(total * (valid + test) + 0.5)).astype(np.int8) + (
        from_end <= np.floor(total * test + 0.5)
    )
    return split


def split_by_hash(hashes: NDArray[np.uint64], valid: float, test: float) -> Splits:
    """(n,) int8 by the hash of (user, item): the same pair always falls on the same side."""
    share = (hashes >> np.uint64(11)).astype(np.float64) / 2.0**53
    return (share < valid + test).astype(np.int8) + (share < test).astype(np.int8)


def pair_hashes(user_ids: NDArray[Any], item_ids: NDArray[Any], user: Ints, item: Ints) -> NDArray[np.uint64]:
    """(n,) uint64 hash of each event's (user id, item id): of ids, so that the order of the tables does not matter."""
    return mix(mix(_id_hashes(user_ids) + GOLDEN)[user] ^ _id_hashes(item_ids)[item])


def _id_hashes(ids: NDArray[Any]) -> NDArray[np.uint64]:
    if ids.dtype == object:
        return hash_strings(ids.tolist(), salt=0)
    return mix(ids.astype(np.uint64) * GOLDEN)


def logged_requests(user: Ints, request: Ints) -> Ints:
    """(n,) dense number of each (user, request id): ids need to be unique within a user only."""
    _, dense = np.unique(user * (int(request.max(initial=0)) + 1) + request, return_inverse=True)
    return np.asarray(dense, np.int64)


def split_of_requests(request: Ints, when: Ints, split: Splits) -> Splits:
    """(n,) int8: every event takes the split of the first event of its request."""
    order = np.lexsort((when, request))
    _, starts, counts = runs(request[order])
    taken = np.empty(len(order), np.int8)
    taken[order] = np.repeat(split[order][starts], counts)
    return taken


def derived_requests(user: Ints, when: Ints, split: Splits, gap: float | None, largest: int) -> Ints:
    """(n,) dense request numbers: a new one after a pause longer than `gap` and at a change of split; what is longer
    than `largest` events is cut into equal parts."""
    order = np.lexsort((when, split, user))
    user, when, split = user[order], when[order], split[order]
    breaks = (user[1:] != user[:-1]) | (split[1:] != split[:-1])
    if gap is not None:
        breaks |= np.diff(when) > gap
    sitting = np.concatenate([[0], np.cumsum(breaks)])[: len(order)]
    _, starts, counts = runs(sitting)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    parts = -(-counts // largest)
    part = place * np.repeat(parts, counts) // np.repeat(counts, counts)
    first_part = np.cumsum(parts) - parts
    request = np.empty(len(order), np.int64)
    request[order] = np.repeat(first_part, counts) + part
    return request


def places_in_user(user: Ints, split: Splits, when: Ints, request: Ints) -> Ints:
    """(n,) place of each event within its user, train before valid before test, requests together: stands for the time
    where a split by hash makes the real one meaningless."""
    start = starts_of_requests(request, when)
    order = np.lexsort((when, request, start, split, user))
    _, starts, counts = runs(user[order])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.repeat(starts, counts)
    return place


def starts_of_requests(request: Ints, when: Ints) -> Ints:
    """(n,) the time of the first event of each event's request."""
    order = np.lexsort((when, request))
    _, starts, counts = runs(request[order])
    start = np.empty(len(order), np.int64)
    start[order] = np.repeat(when[order][starts], counts)
    return start


def repeats(request: Ints, item: Ints, stage: NDArray[np.int8]) -> tuple[Ints, Ints]:
    """One row for each item of each request: (kept, group). `kept` are rows in rising order, the first of the lowest
    stage of an item; `group` (n,) says to which of the kept each row belongs."""
    key = request * (int(item.max(initial=0)) + 1) + item
    order = np.lexsort((np.arange(len(key)), stage, key))
    _, starts, counts = runs(key[order])
    kept = order[starts]
    rank = np.empty(len(kept), np.int64)
    rank[np.argsort(kept)] = np.arange(len(kept))
    group = np.empty(len(key), np.int64)
    group[order] = np.repeat(rank, counts)
    return np.sort(kept), group


def runs(ordered: NDArray[Any]) -> tuple[NDArray[Any], Ints, Ints]:
    """Value, start and length of each run of equal values."""
    if not len(ordered):
        return ordered, np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1]).astype(np.int64)
    return ordered[starts], starts, np.diff(np.append(starts, len(ordered)))
