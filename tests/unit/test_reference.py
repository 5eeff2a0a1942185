from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.head import HeadKind, HeadSpec
from kernel.reference import (
    BUCKET_WORDS,
    SPILLED,
    bucket_count,
    build_index,
    explain,
    hash_strings,
    lookup,
    score,
    score_oracle,
    top_k,
)

SHAPES = [(1, 1, 8), (2, 1, 12), (1, 3, 32), (4, 4, 32), (8, 3, 64), (3, 8, 100)]
COUNTS = [0, 1, 15, 16, 17, 33]


def make(
    kind: HeadKind, hu: int, hi: int, d: int, n: int, bias: bool = True
) -> tuple[HeadSpec, np.ndarray, np.ndarray]:
    head = HeadSpec(kind=kind, user_heads=hu, item_heads=hi, dim=d, scale=2.5, item_bias=bias)
    rng = np.random.default_rng([hu, hi, d, n])
    return head, rng.normal(size=head.user_size).astype("f4"), rng.normal(size=(n, head.item_size)).astype("f4")


def score_by_loops(head: HeadSpec, user: np.ndarray, item: np.ndarray) -> float:
    """The equations of kernel/reference.py, one number at a time."""
    hu, hi, d = head.user_heads, head.item_heads, head.dim
    U = user.astype("f8").reshape(-1, hu, d)
    X = item[: head.item_size - head.item_bias].astype("f8").reshape(-1, hi, d)
    bias = float(item[-1]) if head.item_bias else 0.0
    if head.kind == "maxsim":
        return head.scale * sum(max(float(U[0, p] @ X[0, q]) for q in range(hi)) for p in range(hu)) + bias
    E, V, G, A, B = U
    Ei, Vi, Gi = X

    def softmax(values: list[float]) -> list[float]:
        weights = [math.exp(value - max(values)) for value in values]
        return [weight / sum(weights) for weight in weights]

    P = [softmax([float(A[p] @ Ei[q]) / math.sqrt(d) for q in range(hi)]) for p in range(hu)]
    R = [softmax([float(B[p] @ Ei[q]) / math.sqrt(d) for p in range(hu)]) for q in range(hi)]
    users = [E[p] + G[p] * sum(P[p][q] * Vi[q] for q in range(hi)) for p in range(hu)]
    items = [Ei[q] + Gi[q] * sum(R[q][p] * V[p] for p in range(hu)) for q in range(hi)]

    def cos(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y) / max(np.linalg.norm(x), 1e-6) / max(np.linalg.norm(y), 1e-6)

    return head.scale * sum(max(cos(x, y) for y in items) for x in users) + bias


@pytest.mark.parametrize("kind", ["maxsim", "cross_attention"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", COUNTS)
def test_scores_equal_the_equations(kind: HeadKind, shape: tuple[int, int, int], count: int) -> None:
    head, user, items = make(kind, *shape, count)
    expected = np.array([score_by_loops(head, user, item) for item in items])
    np.testing.assert_allclose(score_oracle(head, user, items), expected, rtol=1e-12, atol=1e-12)
    bound = (
        1e-5
        * head.user_heads
        * head.scale
        * (1 if kind == "cross_attention" else max(1.0, np.abs(expected).max(initial=1)))
    )
    found = score(head, user, items)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max(initial=0) <= bound


@pytest.mark.parametrize("kind", ["maxsim", "cross_attention"])
def test_more_candidates_than_a_chunk_are_scored_as_one_by_one(kind: HeadKind) -> None:
    head, user, items = make(kind, 2, 3, 8, 5000, bias=False)
    picked = [0, 2047, 2048, 4999]
    one_by_one = np.concatenate([score(head, user, items[[i]]) for i in picked])
    np.testing.assert_allclose(score(head, user, items)[picked], one_by_one, rtol=1e-5, atol=1e-5)


def test_zero_vectors_score_zero_instead_of_nan() -> None:
    head, user, items = make("cross_attention", 2, 2, 8, 3, bias=False)
    assert score(head, user * 0, items * 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["maxsim", "cross_attention"])
def test_explained_similarities_add_up_to_the_score(kind: HeadKind) -> None:
    head, user, items = make(kind, 4, 3, 16, 20)
    winner, similarity = explain(head, user, items)
    assert winner.shape == similarity.shape == (20, 4)
    assert winner.min() >= 0
    assert winner.max() < 3
    np.testing.assert_allclose(
        similarity.sum(1) * head.scale + items[:, -1], score(head, user, items), rtol=1e-4, atol=1e-4
    )
    assert explain(head, user, items[:0])[0].shape == (0, 4)


def test_records_of_another_shape_are_refused() -> None:
    head, user, items = make("maxsim", 2, 2, 8, 3)
    with pytest.raises(ValueError, match=r"user record has shape \(15,\)"):
        score(head, user[:-1], items)
    with pytest.raises(ValueError, match=r"item records have shape \(3, 16\)"):
        score(head, user, items[:, :-1])


@pytest.mark.parametrize(("option", "value"), [("kind", "dot"), ("user_heads", 0), ("dim", -1)])
def test_an_impossible_head_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        HeadSpec(**{"kind": "maxsim", "user_heads": 1, "item_heads": 1, "dim": 8, "scale": 1.0, option: value})


@given(
    scores=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("-inf"), float("nan")]), max_size=40),
    k=st.integers(-2, 50),
)
def test_top_k_is_a_stable_sort_cut_at_k(scores: list[float], k: int) -> None:
    order = sorted(
        range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i] if scores[i] == scores[i] else 0)
    )
    expected = order[: max(k, 0)]
    assert top_k(np.array(scores, np.float32), k).tolist() == expected


@given(keys=st.sets(st.integers(0, 2**64 - 1), max_size=200), others=st.sets(st.integers(0, 2**64 - 1), max_size=20))
def test_an_index_finds_its_keys_and_no_others(keys: set[int], others: set[int]) -> None:
    array = np.array(sorted(keys), np.uint64)
    buckets = build_index(array)
    assert buckets.shape == (bucket_count(len(array)), BUCKET_WORDS)
    np.testing.assert_array_equal(lookup(buckets, array), np.arange(len(array)))
    unknown = np.array(sorted(others - keys), np.uint64)
    assert (lookup(buckets, unknown) == -1).all()


def test_keys_that_collide_are_still_told_apart() -> None:
    keys = np.arange(4000, dtype=np.uint64)
    buckets = build_index(keys)
    assert buckets[:, SPILLED].sum() > 20, "some have more keys than room"
    np.testing.assert_array_equal(lookup(buckets, keys[::-1]), np.arange(4000)[::-1])
    assert (lookup(buckets, keys + np.uint64(4000)) == -1).all()


def test_repeated_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="repeat"):
        build_index(np.array([3, 4, 3], np.uint64))


def hash_by_loops(text: str, salt: int) -> int:
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    data = text.encode()
    state = mix(salt ^ len(data))
    for start in range(0, len(data), 8):
        state = mix(state ^ int.from_bytes(data[start : start + 8], "little"))
    return state


@given(ids=st.lists(st.text(max_size=20), max_size=10), salt=st.integers(0, 2**64 - 1))
def test_string_hashes_equal_their_definition(ids: list[str], salt: int) -> None:
    assert hash_strings(ids, salt).tolist() == [hash_by_loops(text, salt) for text in ids]
