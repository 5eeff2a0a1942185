"""Overlays: a release under newer records answers as one that was published with them; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orjson import dumps

from cache.errors import SnapshotError
from cache.overlay import Overlay, overlays_in, write_overlay
from cache.release import ITEMS, read_release
from cache.snapshot import Snapshot
from kernel.plain import item_layout
from kernel.record import Dtype
from kernel.reference import score
from model.features import IdType
from service.errors import ReleaseError
from service.ranker import Ranker
from tests.changed import records_of
from tests.tiny_releases import TinyRelease, item_id, tiny_release

CHANGED, NEW, DELETED = (3, 17), (60, 61, 62), (5, 9)  # numbers of items


def overlay_of(made: TinyRelease, folder: Path, *, watermark: int = 7, dtype: Dtype = "f32") -> Overlay:
    ids: IdType = "string" if isinstance(made.item_ids[0], str) else "int"
    newer = [item_id(number, ids) for number in (*CHANGED, *NEW)]
    path = write_overlay(
        folder,
        bundle_id=made.bundle.id,
        id_type=ids,
        layout=item_layout(made.head, dtype),
        ids=newer,
        records=records_of(made, newer, 4.0),
        deleted=[item_id(number, ids) for number in DELETED],
        watermark=watermark,
    )
    return Overlay.open(path)


def deleting(made: TinyRelease, folder: Path, ids: list[Any]) -> Overlay:
    """An overlay without a record."""
    path = write_overlay(
        folder,
        bundle_id=made.bundle.id,
        id_type="int",
        layout=item_layout(made.head, "f32"),
        ids=[],
        records=np.empty((0, made.head.item_size), np.float32),
        deleted=ids,
        watermark=3,
    )
    return Overlay.open(path)


@pytest.mark.parametrize("kind", ["maxsim", "cross_attention", "onnx"])
@pytest.mark.parametrize("ids", ["int", "string"])
def test_a_release_under_an_overlay_answers_with_what_is_newer(tmp_path: Path, kind: str, ids: IdType) -> None:
    made = tiny_release(tmp_path, kind=kind, ids=ids)
    plain = Ranker.open(made.folder, made.users)
    ranker = plain.with_overlay(overlay_of(made, tmp_path))
    asked = [item_id(number, ids) for number in range(64)]
    body = {"user_id": made.user_ids[1], "candidates": asked, "top_k": 64}
    ranking = ranker.rank(ranker.decoders.rank(dumps(body)))
    assert ranking.watermark == 7
    assert plain.rank(plain.decoders.rank(dumps(body))).watermark == 0
    gone = [item_id(number, ids) for number in (*DELETED, 63)]
    assert ranking.missing.tolist() == gone
    scores = dict(zip(ranking.ids, ranking.scores.tolist(), strict=True))
    user = ranker._record(ranker._encode(ranker.decoders.rank(dumps(body)), "").features)
    newer = [item_id(number, ids) for number in (*CHANGED, *NEW)]
    graph = made.bundle.graph()
    if graph is None:
        expected = score(made.head, user, records_of(made, newer, 4.0))
    else:
        expected = graph(user, records_of(made, newer, 4.0))
    np.testing.assert_allclose([scores[one] for one in newer], expected, rtol=1e-4, atol=1e-5)
    before = plain.rank(plain.decoders.rank(dumps(body)))
    old = dict(zip(before.ids, before.scores.tolist(), strict=True))
    kept = [one for one in made.item_ids if one not in (*newer, *gone)]
    np.testing.assert_array_equal([scores[one] for one in kept], [old[one] for one in kept])
    told = ranker.describe()
    assert (told["items"], told["watermark"]) == (61, 7)
    assert set(ranker.sample(100, 0, 0)[0]) <= set(kept) | set(newer)
    assert ranker.with_overlay(None).rank(plain.decoders.rank(dumps(body))).ids == before.ids
    assert ranker.with_users(None).overlay is ranker.overlay


def test_retrieval_sees_the_overlay(tmp_path: Path) -> None:
    made = tiny_release(tmp_path, index="flat")
    plain = Ranker.open(made.folder, made.users, retrieval=True)
    ranker = plain.with_overlay(overlay_of(made, tmp_path))
    body = dumps({"user_id": made.user_ids[0], "top_k": 100, "per_head": 180, "explain": True})
    found = ranker.retrieve(ranker.decoders.retrieve(body))
    everything = {*made.item_ids, *(item_id(number, "int") for number in NEW)}
    assert set(found.ids) == everything - {item_id(number, "int") for number in DELETED}
    ranked = ranker.rank(
        ranker.decoders.rank(
            dumps({"user_id": made.user_ids[0], "candidates": found.ids, "top_k": 100, "explain": True})
        )
    )
    assert ranked.ids == found.ids
    np.testing.assert_array_equal(ranked.scores, found.scores)
    assert ranked.explanation is not None
    assert found.explanation is not None
    np.testing.assert_array_equal(ranked.explanation.item_heads, found.explanation.item_heads)


def test_a_retrieval_searches_for_more_where_most_is_deleted(tmp_path: Path) -> None:
    made = tiny_release(tmp_path, index="flat")
    plain = Ranker.open(made.folder, made.users, retrieval=True)
    kept = made.item_ids[::6]
    ranker = plain.with_overlay(deleting(made, tmp_path, [item for item in made.item_ids if item not in kept]))
    body = dumps({"user_id": made.user_ids[0], "top_k": 60, "per_head": 20})
    found = ranker.retrieve(ranker.decoders.retrieve(body)).ids
    before = [item for item in plain.retrieve(plain.decoders.retrieve(body)).ids if item in kept]
    assert set(before) < set(found) <= set(kept)


def test_an_overlay_of_another_bundle_or_from_before_the_release_is_refused(tmp_path: Path) -> None:
    made, other = tiny_release(tmp_path / "a"), tiny_release(tmp_path / "b", seed=1)
    ranker = Ranker.open(made.folder)
    with pytest.raises(ReleaseError, match=r"overlay .*7-5.snap is .* up|to change 7"):
        ranker.with_overlay(overlay_of(other, tmp_path))
    document = read_release(made.folder)
    assert document.watermark == 0
    late = Ranker(replace(document, watermark=8), made.bundle, Snapshot.open(made.folder / ITEMS))
    with pytest.raises(ReleaseError, match="holds all up to 8"):
        late.with_overlay(overlay_of(made, tmp_path))


def test_records_of_another_type_are_refused(tmp_path: Path) -> None:
    made = tiny_release(tmp_path)
    with pytest.raises(ReleaseError, match="'f16'"):
        Ranker.open(made.folder).with_overlay(overlay_of(made, tmp_path, dtype="f16"))


def test_files_that_are_no_overlays_are_refused(tmp_path: Path) -> None:
    made = tiny_release(tmp_path)
    path = overlay_of(made, tmp_path).items.path
    with pytest.raises(SnapshotError, match="its name must say its watermark"):
        Overlay.open(made.folder / ITEMS)
    more = path.rename(tmp_path / "7-9.snap")
    with pytest.raises(SnapshotError, match="says that it holds 9 records, and has 7"):
        Overlay.open(more)
    more.write_bytes(more.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match="bytes, not"):
        Overlay.open(more)


def test_overlays_of_a_folder_come_in_the_order_of_their_changes(tmp_path: Path) -> None:
    made = tiny_release(tmp_path)
    for watermark in (100, 9, 20):
        overlay_of(made, tmp_path, watermark=watermark)
    assert [path.name for path in overlays_in(tmp_path)] == ["9-5.snap", "20-5.snap", "100-5.snap"]


def test_an_overlay_may_only_delete(tmp_path: Path) -> None:
    made = tiny_release(tmp_path)
    ranker = Ranker.open(made.folder).with_overlay(deleting(made, tmp_path, made.item_ids[:2]))
    ranking = ranker.rank(ranker.decoders.rank(dumps({"candidates": made.item_ids[:4], "top_k": 4})))
    assert ranking.missing.tolist() == made.item_ids[:2]
