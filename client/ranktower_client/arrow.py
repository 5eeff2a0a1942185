"""A question and its answer as Arrow IPC streams: the same values as in JSON, in columns that nobody has to parse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ranktower_client.errors import BadAnswer, BadRequest
from ranktower_client.wire import Ids, Ranking, RankOptions, ids_of, rest_body, timings_of

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
HEADERS = {"Content-Type": MEDIA_TYPE, "Accept": MEDIA_TYPE}
EXPLANATION = ("item_heads", "similarities")


def rank_body(candidates: Ids, options: RankOptions) -> bytes:
    """One record batch of the candidates, all else in its metadata. Raises BadRequest when it cannot be one."""
    schema_metadata = {"request": rest_body(options)}
    batch = pa.record_batch([_column(candidates)], names=["candidates"]).replace_schema_metadata(schema_metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(use_threads=False)) as writer:
        writer.write_batch(batch)
    octets: bytes = sink.getvalue().to_pybytes()
    return octets


def ranking_of(answer: httpx.Response) -> Ranking:
    """The answer to one question. Raises BadAnswer when the stream is not one."""
    try:
        batch = pa.ipc.open_stream(answer.content, options=pa.ipc.IpcReadOptions(use_threads=False)).read_next_batch()
        said = {name.decode(): json.loads(value) for name, value in (batch.schema.metadata or {}).items()}
        probability = batch.schema.get_field_index("probability")
        return Ranking(
            ids=_id_array(batch.column("id")),
            scores=_floats(batch.column("score")),
            probabilities=None if probability < 0 else _floats(batch.column(probability)),
            positions=_sealed(batch.column("position").to_numpy(zero_copy_only=False)),
            missing=_id_array(pa.array(said["missing"], batch.column("id").type)),
            release=said["release"],
            watermark=said.get("watermark", 0),
            user_known=said["user_known"],
            timings=timings_of(answer.headers.get("server-timing")),
            explanations=_explanations(batch),
        )
    except (pa.ArrowException, StopIteration, OSError, KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"the answer is not a ranking: {type(error).__name__} {error}") from error


def _column(candidates: Ids) -> pa.Array:
    plain = isinstance(candidates, np.ndarray) and candidates.dtype.kind in "iu" and candidates.ndim == 1
    values = candidates if plain else ids_of(candidates, "candidates")  # which refuses what is no column of ids
    try:
        column = pa.array(values)
        if pa.types.is_integer(column.type):
            return column.cast(pa.int64())
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise BadRequest(f"candidates are no column of ids: {error}", field="candidates") from error
    if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_null(column.type)):
        raise BadRequest(
            f"candidates are a column of {column.type} with {column.null_count} nulls",
            field="candidates",
            remedy="send integers or strings",
        )
    return column


def _id_array(column: pa.Array) -> npt.NDArray[Any]:
    return _sealed(column.to_numpy(zero_copy_only=False))


def _floats(column: pa.Array) -> npt.NDArray[np.float32]:
    """NaN for null."""
    return _sealed(column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False))


def _explanations(batch: pa.RecordBatch) -> tuple[Mapping[str, Any] | None, ...]:
    if batch.schema.get_field_index(EXPLANATION[0]) < 0:
        return ()
    columns = (batch.column(name).to_pylist() for name in EXPLANATION)
    return tuple(
        None if part[0] is None else dict(zip(EXPLANATION, part, strict=True)) for part in zip(*columns, strict=True)
    )


def _sealed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array
