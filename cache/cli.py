"""The verbs between a bundle and a service: publish, verify, and those on the releases of a store."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cache.errors import StoreError
from cache.release import BUNDLE, INDEX, ITEMS, Release, read_release
from cache.release import Progress as Report
from cache.snapshot import Snapshot
from cache.store import ReleaseStore, open_store

DEFAULT_STORE = "file://./var/releases"
BYTES_STAGES = ("publish", "verify")
CANDIDATES_PER_HEAD = [50, 100, 200, 500, 1000, 2000]
RECALL_AT, RECALL_WANTED = 100, 0.95

app = typer.Typer(help="Publish and look after releases.", no_args_is_help=True)
releases = typer.Typer(help="List, activate, roll back, prune and check the releases of a store.", no_args_is_help=True)
app.add_typer(releases, name="releases")
console = Console(highlight=False, soft_wrap=True)

StoreUrl = Annotated[str, typer.Option("--store", help="file://./folder or redis://host:port/db?prefix=name")]
CacheDir = Annotated[Path, typer.Option("--cache", help="Where releases from a remote store are kept locally.")]


@app.command()
def publish(
    bundle: Annotated[Path, typer.Option(help="Bundle folder, as `ranktower export` writes it.")],
    items: Annotated[Path, typer.Option(help="Parquet file with the id and the features of every item.")],
    store: StoreUrl = DEFAULT_STORE,
    index: Annotated[str, typer.Option(help="Index for requests without candidates: none, flat or ivf-sq8.")] = "none",
    users: Annotated[Path | None, typer.Option(help="Log folder whose users and histories to publish, too.")] = None,
    activate: Annotated[bool, typer.Option(help="Make the release the current one.")] = True,
    incremental: Annotated[bool, typer.Option(help="Embed only what changed since the current release.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would change, and change nothing.")] = False,
    id_column: Annotated[str | None, typer.Option(help="Column of the item ids, if not that of the log.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that run the item tower; as many as processors.")] = None,
    work: Annotated[Path, typer.Option(help="Folder to build the release in.")] = Path("var/build"),
    cache: CacheDir = Path("var/cache"),
) -> None:
    """Embed the catalogue with a bundle and publish both as one release."""
    from cache.embed import build_release, plan_release

    target = open_store(store)
    before = target.current()
    with reporting() as report:
        previous = target.fetch(before, cache, report) if incremental and before else None
        if dry_run:
            plan = plan_release(bundle, items, previous=previous, id_column=id_column, progress=report)
            console.print(
                f"would publish {plan.items:,} items: {plan.embedded:,} to embed, {plan.reused:,} unchanged, "
                f"{plan.removed:,} removed; nothing was written"
            )
            return
        with building_in(work) as folder:
            built = build_release(
                bundle,
                items,
                folder / "release",
                index=index,
                previous=previous,
                id_column=id_column,
                workers=workers,
                progress=report,
            )
            table = _users(bundle, users, folder / "users.snap", report)
            sent = _send(target, built, report)
            version = target.publish_users(table, for_users(report)) if table else None
            if activate:
                target.activate(sent.release.id)
    console.print(sent.line(store=target.url, current=activate, before=before))
    if version:
        console.print(f"published the users of {users}, version {version}")


@app.command()
def verify(
    store: StoreUrl = DEFAULT_STORE,
    cache: CacheDir = Path("var/cache"),
    sampled: Annotated[int, typer.Option("--users", help="Users whose retrieval is compared with everything.")] = 50,
    seed: Annotated[int, typer.Option(help="Which users are drawn.")] = 0,
    per_head: Annotated[int, typer.Option(help="Candidates per head at which MaxSim recall must be 0.95.")] = 500,
) -> None:
    """Check every hash of the current release in the store, and what its index finds of the true best items."""
    target = open_store(store)
    with checked(target, None, cache) as folder:
        release = read_release(folder)
        if release.index == "none":
            console.print("it has no index (publish with --index flat), so no retrieval to check")
        else:
            records, source = _sampled(folder, target, sampled, seed)
            _print_recall(folder, release, records, source, per_head)


@releases.command("list")
def list_releases(store: StoreUrl = DEFAULT_STORE) -> None:
    """All releases of the store, oldest first, a line each whatever the width of the terminal."""
    console.print(f"{'release':31} {'items':>13} {'MB':>10} {'bundle':16} {'snapshot':16}")
    for info in open_store(store).list():
        size = f"{info.size_bytes / 1e6:,.1f}"
        mark = " current" if info.current else ""
        console.print(f"{info.id} {info.count:13,} {size:>10} {info.bundle_id} {info.snapshot_id}{mark}")


@releases.command("activate")
def activate_release(release: str, store: StoreUrl = DEFAULT_STORE) -> None:
    """Make a release the current one."""
    target = open_store(store)
    before = target.current()
    target.activate(release)
    console.print(f"current is {release}, was {before or 'none'}")


@releases.command("rollback")
def rollback_release(store: StoreUrl = DEFAULT_STORE) -> None:
    """Go back to the release that was current before."""
    target = open_store(store)
    before = target.current()
    console.print(f"current is {target.rollback()}, was {before or 'none'}")


@releases.command("prune")
def prune_releases(
    keep: Annotated[int, typer.Option(help="How many of the newest stay; the current one always does.")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Delete old releases, and what dead publishers left behind."""
    gone = open_store(store).prune(keep)
    console.print(f"deleted {len(gone)}: {', '.join(gone)}" if gone else "nothing to delete")


@releases.command("push")
def push_release(
    folder: Path,
    store: StoreUrl = DEFAULT_STORE,
    activate: Annotated[bool, typer.Option(help="Make the release the current one.")] = True,
) -> None:
    """Publish a release folder that was built before, for example when the store failed after it was built."""
    target = open_store(store)
    before = target.current()
    with reporting() as report:
        sent = _send(target, folder, report)
        if activate:
            target.activate(sent.release.id)
    console.print(sent.line(store=target.url, current=activate, before=before))


@releases.command("verify")
def verify_release(
    release: Annotated[str | None, typer.Argument(help="The current one where absent.")] = None,
    store: StoreUrl = DEFAULT_STORE,
    cache: CacheDir = Path("var/cache"),
) -> None:
    """Check every hash of a release in the store."""
    with checked(open_store(store), release, cache):
        pass


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A published release and the seconds that storing it took."""

    release: Release
    seconds: float

    def line(self, *, store: str, current: bool, before: str | None) -> str:
        """What is said at the end."""
        made, release = self.release.report, self.release
        size = f"{release.size_bytes / 1e6:,.1f} MB"
        counts = ", ".join(f"{made[name]:,} {name}" for name in ("embedded", "reused", "removed") if name in made)
        speed = f"embedding {made['embed_s']:.1f} s, " if "embed_s" in made else ""
        state = f"current, was {before or 'none'}" if current else "not current: see `ranktower releases activate`"
        return (
            f"published {release.id} to {store}: {release.count:,} items ({counts}), {size}; "
            f"{speed}storing {self.seconds:.1f} s; {state}"
        )


def _send(store: ReleaseStore, folder: Path, report: Report) -> Sent:
    started = time.perf_counter()
    store.publish(folder, report)
    return Sent(release=read_release(folder), seconds=time.perf_counter() - started)


def _users(bundle: Path, source: Path | None, out: Path, report: Report) -> Path | None:
    from cache.users import build_user_table
    from model.bundle import open_bundle

    return build_user_table(open_bundle(bundle).spec, source, out, report) if source else None


@contextmanager
def checked(store: ReleaseStore, release_id: str | None, cache: Path) -> Iterator[Path]:
    """A fresh copy of a release, or of the current one, every hash of it checked, and said so."""
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
        yield folder


def _sampled(folder: Path, store: ReleaseStore, count: int, seed: int) -> tuple[NDArray[np.float32], str]:
    """Records of users of the release, and who they are."""
    from cache.users import sample_users
    from model.bundle import open_bundle

    bundle = open_bundle(folder / BUNDLE)
    return sample_users(bundle, store.fetch_users(bundle.spec.id, folder.parent), count, seed)


def _print_recall(folder: Path, release: Release, users: NDArray[np.float32], source: str, per_head: int) -> None:
    """The curve by candidates kept per head. Raises StoreError when MaxSim retrieval falls short at `per_head`."""
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
    if release.head.kind == "maxsim" and curve[per_head] < RECALL_WANTED:
        raise StoreError(
            f"{release.id}: recall@{RECALL_AT} with {per_head} candidates per head is {curve[per_head]:.3f}, below "
            f"{RECALL_WANTED}: retrieve with more of them, or publish with --index flat"
        )


# --- shown to a person -----------------------------------------------------------------------------------------------


@contextmanager
def building_in(work: Path) -> Iterator[Path]:
    """A folder to build in; it goes when all is well, and stays when a built release could not be stored."""
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="release-", dir=work))
    try:
        yield folder
    except BaseException:
        if (folder / "release").is_dir():
            console.print(f"the built release stays in {folder / 'release'}: store it with `ranktower releases push`")
        else:
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


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
