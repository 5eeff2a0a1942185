"""Every level against the float64 reference: scores, lookups, the best k, deadlines; and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic_ns
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import engine, record, reference
from kernel.engine import Index, Table, open_index, open_table
from kernel.errors import KernelError
from kernel.head import HeadKind, HeadSpec
from kernel.ids import Texts
from kernel.plain import PlainLayout
from kernel.record import DTYPES, Dtype, RecordLayout
from tests.kernels import COUNTS, KINDS, NATIVE, SHAPES, head_of, index_of, made, table_of

TOLERANCE: dict[Dtype, float] = {"f32": 1e-5, "f16": 1e-3, "int8": 1e-4}  # in Hu * scale; int8 against what is stored


@pytest.fixture(params=engine.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = engine.level()
    assert engine.select(request.param) == request.param
    yield request.param
    engine.select(before)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_reference(level: str, kind: HeadKind, dtype: Dtype) -> None:
    for shape in SHAPES:
        head = head_of(kind, shape, bias=sum(shape) % 2 == 0)
        user, items = made(head, max(COUNTS))
        table = table_of(head, dtype, items)
        rows = np.arange(len(items), dtype=np.int32)
        exact = items if dtype != "int8" else table.records(rows)
        expected = reference.score_oracle(head, user, exact)
        for count in COUNTS:
            found = table.score(user, rows[:count])
            assert found.dtype == np.float32
            error = np.abs(found - expected[:count]).max(initial=0)
            assert error <= TOLERANCE[dtype] * head.user_heads * head.scale, (shape, count)


@pytest.mark.parametrize("kind", KINDS)
def test_raw_vectors_score_as_well_as_unit_ones(level: str, kind: HeadKind) -> None:
    head = head_of(kind, (4, 4, 32), scale=1.0)
    rng = np.random.default_rng(5)
    user, items = 30 * rng.standard_normal(head.user_size), 30 * rng.standard_normal((50, head.item_size))
    user, items = user.astype(np.float32), items.astype(np.float32)
    expected = reference.score_oracle(head, user, items)
    found = table_of(head, "f32", items).score(user, np.arange(50, dtype=np.int32))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_a_score_does_not_depend_on_its_neighbours(level: str) -> None:
    for kind in KINDS:
        head = head_of(kind, (4, 3, 32))
        user, items = made(head, 40)
        table = table_of(head, "int8", items)
        rows = np.random.default_rng(0).integers(0, 40, 100).astype(np.int32)
        alone = np.concatenate([table.score(user, rows[k : k + 1]) for k in range(100)])
        np.testing.assert_array_equal(table.score(user, rows), alone)


@pytest.mark.skipif(len(NATIVE) < 2, reason="one native level only")
def test_int8_maxsim_is_the_same_on_every_native_level() -> None:
    head = head_of("maxsim", (4, 4, 32))
    user, items = made(head, 200)
    found = []
    before = engine.level()
    for name in NATIVE:
        engine.select(name)
        found.append(table_of(head, "int8", items).score(user, np.arange(200, dtype=np.int32)))
    engine.select(before)
    for other in found[1:]:
        np.testing.assert_allclose(
            other, found[0], rtol=1e-6, atol=1e-6
        )  # exact sums, rounded once or twice after them


def test_zero_vectors_score_zero_instead_of_nan(level: str) -> None:
    for dtype in DTYPES:
        head = head_of("cross_attention", (2, 2, 8))
        table = table_of(head, dtype, np.zeros((3, head.item_size), np.float32))
        scores = table.score(np.zeros(head.user_size, np.float32), np.arange(3, dtype=np.int32))
        assert scores.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_user_that_is_not_finite_has_no_score_and_a_tiny_one_has(level: str, kind: HeadKind, dtype: Dtype) -> None:
    head = head_of(kind, (4, 4, 32))
    user, items = made(head, 20)
    table = table_of(head, dtype, items)
    rows = np.arange(20, dtype=np.int32)
    for number in (np.nan, np.inf):
        wrong = user.copy()
        wrong[:: head.dim] = number
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(table.score(wrong, rows)).any()
    assert np.isfinite(table.score(user * np.float32(1e-41), rows)).all()


def test_affinities_of_hundreds_do_not_overflow(level: str) -> None:
    head = head_of("cross_attention", (2, 2, 16))
    user, items = made(head, 20)
    user[3 * 32 :] *= 300
    expected = reference.score_oracle(head, user, items)
    found = table_of(head, "f32", items).score(user, np.arange(20, dtype=np.int32))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_records_come_back(level: str, kind: HeadKind) -> None:
    for dtype in DTYPES:
        layout = RecordLayout(head_of(kind, (2, 3, 12), bias=True), dtype)
        _, items = made(layout.head, 9)
        rows = np.array([8, 0, 3, 3], np.int32)
        expected = record.unpack(layout, engine.pack(layout, items)[rows])
        np.testing.assert_array_equal(table_of(layout.head, dtype, items).records(rows), expected)


def test_a_table_beyond_four_gigabytes_is_read_to_its_end(tmp_path: Path, level: str) -> None:
    head = head_of("maxsim", (2, 16, 256))
    layout = RecordLayout(head, "f32")
    count = (1 << 32) // layout.stride + 1000
    user, items = made(head, 4)
    path = tmp_path / "sparse"
    with path.open("wb") as stream:
        stream.truncate(count * layout.stride)
        stream.seek((count - 4) * layout.stride)
        stream.write(engine.pack(layout, items).data)
    rows = np.memmap(path, np.uint8, "r", shape=(count, layout.stride))
    table = open_table(layout, rows, index_of(np.arange(count)))
    ids = np.arange(count - 4, count)
    expected = reference.score_oracle(head, user, items)
    np.testing.assert_allclose(table.score(user, ids.astype(np.int32)), expected, atol=1e-4)
    np.testing.assert_allclose(table.rank(user, ids, 4).scores, np.sort(expected)[::-1], atol=1e-4)


# --- ids -------------------------------------------------------------------------------------------------------------


@given(
    keys=st.sets(st.integers(-(2**63), 2**63 - 1), max_size=200),
    others=st.sets(st.integers(-(2**63), 2**63 - 1), max_size=20),
)
def test_every_level_finds_the_same_rows(keys: set[int], others: set[int]) -> None:
    ids = np.array(sorted(keys), np.int64)
    buckets = engine.build_index(ids.view(np.uint64))
    assert len(buckets) == reference.bucket_count(len(ids))
    wanted = np.array([*sorted(keys, reverse=True), *sorted(others - keys)], np.int64)
    expected = reference.lookup(buckets, wanted.view(np.uint64))
    np.testing.assert_array_equal(open_index(Index(buckets, len(ids))).lookup(wanted), expected)
    assert expected.tolist() == [*range(len(ids))][::-1] + [-1] * len(others - keys)


@given(st.lists(st.text(max_size=30), unique=True, max_size=50), st.integers(0, 2**64 - 1))
def test_texts_are_hashed_and_compared_alike(texts: list[str], salt: int) -> None:
    stored = Texts.of(texts)
    keys = engine.hash_texts(stored, salt)
    assert keys.tolist() == reference.hash_strings(texts, salt).tolist()
    offsets = np.concatenate([stored.starts, [len(stored.data)]]).astype(np.uint64)
    finder = open_index(Index(engine.build_index(keys), len(keys), offsets, stored.data, salt))
    assert finder.lookup(stored[::-1]).tolist() == [*range(len(texts))][::-1]
    absent = [text + "!" for text in texts if text + "!" not in texts]
    assert finder.lookup(Texts.of(absent)).tolist() == [-1] * len(absent)


def test_equal_hashes_prove_nothing(level: str) -> None:
    stored, wanted = Texts.of(["abc"]), Texts.of(["abd"])
    keys = engine.hash_texts(wanted, 1)  # as if both had one hash
    finder = open_index(Index(engine.build_index(keys), len(keys), np.array([0, 3], np.uint64), stored.data, 1))
    assert finder.lookup(wanted).tolist() == [-1]


def test_repeated_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="repeat"):
        engine.build_index(np.array([3, 4, 3], np.uint64))


# --- the best k ------------------------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, float("-inf"), float("inf")]), max_size=300),
    k=st.integers(-2, 400),
)
def test_top_k_is_a_stable_sort_cut_at_k(scores: list[float], k: int) -> None:
    expected = sorted(range(len(scores)), key=lambda i: -scores[i])[: max(k, 0)]
    assert engine.top_k(np.array(scores, np.float32), k).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [False, True])
def test_a_ranking_is_lookup_score_and_top_k(level: str, kind: HeadKind, text: bool) -> None:
    head = head_of(kind, (4, 4, 32), bias=True)
    user, items = made(head, 700)
    items[100:200] = items[:100]  # ties
    keys = np.random.default_rng(3).permutation(5000)[:700]
    if text:
        stored = Texts.of([f"item/{key}" for key in keys.tolist()])
        offsets = np.concatenate([stored.starts, [len(stored.data)]]).astype(np.uint64)
        hashes = engine.hash_texts(stored, 7)
        index = Index(engine.build_index(hashes), len(hashes), offsets, stored.data, 7)
        layout = RecordLayout(head, "f16")
        table = open_table(layout, engine.pack(layout, items), open_index(index))
    else:
        table = table_of(head, "f16", items, keys)
    for count in (0, 1, 255, 256, 257, 2000):
        wanted = np.random.default_rng(count).integers(0, 5000, count)  # unknown ids and duplicates among them
        ids: Any = Texts.of([f"item/{key}" for key in wanted.tolist()]) if text else wanted
        rows = table.lookup(ids)
        known = np.flatnonzero(rows >= 0)
        scores = table.score(user, rows[known])
        for k in (0, 1, 10, 5000):
            ranked = table.rank(user, ids, k)
            best = reference.top_k(scores, k)
            np.testing.assert_array_equal(ranked.positions, known[best])
            np.testing.assert_array_equal(ranked.scores, scores[best])
            np.testing.assert_array_equal(ranked.missing, np.flatnonzero(rows < 0))
            assert ranked.seen == count


def test_a_batch_equals_one_by_one(level: str) -> None:
    head = head_of("cross_attention", (2, 4, 16))
    _, items = made(head, 300)
    users = np.stack([made(head, 0, seed)[0] for seed in range(5)])
    table = table_of(head, "int8", items)
    rng = np.random.default_rng(0)
    lists: list[Any] = [rng.integers(-50, 300, count) for count in (0, 700, 3, 1, 256)]
    ks = [5, 100, 5, 0, 1000]
    for together, user, ids, k in zip(table.rank_batch(users, lists, ks), users, lists, ks, strict=True):
        alone = table.rank(user, ids, k)
        np.testing.assert_array_equal(together.positions, alone.positions)
        np.testing.assert_array_equal(together.scores, alone.scores)
        np.testing.assert_array_equal(together.missing, alone.missing)
    assert table.rank_batch(users[:0], [], []) == []


def test_scoring_ends_at_the_deadline(level: str) -> None:
    head = head_of("cross_attention", (4, 4, 32))
    user, items = made(head, 500)
    table = table_of(head, "f32", items)
    ids = np.tile(np.arange(-10, 490), 1000)
    passed = table.rank(user, ids, 10, monotonic_ns() - 1)
    assert (passed.seen, len(passed.positions), len(passed.missing)) == (0, 0, 0)
    allowed_ns, ranked = 1_000_000, passed
    while not ranked.seen:  # the machine may have been busy elsewhere
        ranked = table.rank(user, ids, 10, monotonic_ns() + allowed_ns)
        allowed_ns *= 2
    assert 0 < ranked.seen <= len(ids)
    part = table.rank(user, ids[: ranked.seen], 10)
    np.testing.assert_array_equal(ranked.positions, part.positions)
    np.testing.assert_array_equal(ranked.missing, part.missing)


@pytest.mark.skipif(not NATIVE, reason="the reference holds the interpreter")
def test_other_threads_run_while_the_kernel_scores() -> None:
    head = head_of("cross_attention", (8, 8, 64))
    user, items = made(head, 1000)
    table = table_of(head, "f32", items)
    rows = np.resize(np.arange(1000, dtype=np.int32), 200_000)
    begun, ended = threading.Event(), threading.Event()

    def score() -> None:
        begun.set()
        table.score(user, rows)
        ended.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # the interpreter changes hands only where it is given up
    try:
        other = threading.Thread(target=score)
        other.start()
        begun.wait()
        table.score(user, rows[:10])
        meanwhile = not ended.is_set()
        other.join()
    finally:
        sys.setswitchinterval(interval)
    assert meanwhile


# --- refusals --------------------------------------------------------------------------------------------------------


def test_arrays_are_never_converted_silently() -> None:
    if not NATIVE:
        pytest.skip("the extension was not built")
    head = head_of("maxsim", (2, 2, 8))
    user, items = made(head, 9)
    table = table_of(head, "f32", items)
    rows = np.arange(9, dtype=np.int32)
    for wrong in (rows.astype(np.int64), rows[::2], rows.reshape(3, 3), rows.tolist()):
        with pytest.raises(TypeError):
            table.score(user, wrong)
    for wrong in (user.astype(np.float64), user[::2], user[None]):
        with pytest.raises(TypeError):
            table.score(wrong, rows)
    with pytest.raises(TypeError):
        table.lookup(rows)  # type: ignore[arg-type]  # int32
    with pytest.raises(ValueError, match="user record has 15 entries, not 32"):
        table_of(head_of("maxsim", (4, 2, 8)), "f32", items).score(user[:15], rows)
    for row in (-1, 9):
        with pytest.raises(ValueError, match=f"row {row} is not among 9"):
            table.score(user, np.array([0, row], np.int32))


@pytest.mark.parametrize(
    ("shape", "word", "value", "count", "named"),
    [
        ((1, 16), 10, 2, 1, "row 2 of 1|row beyond 1"),
        ((2, 16), 14, 5, 4, "row 5 of 4|row beyond 4"),
        ((1, 16), 15, 1, 1, "every bucket has spilled"),
    ],
)
@pytest.mark.parametrize("numpy", [False, True])
def test_an_index_that_leads_out_of_itself_is_refused(
    shape: tuple[int, int], word: int, value: int, count: int, named: str, numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if numpy:
        monkeypatch.setattr(engine, "native", None)
    buckets = np.zeros(shape, np.uint32)
    buckets[-1, word] = value
    with pytest.raises(KernelError, match=named):
        open_index(Index(buckets, count))


@pytest.mark.parametrize("numpy", [False, True])
def test_an_index_with_a_key_twice_is_refused(numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is there, but a search would make another of them."""
    if numpy:
        monkeypatch.setattr(engine, "native", None)
    buckets = np.zeros((2, 16), np.uint32)
    buckets[1, 10:12] = 4, 3  # two entries of the key 0
    with pytest.raises(KernelError, match="holds a key twice"):
        open_index(Index(buckets, 4))


@pytest.mark.parametrize(("shape", "named"), [((1, 16), "1 buckets for 5 keys"), ((2, 15), "a bucket has 15 entries")])
def test_an_index_of_another_form_is_refused(shape: tuple[int, int], named: str) -> None:
    if not NATIVE:
        pytest.skip("the extension was not built")
    with pytest.raises(KernelError, match=named):
        open_index(Index(np.zeros(shape, np.uint32), 5))


@pytest.mark.parametrize(("offsets", "named"), [([0, 9], "outside"), ([2, 1], "ends before"), ([0], "offsets has 1")])
def test_texts_that_lead_out_of_themselves_are_refused(offsets: list[int], named: str) -> None:
    if not NATIVE:
        pytest.skip("the extension was not built")
    text = np.frombuffer(b"abc", np.uint8)
    with pytest.raises(KernelError, match=named):
        open_index(Index(np.zeros((1, 16), np.uint32), 1, np.array(offsets, np.uint64), text))
    wrong = Texts(text, np.array([2]), np.array([2]))
    with pytest.raises(ValueError, match="outside of its buffer"):
        engine.hash_texts(wrong, 0)


def test_ids_of_the_other_type_are_refused(level: str) -> None:
    head = head_of("maxsim", (1, 1, 8))
    table = table_of(head, "f32", made(head, 2)[1])
    with pytest.raises(KernelError, match="integer ids, got texts"):
        table.lookup(Texts.of(["a"]))


def test_rows_of_another_layout_are_refused(level: str) -> None:
    layout = RecordLayout(head_of("maxsim", (2, 2, 8)), "f32")
    with pytest.raises(KernelError, match="cannot be opened"):
        open_table(layout, np.zeros((2, layout.stride + 16), np.uint8), index_of(np.arange(2)))


# --- levels ----------------------------------------------------------------------------------------------------------


def test_a_level_that_is_not_here_is_named() -> None:
    with pytest.raises(KernelError, match="level 'neon' cannot be had here: use auto or one of numpy"):
        engine.select("neon")
    with pytest.raises(KernelError, match="numpy was asked for"):
        engine.select("numpy", require_native=True)


def test_auto_takes_the_best_level() -> None:
    before = engine.level()
    assert engine.select() == engine.levels()[-1]
    engine.select(before)


WITHOUT = """
import logging, sys
logging.basicConfig(format="%(message)s")
sys.modules["kernel._native"] = None
from kernel import engine
assert engine.levels() == ["numpy"]
assert engine.select() == engine.select() == "numpy"
try:
    engine.select(require_native=True)
except ValueError as error:
    print(error)
"""


def test_without_the_extension_the_reference_serves_with_one_warning() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stderr.count("NumPy reference") == 1
    assert "a native kernel is required" in done.stdout


def test_the_kernel_is_checked_against_the_reference(level: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    head = head_of("cross_attention", (3, 2, 12), bias=True)
    user, items = made(head, 10)
    for dtype in DTYPES:
        assert engine.check_native(RecordLayout(head, dtype), user, items) < 1e-4


# --- graphs ----------------------------------------------------------------------------------------------------------

GRAPH = HeadSpec(kind="onnx", user_heads=3, item_heads=5, dim=1, scale=1.0)


class Product:
    """A graph's place: the sum of all products of the user's floats and the item's; notes how many items came."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, user: np.ndarray, items: np.ndarray) -> np.ndarray:
        self.counts.append(len(items))
        scores: np.ndarray = user.sum() * items.sum(axis=1)
        return scores


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_graph_scores_plain_records_block_by_block(level: str, dtype: Dtype) -> None:
    items = np.random.default_rng(1).integers(-8, 8, (700, 5)).astype(np.float32)  # f16 holds them
    user, scorer, layout = np.ones(3, np.float32), Product(), PlainLayout(GRAPH, dtype)
    keys = np.arange(700, dtype=np.uint64)
    finder = open_index(Index(engine.build_index(keys), 700))
    table = open_table(layout, engine.pack(layout, items), finder, scorer)
    assert (table.level, len(table)) == (engine.GRAPH, 700)
    ids = np.arange(-100, 700)
    ranked = table.rank(user, ids, 50)
    expected = 3 * items.sum(axis=1)
    best = reference.top_k(expected, 50)
    np.testing.assert_array_equal(ranked.positions, best + 100)
    np.testing.assert_array_equal(ranked.scores, expected[best])
    np.testing.assert_array_equal(ranked.missing, np.arange(100))
    assert (ranked.seen, scorer.counts) == (800, [156, 256, 256, 32])
    np.testing.assert_array_equal(table.score(user, np.arange(700, dtype=np.int32)), expected)
    np.testing.assert_array_equal(table.records(np.array([3, 1], np.int32)), items[[3, 1]])
    assert table.rank(user, ids, 50, monotonic_ns() - 1).seen == 0
    assert len(table.rank(user, ids[:0], 50).scores) == 0


def test_a_graph_reads_the_clock_before_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, scorer = PlainLayout(GRAPH, "f32"), Product()
    rows = engine.pack(layout, np.ones((600, 5), np.float32))
    table = open_table(layout, rows, index_of(np.arange(600)), scorer)
    moments = iter([1, 5, 6])
    monkeypatch.setattr(engine, "monotonic_ns", lambda: next(moments))
    ranked = table.rank(np.ones(3, np.float32), np.arange(600), 1000, deadline_ns=5)
    assert (ranked.seen, len(ranked.scores), scorer.counts) == (512, 512, [256, 256])


def test_plain_records_without_a_graph_are_refused(level: str) -> None:
    layout = PlainLayout(GRAPH, "f32")
    with pytest.raises(KernelError, match="no kernel scores a head of kind onnx: its graph is missing"):
        open_table(layout, np.zeros((2, layout.stride), np.uint8), index_of(np.arange(2)))
    with pytest.raises(KernelError, match="cannot be opened"):
        open_table(layout, np.zeros((2, layout.stride + 64), np.uint8), index_of(np.arange(2)), Product())


# --- overlays --------------------------------------------------------------------------------------------------------


def layered(
    head: HeadSpec, dtype: Dtype, items: np.ndarray, keys: np.ndarray, newer: np.ndarray, changed: np.ndarray
) -> Table:
    """A table of items (n, size) with keys (n,) under newer records (r, size) of the first r keys changed."""
    layout = RecordLayout(head, dtype)
    return table_of(head, dtype, items, keys).under(engine.pack(layout, newer), index_of(changed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_under_an_overlay_ranks_as_one_with_all_of_it(level: str, kind: HeadKind, dtype: Dtype) -> None:
    head = head_of(kind, (4, 4, 32), bias=True)
    user, items = made(head, 60)
    keys = np.arange(50) * 7
    changed = np.array([7, 14, 1001, 1002, 349, 21, 999], np.int64)  # two replaced, three new; 21 deleted, 999 unknown
    whole_keys = np.concatenate([np.setdiff1d(keys, [7, 14, 21]), changed[:5]])
    order = {int(key): row for row, key in enumerate(keys)}
    whole = np.stack([items[order[key]] if key not in (7, 14) else items[50] for key in whole_keys[:47].tolist()])
    whole = np.concatenate([whole, items[50:55]])
    found = layered(head, dtype, items[:50], keys, items[50:55], changed)
    expected = table_of(head, dtype, whole, whole_keys)
    asked = np.concatenate([changed, keys[::-1], [3]]).astype(np.int64)
    asked = asked[np.sort(np.unique(asked, return_index=True)[1])]
    one, other = found.rank(user, asked, 20), expected.rank(user, asked, 20)
    for part in ("positions", "scores", "missing"):
        np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
    rows = found.lookup(asked)
    assert rows[:7].tolist() == [50, 51, 52, 53, 54, -1, -1]
    assert len(found) == 55
    np.testing.assert_array_equal(found.records(rows[rows >= 0]), expected.records(expected.lookup(asked[rows >= 0])))
    np.testing.assert_array_equal(
        found.score(user, rows[rows >= 0]), expected.score(user, expected.lookup(asked[rows >= 0]))
    )
    batch = found.rank_batch(np.stack([user, user]), [asked, asked[:5]], [3, 9])
    np.testing.assert_array_equal(batch[1].positions, found.rank(user, asked[:5], 9).positions)


def test_an_overlay_finds_texts(level: str) -> None:
    head = head_of("maxsim", (2, 2, 8))
    user, items = made(head, 6)
    layout = RecordLayout(head, "f32")

    def finder(texts: list[str], salt: int) -> engine.Finder:
        stored = Texts.of(texts)
        data = np.frombuffer("".join(texts).encode(), np.uint8)
        offsets = np.cumsum([0, *(len(text.encode()) for text in texts)]).astype(np.uint64)
        return engine.open_index(
            engine.Index(engine.build_index(engine.hash_texts(stored, salt)), len(texts), offsets, data, salt)
        )

    table = engine.open_table(layout, engine.pack(layout, items[:4]), finder(["a", "b", "c", "d"], 1))
    over = table.under(engine.pack(layout, items[4:]), finder(["b", "new", "c"], 2))
    assert over.lookup(Texts.of(["a", "b", "c", "d", "new", "x"])).tolist() == [0, 4, -1, 3, 5, -1]
    ranked = over.rank(user, Texts.of(["new", "c", "a"]), 3)
    assert sorted(ranked.positions.tolist()) == [0, 2]
    assert ranked.missing.tolist() == [1]
    with pytest.raises(KernelError, match="overlay cannot be opened"):
        table.under(engine.pack(layout, items[4:]), index_of(np.arange(2)))


def test_overlays_that_do_not_fit_are_refused(level: str) -> None:
    head = head_of("maxsim", (2, 2, 8))
    _, items = made(head, 6)
    layout = RecordLayout(head, "f32")
    table, rows = table_of(head, "f32", items), engine.pack(layout, items)
    with pytest.raises(KernelError, match="overlay cannot be opened"):
        table.under(rows, index_of(np.arange(5)))  # more rows than ids
    with pytest.raises(KernelError, match="overlay cannot be opened"):
        table.under(rows[:, :16], index_of(np.arange(6)))
    with pytest.raises(KernelError, match="lay the new one over the table itself"):
        table.under(rows, index_of(np.arange(6))).under(rows, index_of(np.arange(6)))
