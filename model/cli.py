"""The verbs between raw logs and a bundle: data, train, evaluate, export. Heavy imports happen inside them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model.errors import RankTowerError, TrainError

if TYPE_CHECKING:
    from model.train import Progress, Recipe

ALL = "all"  # of what `evaluate --split` takes: every event of a log
CUTS = (5, 10, 20, 50, 100)
NETWORK_NAMES = (
    "ranktower, two_tower, lr, dat, inttower, cold"  # of model/networks.py and model/losses.py, which import torch
)
LOSS_NAMES = (
    "am_rankmax, approx_ndcg, arf, bce, dftopk, distillation, hybrid, lambdaloss, ranknet, rankmax, softmax, softsort"
)

app = typer.Typer(add_completion=False, no_args_is_help=True)

LogFolder = Annotated[Path, typer.Option("--log", help="Folder with a log in the documented form (docs/data.md).")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]


@contextmanager
def mending() -> Iterator[None]:
    """Print an error that a user can mend on one line and exit with 2."""
    try:
        yield
    except RankTowerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except OSError as error:
        typer.echo(f"error: {error}: check the path, its permissions and the space left", err=True)
        raise typer.Exit(2) from error


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A line that moves while something without countable steps goes on; nothing where nobody watches."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="A data set (docs/data.md), or a folder with its files or a log.")],
    out: Out,
    folder: Annotated[Path | None, typer.Option("--from", help="A named data set's folder, or settings file.")] = None,
) -> None:
    """Bring logs into the documented form, check them, and say what was read and what was dropped."""
    with mending():
        from model.datasets.log import SPLITS, read_log

        with busy(f"reading {source}"):
            path = convert(source, folder, out)
            log = read_log(path)
        typer.echo(f"{path}: log {log.schema.name}, {len(log.users):,} users, {len(log.items):,} items")
        for name, count in log.report.items():
            typer.echo(f"  {name:<14}{count:>12,}")
        for place, name in enumerate(SPLITS):
            typer.echo(f"  {name:<14}{int((log.split == place).sum()):>12,}")


def convert(source: str, folder: Path | None, out: Path) -> Path:
    """The log folder made from a data set's name, or a folder: a log in the documented form, or a data set's files."""
    from model.datasets import DATASETS, adopt

    if source in DATASETS:
        return DATASETS[source](folder, out)
    if folder is not None:
        names = ", ".join(DATASETS)
        raise TrainError(f"--from {folder} goes with a named data set ({names}), not with {source!r}: leave it out")
    if not Path(source).is_dir():
        raise TrainError(f"data {source!r} is neither a folder nor one of {', '.join(DATASETS)}: give one of them")
    return adopt(Path(source), out)


@app.command()
def train(
    log: LogFolder,
    out: Out,
    network: Annotated[str, typer.Option(help=f"One of {NETWORK_NAMES}.")] = "ranktower",
    loss: Annotated[str | None, typer.Option(help=f"One of {LOSS_NAMES}. By default hybrid.")] = None,
    sampler: Annotated[str, typer.Option(help="full, without-random, without-candidates or impressions.")] = "full",
    lr: Annotated[float | None, typer.Option(help="Learning rate of all but the embedding tables.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Most epochs; early stopping may end sooner.")] = None,
    batch: Annotated[int | None, typer.Option(help="Lists of a step.")] = None,
    seed: Annotated[int, typer.Option(help="Decides every random draw.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole epoch in the folder.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of recipe, network, loss or sampler: dim=16, random=80."),
    ] = None,
) -> None:
    """Train a network; write weights, metrics and sample requests."""
    with mending():
        from model.datasets.log import read_log
        from model.distributed import opened
        from model.train import Recipe
        from model.train import train as fit

        chosen = {"lr": lr, "epochs": epochs, "batch": batch, "loss": loss}
        given = {name: value for name, value in chosen.items() if value is not None}
        recipe = with_settings(
            Recipe(network=network, sampler=sampler, seed=seed, device=device, **given),  # type: ignore[arg-type]
            setting or [],
        )
        logging.basicConfig(level=logging.WARNING)
        with opened(recipe.device) as processes, progress_bars() if processes.lead else nullcontext() as progress:
            metrics = fit(read_log(log), out, recipe, resume=resume, progress=progress, processes=processes)
        if not processes.lead:
            return
        teacher = metrics["teacher"]
        if teacher is not None:
            typer.echo("teacher AUC, out of fold: " + ", ".join(f"{k} {v:.4f}" for k, v in teacher["auc"].items()))
        typer.echo(f"best epoch {metrics['best_epoch']}, validation NDCG@10 {metrics['valid_ndcg@10']:.4f}")
        show_rows({name: metrics[name] for name in ("model", "popularity", "random")}, metrics["lists"])


def with_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with `key=value` pairs put where they belong: its own fields, else network, loss or sampler options.

    Values are JSON, else text. A prefix `network.`, `loss.` or `sampler.` says where a key belongs that two know.
    """
    from dataclasses import replace

    for pair in settings:
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise TrainError(f"--set {pair!r}: write key=value")
        place, name = _place(recipe, key)
        value = _value(text)
        changes: dict[str, Any] = {name: value}
        if place != "recipe":
            changes = {place: {**getattr(recipe, place), **changes}}
        recipe = replace(recipe, **changes)
    return recipe


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _place(recipe: Recipe, key: str) -> tuple[str, str]:
    """Which part of a recipe takes a key, and the key without prefix."""
    known = _known_settings(recipe)
    prefix, _, name = key.rpartition(".")
    places = {"network": "options", "loss": "loss_options", "sampler": "sampler_options", "": ""}
    if prefix not in places:
        raise TrainError(f"--set {key}: the prefix is {prefix!r}: use network., loss. or sampler.")
    found = [place for place, names in known.items() if name in names and places[prefix] in ("", place)]
    if len(found) == 1:
        return found[0], name
    if found:
        raise TrainError(
            f"--set {key}: {' and '.join(found)} both know it: write network., loss. or sampler. before it"
        )
    names = ", ".join(sorted({name for names in known.values() for name in names}))
    raise TrainError(f"--set {key}: nothing takes it; known are {names}")


def _known_settings(recipe: Recipe) -> Mapping[str, set[str]]:
    """The names that each part of a recipe takes."""
    from dataclasses import fields
    from inspect import signature

    from model.losses import FUNCTIONS, LOSSES, TOLD
    from model.networks import NETWORKS
    from model.sampling import Sampler

    own = {field.name for field in fields(recipe)} - {"options", "loss_options", "sampler_options"}
    network = NETWORKS.get(recipe.network)
    loss: Callable[..., Any] | None = FUNCTIONS.get(recipe.loss) or LOSSES.get(recipe.loss)
    inputs = {"self", "spec", "scores", "labels", "mask", *TOLD}
    return {
        "recipe": own,
        "options": set(signature(network).parameters) - inputs if network else set(),
        "loss_options": set(signature(loss).parameters) - inputs if loss else set(),
        "sampler_options": {field.name for field in fields(Sampler)},
    }


@app.command()
def evaluate(
    log: LogFolder,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="Folder of a training run.")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Folder of an exported bundle.")] = None,
    split: Annotated[
        str, typer.Option(help="train, valid or test of [split] in log.toml; all: without candidates or popularity.")
    ] = "test",
    size: Annotated[int, typer.Option(min=2, help="Items of a list; impressions stay, however many.")] = 200,
    k: Annotated[list[int] | None, typer.Option("--k", min=1, help="Cut-offs of Recall and NDCG; repeat it.")] = None,
    random_only: Annotated[bool, typer.Option("--random-only", help="Lists of impressions and random items.")] = False,
    out: Annotated[Path, typer.Option("--out", help="JSON file for the report.")] = Path("evaluation.json"),
) -> None:
    """Measure a checkpoint or a bundle on held-out lists, beside popularity and random on the same ones.

    Prints and writes Recall@K, NDCG@K and GAUC with 95 % intervals from a bootstrap over users. The log may be one that
    the model never saw: with --split all every request is measured, each with the history before it. Popularity and the
    candidates of lists are counted in training events, so that a log without any has random negatives alone, and an
    easier list.
    """
    with mending():
        from model.datasets.log import SPLITS, TEST, TRAIN, all_to_test, read_log
        from model.evaluate import evaluate_bundle, evaluate_checkpoint

        if (checkpoint is None) == (bundle is None):
            raise TrainError("evaluate needs one of --checkpoint and --bundle: give one")
        if split not in (*SPLITS, ALL):
            raise TrainError(f"split is {split!r}: use one of {', '.join((*SPLITS, ALL))}")
        measure, folder = (evaluate_checkpoint, checkpoint) if checkpoint else (evaluate_bundle, bundle)
        assert folder is not None
        ks = k or CUTS
        with busy("scoring the held-out lists"):
            read = read_log(log, trainable=False)
            read, part = (all_to_test(read), TEST) if split == ALL else (read, SPLITS.index(split))
            report = measure(folder, read, split=part, size=size, random_only=random_only, ks=ks)
            report["split"] = split
            report["training_events"] = int((read.split == TRAIN).sum())
            if not report["training_events"]:
                del report["rows"]["popularity"]  # of nothing: it would be chance by another name
            report["candidates"] = read.has_stages or bool(report["training_events"] and not random_only)
        show_rows(report["rows"], report["lists"])
        show_remarks(report, ks, size)
        write_report(out, report)


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON, its folder made where it is missing."""
    from model.checkpoint import write_json

    if out.is_dir():
        raise TrainError(f"--out {out} is a folder: name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    typer.echo(f"{out}: the same as JSON")


def show_remarks(report: Mapping[str, Any], ks: Sequence[int], size: int) -> None:
    """What a reader of the numbers has to know of the log beside the model."""
    new, dropped, longest = report["new"], report["dropped"], report["lists"]["size"]
    typer.echo(f"new to the model: {new['users']:,} users and {new['items']:,} items of these lists")
    if not report["training_events"]:
        typer.echo(
            "this log has no training events: popularity is not known"
            + ("" if report["candidates"] else ", and lists hold random items beside impressions, no candidates")
        )
    if report["missing"]:
        typer.echo(f"not in this log, read as missing: {', '.join(report['missing'])}")
    if any(dropped.values()):
        typer.echo(
            f"dropped {dropped['unknown_user']:,} rows of users that are not in users.parquet and "
            f"{dropped['unknown_item']:,} of items that are not in items.parquet"
        )
    if longest > size:
        typer.echo(f"--size {size} is below the longest list of logged rows: lists hold up to {longest} items")
    if max(ks) >= longest:
        typer.echo(f"lists hold up to {longest} items: Recall@K says nothing from there on")


@app.command()
def export(
    run: Annotated[Path, typer.Option("--run", help="Folder of a training run.")],
    out: Out,
) -> None:
    """Write a training run as a bundle of ONNX towers, refusing when torch and ONNX Runtime differ."""
    with mending():
        from model.export import export_bundle

        with busy("tracing the towers to ONNX and comparing them with torch"):
            bundle_id = export_bundle(run, out)
        size = sum(path.stat().st_size for path in out.iterdir())
        typer.echo(f"{out}: bundle {bundle_id}, {size / 1e6:,.1f} MB")


def show_rows(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], lists: Mapping[str, Any]) -> None:
    """A table of metrics with their 95 % intervals, a column a model, and what the lists were."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", *rows):
        table.add_column(column, justify="right" if column else "left")
    for metric in next(iter(rows.values())):
        table.add_row(metric, *(interval(row[metric]) for row in rows.values()))
    console = Console(width=max(100, 26 * (len(rows) + 1)))
    console.print(table)
    console.print(
        f"{lists['lists']:,} lists {lists['digest'][:16]} of up to {lists['size']} items, {lists['users']:,} users; "
        f"{lists['left_out']:,} without a positive left out; 95 % intervals over users",
        highlight=False,
    )


def interval(metric: Mapping[str, Any]) -> str:
    """A mean with its ends; a dash where no list has anything to measure."""
    return f"{metric['mean']:.4f} [{metric['low']:.4f}, {metric['high']:.4f}]" if metric["lists"] else "–"


def epoch_lines() -> Progress:
    """Say on stderr when an epoch ends, with its steps and seconds."""
    began = {"": time.monotonic()}

    def show(what: str, done: int, total: int) -> None:
        if not what.startswith("epoch "):
            return
        start = began.setdefault(what, time.monotonic())
        if done == total:
            typer.echo(f"{what}: {total:,} steps in {time.monotonic() - start:.1f} s", err=True)

    return show


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar for what is going on, redrawn in place on a terminal; elsewhere a line for each epoch."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield epoch_lines()
        return
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            kind = what.partition(":")[0].split()[0]
            if kind not in tasks:
                tasks[kind] = bars.add_task(what, total=total)
            bars.update(tasks[kind], description=what, completed=done, total=total)

        yield show
