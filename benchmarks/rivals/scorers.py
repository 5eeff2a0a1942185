"""What one would score candidates with in place of the kernel: rows of a float32 matrix in, scores out, one thread.

All gather first, into a buffer that is made once (`np.take` with `out`), but torch, which allocates, FAISS, which has
its own way, and numba, whose loop reads the matrix. `maxsim-cpu` scores gathered documents. `numkong` has a `maxsim`,
but of one document a call, and coarse: with 4x4x32 scores are off by up to 0.06, and 5,000 calls take 18 ms. Its packed
dot products and NumPy's maximum are what one would take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernel.head import HeadSpec
from kernel.reference import score

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Scorer = Callable[[Floats, Rows], Any]  # user record (user size,) and rows (n,) to scores (n,)


class AbsentError(RuntimeError):
    """A rival cannot take part; the message says why."""


class Gather:
    """Rows of a matrix into a buffer that grows to the longest list."""

    def __init__(self, vectors: Floats) -> None:
        self._vectors = vectors
        self._buffer = np.empty((0, vectors.shape[1]), np.float32)

    def __call__(self, rows: Rows) -> Floats:
        if len(rows) > len(self._buffer):
            self._buffer = np.empty((len(rows), self._vectors.shape[1]), np.float32)
        return np.take(
            self._vectors, rows, axis=0, out=self._buffer[: len(rows)], mode="clip"
        )  # raise would copy twice


def numpy_scorer(head: HeadSpec, vectors: Floats) -> Scorer:
    gather = Gather(vectors)
    return lambda user, rows: score(head, user, gather(rows))


def faiss_scorer(head: HeadSpec, vectors: Floats) -> Scorer:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)  # a second copy of the matrix
    return lambda user, rows: score(head, user, index.reconstruct_batch(rows))


def maxsim_cpu_scorer(head: HeadSpec, vectors: Floats) -> Scorer:
    import maxsim_cpu

    gather, hu, hi, d = Gather(vectors), head.user_heads, head.item_heads, head.dim
    return lambda user, rows: maxsim_cpu.maxsim_scores(user.reshape(hu, d), gather(rows).reshape(-1, hi, d))


def numkong_scorer(head: HeadSpec, vectors: Floats) -> Scorer:
    import numkong

    gather, hu, hi, d = Gather(vectors), head.user_heads, head.item_heads, head.dim

    def scores(user: Floats, rows: Rows) -> Any:
        packed = numkong.dots_pack(user.reshape(hu, d))
        dots = np.asarray(numkong.dots_packed(gather(rows).reshape(-1, d), packed)).reshape(-1, hi, hu)  # float64
        best = dots[:, 0]
        for q in range(1, hi):  # three times as fast as dots.max(axis=1)
            best = np.maximum(best, dots[:, q])
        return best.sum(axis=1)

    return scores


# --- torch -----------------------------------------------------------------------------------------------------------


def torch_scorer(head: HeadSpec, vectors: Floats) -> Scorer:
    import torch

    torch.set_num_threads(1)
    table = torch.from_numpy(vectors)
    formula = _torch_maxsim if head.kind == "maxsim" else _torch_cross_attention

    def scores(user: Floats, rows: Rows) -> Any:
        with torch.inference_mode():
            items = table.index_select(0, torch.from_numpy(rows))
            return formula(torch, head, torch.from_numpy(user), items).numpy()

    return scores


def _torch_maxsim(torch: Any, head: HeadSpec, user: Any, items: Any) -> Any:
    return _torch_dots(user.view(head.user_heads, head.dim), items.view(-1, head.item_heads, head.dim)).amax(1).sum(1)


def _torch_dots(user: Any, items: Any) -> Any:
    """(n, hi, hu), by one product of matrices: einsum multiplies item by item where there are few heads."""
    n, hi, d = items.shape
    return (items.reshape(-1, d) @ user.T).view(n, hi, len(user))


def _torch_cross_attention(torch: Any, head: HeadSpec, user: Any, items: Any) -> Any:
    """See kernel/reference.py."""
    eu, vu, gu, a, b = user.view(5, head.user_heads, head.dim)
    e, v, g = items.view(-1, 3, head.item_heads, head.dim).unbind(1)
    looks = (_torch_dots(a, e) * head.dim**-0.5).softmax(1)  # (n, hi, hu)
    seen = (_torch_dots(b, e) * head.dim**-0.5).softmax(2)
    users = torch.nn.functional.normalize(eu + gu * (looks.transpose(1, 2) @ v), dim=2, eps=1e-6)
    items = torch.nn.functional.normalize(e + g * (seen @ vu), dim=2, eps=1e-6)
    return (users @ items.transpose(1, 2)).amax(2).sum(1)


# --- numba -----------------------------------------------------------------------------------------------------------


def numba_scorer(head: HeadSpec, vectors: Floats) -> Scorer:
    import numba

    compiled = numba.njit(fastmath=True)
    hu, hi, d = head.user_heads, head.item_heads, head.dim
    make_loop = _maxsim_loop if head.kind == "maxsim" else _cross_attention_loop
    loop, items = make_loop(compiled), vectors.reshape(len(vectors), -1, hi, d)  # (n, parts, hi, d)

    def scores(user: Floats, rows: Rows) -> Any:
        return loop(user.reshape(-1, hu, d), items, rows)

    scores(np.zeros(head.user_size, np.float32), np.zeros(1, np.int64))  # compiles
    return scores


def _maxsim_loop(compiled: Any) -> Any:
    """Every candidate is read once, nothing is gathered."""
    sum_of_most = compiled(_sum_of_most)

    def loop(user: Any, items: Any, rows: Any) -> Any:
        scores = np.empty(len(rows), np.float32)
        for i in range(len(rows)):
            scores[i] = sum_of_most(user[0], items[rows[i], 0])
        return scores

    return compiled(loop)


def _cross_attention_loop(compiled: Any) -> Any:
    """The same; a user is E V G A B, an item E V G. See kernel/reference.py."""
    sum_of_most, weigh, attend = compiled(_sum_of_most), compiled(_weigh), compiled(_attend)

    def loop(user: Any, items: Any, rows: Any) -> Any:
        _, hu, d = user.shape
        hi = items.shape[2]
        scores = np.empty(len(rows), np.float32)
        weights, attended = (
            np.empty((2, max(hu, hi), max(hu, hi)), np.float32),
            np.empty((2, max(hu, hi), d), np.float32),
        )
        for i in range(len(rows)):
            item = items[rows[i]]
            weigh(user[3], item[0], weights[0])
            attend(user[0], user[2], weights[0], item[1], attended[0])
            weigh(item[0], user[4], weights[1])
            attend(item[0], item[2], weights[1], user[1], attended[1])
            scores[i] = sum_of_most(attended[0, :hu], attended[1, :hi])
        return scores

    return compiled(loop)


def _sum_of_most(users: Any, items: Any) -> Any:
    """sum_p max_q <u_p, v_q>."""
    total = np.float32(0)
    for p in range(len(users)):
        best = np.float32(-np.inf)
        for q in range(len(items)):
            dot = np.float32(0)
            for k in range(users.shape[1]):
                dot += users[p, k] * items[q, k]
            best = max(best, dot)
        total += best
    return total


def _weigh(looking: Any, seen: Any, weights: Any) -> None:
    """exp of the affinity of each with each; the records keep it far from overflow."""
    root = np.float32(1 / np.sqrt(looking.shape[1]))
    for p in range(len(looking)):
        for q in range(len(seen)):
            dot = np.float32(0)
            for k in range(looking.shape[1]):
                dot += looking[p, k] * seen[q, k]
            weights[p, q] = np.exp(dot * root)


def _attend(own: Any, gates: Any, weights: Any, values: Any, attended: Any) -> None:
    """Unit vectors of E + G * (softmax of the affinities @ V of the other side)."""
    for p in range(len(own)):
        weight = np.float32(0)
        attended[p] = 0
        for q in range(len(values)):
            weight += weights[p, q]
            for k in range(own.shape[1]):
                attended[p, k] += weights[p, q] * values[q, k]
        norm = np.float32(0)
        for k in range(own.shape[1]):
            attended[p, k] = own[p, k] + gates[p, k] * attended[p, k] / weight
            norm += attended[p, k] * attended[p, k]
        length = np.float32(1) / max(np.sqrt(norm), np.float32(1e-6))
        for k in range(own.shape[1]):
            attended[p, k] *= length


# --- all -------------------------------------------------------------------------------------------------------------

Make = Callable[[HeadSpec, Floats], Scorer]

RIVALS: Mapping[str, Make] = {
    "NumPy": numpy_scorer,
    "torch": torch_scorer,
    "numba": numba_scorer,
    "FAISS": faiss_scorer,
    "maxsim-cpu": maxsim_cpu_scorer,
    "numkong": numkong_scorer,
}
PACKAGES = {"torch": "torch", "numba": "numba", "FAISS": "faiss-cpu", "maxsim-cpu": "maxsim-cpu", "numkong": "numkong"}
MAXSIM_ONLY = ("maxsim-cpu", "numkong")
COPIES = {"FAISS": 2}  # of the matrix in memory; the others need 1


def make(name: str, head: HeadSpec, vectors: Floats) -> Scorer:
    """Raises AbsentError where the rival is not installed."""
    try:
        return RIVALS[name](head, vectors)
    except ImportError as error:
        raise AbsentError(f"n/a: pip install {PACKAGES[name]} ({error})") from error
