"""Full-stage lists: what was shown, what the cascade could have shown, and the rest of the corpus, in one list.

Training lists hold the impressions of a request; candidates (D_C) and random items (D_R) are drawn anew for every
epoch. Evaluation lists are built once from the past and a seed, and named by a digest. Where a log carries its own
stages, both use those and nothing is simulated. An item that was not shown and that its user takes is never a negative:
takes in training for training lists, ever for evaluation lists. Random items are drawn among those that events up to
then name: one that first appears later is no negative, for nobody could have offered it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import faiss
import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from model.datasets.log import CANDIDATE, IMPRESSION, PADDING, RANDOM, TRAIN, Log
from model.requests import NONE, SplitRequests, requests_of

POOL = 100  # retrieved items a training list keeps to draw its candidates from
FACTORS = 32  # dimensions of the simulated retrieval
DENSE_CELLS = 1 << 19  # a matrix up to this size is factored whole, a larger one iteratively
EXACT_ITEMS = 50_000  # above it the simulated retrieval searches an inverted file instead of everything
LOGGED = 200  # rows of one stage that a list of a log with stages keeps
NEIGHBOURS = 50  # co-visited items kept per item
RECENT = 10  # items of a history that ask for co-visited ones
POPULAR_POWER = 0.75  # popular candidates are drawn by count to this power
BLOCK = 4096  # lists handled at a time, so that memory is bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Padded lists; where stage is PADDING, item is 0 and nothing counts."""

    item: np.ndarray  # (L, n) int32 rows of log.items
    grade: np.ndarray  # (L, n) int8
    stage: np.ndarray  # (L, n) int8
    soft: np.ndarray  # (L, n) float32, 0 off impressions

    def __len__(self) -> int:
        return len(self.item)

    @property
    def mask(self) -> np.ndarray:
        """(L, n) bool, False on padding."""
        return np.asarray(self.stage != PADDING)

    @property
    def digest(self) -> str:
        """sha256 of the lists' shape and content, soft labels aside: 64 hex digits."""
        content = hashlib.sha256(repr(self.item.shape).encode())
        for part in (self.item.astype("<i4"), self.grade.astype("i1"), self.stage.astype("i1")):
            content.update(np.ascontiguousarray(part).tobytes())
        return content.hexdigest()

    def take(self, rows: np.ndarray) -> Lists:
        """The lists at `rows`, (m,) int or bool."""
        return Lists(item=self.item[rows], grade=self.grade[rows], stage=self.stage[rows], soft=self.soft[rows])


# --- what was logged ------------------------------------------------------------------------------------


def logged_lists(
    log: Log, requests: SplitRequests, taken: Taken, soft: np.ndarray | None = None, seed: int = 0
) -> Lists:
    """The logged rows of each request, impressions first; unshown stages are thinned to LOGGED rows each.

    taken: pairs that are no negatives: unshown rows of them without a grade are left out.
    soft: (e,) float32 soft label of every event, or None for zeros.
    """
    size = requests.end - requests.first
    lists = np.repeat(np.arange(len(requests)), size)
    event = np.repeat(requests.first - np.cumsum(size) + size, size) + np.arange(size.sum())
    if log.has_stages:
        doubtful = (log.stage[event] != IMPRESSION) & (log.grade[event] == 0)
        fine = ~(doubtful & taken.has(log.user[event], log.item[event][:, None])[:, 0])
        event, lists = event[fine], lists[fine]
    order = np.lexsort(
        (np.random.default_rng(seed).random(len(event)) if log.has_stages else event, log.stage[event], lists)
    )
    event = event[order]
    stage = log.stage[event]
    keep = (_place_in_run(lists * 4 + stage) < LOGGED) | (stage == IMPRESSION) | (log.grade[event] > 0)
    event, lists = event[keep], lists[keep]
    place = _place_in_run(lists)
    shape = (len(requests), int(place.max(initial=0)) + 1)
    item, grade = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int8)
    kind, label = np.full(shape, PADDING, dtype=np.int8), np.zeros(shape, dtype=np.float32)
    item[lists, place], grade[lists, place], kind[lists, place] = log.item[event], log.grade[event], log.stage[event]
    if soft is not None:
        label[lists, place] = np.where(log.stage[event] == IMPRESSION, soft[event], 0.0)
    return Lists(item=item, grade=grade, stage=kind, soft=label)


def _place_in_run(groups: np.ndarray) -> np.ndarray:
    """Position from 0 of each entry within its run of equal adjacent values; (m,) int64."""
    if not len(groups):
        return np.zeros(0, dtype=np.int64)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1])
    return np.asarray(np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups)))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Which (user, item) pairs are taken (grade > 0) in some part of a log, for membership tests by binary search."""

    keys: np.ndarray  # sorted int64, user * items + item
    items: int

    def has(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(L, n) bool for users (L,) and items (L, n); NONE is never taken."""
        if not len(self.keys):
            return np.zeros(item.shape, dtype=bool)
        wanted = user.astype(np.int64)[:, None] * self.items + item
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.asarray((self.keys[place] == wanted) & (item != NONE))


def taken_pairs(log: Log, events: np.ndarray) -> Taken:
    """Pairs taken within `events`, (e,) bool."""
    chosen = events & (log.grade > 0)
    count = len(log.items)
    return Taken(keys=np.unique(log.user[chosen].astype(np.int64) * count + log.item[chosen]), items=count)


def on_offer(log: Log, split: int = TRAIN) -> np.ndarray:
    """Rows of the items that events name until the end of a split, rising, (k,) int32; all items if there are none."""
    named = np.bincount(log.item[(log.split >= TRAIN) & (log.split <= split)], minlength=len(log.items)) > 0
    return np.flatnonzero(named if named.any() else ~named).astype(np.int32)


def popularity(log: Log) -> np.ndarray:
    """How often each item was taken in training; (I,) float64."""
    taken = (log.split == TRAIN) & (log.grade > 0)
    return np.bincount(log.item[taken], minlength=len(log.items)).astype(np.float64)


# --- simulated retrieval --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Item factors of the past's user-item matrix, searched by the mean of a history."""

    factors: np.ndarray  # (I, d) float32
    popular: np.ndarray  # (I,) int32 rows, most taken first


def item_factors(user: np.ndarray, item: np.ndarray, items: int, *, dim: int = FACTORS, seed: int = 0) -> np.ndarray:
    """Item side V * sqrt(S) of the truncated SVD of the 0/1 matrix of pairs; (items, dim) float32, zeros if too small.

    user, item: (m,) int rows of the pairs taken. Rows are scaled by 1/sqrt(pairs of the user), so that a heavy user
    does not own the factors.
    """
    pairs = np.unique(user.astype(np.int64) * items + item)
    users, row = np.unique(pairs // items, return_inverse=True)
    known, column = np.unique(pairs % items, return_inverse=True)
    rank = min(dim, len(users) - 1, len(known) - 1)
    factors = np.zeros((items, dim), dtype=np.float32)
    if rank < 1:
        return factors
    weight = 1.0 / np.sqrt(np.bincount(row))[row]
    matrix = sp.csr_matrix((weight.astype(np.float32), (row, column)), shape=(len(users), len(known)))
    singular, right = _leading(matrix, rank, seed)
    factors[known, :rank] = (right.T * np.sqrt(np.maximum(singular, 0.0))).astype(np.float32)
    return factors


def _leading(matrix: sp.csr_matrix, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The `rank` largest singular values, (rank,), and their right vectors, (rank, items), the same for the same seed.

    The iterative solver restarts from a random state of its own where a matrix has fewer singular values than it looks
    for; such a matrix is small, and factored whole.
    """
    if matrix.shape[0] * matrix.shape[1] <= DENSE_CELLS:
        _, singular, right = np.linalg.svd(matrix.toarray().astype(np.float64), full_matrices=False)
        return np.where(singular > 1e-6 * singular[0], singular, 0.0)[:rank], right[:rank]
    start = np.random.default_rng(seed).normal(size=min(matrix.shape)).astype(np.float32)
    _, singular, right = svds(matrix, k=rank, v0=start)
    return singular, right


def fit_retrieval(log: Log, *, dim: int = FACTORS, seed: int = 0) -> Retrieval:
    """Retrieval learned from what was taken in training."""
    taken = (log.split == TRAIN) & (log.grade > 0)
    factors = item_factors(log.user[taken], log.item[taken], len(log.items), dim=dim, seed=seed)
    return Retrieval(factors=factors, popular=np.argsort(-popularity(log), kind="stable").astype(np.int32))


def retrieve(retrieval: Retrieval, history: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest items to the mean of each history; the most popular ones where there is none.

    history: (L, H) int32 rows, NONE after the end. Returns (L, min(count, I)) int32, best first, NONE where short.
    """
    count = min(count, len(retrieval.factors))
    found = np.broadcast_to(retrieval.popular[:count], (len(history), count)).copy()
    asking = np.flatnonzero((history != NONE).any(axis=1))
    if not len(asking) or not retrieval.factors.any():
        return found
    index = _search_index(retrieval.factors)
    for start in range(0, len(asking), BLOCK):
        rows = asking[start : start + BLOCK]
        known = history[rows] != NONE
        total = np.einsum("lhd,lh->ld", retrieval.factors[history[rows]], known.astype(np.float32))
        _, near = index.search(np.ascontiguousarray(total / known.sum(axis=1, keepdims=True), dtype=np.float32), count)
        found[rows] = near
    return found


def _search_index(factors: np.ndarray) -> faiss.Index:
    """Exact inner products for a small catalogue, an inverted file for a large one."""
    dim = factors.shape[1]
    if len(factors) <= EXACT_ITEMS:
        index: faiss.Index = faiss.IndexFlatIP(dim)
    else:
        index = faiss.index_factory(dim, f"IVF{int(np.sqrt(len(factors)))},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(factors)
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", 8)
    index.add(factors)
    return index


# --- training lists -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingSet:
    """Everything that a sampler draws from, resident as arrays."""

    requests: SplitRequests
    logged: Lists
    pool: np.ndarray | None  # (L, M) int32 retrieved rows; None where the log carries its own stages
    taken: Taken
    offered: np.ndarray  # (k,) int32 rows of the items that random ones are drawn among
    weight: np.ndarray  # (k,) float64, how often each of them was taken in training

    def __len__(self) -> int:
        return len(self.requests)

    @lru_cache(maxsize=1)  # noqa: B019 (of the last one: a training has one sampler)
    def chances(self, power: float) -> np.ndarray:
        """Running sums of (times taken + 1)^power over the items on offer; (k,) float64."""
        steps: np.ndarray = np.cumsum((self.weight + 1.0) ** power)
        return steps


def training_set(log: Log, soft: np.ndarray | None = None, *, pool: int = POOL) -> TrainingSet:
    """The training lists that hold a positive, with retrieved candidates unless the log has stages.

    soft: (e,) float32 soft label of every event, or None.
    """
    requests = requests_of(log, TRAIN)
    taken = taken_pairs(log, log.split == TRAIN)
    logged = logged_lists(log, requests, taken, soft)
    kept = np.flatnonzero((logged.grade > 0).any(axis=1))
    requests, logged = requests.take(kept), logged.take(kept)
    offered = on_offer(log)
    return TrainingSet(
        requests=requests,
        logged=logged,
        pool=None if log.has_stages else retrieve(fit_retrieval(log), tastes(log, requests), pool),
        taken=taken,
        offered=offered,
        weight=popularity(log)[offered],
    )


def tastes(log: Log, requests: SplitRequests) -> np.ndarray:
    """What retrieval knows of each training request's user: the history, (L, H) int32, NONE after the end.

    Where a log has no times, no request has a past (most users have one training list). There it is what the user took
    in training, at most RECENT items; those of the list itself become no negatives, only their neighbours do.
    """
    if log.schema.split.by != "hash":
        return requests.history
    taken = np.flatnonzero((log.split == TRAIN) & (log.grade > 0))
    taken = taken[np.argsort(log.user[taken], kind="stable")]
    place = _place_in_run(log.user[taken])
    taken, place = taken[place < RECENT], place[place < RECENT]
    known = np.full((len(log.users), RECENT), NONE, dtype=np.int32)
    known[log.user[taken], place] = log.item[taken]
    return np.asarray(known[requests.user])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How many items of each stage a training list gets; with logged stages these are bounds, not additions."""

    impressions: int = 50
    candidates: int = 20
    random: int = 40
    power: float = 0.75  # random items by popularity^power; 0 is uniform

    def draw(self, data: TrainingSet, rows: np.ndarray, rng: np.random.Generator) -> Lists:
        """One padded batch of the lists at `rows`, (b,) int."""
        logged = self._bounded(data.logged.take(rows), rng)
        if data.pool is None:
            return trimmed(logged)
        drawn = [logged.item]
        if self.candidates:
            pool = data.pool[rows]
            drawn.append(np.take_along_axis(pool, rng.integers(0, pool.shape[1], (len(rows), self.candidates)), axis=1))
        if self.random:
            drawn.append(self._random_items(data, len(rows), rng))
        items = np.concatenate(drawn, axis=1)
        stage = np.concatenate([np.full(part.shape, k, dtype=np.int8) for k, part in enumerate(drawn)], axis=1)
        if not self.candidates:
            stage[stage > 0] = RANDOM
        stage[:, : logged.item.shape[1]] = logged.stage
        items = np.where(stage == PADDING, NONE, items)
        return trimmed(_complete(logged, items, stage, data.taken, data.requests.user[rows]))

    def _random_items(self, data: TrainingSet, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, random) int32 rows of items on offer."""
        steps = data.chances(self.power)
        drawn = np.searchsorted(steps, rng.random((count, self.random)) * steps[-1], side="right")
        return np.asarray(data.offered[drawn])

    def _bounded(self, logged: Lists, rng: np.random.Generator) -> Lists:
        """The logged rows, at most so many of each stage, positives first, the rest at random."""
        bound = np.array([self.impressions, self.candidates, self.random])
        counts = [(logged.stage == stage).sum(axis=1).max(initial=0) for stage in (IMPRESSION, CANDIDATE, RANDOM)]
        if (np.array(counts) <= bound).all():
            return logged
        chance = rng.random(logged.item.shape) - (logged.grade > 0)
        keep = logged.mask & _first_of_stage(logged.stage, chance, bound)
        return _packed(logged, keep)


def _first_of_stage(stage: np.ndarray, order: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """(L, n) bool: is the entry among the `bound[stage]` lowest `order` of its stage in its list."""
    keep = np.zeros(stage.shape, dtype=bool)
    for kind, most in enumerate(bound.tolist()):
        mine = stage == kind
        place = np.argsort(np.argsort(np.where(mine, order, np.inf), axis=1, kind="stable"), axis=1, kind="stable")
        keep |= mine & (place < most)
    return keep


def _packed(lists: Lists, keep: np.ndarray) -> Lists:
    """Kept entries moved to the left, the rest turned into padding."""
    order = np.argsort(~keep, axis=1, kind="stable")
    kept = np.take_along_axis(keep, order, axis=1)
    parts = {
        name: np.take_along_axis(getattr(lists, name), order, axis=1) for name in ("item", "grade", "stage", "soft")
    }
    return Lists(
        item=np.where(kept, parts["item"], 0).astype(np.int32),
        grade=np.where(kept, parts["grade"], 0).astype(np.int8),
        stage=np.where(kept, parts["stage"], PADDING).astype(np.int8),
        soft=np.where(kept, parts["soft"], 0).astype(np.float32),
    )


def trimmed(lists: Lists) -> Lists:
    """Without the columns that are padding in every list; at least one column stays."""
    used = np.flatnonzero(lists.mask.any(axis=0))
    used = used if len(used) else np.zeros(1, dtype=np.int64)
    return Lists(
        item=lists.item[:, used], grade=lists.grade[:, used], stage=lists.stage[:, used], soft=lists.soft[:, used]
    )


def _complete(logged: Lists, items: np.ndarray, stage: np.ndarray, taken: Taken, user: np.ndarray) -> Lists:
    """Logged rows and drawn ones as lists: a drawn row that is empty, a repeat or taken by the user is padding.

    items, stage: (L, n) with the logged rows first, NONE where empty; user: (L,).
    """
    width = logged.item.shape[1]
    fine = first_occurrences(items)
    fine[:, width:] &= ~taken.has(user, items[:, width:])
    fine[:, :width] = logged.mask
    grade, soft = np.zeros(items.shape, dtype=np.int8), np.zeros(items.shape, dtype=np.float32)
    grade[:, :width], soft[:, :width] = logged.grade, logged.soft
    kind = np.where(fine, stage, PADDING).astype(np.int8)
    return Lists(item=np.where(fine, items, 0).astype(np.int32), grade=grade, stage=kind, soft=soft)


def first_occurrences(items: np.ndarray) -> np.ndarray:
    """(L, n) bool: True at the first place of each item in its row, False on repeats and on NONE."""
    width = items.shape[1]
    key = np.sort(items.astype(np.int64) * width + np.arange(width), axis=1)
    new = np.ones(items.shape, dtype=bool)
    new[:, 1:] = key[:, 1:] // width != key[:, :-1] // width
    first = np.zeros(items.shape, dtype=bool)
    np.put_along_axis(first, key % width, new, axis=1)
    return np.asarray(first & (items != NONE))


def full(**options: float) -> Sampler:
    """Impressions, candidates and random items."""
    return _sampler(options)


def without_random(**options: float) -> Sampler:
    """Impressions and candidates."""
    return _sampler({**options, "random": 0})


def without_candidates(**options: float) -> Sampler:
    """Impressions and random items."""
    return _sampler({**options, "candidates": 0})


def impressions_only(**options: float) -> Sampler:
    """Impressions alone."""
    return _sampler({**options, "candidates": 0, "random": 0})


def _sampler(options: dict[str, float]) -> Sampler:
    return Sampler(**{name: float(value) if name == "power" else int(value) for name, value in options.items()})  # type: ignore[arg-type]


# --- evaluation lists -----------------------------------------------------------------------------------


def evaluation_lists(
    log: Log, split: int, *, size: int = 200, seed: int = 0, random_only: bool = False, new_items: bool = True
) -> tuple[SplitRequests, Lists]:
    """The requests of a split and their frozen lists of up to `size` items each.

    Beside the impressions, half of the room goes to random items, a quarter to items co-visited with the history and
    a quarter to popular items of the request's scenario (drawn by training count^0.75); what one source cannot fill,
    random items do. No contestant resembles these sources. With logged stages the logged rows are the list, and a
    request of which none is left is left out.

    Without `new_items`, items that no training event names are neither positives nor negatives: where many positives
    are new, a list is won by ranking all that is unknown first.
    """
    requests = requests_of(log, split)
    taken = taken_pairs(log, np.ones(len(log.grade), dtype=bool))
    logged = logged_lists(log, requests, taken, seed=seed)
    if log.has_stages or not len(requests):
        filled = np.flatnonzero(logged.mask.any(axis=1))
        return requests.take(filled), logged.take(filled)
    rng = np.random.default_rng([seed, split])
    sources = None if random_only else Sources(covisited(log), *scenario_popularity(log, requests))
    offered = on_offer(log, split if new_items else TRAIN)
    if not new_items:
        logged = _packed(logged, logged.mask & np.isin(logged.item, offered))
    blocks = []
    for start in range(0, len(requests), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(requests)))
        part, shown = requests.take(rows), logged.take(rows)
        room = np.maximum(size - shown.mask.sum(axis=1), 0)
        proposals = [] if sources is None else sources.propose(part, rows, room // 4, rng)
        proposals.append((offered[_draw_uniform(len(rows), len(offered), size, rng)], room, RANDOM))
        blocks.append(_fill(shown, proposals, size, taken, part.user))
    return requests, _stacked(blocks)


Proposal = tuple[np.ndarray, np.ndarray, int]  # items (L, m), NONE where empty; the most to keep (L,); their stage


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the candidates of evaluation lists come from: both from training counts alone."""

    neighbours: np.ndarray  # (I, NEIGHBOURS) int32
    by_scenario: np.ndarray  # (S, I) float64
    scenario: np.ndarray  # (L,) int64

    def propose(
        self, requests: SplitRequests, rows: np.ndarray, quota: np.ndarray, rng: np.random.Generator
    ) -> list[Proposal]:
        """Co-visited and popular items, `quota` (b,) of each, for the requests at `rows` (b,)."""
        near = _ask_neighbours(self.neighbours, requests.history)
        popular = _draw_popular(self.by_scenario, self.scenario[rows], 4 * int(quota.max(initial=0)), rng)
        return [(near, quota, CANDIDATE), (popular, quota, CANDIDATE)]


def _fill(logged: Lists, proposals: list[Proposal], size: int, taken: Taken, user: np.ndarray) -> Lists:
    """Proposals of every source beside the logged rows: each fills at most its quota, all together `size`."""
    parts = [np.where(logged.mask, logged.item, NONE), *(items for items, _, _ in proposals)]
    source = np.concatenate([np.full(part.shape, k, dtype=np.int8) for k, part in enumerate(parts)], axis=1)
    stage = np.concatenate(
        [logged.stage, *(np.full(items.shape, stage, dtype=np.int8) for items, _, stage in proposals)], axis=1
    )
    lists = _complete(logged, np.concatenate(parts, axis=1), stage, taken, user)
    keep = lists.mask
    for k, (_, quota, _) in enumerate(proposals, start=1):
        keep &= (source != k) | (np.cumsum(keep & (source == k), axis=1) <= quota[:, None])
    most = np.maximum(size, logged.mask.sum(axis=1))
    keep &= np.cumsum(keep, axis=1) <= most[:, None]
    return trimmed(_packed(lists, keep))


def covisited(log: Log) -> np.ndarray:
    """The items most often taken in training by those who took each item; (I, NEIGHBOURS) int32, NONE where short."""
    chosen = (log.split == TRAIN) & (log.grade > 0)
    pairs = np.unique(log.user[chosen].astype(np.int64) * len(log.items) + log.item[chosen])
    cells = (pairs // len(log.items), pairs % len(log.items))
    matrix = sp.csr_matrix((np.ones(len(pairs), dtype=np.int32), cells), shape=(len(log.users), len(log.items)))
    found = np.full((len(log.items), NEIGHBOURS), NONE, dtype=np.int32)
    for start in range(0, len(log.items), 512):
        together = (matrix.T[start : start + 512] @ matrix).tocoo()
        other = together.row + start != together.col
        row, column, count = together.row[other], together.col[other], together.data[other]
        order = np.lexsort((column, -count, row))
        place = _place_in_run(row[order])
        near = order[place < NEIGHBOURS]
        found[start + row[near], place[place < NEIGHBOURS]] = column[near]
    return found


def _ask_neighbours(neighbours: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Neighbours of the recent history, the nearest of each item first; (L, RECENT * NEIGHBOURS) int32."""
    size = (history != NONE).sum(axis=1)
    place = size[:, None] - 1 - np.arange(min(RECENT, history.shape[1]))
    recent = np.where(place >= 0, np.take_along_axis(history, np.maximum(place, 0), axis=1), NONE)  # newest first
    asked = np.where((recent != NONE)[..., None], neighbours[recent], NONE)  # (L, RECENT, NEIGHBOURS)
    return np.asarray(asked.transpose(0, 2, 1).reshape(len(history), -1))


def scenario_popularity(log: Log, requests: SplitRequests) -> tuple[np.ndarray, np.ndarray]:
    """Training counts of taken items by scenario, (S, I) float64, and the scenario of each request, (L,) int64.

    The scenario is the first categorical context field of up to 50 values; without one, all requests share one. A
    scenario with few events leans on the global counts.
    """
    total = popularity(log)
    for field in log.schema.fields:
        if field.side != "context" or field.kind != "categorical":
            continue
        names, code = np.unique(log.context[field.name].astype(str), return_inverse=True)
        if not 1 < len(names) <= 50:
            continue
        chosen = (log.split == TRAIN) & (log.grade > 0)
        flat = np.bincount(code[chosen] * len(total) + log.item[chosen], minlength=len(names) * len(total))
        lean = 100.0 * total / max(total.sum(), 1.0)
        return flat.reshape(len(names), -1) + lean, code[requests.first]
    return total[None, :], np.zeros(len(requests), dtype=np.int64)


def _draw_popular(counts: np.ndarray, scenario: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """(L, width) int32 items drawn with replacement by count^0.75 within each list's scenario; NONE without counts."""
    drawn = np.full((len(scenario), width), NONE, dtype=np.int32)
    for which in np.unique(scenario).tolist():
        mine = scenario == which
        steps = np.cumsum(counts[which] ** POPULAR_POWER)
        if steps[-1] > 0:
            point = rng.random((int(mine.sum()), width)) * steps[-1]
            drawn[mine] = np.searchsorted(steps, point, side="right")
    return drawn


def _draw_uniform(lists: int, items: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Enough uniform rows to fill `size` places: every item in random order if there are few, else twice the size."""
    if items > 4 * size:
        return rng.integers(0, items, (lists, 2 * size + 64), dtype=np.int32)
    return np.argsort(rng.random((lists, items)), axis=1).astype(np.int32)


def _stacked(blocks: list[Lists]) -> Lists:
    """Blocks of different widths as one."""
    width = max(block.item.shape[1] for block in blocks)

    def padded(name: str, fill: int) -> np.ndarray:
        parts = [getattr(block, name) for block in blocks]
        wide = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill) for part in parts]
        return np.concatenate(wide)

    fills = {"item": 0, "grade": 0, "stage": PADDING, "soft": 0}
    return Lists(**{name: padded(name, fill) for name, fill in fills.items()})


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "full": full,
    "without-random": without_random,
    "without-candidates": without_candidates,
    "impressions": impressions_only,
}
