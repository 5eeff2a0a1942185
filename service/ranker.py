"""Rank one request: encode the user, run the tower, score the candidates, keep k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from cache.release import BUNDLE, INDEX, ITEMS, Release, read_release
from cache.snapshot import Snapshot
from kernel.reference import explain, score, top_k
from model.bundle import Bundle, Calibration, open_bundle
from model.errors import FeatureError
from model.features import HISTORY
from model.tower import Tower
from service.errors import ReleaseError, RequestError, RetrievalOff
from service.telemetry import StageClock
from service.wire import Decoders, RankRequest, RetrieveRequest, UserRequest, decoders, nearest, short

if TYPE_CHECKING:
    from cache.index import RetrievalIndex

KERNEL = "numpy"  # the level that scores: the reference in kernel/reference.py
MEASURED_ROWS, MEASURED_TIMES = 2048, 3

Rank = RankRequest[Any, Any]


class Explanation(NamedTuple):
    """For each item and each user head, the item head that won and its similarity."""

    item_heads: NDArray[np.int32]  # (k, user heads)
    similarities: NDArray[np.float32]  # (k, user heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The best items, best first; then, where asked for, those that the release does not know."""

    release: str
    user_known: bool | None  # None where the request named no user
    candidates: int
    missing: list[Any]  # (m,) ids of unknown candidates in the caller's order
    ids: list[Any]  # (k,)
    positions: NDArray[np.int32] | None  # (k,) into the caller's list, None when retrieved
    scores: NDArray[np.float32]  # (k,), never rising, NaN for unknown items at the end
    probabilities: NDArray[np.float32] | None  # (k,), None without calibration
    explanation: Explanation | None  # of the known items among the k


class _User(NamedTuple):
    features: NDArray[np.int32]  # (user width,)
    known: bool | None


class Ranker:
    """Answers from one release and one user table. Immutable: to update, build another and swap the reference."""

    def __init__(
        self,
        document: Release,
        bundle: Bundle,
        items: Snapshot,
        *,
        users: Snapshot | None = None,
        index: RetrievalIndex | None = None,
        tower: Tower | None = None,
    ) -> None:
        _check_items(document, bundle, items)
        _check_users(bundle, users)
        self.document, self.bundle, self.items, self.users, self.index = document, bundle, items, users, index
        self.release = document.id
        self.spec, self.head = bundle.spec, bundle.head
        self._tower = tower or bundle.user_tower()
        self._columns = self.spec.columns("user")
        self.names = {  # of the fields that `user` and `context` take
            side: tuple(f.name for f in self.spec.user_fields if f.side == side and f.name != HISTORY)
            for side in ("user", "context")
        }

    @classmethod
    def open(cls, folder: Path, users: Path | None = None, *, retrieval: bool = False) -> Ranker:
        """Open a release folder that its store has verified.

        Raises StoreError, BundleError, SnapshotError or ReleaseError unless all parts are whole and belong together.
        """
        document = read_release(folder)
        return cls(
            document,
            open_bundle(folder / BUNDLE),
            Snapshot.open(folder / ITEMS),
            users=Snapshot.open(users) if users else None,
            index=_open_index(folder / INDEX) if retrieval and document.index != "none" else None,
        )

    def with_users(self, users: Path | None) -> Ranker:
        """The same release with another user table. Raises SnapshotError or ReleaseError unless it fits."""
        table = Snapshot.open(users) if users else None
        return Ranker(self.document, self.bundle, self.items, users=table, index=self.index, tower=self._tower)

    @cached_property
    def decoders(self) -> Decoders:
        """Readers of bodies whose ids are of this release's types."""
        return decoders(self.spec.user_id_type, self.spec.item_id_type)

    # --- ranking

    def rank(self, request: Rank, clock: StageClock | None = None) -> Ranking:
        """Rank the candidates for the user. Raises RequestError naming the field that cannot be answered."""
        return self._rank([request], [""], clock or StageClock())[0]

    def rank_batch(self, requests: Sequence[Rank], clock: StageClock | None = None) -> list[Ranking]:
        """The same for several, equal to one by one, with one lookup for all. Errors name `requests[2].user.age`."""
        return self._rank(requests, [f"requests[{k}]." for k in range(len(requests))], clock or StageClock())

    def _rank(self, requests: Sequence[Rank], places: Sequence[str], clock: StageClock) -> list[Ranking]:
        users = [self._encode(request, place) for request, place in zip(requests, places, strict=True)]
        clock.lap("encode")
        records = [self._tower.run(user.features[None])[0] for user in users]  # one by one: the same bits as alone
        clock.lap("user")
        rankings = []
        for request, place, user, record, rows in zip(
            requests, places, users, records, self._lookup(requests), strict=True
        ):
            known = np.flatnonzero(rows >= 0).astype(np.int32)
            if len(known) < len(rows) and request.on_missing == "error":
                raise self._unknown_items(request, rows, place)
            scores = score(self.head, record, self.items.records[rows if len(known) == len(rows) else rows[known]])
            clock.lap("score")
            rankings.append(self._keep(request, user, record, rows, known, scores))
            clock.lap("topk")
        return rankings

    def _lookup(self, requests: Sequence[Rank]) -> Iterator[NDArray[np.int32]]:
        """Rows (n,) of each request's candidates, -1 where unknown, from one lookup."""
        lists = [request.candidates for request in requests]
        ids = lists[0] if len(lists) == 1 else [id_ for one in lists for id_ in one]
        rows = self.items.lookup(np.array(ids, np.int64) if self.items.id_type == "int" else ids)
        ends = np.cumsum([len(one) for one in lists]).tolist()
        return (rows[end - len(one) : end] for one, end in zip(lists, ends, strict=True))

    def _keep(
        self,
        request: Rank,
        user: _User,
        record: NDArray[np.float32],  # (user size,)
        rows: NDArray[np.int32],  # (n,) -1 where unknown
        known: NDArray[np.int32],  # (m,) positions of known candidates
        scores: NDArray[np.float32],  # (m,)
    ) -> Ranking:
        """The k best, then unknown items in the caller's order if they are wanted. k is clamped in `top_k` alone."""
        best = top_k(scores, request.k)
        positions, kept = known[best], scores[best]
        explanation = self._explain(record, rows[positions]) if request.explain else None
        missing = np.flatnonzero(rows < 0).astype(np.int32)
        if request.on_missing != "drop":
            last = missing[: max(0, request.k - len(best))]
            positions = np.concatenate([positions, last])
            kept = np.concatenate([kept, np.full(len(last), np.nan, np.float32)])
        return Ranking(
            release=self.release,
            user_known=user.known,
            candidates=len(rows),
            missing=[request.candidates[position] for position in missing.tolist()],
            ids=[request.candidates[position] for position in positions.tolist()],
            positions=positions,
            scores=kept,
            probabilities=_probabilities(self.bundle.calibration, kept),
            explanation=explanation,
        )

    def retrieve(self, request: RetrieveRequest[Any, Any], clock: StageClock | None = None) -> Ranking:
        """The best items of the catalogue: each user head searches, the union is scored exactly.

        Raises RetrievalOff where there is no index.
        """
        clock = clock or StageClock()
        if self.index is None:
            raise self._no_index()
        user = self._encode(request, "")
        clock.lap("encode")
        record = self._tower.run(user.features[None])[0]
        clock.lap("user")
        rows = np.asarray(self.index.search(record, request.items_per_head), np.int32)
        scores = score(self.head, record, self.items.records[rows])
        clock.lap("score")
        best = top_k(scores, request.k)
        ranking = Ranking(
            release=self.release,
            user_known=user.known,
            candidates=len(rows),
            missing=[],
            ids=self.items.ids(rows[best]).tolist(),
            positions=None,
            scores=scores[best],
            probabilities=_probabilities(self.bundle.calibration, scores[best]),
            explanation=self._explain(record, rows[best]) if request.explain else None,
        )
        clock.lap("topk")
        return ranking

    def _explain(self, record: NDArray[np.float32], rows: NDArray[np.int32]) -> Explanation:
        return Explanation(*explain(self.head, record, self.items.records[rows]))

    # --- the user

    def _encode(self, request: UserRequest[Any, Any], place: str) -> _User:
        """Input of the user tower: the row of the user table, and over it what the request sends, field by field."""
        sent = self._sent(request, place)
        try:
            features = self.spec.encode_row("user", sent)
        except FeatureError as error:
            field = f"{place}{self._path(error.field)}"
            detail, _, remedy = error.detail.rpartition(": ")
            raise RequestError(f"{field}: {short(detail, 160)}", field=field, remedy=remedy) from error
        row = self._user_row(request.user_id)
        if row is None:
            return _User(features, None if request.user_id is None else False)
        stored = row.copy()
        for name in sent:
            stored[self._columns[name]] = features[self._columns[name]]
        return _User(stored, True)

    def _sent(self, request: UserRequest[Any, Any], place: str) -> dict[str, Any]:
        """Every field that the request gives a value, by name. Raises RequestError on a name that is no field."""
        sent: dict[str, Any] = {}
        for side, values in (("user", request.user), ("context", request.context)):
            for name in values or ():
                if name not in self.names[side]:
                    raise self._unknown_field(side, name, place)
            sent |= values or {}
        if request.history is not None and HISTORY in self._columns:
            sent[HISTORY] = request.history
        if request.user_id is not None and self.spec.user_id_name in self.names["user"]:
            sent.setdefault(self.spec.user_id_name, request.user_id)
        return sent

    def _user_row(self, user_id: int | str | None) -> NDArray[np.int32] | None:
        """(user width,) of a known user."""
        if user_id is None or self.users is None:
            return None
        wanted: Any = [user_id]
        row = int(self.users.lookup(wanted)[0])
        return None if row < 0 else self.users.records[row]

    # --- what it is

    @cached_property
    def candidate_ns(self) -> float:
        """Nanoseconds that scoring one candidate takes on this machine, measured when first asked for."""
        count = min(len(self.items), MEASURED_ROWS)
        record, rows = np.zeros(self.head.user_size, np.float32), np.linspace(0, len(self.items) - 1, count).astype(int)
        spent = []
        for _ in range(MEASURED_TIMES):
            start = perf_counter_ns()
            score(self.head, record, self.items.records[rows])
            spent.append(perf_counter_ns() - start)
        return min(spent) / max(count, 1)

    def check(self) -> None:
        """Recompute the bundle's golden outputs. Raises BundleError when this machine gives others."""
        self.bundle.check_probe(self._tower, self.bundle.item_tower())

    def warm_up(self) -> float:
        """Answer the bundle's recorded requests; returns the nanoseconds that a candidate costs, for the record.

        Raises RequestError when this release cannot answer what it was made for.
        """
        for body in self.bundle.warmup:
            self.rank(self.decoders.rank(orjson.dumps(body)))
        return self.candidate_ns

    def sample(self, items: int, users: int, seed: int) -> tuple[list[Any], list[Any]]:
        """Ids drawn without repetition from the catalogue and the user table, as many as there are at most."""
        rng = np.random.default_rng(seed)
        return _draw(self.items, items, rng), _draw(self.users, users, rng) if self.users else []

    def describe(self) -> dict[str, Any]:
        """`schema.ReleaseAnswer`."""
        manifest = self.bundle.manifest
        return {
            "release": self.release,
            "bundle": self.bundle.id,
            "snapshot": self.items.id,
            "created": self.document.created,
            "items": len(self.items),
            "users": len(self.users) if self.users else 0,
            "item_id_type": self.spec.item_id_type,
            "user_id_type": self.spec.user_id_type,
            "fields": {side: list(names) for side, names in self.names.items()},
            "head": self.head.to_json(),
            "network": manifest["network"],
            "metrics": manifest.get("metrics", {}),
            "calibrated": self.bundle.calibration is not None,
            "retrieval": self.index is not None,
            "kernel": KERNEL,
        }

    # --- refusals

    def _unknown_items(self, request: Rank, rows: NDArray[np.int32], place: str) -> RequestError:
        missing = np.flatnonzero(rows < 0)
        field = f"{place}candidates[{missing[0]}]"
        named = short(repr(request.candidates[missing[0]]))
        which = "the only one" if len(missing) == 1 else f"the first of {len(missing)} such"
        return RequestError(
            f"{field} is {named}, unknown to release {self.release} ({which} among {len(rows)} candidates)",
            field=field,
            remedy="publish these items, leave them out, or send on_missing last or drop",
        )

    def _unknown_field(self, side: str, name: str, place: str) -> RequestError:
        other = "context" if side == "user" else "user"
        if name == HISTORY:
            remedy = "send `history` beside `user`, not in it"
        elif name in self.names[other]:
            remedy = f"it is a field of `{other}`: send it there"
        else:
            remedy = nearest(name, self.names[side])
        field = short(f"{place}{side}.{name}", 200)
        return RequestError(f"{field} is not a field of release {self.release}", field=field, remedy=remedy)

    def _path(self, name: str) -> str:
        if name == HISTORY:
            return name
        return next((f"{side}.{name}" for side, names in self.names.items() if name in names), name)

    def _no_index(self) -> RetrievalOff:
        if self.document.index == "none":
            return RetrievalOff(
                f"release {self.release} has no retrieval index", remedy="publish it with --index flat or ivf-sq8"
            )
        return RetrievalOff(f"the index of release {self.release} is not loaded", remedy="serve with --retrieval")


def _open_index(path: Path) -> RetrievalIndex:
    from cache.index import RetrievalIndex  # faiss comes into memory only where retrieval is on

    return RetrievalIndex.open(path)


def _check_items(document: Release, bundle: Bundle, items: Snapshot) -> None:
    """Raise ReleaseError unless the snapshot was embedded with this bundle and can be scored here."""
    if bundle.head.kind == "onnx" or items.records.dtype.kind != "f":
        raise ReleaseError(
            f"release {document.id} has a {bundle.head.kind} head over {items.records.dtype} records, not scored here",
            remedy="export a maxsim or cross_attention head and publish floats",
        )
    if not document.bundle_id == bundle.id == items.owner:
        raise ReleaseError(
            f"release {document.id} is of bundle {document.bundle_id}, holds {bundle.id}, and items of {items.owner}",
            remedy="publish the release again",
        )
    found = (items.kind, items.id_type, items.record_size)
    wanted = ("items", bundle.spec.item_id_type, bundle.head.item_size)
    if found != wanted:
        raise ReleaseError(
            f"release {document.id}: its table is {found} (kind, id type, floats), bundle {bundle.id} reads {wanted}",
            remedy="publish the release again",
        )


def _check_users(bundle: Bundle, users: Snapshot | None) -> None:
    """Raise ReleaseError unless the user table was encoded with the bundle's specification."""
    spec = bundle.spec
    if users is None:
        return
    found = (users.kind, users.owner, users.id_type, users.record_size)
    wanted = ("users", spec.id, spec.user_id_type, spec.user_width)
    if found != wanted or users.records.dtype != np.int32:
        raise ReleaseError(
            f"user table {users.path} is {found} of {users.records.dtype}, bundle {bundle.id} reads {wanted} of int32",
            remedy="publish the users again with this bundle",
        )


def _probabilities(calibration: Calibration | None, scores: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """sigmoid(a * score + b), (k,) float32; NaN stays NaN."""
    if calibration is None:
        return None
    logits = calibration.a * scores.astype(np.float64) + calibration.b
    return (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)


def _draw(table: Snapshot, count: int, rng: np.random.Generator) -> list[Any]:
    rows = rng.choice(len(table), min(count, len(table)), replace=False) if len(table) else np.empty(0, np.int64)
    ids: list[Any] = table.ids(rows).tolist()
    return ids
