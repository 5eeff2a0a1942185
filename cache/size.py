"""What a catalogue will cost, before it is there: its form -> bytes of a release, memory, disk and times.

Bytes of files come from the code that writes them. What a process takes and how fast things go was measured
(docs/performance.md, docs/stores.md) and stands here as constants.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from cache.errors import SnapshotError
from cache.release import DtypeChoice, IndexKind, index_kind
from cache.snapshot import MAX_ID_BYTES, MAX_ROWS, IdType, file_bytes
from kernel.head import HeadKind, HeadSpec
from kernel.plain import item_layout
from kernel.record import Dtype
from model.bundle import HEAD_FILE, Bundle, open_bundle
from model.errors import DataError

PRINT_BYTES = 8  # of inputs.hash, an item
REDIS_SHARE = 1.05  # bound of what a release takes in Redis, by its bytes; 1.00 to 1.01 was measured
IN_FLIGHT_BYTES = 24_000_000  # chunks on their way, in Redis and in its buffers
PROCESS_BYTES = 130_000_000  # of a worker, or of supervisor and refresher together, without table and bundle
VALUE_BYTES = 220  # a worker's memory for a known value of a vocabulary: 167 for integers, 217 for texts of 20
PUBLISHER_BYTES = 350_000_000  # the process, blocks of items on their way
PUBLISHER_ITEM_BYTES: dict[IdType, int] = {"int": 58, "string": 330}  # ids, keys, their order, buckets; texts beside
KEPT_BY_PUBLISHER = 3  # the release, and with --incremental the one before and the one before that, until it is fetched
KEPT_BY_REPLICA = 3  # the release, the one before, the one that is fetched
EMBED_ITEMS_S = 480_000  # on a core, item tower of the default recipe
BUILD_ITEMS_S = 850_000  # ids checked, features encoded, records packed, hashes; on two cores
STORE_BYTES_S = 420e6  # sent to Redis and read back, on two cores that Redis shares
DOWNLOAD_BYTES_S = 580e6  # from Redis, hashes checked, synced to the disk; the same

DTYPE_NAMES: dict[DtypeChoice, Dtype] = {DtypeChoice.F32: "f32", DtypeChoice.F16: "f16", DtypeChoice.INT8: "int8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A catalogue as it will be published."""

    items: int
    head: HeadSpec
    dtype: Dtype
    id_type: IdType = "int"
    id_bytes: int = 0  # mean UTF-8 octets of a string id
    index: IndexKind = IndexKind.NONE
    bundle_bytes: int = 0
    graph_bytes: int = 0  # of the bundle's graphs that a worker holds
    known_values: int = 0  # of the bundle's vocabularies, which a worker holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one shard. Bytes, or seconds where the name ends in _s."""

    items: int
    record: int  # of one item
    snapshot: int
    inputs: int
    index: int
    bundle: int
    release: int  # all of these
    item: float  # release without bundle, by items
    redis: int  # the releases that are kept
    redis_publishing: int  # and one more, on its way
    replica: int  # memory, table mapped once for all workers
    replica_swapping: int  # two releases at once
    replica_disk: int
    publisher: int  # memory
    publisher_disk: int
    embed_s: float  # on one core
    build_s: float
    store_s: float
    download_s: float  # at the line rate
    download_measured_s: float  # as fast as was measured, or at the line rate where that is slower

    def to_json(self) -> dict[str, int | float]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What holds the releases."""

    releases: int = 2  # kept in the store
    shards: int = 1
    workers: int = 1
    gbit: float = 10.0  # line rate of a replica, Gbit/s


def form_of(
    items: int,
    *,
    bundle: Path | None = None,
    heads: int | None = None,
    dim: int | None = None,
    kind: HeadKind | None = None,
    bias: bool = False,
    dtype: DtypeChoice = DtypeChoice.AUTO,
    ids: str = "int64",
    index: IndexKind = IndexKind.NONE,
) -> Form:
    """A form from a bundle folder, or from heads and dim.

    Raises DataError for what is missing or said twice, BundleError for the bundle.
    """
    id_type, id_bytes = parse_ids(ids)
    opened = None if bundle is None else open_bundle(bundle)
    if opened is None and (heads is None or dim is None):
        raise DataError("heads and dim are unknown: give --heads and --dim, or --bundle to read them there")
    if opened is not None and (heads, dim, kind, bias) != (None, None, None, False):
        raise DataError(f"bundle {bundle} says what its head is: leave out --heads, --dim, --head and --bias")
    if opened is not None and opened.spec.item_id_type != id_type:
        wanted = "int64" if id_type == "string" else "string:20 with the mean bytes of your ids for the 20"
        raise DataError(f"bundle {bundle} has {opened.spec.item_id_type} ids, not {ids}: give --ids {wanted}")
    head = (
        HeadSpec(kind=kind or "maxsim", user_heads=1, item_heads=heads or 0, dim=dim or 0, scale=1.0, item_bias=bias)
        if opened is None
        else opened.head
    )
    smallest: Dtype = "f16" if head.kind == "onnx" else "int8"
    return Form(
        items=items,
        head=head,
        dtype=smallest if dtype is DtypeChoice.AUTO else DTYPE_NAMES[dtype],
        id_type=id_type,
        id_bytes=id_bytes,
        index=index,
        **({} if opened is None else _held(opened)),
    )


def parse_ids(text: str) -> tuple[IdType, int]:
    """Type of ids and mean bytes of a string id, from `int64` or `string:20`. Raises DataError for anything else."""
    name, _, size = text.partition(":")
    if text in ("int64", "int"):
        return "int", 0
    if name == "string" and size.isascii() and size.isdigit() and 1 <= int(size) <= MAX_ID_BYTES:
        return "string", int(size)
    raise DataError(f"ids are {text!r}: say int64, or string:20 with the mean bytes of an id, 1 to {MAX_ID_BYTES}")


def _held(bundle: Bundle) -> dict[str, int]:
    """Bytes of a bundle's files, and what of it a worker holds."""
    sizes = {name: (bundle.folder / name).stat().st_size for name in ("manifest.json", *bundle.files)}
    return {
        "bundle_bytes": sum(sizes.values()),
        "graph_bytes": sizes["user.onnx"] + sizes.get(HEAD_FILE, 0),
        "known_values": sum(len(field.vocabulary) for field in bundle.spec.fields),
    }


def cost_of(form: Form, service: Service) -> Cost:
    """What one shard costs.

    Raises SnapshotError where its items do not fit a table, KernelError for a head or type that has no records,
    StoreError for an index that cannot search them.
    """
    items = -(-form.items // service.shards)
    if items > MAX_ROWS:
        raise SnapshotError(
            f"{items:,} items a shard, at most {MAX_ROWS:,} fit one table: give --shards {-(-form.items // MAX_ROWS)}"
        )
    stride = item_layout(form.head, form.dtype).stride
    snapshot = file_bytes(items, stride, form.id_type, items * form.id_bytes)
    inputs, index = PRINT_BYTES * items, _index_bytes(form, items)
    release = snapshot + inputs + index + form.bundle_bytes
    mapped, processes = snapshot + index, service.workers + (service.workers > 1)
    opened = service.workers * (form.graph_bytes + VALUE_BYTES * form.known_values)  # of each release that is mapped
    download_s = 8 * release / (service.gbit * 1e9)
    return Cost(
        items=items,
        record=stride,
        snapshot=snapshot,
        inputs=inputs,
        index=index,
        bundle=form.bundle_bytes,
        release=release,
        item=(release - form.bundle_bytes) / items,
        redis=round(REDIS_SHARE * service.releases * release),
        redis_publishing=round(REDIS_SHARE * (service.releases + 1) * release) + IN_FLIGHT_BYTES,
        replica=mapped + opened + processes * PROCESS_BYTES,
        replica_swapping=2 * (mapped + opened) + processes * PROCESS_BYTES,
        replica_disk=KEPT_BY_REPLICA * release,
        publisher=PUBLISHER_BYTES + items * (PUBLISHER_ITEM_BYTES[form.id_type] + form.id_bytes) + index,
        publisher_disk=KEPT_BY_PUBLISHER * release,
        embed_s=items / EMBED_ITEMS_S,
        build_s=items / BUILD_ITEMS_S,
        store_s=release / STORE_BYTES_S,
        download_s=download_s,
        download_measured_s=max(download_s, release / DOWNLOAD_BYTES_S),
    )


def _index_bytes(form: Form, items: int) -> int:
    kind = index_kind(form.index, form.head)
    if kind is IndexKind.NONE:
        return 0
    from cache.index import index_bytes  # FAISS comes into memory only where an index is asked for

    return index_bytes(form.head, kind, items)


# --- shown to a person -----------------------------------------------------------------------------------------------


def report(form: Form, service: Service, cost: Cost) -> str:
    """A line for each figure of one shard, and of all of them where a sum means something."""
    head, shards = form.head, service.shards
    floats = f"{head.item_size} floats" if head.kind == "onnx" else f"{head.item_heads} heads of {head.dim}"
    ids = "int64 ids" if form.id_type == "int" else f"ids of {form.id_bytes} bytes"
    bundle = "" if form.bundle_bytes else "; bundle and vocabularies not counted: give --bundle"
    lines = [
        f"{form.items:,} items, {head.kind}, {floats}, {form.dtype} records of {cost.record} bytes, {ids}, "
        f"index {form.index}{bundle}",
        *([f"{'':42} {'a shard':>14} {f'{shards} shards':>16}"] if shards > 1 else []),
        *(
            f"{name:42} {one:>14}" + (f" {whole:>16}" if shards > 1 else "")
            for name, one, whole in figures(service, cost)
        ),
    ]
    return "\n".join(line.rstrip() for line in lines)


def figures(service: Service, cost: Cost) -> list[tuple[str, str, str]]:
    """What it is, how much for one shard, and for all where that is a sum."""
    shards = service.shards
    kept = f"{service.releases} release{'s' * (service.releases > 1)}"
    workers = f"{service.workers} worker{'s' * (service.workers > 1)}"
    publishing = cost.redis_publishing
    return [
        ("items", f"{cost.items:,}", f"{shards * cost.items:,}"),
        ("bytes an item, without bundle", f"{cost.item:.1f}", ""),
        ("release", _bytes(cost.release), _bytes(shards * cost.release)),
        ("Redis, " + kept, _bytes(cost.redis), _bytes(shards * cost.redis)),
        ("Redis while one more comes: maxmemory", _bytes(publishing), _bytes(shards * publishing)),
        ("replica's memory, " + workers, _bytes(cost.replica), ""),
        ("replica's memory during a swap", _bytes(cost.replica_swapping), ""),
        ("replica's disk", _bytes(cost.replica_disk), ""),
        ("publisher's memory", _bytes(cost.publisher), ""),
        ("publisher's disk", _bytes(cost.publisher_disk), ""),
        ("embedding on one core", _seconds(cost.embed_s), _seconds(shards * cost.embed_s)),
        ("building beside it", _seconds(cost.build_s), _seconds(shards * cost.build_s)),
        ("storing in Redis", _seconds(cost.store_s), _seconds(shards * cost.store_s)),
        (f"download at {service.gbit:g} Gbit/s", _seconds(cost.download_s), ""),
        ("download as measured", _seconds(cost.download_measured_s), ""),
    ]


def _bytes(size: int) -> str:
    """Decimal units, three digits."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1e3:.3g} kB"


def _seconds(duration_s: float) -> str:
    if duration_s < 120:
        return f"{duration_s:.2g} s" if duration_s < 10 else f"{duration_s:.0f} s"
    return f"{duration_s / 60:.0f} min" if duration_s < 7200 else f"{duration_s / 3600:.1f} h"
