"""Native scores and gradients of lists at every level: the float64 reference, its differences, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from kernel import engine
from kernel.head import HeadKind, HeadSpec
from kernel.reference import score_oracle
from kernel.training import available, differentiate_lists, score_lists
from tests.kernels import KINDS, NATIVE, head_of, made

SHAPES = [*product((1, 2, 4, 8), (1, 2, 4, 8), (8, 33)), (4, 4, 16), (4, 4, 32), (2, 8, 64), (3, 5, 7), (17, 3, 2)]
SCORE_ERROR, GRADIENT_ERROR = 2e-6, 1e-5  # of a user head's share of a score; of the largest gradient

pytestmark = pytest.mark.skipif(not NATIVE, reason="the extension was not built")


@pytest.fixture(params=NATIVE)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = engine.level()
    yield engine.select(request.param)
    engine.select(before)


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def batch(head: HeadSpec, lists: int = 3, entries: int = 19, items: int = 12) -> Batch:
    """Users (lists, user size), items (items, item size) and which of them (lists, entries), some again and again."""
    users = np.stack([made(head, 0, seed)[0] for seed in range(lists)])
    chosen = np.random.default_rng(entries).integers(0, items, (lists, entries))
    return users, made(head, items)[1], chosen


def slopes(chosen: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(chosen.shape).astype(np.float32)


def oracle(head: HeadSpec, users: np.ndarray, items: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Scores with biases (lists, entries) in float64."""
    return np.stack([score_oracle(head, user, items[row]) for user, row in zip(users, chosen, strict=True)])


def gradients(head: HeadSpec, data: Batch, of_scores: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    of_biases = of_scores if head.item_bias else np.empty((0, 0), np.float32)
    return differentiate_lists(head, *data, of_scores, of_biases, threads)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_reference(level: str, kind: HeadKind) -> None:
    for shape, entries in product(SHAPES, (1, 15, 16, 17, 33)):
        head = head_of(kind, shape, bias=sum(shape) % 2 == 0, scale=1.0)
        data = batch(head, entries=entries)
        scores, biases = score_lists(head, *data, 1)
        found = scores + biases if head.item_bias else scores
        assert np.abs(found - oracle(head, *data)).max() < SCORE_ERROR * head.user_heads, (shape, entries)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences_in_float64(level: str, kind: HeadKind) -> None:
    rng = np.random.default_rng(1)
    for shape in SHAPES:
        head = head_of(kind, shape, bias=sum(shape) % 2 == 0, scale=1.0)
        data = batch(head)
        weight = slopes(data[2])
        for side, found in enumerate(gradients(head, data, weight)):
            for step in rng.standard_normal((8, *found.shape)):
                expected = difference(head, data, weight, side, 1e-6 * step) / 1e-6
                error = abs((found * step).sum() - expected)
                assert error < GRADIENT_ERROR * np.linalg.norm(found), (shape, side)


def difference(head: HeadSpec, data: Batch, weight: np.ndarray, side: int, step: np.ndarray) -> float:
    """By how much the weighted sum of scores changes from half a step before users (side 0) or items to half after."""
    ends = []
    for sign in (0.5, -0.5):
        moved = [part.astype(np.float64) for part in data[:2]]
        moved[side] = moved[side] + sign * step
        ends.append((weight * oracle(head, *moved, data[2])).sum())
    return float(ends[0] - ends[1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_s_gradient_is_the_sum_over_its_places(level: str, kind: HeadKind) -> None:
    head = head_of(kind, (4, 4, 32), bias=True, scale=1.0)
    users, items, _ = batch(head, items=1)
    often = np.zeros((3, 20), np.int64)
    weight = slopes(often)
    of_users, of_items = gradients(head, (users, items, often), weight)
    each = items.repeat(60, axis=0)
    apart_users, apart_items = gradients(head, (users, each, np.arange(60).reshape(3, 20)), weight)
    np.testing.assert_array_equal(of_users, apart_users)
    np.testing.assert_allclose(of_items[0], apart_items.sum(axis=0), atol=1e-5)


def test_a_pair_without_a_gradient_changes_nothing(level: str) -> None:
    head = head_of("cross_attention", (4, 2, 32), bias=True, scale=1.0)
    users, items, chosen = batch(head, entries=40, items=30)
    weight = slopes(chosen)
    weight[:, 7:] = 0
    weight[1] = 0
    of_users, of_items = gradients(head, (users, items, chosen), weight)
    alone = gradients(head, (users, items, np.ascontiguousarray(chosen[:, :7])), weight[:, :7].copy())
    np.testing.assert_array_equal(of_users, alone[0])
    np.testing.assert_array_equal(of_items, alone[1])
    assert not of_users[1].any()


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_the_same_number_of_threads_gives_the_same_bits(level: str, threads: int) -> None:
    head = head_of("cross_attention", (4, 4, 32), bias=True, scale=1.0)
    data = batch(head, lists=11, entries=50, items=40)
    weight = slopes(data[2])
    alone = gradients(head, data, weight, 1)
    np.testing.assert_array_equal(score_lists(head, *data, threads), score_lists(head, *data, 1))
    first = gradients(head, data, weight, threads)
    for _ in range(5):
        for found, before in zip(gradients(head, data, weight, threads), first, strict=True):
            np.testing.assert_array_equal(found, before)
    np.testing.assert_array_equal(first[0], alone[0])
    np.testing.assert_allclose(first[1], alone[1], atol=1e-5)


def test_equal_best_heads_share_a_gradient(level: str) -> None:
    head = head_of("maxsim", (1, 4, 3), scale=1.0)
    user, item = np.array([[1, 2, 3]], np.float32), np.array([[1, 0, 0, 2, 1, 0, 2, 1, 0, 0, 0, 0]], np.float32)
    chosen = np.zeros((1, 1), np.int64)
    assert score_lists(head, user, item, chosen, 1)[0] == 4
    of_user, of_item = gradients(head, (user, item, chosen), np.full((1, 1), 6, np.float32))
    np.testing.assert_allclose(of_user, [[12, 6, 0]], rtol=1e-6)
    np.testing.assert_allclose(of_item, [[0, 0, 0, 3, 6, 9, 3, 6, 9, 0, 0, 0]], rtol=1e-6)


def test_vectors_of_zeros_have_finite_gradients(level: str) -> None:
    head = head_of("cross_attention", (4, 4, 32), scale=1.0)
    users, items, chosen = batch(head)
    for data in ((users * 0, items, chosen), (users, items * 0, chosen), (users * 0, items * 0, chosen)):
        assert not score_lists(head, *data, 1)[0].any()
        assert all(np.isfinite(part).all() for part in gradients(head, data, slopes(chosen)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_never_hidden(level: str, kind: HeadKind, wrong: float) -> None:
    head = head_of(kind, (4, 4, 32), scale=1.0)
    users, items, chosen = batch(head, entries=16, items=head.item_size)
    for at in range(head.item_size):  # every number of a record in turn
        items[at, at] = wrong
    scores, _ = score_lists(head, users, items, chosen, 1)
    assert not np.isfinite(scores).any()


def test_nothing_to_score_is_no_error(level: str) -> None:
    head = head_of("cross_attention", (2, 2, 8), bias=True, scale=1.0)
    users, items, _ = batch(head)
    for part, entries, rows in ((users[:0], 4, items), (users, 0, items), (users, 0, items[:0])):
        data = (part, rows, np.zeros((len(part), entries), np.int64))
        assert score_lists(head, *data, 2)[0].shape == (len(part), entries)
        of_users, of_items = gradients(head, data, np.zeros((len(part), entries), np.float32), 2)
        assert of_users.shape == part.shape
        assert of_items.shape == rows.shape
        assert not of_users.any()
        assert not of_items.any()


def changed(array: np.ndarray, value: int) -> np.ndarray:
    other = array.copy()
    other[-1, -1] = value
    return other


WRONG: dict[str, tuple[Any, str]] = {
    "user": (lambda u, i, c: (u[:, :-1].copy(), i, c), "a user record"),
    "item": (lambda u, i, c: (u, np.hstack([i, i[:, :1]]), c), "an item record"),
    "lists": (lambda u, i, c: (u, i, c[:-1]), "chosen"),
    "negative": (lambda u, i, c: (u, i, changed(c, -1)), "chosen holds -1"),
    "beyond": (lambda u, i, c: (u, i, changed(c, len(i))), "no row of 12 items"),
    "strided": (lambda u, i, c: (u, i, np.asfortranarray(c)), "incompatible"),
    "dtype": (lambda u, i, c: (u.astype(np.float64), i, c), "incompatible"),
    "rows": (lambda u, i, c: (u, i, c.astype(np.int32)), "incompatible"),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(change: Any, complaint: str) -> None:
    head = head_of("cross_attention", (4, 4, 8), bias=True, scale=1.0)
    right = batch(head)
    data = change(*right)
    with pytest.raises((ValueError, TypeError), match=complaint):
        score_lists(head, *data, 1)
    with pytest.raises((ValueError, TypeError), match=complaint):
        gradients(head, data, slopes(data[2]))
    for of_scores, of_biases in (
        (slopes(right[2])[:, 1:].copy(), slopes(right[2])),
        (slopes(right[2]), slopes(right[2])[1:]),
    ):
        with pytest.raises(ValueError, match="entries, not"):
            differentiate_lists(head, *right, of_scores, of_biases, 1)


def test_the_reference_level_is_not_native() -> None:
    before = engine.level()
    engine.select(engine.NUMPY)
    assert not available()
    engine.select(before)
    assert available() is (before != engine.NUMPY)
