"""Measure a checkpoint or a bundle on frozen held-out lists, beside popularity and random on the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernel.head import Scorer
from model.bundle import open_bundle
from model.datasets.log import IMPRESSION, SPLITS, TEST, Log
from model.errors import DataError
from model.features import HISTORY, UNKNOWN, FeatureSpec, IdType, Side, Tower
from model.metrics import METRICS, Interval, bootstrap, group_auc, rank
from model.requests import SplitRequests, encode_items, encode_users, plain
from model.sampling import Lists, evaluation_lists, popularity

SIZE = 200  # items of a held-out list
KS = (10, 50)  # of a training run; the command line has more
DROPPED = ("unknown_user", "unknown_item")  # rows that no table could tell anything of
Towers = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Row = dict[str, Interval]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Frozen lists of one split; `digest` names them."""

    requests: SplitRequests
    lists: Lists

    @property
    def digest(self) -> str:
        """sha256 of the lists, 64 hex digits."""
        return self.lists.digest

    def take(self, rows: np.ndarray) -> HeldOut:
        """The lists at `rows`, (m,) int or bool."""
        return HeldOut(requests=self.requests.take(rows), lists=self.lists.take(rows))

    def describe(self) -> dict[str, Any]:
        """Counts and digest for metrics.json."""
        with_positive = int((self.lists.grade > 0).any(axis=1).sum())
        return {
            "digest": self.digest,
            "lists": with_positive,
            "left_out": len(self.lists) - with_positive,  # without a positive
            "users": len(np.unique(self.requests.user)),
            "size": int(self.lists.mask.sum(axis=1).max(initial=0)),
        }


def held_out(
    log: Log,
    split: int = TEST,
    *,
    size: int = SIZE,
    seed: int = 0,
    random_only: bool = False,
    new_items: bool = True,
) -> HeldOut:
    """The frozen lists of a split (`evaluation_lists`). Raises DataError when no list of it holds a positive."""
    requests, lists = evaluation_lists(log, split, size=size, seed=seed, random_only=random_only, new_items=new_items)
    if not (lists.grade > 0).any():
        raise DataError(f"log {log.schema.name}: no {SPLITS[split]} list has a positive: widen the split in log.toml")
    return HeldOut(requests=requests, lists=lists)


def measure(scores: np.ndarray, held: HeldOut, ks: Sequence[int] = KS) -> Row:
    """Every metric of scores (L, n) with its interval over users."""
    columns, weights = list_metrics(scores, held.lists, held.requests.user, ks)
    return bootstrap(columns, held.requests.user, weights)


def list_metrics(
    scores: np.ndarray, lists: Lists, user: np.ndarray, ks: Sequence[int] = KS
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every metric of scores (L, n) by list, and the weights of those that have any: (L,) each, NaN where left out.

    Recall and NDCG rank the whole list; GAUC looks at the impressions alone: does it tell what was taken from what was
    shown? user: (L,) int.
    """
    ranked = rank(scores, lists.grade, lists.mask)
    columns = {f"{name}@{k}": METRICS[name](ranked, k) for k in ks for name in ("recall", "ndcg")}
    shown = lists.stage == IMPRESSION
    _, first, code = np.unique(user, return_index=True, return_inverse=True)
    shown_by = np.repeat(code.ravel(), shown.sum(axis=1))
    area, sizes = group_auc(scores[shown], lists.grade[shown] > 0, shown_by, len(first))
    columns["gauc"], weight = np.full(len(user), np.nan), np.zeros(len(user))
    columns["gauc"][first], weight[first] = area, sizes  # a user's area stands at the user's first list
    return columns, {"gauc": weight}


def baselines(log: Log, held: HeldOut) -> dict[str, np.ndarray]:
    """Scores (L, n) of training popularity and of chance (a constant: ties take their expected value)."""
    items = held.lists.item
    return {"popularity": popularity(log)[items], "random": np.zeros(items.shape)}


def score_records(scorer: Scorer, user: np.ndarray, item: np.ndarray, held: HeldOut) -> np.ndarray:
    """Scores (L, n) float32 as a service computes them: user (L, Ru), item (I, Ri) records."""
    rows = [scorer(record, item[items]) for record, items in zip(user, held.lists.item, strict=True)]
    return np.stack(rows)


def evaluate_checkpoint(run: Path, log: Log, **options: Any) -> dict[str, Any]:
    """Report of a training run's best weights on a log; see `report`."""
    from model.checkpoint import load_checkpoint
    from model.scoring import score_network

    network, spec, config = load_checkpoint(run)

    def scorer(held: HeldOut) -> np.ndarray:
        return score_network(network, encode_users(spec, log, held.requests), encode_items(spec, log), held.lists)

    return report(log, spec, config["network"], scorer, **options)


def evaluate_bundle(bundle: Path, log: Log, **options: Any) -> dict[str, Any]:
    """Report of an exported bundle on a log, through ONNX Runtime and the serving head; see `report`."""
    opened = open_bundle(bundle)

    def scorer(held: HeldOut) -> np.ndarray:
        user = opened.user_tower().embed(encode_users(opened.spec, log, held.requests))
        item = opened.item_tower().embed(encode_items(opened.spec, log))
        return score_records(opened.scorer(), user, item, held)

    return report(log, opened.spec, opened.manifest["network"]["name"], scorer, **options)


def check_fit(log: Log, spec: FeatureSpec) -> list[str]:
    """The fields of the model that the log lacks: they are read as missing. Its users and items may all be new.

    Raises DataError where ids differ, or where a field of the log has the name of a model's and is another.
    """
    absent = []
    where, names = f"log {log.schema.name}", log.schema.columns
    if (spec.user_id_type, spec.item_id_type) != (log.users.id_type, log.items.id_type):
        raise DataError(
            f"{where} has {log.users.id_type} user ids and {log.items.id_type} item ids, the model was "
            f"trained on {spec.user_id_type} and {spec.item_id_type}: convert the log"
        )
    ids = {"user": (names.user, spec.user_id_name), "item": (names.item, spec.item_id_name)}
    for side, (ours, theirs) in ids.items():
        if ours != theirs:
            raise DataError(
                f"{where}: the {side} id is column {ours!r}, the model was trained with {theirs!r}: rename the column, "
                "or evaluate a model of this log"
            )
    for field in spec.fields:
        known = {column.name: column for column in log.schema.fields}
        if field.name in (HISTORY, ids.get(field.side, ("",))[0]):
            continue  # the history is made from events, the id is always there
        if field.name not in known:
            absent.append(field.name)
            continue
        found = known[field.name]
        if (found.side, found.kind) != (field.side, field.kind):
            raise DataError(
                f"{where}: {field.name!r} is a {found.kind} {found.side} field, the model reads it as a {field.kind} "
                f"{field.side} field: declare it so in log.toml, or evaluate a model of this log"
            )
        if field.kind != "numeric":
            check_values(log, field.name, field.side, spec.owner(field).values)
    return absent


def check_values(log: Log, name: str, side: Side, expected: IdType) -> None:
    """Raise DataError where a column holds text and the model was trained on integers, or the other way round."""
    column = {"user": log.users.columns, "item": log.items.columns, "context": log.context}[side][name]
    values = (value for entry in column for value in (entry if isinstance(entry, np.ndarray) else (entry,)))
    first = next((value for value in values if value is not None and value == value), None)
    found = "string" if isinstance(first, str) else "int"
    if first is not None and found != expected:
        kinds = {"string": "text", "int": "integers"}
        raise DataError(
            f"log {log.schema.name}: {side} field {name!r} holds {kinds[found]}, such as {plain(first)!r}, "
            f"the model was trained on {kinds[expected]}: write the column as it was then"
        )


def report(
    log: Log,
    spec: FeatureSpec,
    name: str,
    scorer: Callable[[HeldOut], np.ndarray],
    *,
    split: int = TEST,
    size: int = SIZE,
    seed: int = 0,
    random_only: bool = False,
    ks: Sequence[int] = KS,
) -> dict[str, Any]:
    """Metrics of a scorer, popularity and random on the same frozen lists, as plain JSON."""
    absent = check_fit(log, spec)
    held = held_out(log, split, size=size, seed=seed, random_only=random_only)
    rows = {name: measure(scorer(held), held, ks)}
    rows |= {row: measure(scores, held, ks) for row, scores in baselines(log, held).items()}
    return {
        "log": log.schema.name,
        "split": SPLITS[split],
        "lists": held.describe(),
        "new": new_to(spec, log, held),
        "missing": absent,
        "dropped": {name: log.report[name] for name in DROPPED},
        "rows": rows_to_json(rows),
    }


def new_to(spec: FeatureSpec, log: Log, held: HeldOut) -> dict[str, int]:
    """Users and items of the lists that the model was not trained on; of a side whose id it does not read, none."""
    asked: tuple[tuple[Tower, str, str, np.ndarray], ...] = (
        ("user", "users", spec.user_id_name, log.users.ids[np.unique(held.requests.user)]),
        ("item", "items", spec.item_id_name, log.items.ids[np.unique(held.lists.item[held.lists.mask])]),
    )
    found = {}
    for tower, name, column, ids in asked:
        place = spec.columns(tower).get(column)
        encoded = spec.encode(tower, {column: ids}, len(ids))
        found[name] = 0 if place is None else int((encoded[:, place] == UNKNOWN).sum())
    return found


def rows_to_json(rows: dict[str, Row]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Intervals as numbers."""
    return {name: {metric: value.to_json() for metric, value in row.items()} for name, row in rows.items()}
