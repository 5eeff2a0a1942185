"""Rank one request: encode the user, run the tower, score the candidates, keep k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from cache.overlay import Overlay
from cache.release import BUNDLE, INDEX, ITEMS, Release, read_release
from cache.snapshot import Snapshot, as_integers, as_texts
from kernel.engine import Ranked, Table, check_native, top_k
from kernel.ids import Ids, Texts
from kernel.items import probabilities
from kernel.record import RecordLayout
from kernel.reference import explain
from model.bundle import Bundle, Calibration, open_bundle, read_probe
from model.errors import FeatureError
from model.features import HISTORY
from model.tower import Tower
from service.errors import ReleaseError, RequestError, RetrievalOff
from service.telemetry import StageClock
from service.user_cache import UserCache
from service.wire import Decoders, RankRequest, RetrieveRequest, UserRequest, decoders, nearest, short

if TYPE_CHECKING:
    from cache.index import RetrievalIndex

MORE = 8  # times as many are searched for where most of what is found is replaced or deleted
MEASURED_ROWS, MEASURED_TIMES = 2048, 3
KERNEL_TOLERANCE = 1e-3  # in units of user heads * scale; int8 users are rounded to 16 bits

Rank = RankRequest[Any, Any]


class Explanation(NamedTuple):
    """For each item and each user head, the item head that won and its similarity."""

    item_heads: NDArray[np.int32]  # (k, user heads)
    similarities: NDArray[np.float32]  # (k, user heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The best items, best first; then, where asked for, those that the release does not know."""

    release: str
    watermark: int  # position of the last change to the items that the answer knows
    user_known: bool | None  # None where the request named no user
    candidates: int
    scored: int  # fewer than candidates less missing where the deadline passed meanwhile
    missing: Ids  # (m,) unknown candidates in the caller's order
    kept: Ids  # (k,)
    positions: NDArray[np.int32] | None  # (k,) into the caller's list, None when retrieved
    scores: NDArray[np.float32]  # (k,), never rising, NaN for unknown items at the end
    probabilities: NDArray[np.float32] | None  # (k,), None without calibration
    explanation: Explanation | None  # of the known items among the k

    @property
    def ids(self) -> list[Any]:
        """The k ids as Python has them."""
        return self.kept.tolist()


class _User(NamedTuple):
    features: NDArray[np.int32]  # (user width,)
    known: bool | None


class Ranker:
    """Answers from one release, what came after it and one user table. Immutable: build another to update, and swap."""

    def __init__(
        self,
        document: Release,
        bundle: Bundle,
        items: Snapshot,
        *,
        overlay: Overlay | None = None,
        users: Snapshot | None = None,
        index: RetrievalIndex | None = None,
        tower: Tower | None = None,
        table: Table | None = None,
        user_cache: UserCache | None = None,
    ) -> None:
        """table: of the release's items, without the overlay."""
        _check_items(document, bundle, items)
        _check_users(bundle, users)
        self.document, self.bundle, self.items, self.users, self.index = document, bundle, items, users, index
        self._release_table = items.table(bundle.head, bundle.graph()) if table is None else table
        if overlay is not None:
            _check_overlay(document, items, overlay)
        self.overlay = overlay
        self.table = self._release_table if overlay is None else overlay.over(self._release_table)
        self.watermark = document.watermark if overlay is None else overlay.watermark
        self.release = document.id
        self.spec, self.head = bundle.spec, bundle.head
        self._tower, self._user_cache = tower or bundle.user_tower(), user_cache
        self._columns = self.spec.columns("user")
        self.names = {  # of the fields that `user` and `context` take, in their order
            side: dict.fromkeys(f.name for f in self.spec.user_fields if f.side == side and f.name != HISTORY)
            for side in ("user", "context")
        }

    @classmethod
    def open(
        cls,
        folder: Path,
        users: Path | None = None,
        *,
        retrieval: bool = False,
        user_cache: UserCache | None = None,
    ) -> Ranker:
        """Open a release folder that its store has verified. Rankers of several releases may share a user cache.

        Raises StoreError, BundleError, SnapshotError or ReleaseError unless all parts are whole and belong together.
        """
        document = read_release(folder)
        return cls(
            document,
            open_bundle(folder / BUNDLE),
            Snapshot.open(folder / ITEMS),
            users=Snapshot.open(users) if users else None,
            index=_open_index(folder / INDEX) if retrieval and document.index != "none" else None,
            user_cache=user_cache,
        )

    def with_users(self, users: Path | None) -> Ranker:
        """The same release with another user table. Raises SnapshotError or ReleaseError unless it fits."""
        return self._with(self.overlay, Snapshot.open(users) if users else None)

    def with_overlay(self, overlay: Overlay | None) -> Ranker:
        """The same release under another overlay. Raises SnapshotError or ReleaseError unless it fits."""
        ranker = self._with(overlay, self.users)
        if self.index is not None:
            _ = ranker._held  # looked up here, not by the first search
        ranker.candidate_ns = self.candidate_ns  # the same records on the same machine
        return ranker

    def _with(self, overlay: Overlay | None, users: Snapshot | None) -> Ranker:
        return Ranker(
            self.document,
            self.bundle,
            self.items,
            overlay=overlay,
            users=users,
            index=self.index,
            tower=self._tower,
            table=self._release_table,
            user_cache=self._user_cache,
        )

    @cached_property
    def decoders(self) -> Decoders:
        """Readers of bodies whose ids are of this release's types."""
        return decoders(self.spec.user_id_type, self.spec.item_id_type)

    # --- ranking

    def rank(self, request: Rank, clock: StageClock | None = None, deadline_ns: int = 0) -> Ranking:
        """Rank the candidates for the user. Raises RequestError naming the field that cannot be answered.

        Scoring ends at the deadline (time.monotonic_ns; 0 is none); what is not scored by then follows what is.
        """
        clock = clock or StageClock()
        user = self._encode(request, "")
        clock.lap("encode")
        record = self._record(user.features)
        clock.lap("user")
        ids = self._ids(request)
        ranked = self.table.rank(record, ids, request.k, deadline_ns)
        clock.lap("score")
        ranking = self._keep(request, "", user, record, ids, ranked)
        clock.lap("topk")
        return ranking

    def rank_batch(
        self,
        requests: Sequence[Rank],
        clock: StageClock | None = None,
        deadline_ns: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[Ranking]:
        """The same for several in one call of the kernel, equal to one by one.

        Errors name `requests[2].user.age`; numbers: places of the requests in the batch that they are a part of.
        """
        clock = clock or StageClock()
        if not requests:
            return []
        places = [f"requests[{number}]." for number in numbers or range(len(requests))]
        users = [self._encode(request, place) for request, place in zip(requests, places, strict=True)]
        clock.lap("encode")
        records = np.stack([self._record(user.features) for user in users])  # one by one: the same bits
        clock.lap("user")
        lists = [self._ids(request) for request in requests]
        ranked = self.table.rank_batch(records, lists, [request.k for request in requests], deadline_ns)
        clock.lap("score")
        rankings = [self._keep(*one) for one in zip(requests, places, users, records, lists, ranked, strict=True)]
        clock.lap("topk")
        return rankings

    def _record(self, features: NDArray[np.int32]) -> NDArray[np.float32]:
        """The user's record (user size,) of encoded features (user width,)."""
        if self._user_cache is None:
            alone: NDArray[np.float32] = self._tower.run(features[None])[0]
            return alone
        record = self._user_cache.get(self.release, features)
        if record is None:
            record = self._tower.run(features[None])[0]
            self._user_cache.put(self.release, features, record)
        return record

    def _ids(self, request: Rank) -> Ids:
        """The candidates as the kernel reads them."""
        ids: Any = request.candidates
        if isinstance(ids, (np.ndarray, Texts)):
            return ids
        return as_integers(ids) if self.items.id_type == "int" else as_texts(ids)

    def _keep(
        self,
        request: Rank,
        place: str,
        user: _User,
        record: NDArray[np.float32],  # (user size,)
        ids: Ids,  # (n,)
        ranked: Ranked,
    ) -> Ranking:
        """The best, then what has no score in the caller's order: unknown items if they are wanted, and those that the
        deadline cut off. k is clamped in the kernel alone."""
        missing = ranked.missing
        if len(missing) and request.on_missing == "error":
            raise unknown_items(ids, missing, place, f"release {self.release}")
        positions, scores = ranked.positions, ranked.scores
        explanation = self._explain(record, self.table.lookup(ids[positions])) if request.explain else None
        if len(positions) < request.k and (len(missing) or ranked.seen < len(ids)):
            unscored = np.arange(ranked.seen, len(ids), dtype=np.int32)
            last = unscored if request.on_missing == "drop" else np.concatenate([missing, unscored])
            last = last[: request.k - len(positions)]
            positions = np.concatenate([positions, last])
            scores = np.concatenate([scores, np.full(len(last), np.nan, np.float32)])
        return Ranking(
            release=self.release,
            watermark=self.watermark,
            user_known=user.known,
            candidates=len(ids),
            scored=ranked.seen - len(missing),
            missing=ids[missing] if len(missing) else ids[:0],
            kept=ids[positions],
            positions=positions,
            scores=scores,
            probabilities=_probabilities(self.bundle.calibration, scores),
            explanation=explanation,
        )

    def retrieve(self, request: RetrieveRequest[Any, Any], clock: StageClock | None = None) -> Ranking:
        """The best items of the catalogue: each user head searches, the union is scored exactly.

        What came after the release is in no index: all of it is scored. Raises RetrievalOff where there is no index.
        """
        clock = clock or StageClock()
        if self.index is None:
            raise self.no_index()
        user = self._encode(request, "")
        clock.lap("encode")
        record = self._record(user.features)
        clock.lap("user")
        rows = self._with_newer(np.asarray(self.index.search(record, self._wanted(request.items_per_head)), np.int32))
        scores = self.table.score(record, rows)
        clock.lap("score")
        best = top_k(scores, request.k)
        ranking = Ranking(
            release=self.release,
            watermark=self.watermark,
            user_known=user.known,
            candidates=len(rows),
            scored=len(rows),
            missing=np.empty(0, np.int64),
            kept=self._ids_of(rows[best]),
            positions=None,
            scores=scores[best],
            probabilities=_probabilities(self.bundle.calibration, scores[best]),
            explanation=self._explain(record, rows[best]) if request.explain else None,
        )
        clock.lap("topk")
        return ranking

    def _with_newer(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Rows of the release that are served still, and all of the overlay."""
        if self.overlay is None:
            return rows
        newer = np.arange(len(self.items), len(self.items) + self.overlay.held, dtype=np.int32)
        return np.concatenate([rows[self._served[rows]], newer])

    def _wanted(self, per_head: int) -> int:
        """How many items a head searches for, so that about as many as wanted are served still."""
        if self.overlay is None:
            return per_head
        return min(-(-per_head * len(self.items) // max(self._held, 1)), MORE * per_head)

    @cached_property
    def _served(self) -> NDArray[np.bool_]:
        """(items,) whether a row of the release is neither replaced nor deleted."""
        served = np.ones(len(self.items), np.bool_)
        if self.overlay is not None:
            served[self.overlay.hides(self.items)] = False
        return served

    @cached_property
    def _held(self) -> int:
        """How many these are."""
        return int(np.count_nonzero(self._served))

    def _ids_of(self, rows: NDArray[np.int32]) -> Ids:
        count = len(self.items)
        if self.overlay is None:
            ids = self.items.ids(rows)
        else:
            ids = np.empty(len(rows), np.int64 if self.items.id_type == "int" else object)
            own = rows < count
            ids[own], ids[~own] = self.items.ids(rows[own]), self.overlay.items.ids(rows[~own] - count)
        return ids if self.items.id_type == "int" else Texts.of(ids.tolist())

    def _explain(self, record: NDArray[np.float32], rows: NDArray[np.int32]) -> Explanation:
        return Explanation(*explain(self.head, record, self.table.records(rows)))

    # --- the user

    def _encode(self, request: UserRequest[Any, Any], place: str) -> _User:
        """Input of the user tower: the row of the user table, and over it what the request sends, field by field."""
        if request.explain and self.head.kind == "onnx":
            raise RequestError(
                f"{place}explain: release {self.release} has a head of kind onnx, where no item head wins",
                field=f"{place}explain",
                remedy="leave explain out",
            )
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
            if values and not values.keys() <= self.names[side].keys():
                raise self._unknown_field(side, next(n for n in values if n not in self.names[side]), place)
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
        record, rows = (
            np.zeros(self.head.user_size, np.float32),
            np.linspace(0, len(self.items) - 1, count).astype(np.int32),
        )
        spent = []
        for _ in range(MEASURED_TIMES):
            start = perf_counter_ns()
            self.table.score(record, rows)
            spent.append(perf_counter_ns() - start)
        return min(spent) / max(count, 1)

    def check(self) -> None:
        """Recompute the bundle's golden outputs, and score them with the kernel, too.

        Raises BundleError or ReleaseError when this machine gives others.
        """
        self.bundle.check_probe(self._tower, self.bundle.item_tower())
        if self.head.kind == "onnx":  # its graph has been checked with the towers
            return
        probe = read_probe(self.bundle.folder)
        layout = RecordLayout(self.head, self.items.dtype)
        for user in probe["user_records"]:
            difference = check_native(layout, user, probe["item_records"])
            if not difference <= KERNEL_TOLERANCE:
                raise ReleaseError(
                    f"the kernel at level {self.table.level} differs from the reference by {difference:.1e} "
                    f"(allowed {KERNEL_TOLERANCE:.0e})",
                    remedy="serve with --kernel portable or numpy, and report the processor and the build",
                )

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
        drawn = _draw(len(self.items), items, rng)
        served = drawn[self._served[drawn]]
        people = self.users.ids(_draw(len(self.users), users, rng)).tolist() if self.users else []
        return self.items.ids(served).tolist(), people

    @property
    def changed(self) -> int:
        """How many items are new, changed or deleted behind the release."""
        return 0 if self.overlay is None else len(self.overlay.items)

    def describe(self) -> dict[str, Any]:
        """`schema.ReleaseAnswer`."""
        manifest = self.bundle.manifest
        return {
            "release": self.release,
            "bundle": self.bundle.id,
            "snapshot": self.items.id,
            "created": self.document.created,
            "items": self._held + (self.overlay.held if self.overlay else 0),
            "watermark": self.watermark,
            "users": len(self.users) if self.users else 0,
            "item_id_type": self.spec.item_id_type,
            "user_id_type": self.spec.user_id_type,
            "fields": {side: list(names) for side, names in self.names.items()},
            "head": self.head.to_json(),
            "network": manifest["network"],
            "metrics": manifest.get("metrics", {}),
            "calibrated": self.bundle.calibration is not None,
            "retrieval": self.index is not None,
            "kernel": self.table.level,
            "dtype": self.items.dtype,
        }

    # --- refusals

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

    def no_index(self) -> RetrievalOff:
        """Why there is no retrieval."""
        if self.head.kind == "onnx":
            return RetrievalOff(
                f"release {self.release} has a head of kind onnx, which has no vectors to search",
                remedy="send candidates to /v1/rank",
            )
        if self.document.index == "none":
            return RetrievalOff(
                f"release {self.release} has no index", remedy="publish it with --index flat or ivf-sq8"
            )
        return RetrievalOff(f"the index of release {self.release} is not loaded", remedy="serve with --retrieval")


def unknown_items(ids: Ids, missing: NDArray[np.int32], place: str, owner: str) -> RequestError:
    """Where on_missing is error; owner: the release, as it is called."""
    field = f"{place}candidates[{missing[0]}]"
    named = short(repr(ids[missing[:1]].tolist()[0]))
    which = "the only one" if len(missing) == 1 else f"the first of {len(missing)} such"
    return RequestError(
        f"{field} is {named}, unknown to {owner} ({which} among {len(ids)} candidates)",
        field=field,
        remedy="publish these items, leave them out, or send on_missing last or drop",
    )


def _open_index(path: Path) -> RetrievalIndex:
    from cache.index import RetrievalIndex  # faiss comes into memory only where retrieval is on

    return RetrievalIndex.open(path)


def _check_items(document: Release, bundle: Bundle, items: Snapshot) -> None:
    """Raise ReleaseError unless the snapshot was embedded with this bundle."""
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


def _check_overlay(document: Release, items: Snapshot, overlay: Overlay) -> None:
    """Raise ReleaseError unless the overlay was embedded with the release's bundle, after the release."""
    found = (overlay.items.owner, overlay.items.id_type, overlay.items.record_size, overlay.items.dtype)
    wanted = (items.owner, items.id_type, items.record_size, items.dtype)
    if found != wanted or overlay.watermark < document.watermark:
        raise ReleaseError(
            f"overlay {overlay.items.path} is {found} (bundle, id type, floats, type) to change {overlay.watermark}, "
            f"release {document.id} is {wanted} and holds all up to {document.watermark}",
            remedy="delete the file",
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
    return None if calibration is None else probabilities(scores, calibration.a, calibration.b)


def _draw(rows: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.choice(rows, min(count, rows), replace=False) if rows else np.empty(0, np.int64)
