"""What a row gets to train on: the whole training part of a log, or less of it. Test lists are of the whole log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from model.datasets.log import TRAIN, Log

WHOLE = "whole"
PAST = -1  # the split of events that nothing is trained on, and that stay in the histories of later ones


def whole(log: Log) -> Log:
    """All of it."""
    return log


def with_context(log: Log) -> Log:
    """No training row without a value in any context field. What was taken there stays in histories."""
    split = np.where(bare(log) & (log.split == TRAIN), PAST, log.split).astype(np.int8)
    begins = (np.diff(log.request, prepend=-1) != 0) | (np.diff(split, prepend=split[:1]) != 0)
    return replace(log, split=split, request=np.cumsum(begins) - 1)  # what is left of a request is one of its own


def no_context(log: Log) -> Log:
    """No context fields at all."""
    fields = tuple(field for field in log.schema.fields if field.side != "context")
    return replace(log, schema=replace(log.schema, fields=fields), context={})


def bare(log: Log) -> np.ndarray:
    """(e,) bool: rows without a value in any of the context fields that there are."""
    if not log.context:
        return np.zeros(len(log), bool)
    return np.asarray(np.all([missing(column) for column in log.context.values()], axis=0))


def missing(column: np.ndarray) -> np.ndarray:
    """(n,) bool: NaN or None."""
    if column.dtype == object:
        return np.array([value is None for value in column], bool)
    return np.isnan(column) if column.dtype.kind == "f" else np.zeros(len(column), bool)


VIEWS: dict[str, Callable[[Log], Log]] = {WHOLE: whole, "with-context": with_context, "no-context": no_context}
