"""The verbs between a bundle and a service: publish, verify, and those on the releases of a store."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cache.changes import CHANGES, DEAD, DeadLetter, decode_dead
from cache.durable import locked, locked_now
from cache.errors import StoreError, disk_error
from cache.release import (
    BUNDLE,
    INDEX,
    ITEMS,
    USER_TABLE,
    DtypeChoice,
    IndexKind,
    Release,
    created_at,
    read_release,
    utc_now,
)
from cache.release import Progress as Report
from cache.release import verify_release as verify_built
from cache.rollout import Audited, Change, Live, shares_told, told
from cache.shards import Shard, read_shard, shard_url
from cache.snapshot import Snapshot
from cache.store import ReleaseInfo, ReleaseStore, open_store
from cache.watermarks import check_change, check_watermark, trim_changes, watermark_of
from kernel.head import HeadSpec
from model.errors import DataError

if TYPE_CHECKING:
    from cache.embed import Engine
    from model.features import FeatureSpec

DEFAULT_STORE = "file://./var/releases"
BYTES_STAGES = ("publish", "verify")
CANDIDATES_PER_HEAD = [50, 100, 200, 500, 1000, 2000]
RECALL_AT, RECALL_WANTED = 100, 0.95
LOCK, ORDER = ".lock", "order.json"
UPDATES = "update"  # the corner of the cache where bundles lie that are embedded with
DEAD_ENTRIES = 16  # read at a time
NOT_CURRENT = "not current: see `ranktower releases activate`"

app = typer.Typer(help="Publish and look after releases.", no_args_is_help=True)
releases = typer.Typer(
    help="List, activate, try out, roll back, prune and check the releases of a store.", no_args_is_help=True
)
app.add_typer(releases, name="releases")
users = typer.Typer(help="Publish, show and delete the user table of a bundle, by itself.", no_args_is_help=True)
app.add_typer(users, name="users")
# Whoever calls, paths and ids may have brackets: none is a style.
console = Console(highlight=False, markup=False, soft_wrap=True)
warnings = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)

StoreUrl = Annotated[
    str, typer.Option("--store", help="file://./folder, redis://host:port/db?prefix=name, or another of docs/stores.md")
]
BundleFolder = Annotated[Path, typer.Option("--bundle", help="Bundle folder, as `ranktower export` writes it.")]
WorkFolder = Annotated[Path, typer.Option("--work", help="Folder to build in.")]
CacheDir = Annotated[Path, typer.Option("--cache", help="Where releases from a remote store are kept locally.")]
RecordType = Annotated[
    DtypeChoice,
    typer.Option(
        help="Of the records; auto takes the smallest that keeps 99 % of the top 100. A head.onnx reads no int8."
    ),
]
IdColumn = Annotated[str | None, typer.Option(help="Column of the item ids, if not that of the log.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads, or actors, that run the item tower; as many as processors.")
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", help="As 0/4: only the items of one of 4 shards, in a store of its own below --store."),
]
RayAddress = Annotated[str | None, typer.Option(help="host:port of the Ray cluster that this node is part of.")]
SparkMaster = Annotated[str | None, typer.Option(help="spark://host:port, local[2] or another master of Spark's.")]


class EngineKind(StrEnum):
    """Where the item tower runs."""

    LOCAL = "local"
    RAY = "ray"
    SPARK = "spark"


class HeadChoice(StrEnum):
    """How a user and an item become a score."""

    MAXSIM = "maxsim"
    CROSS_ATTENTION = "cross_attention"
    ONNX = "onnx"


Watermark = Annotated[int | None, typer.Option(help="Position of the log of updates that the items contain.")]
EngineChoice = Annotated[EngineKind, typer.Option(help="Who runs the item tower (docs/operations.md).")]


@app.command()
def publish(
    bundle: BundleFolder,
    items: Annotated[Path, typer.Option(help="Parquet file with the id and the features of every item.")],
    store: StoreUrl = DEFAULT_STORE,
    index: Annotated[IndexKind | None, typer.Option(help="Index for requests without candidates; none.")] = None,
    dtype: RecordType = DtypeChoice.AUTO,
    log: Annotated[Path | None, typer.Option("--users", help="Log folder whose users to publish, too.")] = None,
    activate: Annotated[bool, typer.Option(help="Make the release the current one.")] = True,
    incremental: Annotated[bool, typer.Option(help="Embed only what changed since the current release.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would change, and change nothing.")] = False,
    id_column: IdColumn = None,
    shard: ShardOption = None,
    watermark: Watermark = None,
    workers: Workers = None,
    engine: EngineChoice = EngineKind.LOCAL,
    ray_address: RayAddress = None,
    spark_master: SparkMaster = None,
    work: WorkFolder = Path("var/build"),
    cache: CacheDir = Path("var/cache"),
) -> None:
    """Embed the catalogue with a bundle and publish both as one release."""
    from cache.embed import build_release

    part, target = _part(store, shard)
    embedding = _engine(engine, workers, ray_address, spark_master)
    kind = _wanted_index(index, before := _current(target))
    with reporting() as report:
        previous = _previous(target, before.id, cache, report) if incremental and before else None
        contained = _contained(target, items, watermark)
        wanted: dict[str, Any] = {"index": kind, "dtype": dtype, "previous": previous}
        wanted |= {"id_column": id_column, "shard": part}
        if dry_run:
            _plan(target, bundle, items, _published_users(target, bundle, cache), before, report, workers, **wanted)
            return
        target.check_writable()
        order = _order(bundle, items, [target.url, contained, log, *wanted.values()])
        with building_in(work, order) as folder:
            table = _user_table(bundle, log, folder, report) if log else None  # a wrong log is found before the work
            built = folder / "release"
            if not _was_built(built):
                build_release(
                    bundle,
                    items,
                    built,
                    users=table or _published_users(target, bundle, cache),
                    watermark=contained,
                    engine=embedding,
                    progress=report,
                    **wanted,
                )
            sent = _send(target, built, report, owned=True)
            _catch_up(target, sent.release, cache, report)
            version = target.publish_users(table, for_users(report)) if table else None
            if activate:
                target.activate(sent.release.id)
    sent.tell(store=target.url, current=activate, before=before)
    if version:
        console.print(f"published the users of {log}, version {version}")


@app.command()
def verify(
    store: StoreUrl = DEFAULT_STORE,
    cache: CacheDir = Path("var/cache"),
    sampled: Annotated[int, typer.Option("--users", min=1, help="Users whose retrieval is checked.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Which users are drawn.")] = 0,
    per_head: Annotated[int, typer.Option(min=1, help="Candidates per head that must bring recall 0.95.")] = 500,
) -> None:
    """Check every hash of the current release in the store, and what its index finds of the true best items."""
    target = open_store(store)
    with checked(target, None, cache) as (folder, fresh):
        release = read_release(folder)
        if release.index == "none":
            searched = "its head is a graph" if release.head.kind == "onnx" else "publish with --index flat"
            console.print(f"it has no index ({searched}), so no retrieval to check")
        else:
            records, source = _sampled(folder, target, fresh, sampled, seed)
            _print_recall(folder, release, records, source, per_head)


@app.command()
def update(
    items: Annotated[Path | None, typer.Option(help="Parquet file of new and changed items, with all columns.")] = None,
    delete: Annotated[Path | None, typer.Option(help="Parquet file with the ids of items that are gone.")] = None,
    delete_ids: Annotated[str | None, typer.Option(help="The same as ids with commas between them.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Embed what others append, until stopped.")] = False,
    dead: Annotated[bool, typer.Option("--dead", help="Print what could not be embedded, and why.")] = False,
    position: Annotated[bool, typer.Option("--position", help="Print the log's last position.")] = False,
    embed: Annotated[bool, typer.Option(help="Embed at once; no need where another process runs --follow.")] = True,
    id_column: IdColumn = None,
    shard: ShardOption = None,
    workers: Workers = None,
    store: StoreUrl = DEFAULT_STORE,
    cache: CacheDir = Path("var/cache"),
) -> None:
    """Change or delete items between two full publishes, for every release of the store."""
    part, target = _part(store, shard)
    if sum((items is not None, delete is not None, delete_ids is not None, follow, dead, position)) != 1:
        raise DataError("give one of --items, --delete, --delete-ids, --follow, --dead and --position")
    if follow:
        _follow(target, cache, workers)
    elif dead:
        _print_dead(target)
    elif position:
        console.print(target.log(CHANGES).last())
    else:
        _append(target, _current_spec(target, cache), items, delete, delete_ids, id_column, part)
        if embed:
            _embed(target, cache, workers)


@app.command()
def size(
    items: Annotated[int, typer.Option(min=1, help="Items of the catalogue.")],
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder: heads, dim, type of ids, vocabularies.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Item heads, without a bundle.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Dimensions of a head, without a bundle.")] = None,
    kind: Annotated[
        HeadChoice | None,
        typer.Option("--head", help="Without a bundle; maxsim where absent. onnx: heads x dim floats."),
    ] = None,
    bias: Annotated[bool, typer.Option("--bias", help="Items have a bias; without a bundle.")] = False,
    dtype: Annotated[
        DtypeChoice, typer.Option(help="Of the records; auto here is the smallest that it may choose.")
    ] = DtypeChoice.AUTO,
    ids: Annotated[str, typer.Option(help="int64, or string:20 with the mean bytes of an id.")] = "int64",
    index: Annotated[IndexKind, typer.Option(help="Index for requests without candidates.")] = IndexKind.NONE,
    kept: Annotated[int, typer.Option("--releases", min=1, help="Releases that the store keeps.")] = 2,
    shards: Annotated[int, typer.Option(min=1, help="Parts into which the items are cut.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of a replica.")] = 1,
    gbit: Annotated[float, typer.Option(min=0.001, help="Line rate of a replica, Gbit/s.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print bytes and seconds as JSON.")] = False,
) -> None:
    """What a catalogue will cost: bytes an item, memory of Redis, replicas and publisher, disk, times."""
    from cache.size import Service, cost_of, form_of, report

    form = form_of(
        items,
        bundle=bundle,
        heads=heads,
        dim=dim,
        kind=None if kind is None else kind.value,
        bias=bias,
        dtype=dtype,
        ids=ids,
        index=index,
    )
    service = Service(releases=kept, shards=shards, workers=workers, gbit=gbit)
    cost = cost_of(form, service)
    console.print(json.dumps(cost.to_json()) if as_json else report(form, service, cost))


@releases.command("list")
def list_releases(store: StoreUrl = DEFAULT_STORE) -> None:
    """All releases of the store, oldest first, a line each whatever the width of the terminal."""
    target = open_store(store)
    live = target.live()
    console.print(f"{'release':31} {'items':>13} {'MB':>10} {'bundle':16} {'snapshot':16}")
    for info in target.list():
        size = f"{info.size_bytes / 1e6:,.1f}"
        mark = _mark(info, live)
        if info.damage:
            console.print(f"{info.id} damaged{mark}: {info.damage}")
        else:
            console.print(f"{info.id} {info.count:13,} {size:>10} {info.bundle_id} {info.snapshot_id}{mark}")


def _mark(info: ReleaseInfo, live: Live) -> str:
    shadow = live.rollout.shadow
    canaries = [f" canary {100 * each.weight:g} %" for each in live.rollout.canaries if each.release == info.id]
    shadows = [f" shadow {100 * shadow.share:g} %"] if shadow is not None and shadow.release == info.id else []
    return "".join([" current" if info.current else "", *canaries, *shadows])


@releases.command("activate")
def activate_release(release: str, store: StoreUrl = DEFAULT_STORE) -> None:
    """Make a release the current one."""
    target = open_store(store)
    before, change = target.current(), Change(verb="activate", release=release)
    check_change(target, change)
    target.change(change)
    console.print(f"current is {release}, was {before or 'none'}")


@releases.command("canary")
def set_canary(
    release: str,
    weight: Annotated[float, typer.Option(help="Share of the users that it answers, below 1; 0 ends it.")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Let a release answer a share of the users, always the same ones; more of them as the weight grows."""
    _change(store, Change(verb="canary", release=release, share=weight))


@releases.command("shadow")
def set_shadow(
    release: str,
    share: Annotated[float, typer.Option(help="Share of the requests that it scores, too; 0 ends it.")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Let a release score what others answer; /metrics and /v1/release say how far its order is from theirs."""
    _change(store, Change(verb="shadow", release=release, share=share))


@releases.command("promote")
def promote_release(
    release: Annotated[str | None, typer.Argument(help="The one canary where absent.")] = None,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Make a canary, or the shadow, the current release, for all users and in one step."""
    _change(store, Change(verb="promote", release=release))


@releases.command("abort")
def abort_rollout(store: StoreUrl = DEFAULT_STORE) -> None:
    """End all canaries and the shadow: the current release answers everybody again."""
    _change(store, Change(verb="abort"))


@releases.command("rollback")
def rollback_release(store: StoreUrl = DEFAULT_STORE) -> None:
    """End the canaries; where there are none, go back to the release that was current before."""
    made = _change(store, Change(verb="rollback"))
    if made is not None and len(made.before) > 1:
        console.print("the canaries have ended; once more goes back to the release before")


def _change(store: str, change: Change) -> Audited | None:
    target = open_store(store)
    check_change(target, change)
    made = target.change(change)
    if made is None:
        console.print(f"nothing to change: live is {told(target.live())}")
    else:
        before = shares_told(made.before, made.shadow_before)
        console.print(f"live is {shares_told(made.after, made.shadow_after)}; was {before}")
    return made


@releases.command("audit")
def show_audit(
    last: Annotated[int, typer.Option(min=1, help="How many changes to show, newest last.")] = 50,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Who changed what is live, and when: a line each, with the shares of the users before and after."""
    for made in open_store(store).audit()[-last:]:
        console.print(f"{made.at} {made.who} {made.verb}: {shares_told(made.before, made.shadow_before)} -> ", end="")
        console.print(shares_told(made.after, made.shadow_after))


@releases.command("prune")
def prune_releases(
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest stay; what is live always does.")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Delete old releases, what dead publishers left behind, and updates that all releases contain."""
    target = open_store(store)
    gone = target.prune(keep)
    console.print(f"deleted {len(gone)}: {', '.join(gone)}" if gone else "nothing to delete")
    contained = trim_changes(target)
    if contained is not None:
        console.print(f"trimmed the log of updates up to position {contained}, which every release contains")


@releases.command("push")
def push_release(
    folder: Path,
    store: StoreUrl = DEFAULT_STORE,
    activate: Annotated[bool, typer.Option(help="Make the release the current one.")] = True,
    cache: CacheDir = Path("var/cache"),
) -> None:
    """Publish a release folder that was built before, for example when the store failed after it was built."""
    target = open_store(store)
    before = _current(target)
    built = read_release(folder)
    check_watermark(target, built.watermark, f"release {built.id}")  # before it is there, and trims the log, too
    with reporting() as report:
        sent = _send(target, folder, report)
        _catch_up(target, sent.release, cache, report)
        if activate:
            target.activate(sent.release.id)
    sent.tell(store=target.url, current=activate, before=before)


@releases.command("verify")
def verify_release(
    release: Annotated[str | None, typer.Argument(help="The current one where absent.")] = None,
    store: StoreUrl = DEFAULT_STORE,
    cache: CacheDir = Path("var/cache"),
) -> None:
    """Check every hash of a release in the store, and of the user table that it is served with."""
    with checked(open_store(store), release, cache):
        pass


@users.command("publish")
def publish_users(
    bundle: BundleFolder,
    log: Annotated[Path, typer.Option(help="Log folder whose users and histories to publish (docs/data.md).")],
    store: StoreUrl = DEFAULT_STORE,
    work: WorkFolder = Path("var/build"),
) -> None:
    """Replace the user table; services take it within seconds, their release stays."""
    target = open_store(store)
    target.check_writable()
    with reporting() as report, building_in(work) as folder:
        version = target.publish_users(_user_table(bundle, log, folder, report), for_users(report))
    console.print(f"published the users of {log} to {target.url}, version {version}")


@users.command("show")
def show_users(bundle: BundleFolder, store: StoreUrl = DEFAULT_STORE) -> None:
    """Version, number of users and age of the user table."""
    target, spec_id = open_store(store), _spec_id(bundle)
    table = target.users(spec_id)
    if table is None:
        raise StoreError(f"{target.url} has no user table for {bundle}: run `ranktower users publish`")
    age = timedelta(seconds=round((utc_now() - created_at(table.id)).total_seconds()))
    size = f"{table.size_bytes / 1e6:,.1f} MB"
    console.print(f"version {table.id}: {table.count:,} users, {size}, {age} old, of specification {spec_id}")


@users.command("delete")
def delete_users(bundle: BundleFolder, store: StoreUrl = DEFAULT_STORE) -> None:
    """Delete the user table; services forget it, and their local copies, within seconds."""
    target, spec_id = open_store(store), _spec_id(bundle)
    try:
        version = target.users_version(spec_id)
    except StoreError as error:
        version = f"unknown ({error})"  # damaged, and to be deleted all the same
    target.delete_users(spec_id)
    console.print(f"deleted version {version} from {target.url}" if version else "nothing to delete")


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A published release and the seconds that storing it took."""

    release: Release
    seconds: float

    def tell(self, *, store: str, current: bool, before: ReleaseInfo | None) -> None:
        """Say at the end what was done, and warn of a catalogue that lost most of its items."""
        made, release = self.release.report, self.release
        size = f"{release.size_bytes / 1e6:,.1f} MB"
        counts = ", ".join(f"{made[name]:,} {name}" for name in ("embedded", "reused", "removed") if made.get(name))
        speed = f"embedding {made['embed_s']:.1f} s, " if "embed_s" in made else ""
        state = f"current, was {before.id if before else 'none'}" if current else NOT_CURRENT
        console.print(
            f"published {release.id} to {store}: {release.count:,} items{_than(before)} ({counts}), {size}; "
            f"{speed}storing {self.seconds:.1f} s; {state}"
        )
        if (precision := made.get("precision")) and precision["costs"]:
            from cache.precision import Precision

            console.print(Precision.from_json(precision).tell())
        _warn_if_shrunk(release.count, made.get("removed", 0), before)


def _part(store: str, shard: str | None) -> tuple[Shard | None, ReleaseStore]:
    """The shard of --shard, and its store."""
    if shard is None:
        return None, open_store(store)
    part = read_shard(shard)
    return part, open_store(shard_url(store, part))


def _engine(kind: EngineKind, workers: int | None, ray_address: str | None, spark_master: str | None) -> Engine:
    from cache.embed import on_threads

    try:
        if kind is EngineKind.RAY:
            from cache.on_ray import on_ray

            return on_ray(ray_address, workers)
        if kind is EngineKind.SPARK:
            from cache.on_spark import on_spark

            return on_spark(spark_master, workers)
    except ImportError as error:
        raise StoreError(
            f"--engine {kind} needs {kind.capitalize()} ({error}): pip install 'ranktower[{kind}]'"
        ) from error
    return on_threads(workers)


def _current(store: ReleaseStore) -> ReleaseInfo | None:
    """The current release, to compare a new one with."""
    return next((info for info in store.list() if info.current), None)


def _wanted_index(given: IndexKind | None, before: ReleaseInfo | None) -> IndexKind:
    """None where nothing is said, with a warning where the current release has one."""
    if given is None and before is not None and before.index != IndexKind.NONE:
        warnings.print(
            f"warning: the current release {before.id} has the index {before.index}, this one will have none, and "
            f"without one /v1/retrieve answers nothing: give --index {before.index}, or --index none if that is meant"
        )
    return given or IndexKind.NONE


def _contained(store: ReleaseStore, items: Path, given: int | None) -> int:
    """The watermark of a release of these items, said, so that a wrong one is seen."""
    watermark = watermark_of(store, items, given)
    if watermark:
        console.print(f"{items} is taken to contain the updates up to position {watermark}", markup=False)
    return watermark


def _plan(
    store: ReleaseStore,
    bundle: Path,
    items: Path,
    users: Path | None,
    before: ReleaseInfo | None,
    report: Report,
    workers: int | None,
    **options: Any,
) -> None:
    """Say what publishing would do."""
    from cache.embed import plan_release
    from cache.size import STORE_BYTES_S

    plan = plan_release(bundle, items, users=users, progress=report, workers=workers, **options)
    counts = plan.counts
    removed = f", {counts.removed:,} removed" if options["previous"] else ""
    console.print(
        f"would publish {counts.items:,} items{_than(before)}: {counts.embedded:,} to embed, {counts.reused:,} "
        f"unchanged{removed}; nothing was written"
    )
    console.print(
        f"the release would be {plan.size_bytes:,} bytes, built here and sent to {store.url}: about "
        f"{plan.embed_s:,.1f} s of embedding on this machine, and {plan.size_bytes / STORE_BYTES_S:,.1f} s of storing "
        f"at {STORE_BYTES_S / 1e6:.0f} MB/s"
    )
    _warn_if_shrunk(counts.items, counts.removed, before)


def _than(before: ReleaseInfo | None) -> str:
    return f", {before.count:,} before" if before and not before.damage else ""


def _warn_if_shrunk(count: int, removed: int, before: ReleaseInfo | None) -> None:
    """`removed` may be 0 because items were not compared one by one."""
    gone = max(removed, before.count - count) if before else 0
    if before and 2 * gone > before.count:
        console.print(
            f"warning: {gone:,} of the {before.count:,} items of {before.id} are gone: if that is not meant, mend the "
            "items file; `ranktower releases rollback` goes back to the release before"
        )


def _order(bundle: Path, items: Path, options: Sequence[object]) -> str:
    """What is to be built, in a line: the same from the same content and options; nothing where no items are."""
    from model.bundle import hash_file, open_bundle

    return json.dumps([open_bundle(bundle).id, hash_file(items), *options], default=str) if items.is_file() else ""


def _was_built(built: Path) -> bool:
    """Whether `building_in` has found a release that a publisher left, every byte of it right; else it goes."""
    if not built.is_dir():
        return False
    try:
        console.print(f"taking release {verify_built(built).id}, which a publisher had built and not stored")
    except StoreError as error:
        console.print(f"building anew what a publisher had left: {error}")
        shutil.rmtree(built)
    return built.is_dir()


def _send(store: ReleaseStore, folder: Path, report: Report, *, owned: bool = False) -> Sent:
    started = time.perf_counter()
    store.publish(folder, report, owned=owned)
    return Sent(release=read_release(folder), seconds=time.perf_counter() - started)


def _previous(store: ReleaseStore, release_id: str, cache: Path, report: Report) -> Path:
    """A copy of the release in a corner of the cache where no service drops it while it is read."""
    corner = cache / "publish"
    folder = store.fetch(release_id, corner, report)
    store.drop_cached(corner, {release_id})
    return folder


def _user_table(bundle: Path, log: Path, folder: Path, report: Report) -> Path:
    from cache.users import build_user_table
    from model.bundle import open_bundle

    return build_user_table(open_bundle(bundle).spec, log, folder / USER_TABLE, report)


def _published_users(store: ReleaseStore, bundle: Path, cache: Path) -> Path | None:
    """The user table that the store has already: real users to measure with."""
    return store.fetch_users(_spec_id(bundle), cache / "publish")


def _spec_id(bundle: Path) -> str:
    from model.bundle import open_bundle

    return open_bundle(bundle).spec.id


@contextmanager
def checked(store: ReleaseStore, release_id: str | None, cache: Path) -> Iterator[tuple[Path, Path]]:
    """A release, or the current one, in a fresh cache, every hash of it checked, and said so; and that cache."""
    wanted = release_id or store.current()
    if wanted is None:
        raise StoreError(f"{store.url} has no current release: name one of `ranktower releases list`, or publish one")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=cache) as fresh:  # a copy from before would prove nothing
        with reporting() as report:
            folder = store.fetch(wanted, Path(fresh), report)
        Snapshot.open(folder / ITEMS).verify()
        found = read_release(folder)
        size = f"{found.size_bytes / 1e6:,.1f} MB"
        console.print(f"{found.id}: all hashes of {len(found.files)} files, {size}, are right")
        _check_users(store, _spec_id(folder / BUNDLE), Path(fresh))
        yield folder, Path(fresh)


def _check_users(store: ReleaseStore, spec_id: str, fresh: Path) -> None:
    """The same for the user table that the release is served with."""
    with reporting() as report:
        path = store.fetch_users(spec_id, fresh, for_users(report))
    if path is None:
        console.print("no user table is published for it")
    else:
        table = Snapshot.open(path)
        table.verify()
        console.print(f"user table {path.parent.name}: all hashes of {len(table):,} users are right")


def _sampled(folder: Path, store: ReleaseStore, cache: Path, count: int, seed: int) -> tuple[NDArray[np.float32], str]:
    """Records of users of the release, and who they are."""
    from cache.users import sample_users
    from model.bundle import open_bundle

    bundle = open_bundle(folder / BUNDLE)
    return sample_users(bundle, store.fetch_users(bundle.spec.id, cache), count, seed)


def _print_recall(folder: Path, release: Release, users: NDArray[np.float32], source: str, per_head: int) -> None:
    """The curve by candidates kept per head, and whether it suffices at `per_head`."""
    from cache.index import RetrievalIndex, recall_curve

    index = RetrievalIndex.open(folder / INDEX)
    points = sorted({*CANDIDATES_PER_HEAD, per_head})
    with reporting() as report:
        items = Snapshot.open(folder / ITEMS)
        curve = recall_curve(index, items, release.head, users, k=RECALL_AT, per_head=points, progress=report)
    console.print(f"recall@{RECALL_AT} of the {index.kind} index against scoring all items, {len(users)} {source}")
    console.print("candidates per head  recall")
    for kept, recall in curve.items():
        console.print(f"{kept:19,}  {recall:.4f}")
    check_recall(release.id, release.head, curve[per_head], per_head)


def check_recall(release_id: str, head: HeadSpec, recall: float, per_head: int) -> None:
    """Raises StoreError unless MaxSim retrieval finds enough; with cross-attention the curve is for information."""
    if head.kind == "maxsim" and not recall >= RECALL_WANTED:  # a NaN is not enough
        raise StoreError(
            f"{release_id}: recall@{RECALL_AT} with {per_head} candidates per head is {recall:.3f}, below "
            f"{RECALL_WANTED}: retrieve with more of them, or publish with --index flat"
        )


# --- updates ---------------------------------------------------------------------------------------------------------


def _current_spec(store: ReleaseStore, cache: Path) -> FeatureSpec:
    """What items are checked against."""
    from model.bundle import open_bundle

    current = store.current()
    if current is None:
        raise StoreError(f"{store.url} has no current release to check the items against: publish one first")
    with store.fetch_bundle(current, cache / UPDATES) as folder:
        return open_bundle(folder).spec


def _append(
    store: ReleaseStore,
    spec: FeatureSpec,
    items: Path | None,
    delete: Path | None,
    delete_ids: str | None,
    id_column: str | None,
    shard: Shard | None,
) -> None:
    """Check the changes, append them and say so."""
    from cache.intake import append_deletes, append_items, parse_deleted, read_deleted

    if items is not None:
        with reporting() as report:
            count, position = append_items(store, items, spec, id_column, report, shard)
    else:
        ids = read_deleted(delete, spec, id_column) if delete is not None else parse_deleted(delete_ids or "", spec)
        count, position = append_deletes(store, ids if shard is None else ids[shard.holds(ids)])
    what = "items" if items is not None else "deletions"
    position = position or store.log(CHANGES).last()  # where a shard has no part of it
    console.print(f"appended {count:,} {what} to the log of {store.url}, up to position {position}")


def _embed(store: ReleaseStore, cache: Path, workers: int | None) -> None:
    """Bring the records of all live bundles up to date and say so."""
    from cache.updater import Updater, dead_told

    with Updater(store, cache / UPDATES, workers=workers, tell=_tell) as updater:
        updater.catch_up()
    lines = {bundle_id: line for bundle_id, line in updater.lines.items() if bundle_id not in updater.problems}
    places = ", ".join(f"{bundle_id} (up to position {line.at})" for bundle_id, line in lines.items())
    count = len(lines)
    console.print(f"embedded for {count} bundle{'s' * (count != 1)}: {places}")
    if updater.dead:
        console.print(dead_told(updater.dead))
    if updater.problems:
        raise StoreError(f"not for every bundle: {'; '.join(updater.problems.values())}")


def _catch_up(store: ReleaseStore, release: Release, cache: Path, report: Report) -> None:
    """Embed the changes behind the watermark of a release, before it is activated.

    Raises StoreError unless all that were there at the beginning are embedded then.
    """
    from cache.updater import Updater

    check_watermark(store, release.watermark, f"release {release.id}")
    end = store.log(CHANGES).last()
    if end > release.watermark:
        with Updater(store, cache / UPDATES, only=release.bundle_id, tell=_tell) as updater:
            updater.look()
            done = 0
            while step := updater.step():
                done += step
                report("updates", done, done)
        line = updater.lines.get(release.bundle_id)
        at = max(release.watermark, line.at if line else 0)
        if at < end or updater.problems:
            reason = "; ".join(updater.problems.values()) or "its release is gone, or damaged"
            raise StoreError(
                f"release {release.id} is in the store and was not activated: the updates behind it are embedded up to "
                f"position {at} of {end}: {reason}"
            )


def _follow(store: ReleaseStore, cache: Path, workers: int | None) -> None:
    from cache.updater import Updater

    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with Updater(store, cache / UPDATES, workers=workers, tell=_tell) as updater:
        updater.run(stopping)


def _tell(text: str) -> None:
    console.print(f"{utc_now().isoformat(timespec='seconds')} {text}")


def _print_dead(store: ReleaseStore) -> None:
    """A line for each change that some bundle could not take; what was tried twice is shown once."""
    log, position = store.log(DEAD), 0
    seen: set[DeadLetter] = set()
    while entries := log.read(position, DEAD_ENTRIES):
        for letter in (letter for entry in entries for letter in decode_dead(entry)):
            if letter not in seen:
                place = f"position {letter.position}, bundle {letter.bundle_id}"
                console.print(f"{letter.id}: {letter.reason} ({place})")
                seen.add(letter)
        position = entries[-1].position
    if not seen:
        console.print("nothing")


# --- shown to a person -----------------------------------------------------------------------------------------------


@contextmanager
def building_in(work: Path, order: str = "") -> Iterator[Path]:
    """A folder to build in; it goes when all is well, and stays when a built release could not be stored.

    Its lock is free once its publisher is gone: the next one goes on with what was built to the same order, and deletes
    what else was left. One that builds no release (no order) leaves whole ones alone.
    """
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with locked(work / LOCK):  # else another could take the folder's lock between its making and its locking
            folder = _sweep_builds(work, order) or Path(tempfile.mkdtemp(prefix="release-", dir=work))
            held.enter_context(locked(folder / LOCK))
            (folder / ORDER).write_text(order)
        try:
            yield folder
        except BaseException as error:
            if (folder / "release").is_dir():
                console.print(
                    f"the built release stays in {folder / 'release'}: the same command again, or `ranktower releases "
                    "push`, stores it; another publish deletes it"
                )
            else:
                _delete_build(work, folder)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # a write names no path
                raise StoreError(disk_error(error, work)) from error
            raise
        _delete_build(work, folder)


def _delete_build(work: Path, folder: Path) -> None:
    """In an order in which nobody takes a part for a whole: what was ordered, the release, the lock."""
    (folder / ORDER).unlink(missing_ok=True)
    if (folder / "release").is_dir():
        shutil.rmtree(folder / "release")
    with locked(work / LOCK):
        shutil.rmtree(folder)


def _sweep_builds(work: Path, order: str) -> Path | None:
    """Delete what publishers left that are gone, but for one that had built a whole release to this order."""
    found = None
    for folder in sorted(path for path in work.glob("release-*") if path.is_dir()):
        with locked_now(folder / LOCK) as gone:
            built_to = _built_to(folder) if gone else ""
            if gone and order and found is None and built_to == order:
                found = folder
            elif gone and (order or not built_to):
                shutil.rmtree(folder)
                console.print(f"deleted {folder}, which a publisher left")
    return found


def _built_to(folder: Path) -> str:
    """The order to which a whole release lies there, nothing where none does: it appears there when it is whole."""
    written = folder / ORDER
    return written.read_text() if (folder / "release").is_dir() and written.is_file() else ""


def for_users(report: Report) -> Report:
    """The same bars under names of their own."""
    return lambda stage, done, total: report(f"{stage} users", done, total)


@contextmanager
def reporting() -> Iterator[Report]:
    """Progress bars, one for each stage as it comes, with its rate."""
    columns = (
        TextColumn("{task.description:13}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, state="")
            bars.update(tasks[stage], completed=done, total=total, state=_state(stage, done, total, bars, tasks[stage]))

        yield report


def _state(stage: str, done: int, total: int, bars: Progress, task: TaskID) -> str:
    speed = bars.tasks[task].finished_speed or bars.tasks[task].speed
    if stage.split()[0] in BYTES_STAGES:
        rate = f" {speed / 1e6:,.0f} MB/s" if speed else ""
        return f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB{rate}"
    rate = f" {speed:,.0f}/s" if speed else ""
    return f"{done:,} of {total:,} {'users' if stage in ('users', 'recall') else 'items'}{rate}"
