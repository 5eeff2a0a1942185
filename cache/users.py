"""The table of known users: what a request that names one need not send, and whom checks and load tests draw from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.catalogue import BLOCK_ROWS
from cache.release import Progress, no_progress
from cache.snapshot import Snapshot, SnapshotWriter
from model.bundle import Bundle, read_probe
from model.datasets.log import PADDING, Log, latest_histories, read_log
from model.errors import DataError, FeatureError
from model.features import HISTORY, FeatureSpec


def build_user_table(spec: FeatureSpec, log_folder: Path, out: Path, progress: Progress = no_progress) -> Path:
    """Write the encoded features and the latest history of every user of a log to the snapshot `out`.

    Context is left as missing: it comes with the request. Raises DataError for the log.
    """
    source = read_log(log_folder)
    _check_users(source, spec, log_folder)
    columns = user_columns(source, spec)
    writer = SnapshotWriter(out, kind="users", owner=spec.id, id_type=spec.user_id_type, record_size=spec.user_width)
    with writer:
        for start in range(0, len(source.users), BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, len(source.users)))
            block = {name: column[rows] for name, column in columns.items()}
            ids = source.users.ids[rows]
            try:
                writer.append(ids, spec.encode("user", block, len(ids)))
            except FeatureError as error:
                raise DataError(f"{log_folder}/users.parquet: column {error.field!r}: {error.detail}") from error
            progress("users", rows.stop, len(source.users))
        writer.finish()
    return out


def _check_users(source: Log, spec: FeatureSpec, folder: Path) -> None:
    """Raise DataError unless the users of the log have the ids and the columns that the bundle was trained with."""
    remedy = "publish the users of the log that the bundle was trained on"
    if source.schema.columns.user != spec.user_id_name:
        raise DataError(
            f"{folder}/log.toml: the user ids are in column {source.schema.columns.user!r}, the bundle was trained "
            f"with {spec.user_id_name!r}: {remedy}"
        )
    if source.users.id_type != spec.user_id_type:
        raise DataError(
            f"{folder}/users.parquet holds {source.users.id_type} ids, the bundle was trained with "
            f"{spec.user_id_type} ids: {remedy}"
        )
    known = {*source.users.columns, spec.user_id_name, HISTORY}
    absent = next((field.name for field in spec.user_fields if field.side == "user" and field.name not in known), None)
    if absent is not None:
        raise DataError(
            f"{folder}/log.toml declares no field {absent!r} of the users, which the bundle reads: {remedy}, "
            "or add the column and its [[fields]] entry"
        )


def user_columns(source: Log, spec: FeatureSpec) -> dict[str, Any]:
    """Raw columns of the user side for every user of a log, histories as item ids, oldest first."""
    columns: dict[str, Any] = {**source.users.columns, source.schema.columns.user: source.users.ids}
    history = next((field for field in spec.user_fields if field.name == HISTORY), None)
    if history is not None:
        latest = latest_histories(source, history.length)
        sizes = (latest != PADDING).sum(axis=1).tolist()
        columns[HISTORY] = [source.items.ids[row[:size]] for row, size in zip(latest, sizes, strict=True)]
    return columns


def sample_users(bundle: Bundle, table: Path | None, count: int, seed: int = 0) -> tuple[NDArray[np.float32], str]:
    """Records (u, user size) of up to `count` users, and who they are: drawn from the published table where there is
    one, else the bundle's recorded requests, else its probe."""
    rng = np.random.default_rng(seed)
    if table is not None:
        users = Snapshot.open(table)
        rows = rng.choice(len(users), min(count, len(users)), replace=False)
        features, source = users.records[rows], "published users"
    elif bundle.warmup:
        chosen = rng.choice(len(bundle.warmup), min(count, len(bundle.warmup)), replace=False)
        features = np.stack(
            [bundle.spec.encode_row("user", request_row(bundle.spec, bundle.warmup[k])) for k in chosen.tolist()]
        )
        source = "recorded requests of the bundle (publish with --users for real ones)"
    else:
        features = read_probe(bundle.folder)["user_features"][:count]
        source = "random users of the bundle's probe (publish with --users for real ones)"
    return bundle.user_tower().embed(np.ascontiguousarray(features)), source


def request_row(spec: FeatureSpec, body: dict[str, Any]) -> dict[str, Any]:
    """The user side of a request body as one row of raw features."""
    known = {} if body.get("user_id") is None else {spec.user_id_name: body["user_id"]}
    return {**known, **body.get("user", {}), **body.get("context", {}), HISTORY: body.get("history")}
