"""Request bodies for a made release: in each another user, described in full, and other candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.made import HISTORY_LENGTH, SEEN, Made
from model.features import HISTORY, FeatureSpec, Field

TOP_K = 100


def bodies(made: Made, count: int, candidates: int, *, seed: int) -> list[bytes]:
    """`count` JSON bodies of `candidates` distinct items, drawn uniformly: the hardest case for every cache."""
    if candidates > made.plan.items:
        raise ValueError(f"{candidates} candidates of {made.plan.items} items: ask for fewer, or make more items")
    rng = np.random.default_rng([3, seed, candidates])
    return [orjson.dumps(document(made, rng, candidates)) for _ in range(count)]


def document(made: Made, rng: np.random.Generator, candidates: int) -> dict[str, Any]:
    """One request as a mapping."""
    rows = rng.choice(made.plan.items, candidates, replace=False, shuffle=False)
    rng.shuffle(rows)
    past = rng.integers(0, min(SEEN, made.plan.items), HISTORY_LENGTH)
    return {
        **user_of(made.bundle.spec, rng),
        "history": _ids(made, past),
        "candidates": _ids(made, rows),
        "top_k": TOP_K,
    }


def user_of(spec: FeatureSpec, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """A value for each field of `user` and `context`."""
    drawn: dict[str, dict[str, Any]] = {"user": {}, "context": {}}
    for field in spec.user_fields:
        if field.name != HISTORY:
            drawn[field.side][field.name] = _value(field, rng)
    return drawn


def _value(field: Field, rng: np.random.Generator) -> Any:
    if field.kind == "numeric":
        return round(float(rng.uniform(0, field.edges[-1] * 1.1)), 2)
    if field.kind == "multi":
        return [field.vocabulary[k] for k in rng.integers(0, len(field.vocabulary), field.length).tolist()]
    return field.vocabulary[int(rng.integers(0, len(field.vocabulary)))]


def _ids(made: Made, rows: NDArray[np.int64]) -> list[Any]:
    ids: list[Any] = made.ids[rows].tolist()
    return ids
