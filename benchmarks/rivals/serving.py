"""What all rivals share with RankTower, so that only their own work differs: server, user tower, encoding, threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from kernel.head import HeadSpec
from model.bundle import open_bundle
from model.errors import FeatureError
from model.features import HISTORY

HOST = "127.0.0.1"
IDLE_S = 75  # as RankTower's: no connection closes between two rare requests
LOG_LEVEL = "info"

Floats = NDArray[np.float32]


class Users:
    """From the fields of a request to the user's head vectors, by RankTower's own encoding and ONNX tower."""

    def __init__(self, folder: Path) -> None:
        bundle = open_bundle(folder)
        if bundle.head.kind != "maxsim" or bundle.head.item_bias:
            raise ValueError(f"bundle {bundle.id} has a {bundle.head.kind} head: the rivals score maxsim without bias")
        self.head: HeadSpec = bundle.head
        self._spec, self._tower = bundle.spec, bundle.user_tower()

    def heads(self, user: Mapping[str, Any], context: Mapping[str, Any], history: Sequence[Any]) -> Floats:
        """(user heads, dim) float32. Raises ValueError naming the field that cannot be encoded."""
        try:
            features = self._spec.encode_row("user", {**user, **context, HISTORY: history})
        except FeatureError as error:
            raise ValueError(f"{error.field}: {error.detail}") from error
        record: Floats = self._tower.run(features[None])[0]
        return record.reshape(self.head.user_heads, self.head.dim)


def maxsim(head: HeadSpec, user: Floats, items: Floats) -> Floats:
    """scale * sum_p max_q <u_p, v_q>, (n,), of user heads (Hu, d) and records (n, Hi * d): one matrix product."""
    dots = items.reshape(-1, head.dim) @ user.T  # (n * Hi, Hu)
    heads = dots.reshape(len(items), head.item_heads, head.user_heads)
    scores: Floats = heads.max(axis=1).sum(axis=1) * np.float32(head.scale)
    return scores


def best(scores: Floats, k: int) -> NDArray[np.int64]:
    """Positions of the k highest scores, best first."""
    k = min(k, len(scores))
    if not k:
        return np.empty(0, np.int64)
    kept = np.argpartition(scores, len(scores) - k)[len(scores) - k :]
    return kept[np.argsort(-scores[kept], kind="stable")]


def serve(create: Callable[[], FastAPI], port: int) -> None:
    """One process with the server, loop, parser and log that RankTower runs with, NumPy held to one thread as there."""
    with threadpool_limits(limits=1, user_api="blas"):
        uvicorn.run(
            create(),
            host=HOST,
            port=port,
            loop="uvloop",
            http="httptools",
            ws="none",
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            log_level=LOG_LEVEL,
        )
