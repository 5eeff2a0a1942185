"""Requests and answers of `POST /v1/rank` as Arrow IPC streams. No other file here knows their form."""

from __future__ import annotations

import orjson
import pyarrow as pa

from benchmarks.checks import Item

REST = b"request"  # key of the schema's metadata that holds all fields but the candidates, as JSON


def arrow_body(body: bytes) -> bytes:
    """The same request as a stream of one column, the candidates."""
    request = orjson.loads(body)
    candidates = pa.array(request.pop("candidates"))
    schema = pa.schema([pa.field("candidates", candidates.type)], {REST: orjson.dumps(request)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([candidates], schema=schema))
    octets: bytes = sink.getvalue().to_pybytes()
    return octets


def arrow_items(answer: bytes) -> list[Item]:
    """The items of an answer."""
    columns = pa.ipc.open_stream(answer).read_all().to_pydict()
    return [Item(*item) for item in zip(columns["id"], columns["score"], columns["position"], strict=True)]
