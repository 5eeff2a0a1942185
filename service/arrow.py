"""`POST /v1/rank` as Arrow IPC streams: one record batch to a request, a ranking to one record batch.

Candidates stay where they are in the body: the kernel reads the column's buffers. All else of a request is its JSON
body without `candidates`, in the schema's metadata. The kernel reads plain streams of integers, pyarrow all others, and
says what is wrong with them. Nothing in a stream is trusted: its messages are looked at before pyarrow decodes them, so
that it never inflates a buffer, and the column is validated whole before it is read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from kernel.candidates import arrow_candidates
from kernel.ids import Ids, Texts
from model.features import IdType
from service.admission import Permit
from service.answers import ARROW, JSON, Answer, Answerer, Limits, counts_of, encode_ranking, json_ids, rank
from service.errors import MalformedBody, RequestError, UnsupportedBody
from service.live import Serving
from service.ranker import Ranker, Ranking
from service.schema import ID_LENGTH
from service.telemetry import StageClock
from service.wire import RankRequest, RestRequest, short

CANDIDATES, REQUEST = "candidates", b"request"
TYPES: dict[IdType, tuple[pa.DataType, ...]] = {"int": (pa.int64(),), "string": (pa.utf8(), pa.large_utf8())}
FORM = "send one schema and one record batch, as pyarrow.ipc.new_stream writes them"
OFFSETS: dict[pa.DataType, np.dtype[Any]] = {pa.utf8(): np.dtype(np.int32), pa.large_utf8(): np.dtype(np.int64)}
HEADER, COMPRESSION = 2, 3  # fields of the flatbuffers tables Message and RecordBatch of the Arrow columnar format
KNOWN, COUNTS = b"?" * 5, b"#" * 80  # what stands in a template for the two; as JSON, blanks may follow them
ALIGNED, END = 8, b"\xff\xff\xff\xff\0\0\0\0"
WRITTEN = pa.ipc.IpcWriteOptions(use_threads=False)


def answerer(*, takes: bool, sends: bool) -> Answerer:
    """Answers to bodies that are Arrow or JSON (`takes`), in Arrow or JSON (`sends`)."""

    def answer_rank(permit: Permit, serving: Serving, body: bytes, limits: Limits, clock: StageClock) -> Answer:
        current = serving.current
        request = read_request(current, body) if takes else current.decoders.rank(body)
        ranking = rank(permit, serving, request, limits, clock)
        encoded = write_ranking(ranking, current.spec.item_id_type) if sends else encode_ranking(ranking)
        answer = Answer(encoded, ranking.release, [ranking], ARROW if sends else JSON, [request])
        clock.lap("respond")
        return answer

    return answer_rank


# --- in --------------------------------------------------------------------------------------------------------------


def read_request(ranker: Ranker, body: bytes) -> RankRequest[Any, Any]:
    """The request that a stream holds. Raises RequestError that names the column, the value and the remedy."""
    item_ids = ranker.spec.item_id_type
    ids: Ids
    plain = arrow_candidates(body) if item_ids == "int" else None
    if plain is not None:
        document, ids = plain
    else:
        stream = _open(body)
        _check_columns(stream, item_ids)
        _check_messages(stream)
        document, ids = stream.metadata.get(REQUEST), _ids(stream, item_ids)
    rest = _read_rest(ranker, b"{}" if document is None else document)
    return RankRequest(candidates=ids, **msgspec.structs.asdict(rest))  # type: ignore[arg-type]


class _Stream(NamedTuple):
    """What is known of a stream before any of its batches is decoded."""

    schema: pa.Schema
    names: list[str]  # of the columns
    types: list[str]
    metadata: dict[bytes, bytes]
    messages: list[pa.Message]  # behind the schema; one more at most than there may be
    behind: int  # octets that follow the end


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever goes wrong within is the stream's fault: pyarrow raises classes of its own and many of Python's."""
    try:
        yield
    except Exception as error:
        raise _malformed(error) from error


def _open(body: bytes) -> _Stream:
    with _decoding():
        source = pa.BufferReader(pa.py_buffer(body))
        messages = [*islice(pa.ipc.MessageReader.open_stream(source), 3)]
        kinds = [message.type for message in messages]
        if kinds[:1] != ["schema"]:  # pyarrow would read any message as one, and crash
            raise ValueError(f"it begins with {kinds[0] if kinds else 'nothing'}, not with a schema")
        schema = pa.ipc.read_schema(messages.pop(0))
        types = [str(kind) for kind in schema.types]
        return _Stream(schema, schema.names, types, schema.metadata or {}, messages, len(body) - source.tell())


def _check_messages(stream: _Stream) -> None:
    kinds = [message.type for message in stream.messages]
    if kinds == ["record batch", "record batch"]:
        remedy = "send one: combine the chunks of the table before you write it"
        raise RequestError("the stream has more than one record batch", field=CANDIDATES, remedy=remedy)
    if kinds not in ([], ["record batch"]):
        raise _malformed(f"behind the schema it holds {', '.join(kinds)}")
    if stream.behind:
        raise _malformed(f"{stream.behind} octets follow its end")
    with _decoding():
        compressed = bool(kinds) and _is_compressed(stream.messages[0].metadata)
    if compressed:
        raise UnsupportedBody("the record batch is compressed", field=CANDIDATES, remedy="send it uncompressed")


def _is_compressed(header: pa.Buffer) -> bool:
    """Whether a record batch says that its buffers are, by the layout of flatbuffers: pyarrow cannot be asked."""
    octets = memoryview(header)
    batch = _target(octets, _field(octets, _target(octets, 0), HEADER))
    return _field(octets, batch, COMPRESSION) != 0 or b"ARROW:experimental_compression" in bytes(octets)  # before 1.0


def _field(octets: memoryview, table: int, number: int) -> int:
    """Where a field of a flatbuffers table lies, 0 where it is absent."""
    (distance,) = struct.unpack_from("<i", octets, table)
    size, entry = table - distance, 4 + 2 * number
    (length,) = struct.unpack_from("<H", octets, size)
    (offset,) = struct.unpack_from("<H", octets, size + entry) if entry + 2 <= length else (0,)
    return table + int(offset) if offset else 0


def _target(octets: memoryview, place: int) -> int:
    (distance,) = struct.unpack_from("<I", octets, place)
    return place + int(distance)


def _malformed(reason: object) -> MalformedBody:
    return MalformedBody(f"the body is not an Arrow IPC stream ({short(str(reason), 160)})", remedy=FORM)


def _check_columns(stream: _Stream, item_ids: IdType) -> None:
    if stream.names != [CANDIDATES]:
        raise RequestError(
            f"the columns are {short(', '.join(stream.names) or 'none')}",
            field=CANDIDATES,
            remedy="send one column, candidates, and all else as JSON in the schema's metadata under `request`",
        )
    if stream.schema.types[0] not in (*TYPES[item_ids], pa.null()):  # what an empty list becomes is of type null
        expected = " or ".join(str(kind) for kind in TYPES[item_ids])
        raise RequestError(
            f"candidates is a column of {short(stream.types[0])}",
            field=CANDIDATES,
            remedy=f"send {expected}: item ids are of type {item_ids} in this release",
        )


def _ids(stream: _Stream, item_ids: IdType) -> Ids:
    """The column where it lies in the body."""
    nothing = np.empty(0, np.int64) if item_ids == "int" else Texts.of([])
    if not stream.messages:  # as an empty table is written
        return nothing
    with _decoding():
        batch = pa.ipc.read_record_batch(stream.messages[0], stream.schema)  # nothing is inflated: no thread helps
        batch.validate(full=True)
        column = batch.column(0)
        nulls = column.null_count
        # a column of type null has no octets whatever its length: nothing may be made of each of its rows
        masked = bool(nulls) and not pa.types.is_null(column.type)
        first = int(np.argmin(column.is_valid().to_numpy(zero_copy_only=False))) if masked else 0
    if nulls:
        raise RequestError(
            f"candidates[{first}] is null ({nulls} are)", field=f"candidates[{first}]", remedy="leave nulls out"
        )
    if not len(column):
        return nothing
    if item_ids == "int":
        return np.require(column.to_numpy(zero_copy_only=True), np.int64, ["C", "A"])
    return _texts(column)


def _texts(column: pa.Array) -> Texts:
    _, places, data = column.buffers()
    kind = OFFSETS[column.type]
    offsets = np.frombuffer(places, kind, len(column) + 1, column.offset * kind.itemsize)
    starts = offsets[:-1].astype(np.int64)
    octets = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
    texts = Texts(octets, starts, offsets[1:] - starts)
    for position in np.flatnonzero(texts.sizes > ID_LENGTH).tolist():  # octets; the limit is one of characters
        length = len(column[position].as_py())
        if length > ID_LENGTH:
            field = f"{CANDIDATES}[{position}]"
            raise RequestError(
                f"{field} has {length} characters", field=field, remedy=f"an id has {ID_LENGTH} characters at most"
            )
    return texts


def _read_rest(ranker: Ranker, document: bytes) -> RestRequest[Any, Any]:
    """What is asked beside the candidates. What is wrong with all of it is said of the metadata, not of the body."""
    try:
        return ranker.decoders.rest(document)
    except RequestError as error:
        if error.field is not None:
            raise
        detail = error.detail.replace("the body", "`request` in the schema's metadata", 1)
        raise type(error)(detail, field=REQUEST.decode(), remedy=error.remedy) from error


# --- out -------------------------------------------------------------------------------------------------------------


def write_ranking(ranking: Ranking, item_ids: IdType) -> bytes:
    """A stream of one record batch: an item a row, the rest of `schema.RankAnswer` as JSON in the schema's metadata."""
    return _write_plain(ranking) or _write_any(ranking, item_ids)


def _write_any(ranking: Ranking, item_ids: IdType) -> bytes:
    columns: dict[str, pa.Array] = {
        "id": pa.array(ranking.ids if isinstance(ranking.kept, Texts) else ranking.kept, TYPES[item_ids][0]),
        "score": _floats(ranking.scores),
    }
    if ranking.probabilities is not None:
        columns["probability"] = _floats(ranking.probabilities)
    columns["position"] = pa.array(ranking.positions, pa.int32())
    if ranking.explanation is not None:
        for name, part in zip(ranking.explanation._fields, ranking.explanation, strict=True):
            unknown = [None] * (len(ranking.kept) - len(part))
            columns[name] = pa.array([*part.tolist(), *unknown], pa.list_(pa.from_numpy_dtype(part.dtype)))
    said = {
        "release": ranking.release,
        "watermark": ranking.watermark,
        "user_known": ranking.user_known,
        "missing": json_ids(ranking.missing),
        "counts": counts_of(ranking),
    }
    metadata = {name: orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY) for name, value in said.items()}
    return _stream_of(columns, metadata)


def _stream_of(columns: dict[str, pa.Array], metadata: dict[str, bytes]) -> bytes:
    batch = pa.RecordBatch.from_arrays([*columns.values()], names=[*columns], metadata=metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=WRITTEN) as writer:
        writer.write_batch(batch)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def _write_plain(ranking: Ranking) -> bytes | None:
    """The same where all items are known integers: pyarrow's fixed cost, 130 us, is paid once a template."""
    kept, scores, positions = ranking.kept, ranking.scores, ranking.positions
    if isinstance(kept, Texts) or positions is None or ranking.explanation is not None:
        return None
    if len(ranking.missing) or not len(kept) or scores[-1] != scores[-1]:  # what is NaN is last
        return None
    found = _template(ranking.release, ranking.watermark, len(kept), ranking.probabilities is not None)
    said = {
        KNOWN: orjson.dumps(ranking.user_known).ljust(len(KNOWN)),
        COUNTS: orjson.dumps(counts_of(ranking)).ljust(len(COUNTS)),
    }
    if found is None or len(said[COUNTS]) > len(COUNTS):
        return None
    columns: list[NDArray[Any]] = [kept, scores, positions]
    if ranking.probabilities is not None:
        columns.insert(2, ranking.probabilities)
    parts = [said.get(part, part) for part in found]
    return b"".join([*parts, *map(_padded, columns), END])


@lru_cache(maxsize=256)
def _template(release: str, watermark: int, rows: int, calibrated: bool) -> tuple[bytes, ...] | None:
    """A stream of so many rows up to its columns, cut around KNOWN and COUNTS, which stand for what an answer says.

    None where pyarrow does not write what `_write_plain` expects.
    """
    kinds = {"id": np.int64, "score": np.float32, "probability": np.float32, "position": np.int32}
    seen = np.arange(1, rows + 1)  # any values, to be found again
    values = {name: seen.astype(kind) for name, kind in kinds.items() if calibrated or name != "probability"}
    said = {"release": orjson.dumps(release), "watermark": orjson.dumps(watermark)}
    metadata = {**said, "user_known": KNOWN, "missing": b"[]", "counts": COUNTS}
    stream = _stream_of({name: pa.array(column) for name, column in values.items()}, metadata)
    rest = b"".join(_padded(column) for column in values.values()) + END
    head = stream[: -len(rest)]
    parts = re.split(b"(%s|%s)" % (re.escape(KNOWN), re.escape(COUNTS)), head)
    return tuple(parts) if stream.endswith(rest) and parts[1::2] in ([KNOWN, COUNTS], [COUNTS, KNOWN]) else None


def _padded(column: NDArray[Any]) -> bytes:
    return column.tobytes() + bytes(-column.nbytes % ALIGNED)


def _floats(values: NDArray[np.float32]) -> pa.Array:
    """(k,) float32, null for NaN."""
    return pa.array(values, pa.float32(), from_pandas=bool(np.isnan(values[-1:]).any()))  # what is NaN is last
