"""Rival `plain`: typed FastAPI body and answer, vectors from Redis by one MGET, NumPy MaxSim. A team's first day.

Redis holds one value for each item, its head vectors in float16, under `item:<id>`. Unknown items come last, without a
score. hiredis parses the answers; pydantic validates body and answer, as FastAPI's documentation has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import redis
from fastapi import FastAPI, HTTPException
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.rivals.serving import Users, best, maxsim, serve

LOAD_ITEMS = 5_000  # in one MSET
MAX_CANDIDATES = 20_000
Value = bool | int | float | str | None


class Body(BaseModel):
    """A request."""

    model_config = ConfigDict(extra="forbid")

    user: dict[str, Value | list[Value]] = {}
    context: dict[str, Value | list[Value]] = {}
    history: list[int] = []
    candidates: Annotated[list[int], Field(max_length=MAX_CANDIDATES)]
    top_k: Annotated[int, Field(ge=0)] = 100


class Item(BaseModel):
    """One item of the answer."""

    id: int
    score: float | None
    position: int


class Ranking(BaseModel):
    """The answer, best first."""

    items: list[Item]
    missing: list[int]


def key(id_: int) -> bytes:
    return b"item:%d" % id_


def load(url: str, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
    """Write vectors (n, size) of ids (n,) as float16."""
    with redis.Redis.from_url(url) as store:
        for start in range(0, len(ids), LOAD_ITEMS):
            part = np.ascontiguousarray(vectors[start : start + LOAD_ITEMS], np.float16)
            names = ids[start : start + LOAD_ITEMS].tolist()
            store.mset({key(id_): row.tobytes() for id_, row in zip(names, part, strict=True)})


class Ranker:
    """Scores candidates by what Redis holds of them."""

    def __init__(self, bundle: Path, url: str) -> None:
        self._users = Users(bundle)
        self._store = redis.Redis.from_url(url)
        self._store.ping()

    def rank(self, body: Body) -> Ranking:
        """Raises ValueError where a field cannot be encoded."""
        user = self._users.heads(body.user, body.context, body.history)
        values = self._fetch(body.candidates)
        known = [position for position, value in enumerate(values) if value is not None]
        missing = [position for position, value in enumerate(values) if value is None]
        flat = np.frombuffer(b"".join(values[position] for position in known), np.float16)
        scores = maxsim(self._users.head, user, flat.astype(np.float32).reshape(len(known), self._users.head.item_size))
        chosen = best(scores, body.top_k).tolist()
        items = [
            Item(id=body.candidates[known[row]], score=score, position=known[row])
            for row, score in zip(chosen, scores[chosen].tolist(), strict=True)
        ]
        items += [Item(id=body.candidates[p], score=None, position=p) for p in missing[: body.top_k - len(items)]]
        return Ranking(items=items, missing=[body.candidates[position] for position in missing])

    def _fetch(self, ids: Sequence[int]) -> list[Any]:
        values: Any = self._store.mget([key(id_) for id_ in ids]) if ids else []
        return list(values)


def create(bundle: Path, url: str) -> FastAPI:
    """The application."""
    app, ranker = FastAPI(), Ranker(bundle, url)

    @app.post("/v1/rank", response_model=Ranking)
    def rank(body: Body) -> Ranking:  # `def`: FastAPI runs it in a thread, since it waits for Redis
        try:
            return ranker.rank(body)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    serve(lambda: create(options.bundle, options.redis), options.port)


if __name__ == "__main__":
    main()
