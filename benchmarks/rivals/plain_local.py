"""Rival `plain-local`: orjson on the raw body, the catalogue as a float32 matrix in the process. A team's first week.

Ids lie sorted, so np.searchsorted finds the rows of all candidates at once; NumPy scores the gathered rows; orjson
writes the answer. Unknown items come last, without a score.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray

from benchmarks.rivals.serving import Users, best, maxsim, serve

JSON = "application/json"
MAX_CANDIDATES = 20_000


class Ranker:
    """Scores candidates by rows of a matrix in memory."""

    def __init__(self, bundle: Path, vectors: Path) -> None:
        self._users = Users(bundle)
        ids = np.load(vectors.with_name("ids.npy"), allow_pickle=False)
        order = np.argsort(ids)
        self._ids = ids[order]  # (n,) int64, rising
        self._items = np.load(vectors, mmap_mode="r", allow_pickle=False)[order]  # (n, size) float32, in memory

    def rank(self, raw: bytes) -> bytes:
        """Raises ValueError naming what is wrong with the body."""
        body = _checked(orjson.loads(raw))
        wanted = _integers(body["candidates"], "candidates")
        user = self._users.heads(body.get("user") or {}, body.get("context") or {}, body.get("history") or [])
        rows, known = self._rows(wanted)
        scores = maxsim(self._users.head, user, self._items[rows[known]])
        chosen = best(scores, body.get("top_k", 100))
        positions = np.flatnonzero(known)[chosen]
        items = [
            {"id": id_, "score": score, "position": position}
            for id_, score, position in zip(
                wanted[positions].tolist(), scores[chosen].tolist(), positions.tolist(), strict=True
            )
        ]
        missing = np.flatnonzero(~known)
        last = missing[: body.get("top_k", 100) - len(items)].tolist()
        items += [{"id": int(wanted[position]), "score": None, "position": position} for position in last]
        return orjson.dumps({"items": items, "missing": wanted[missing].tolist()})

    def _rows(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Row of each id, and whether it is that id's."""
        rows = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        return rows, self._ids[rows] == wanted


def _checked(body: Any) -> dict[str, Any]:
    """The body, whose parts have the right types. Raises ValueError."""
    if not isinstance(body, dict) or not isinstance(body.get("candidates"), list):
        raise ValueError("send one object with a list of candidates")
    if len(body["candidates"]) > MAX_CANDIDATES:
        raise ValueError(f"candidates has {len(body['candidates'])} entries: send at most {MAX_CANDIDATES}")
    for name, kind in (("user", dict), ("context", dict), ("history", list)):
        if not isinstance(body.get(name) or kind(), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    top_k = body.get("top_k", 100)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise ValueError(f"top_k is {top_k!r}: send an integer from 0")
    return body


def _integers(values: list[Any], name: str) -> NDArray[np.int64]:
    """(n,) int64. Raises ValueError unless all are integers."""
    try:
        found = np.array(values) if values else np.empty(0, np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} are no integers ({error})") from error
    if found.dtype != np.int64 or found.ndim != 1:
        raise ValueError(f"{name} are no integers within int64")
    return found


def create(bundle: Path, vectors: Path) -> FastAPI:
    """The application."""
    app, ranker = FastAPI(), Ranker(bundle, vectors)

    @app.post("/v1/rank")
    async def rank(request: Request) -> Response:
        try:
            return Response(ranker.rank(await request.body()), media_type=JSON)
        except ValueError as error:  # orjson's error is one
            return Response(orjson.dumps({"detail": str(error)}), 422, media_type=JSON)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    serve(lambda: create(options.bundle, options.vectors), options.port)


if __name__ == "__main__":
    main()
