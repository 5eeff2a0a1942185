"""Train a network on a log: one visible loop, a checkpoint and a JSON line an epoch, artefacts at the end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.checkpoint import (
    build_network,
    check_run,
    load_checkpoint,
    load_state,
    load_weights,
    open_run,
    read_json,
    save_state,
    save_weights,
    write_json,
    write_tensors,
    write_text,
)
from model.datasets.log import IMPRESSION, TEST, TRAIN, VALID, Log
from model.distributed import ALONE, Processes
from model.errors import DivergedError, TrainError
from model.evaluate import HeldOut, Row, baselines, held_out, measure, rows_to_json
from model.features import UNKNOWN, FeatureSpec
from model.layers import Tables
from model.losses import ARF, LOSSES, Hybrid, Labels
from model.metrics import METRICS, Calibration, calibrate, expected_calibration_error, rank, sigmoid
from model.networks import Network
from model.regularisers import Batch
from model.requests import encode_items, encode_users, fit_log_spec, request_body, user_features
from model.sampling import SAMPLERS, Lists, Sampler, TrainingSet, item_factors, training_set
from model.scoring import score_network
from model.teacher import Teacher, fit_teacher

__all__ = ["Recipe", "load_checkpoint", "prepare", "train"]

WARMUP_REQUESTS = 50
HELD_OUT_REQUESTS = 300

RANGES: dict[str, tuple[type, float, float]] = {  # of the recipe's numbers: kind, least, most
    "lr": (float, 1e-8, 10.0),
    "embedding_lr": (float, 1e-8, 10.0),
    "weight_decay": (float, 0.0, 10.0),
    "clip": (float, 1e-6, 1e9),
    "average": (float, 0.0, 0.999999),
    "epochs": (int, 1, 10_000),
    "steps": (int, 0, 10_000_000),
    "batch": (int, 1, 1_000_000),
    "patience": (int, 1, 10_000),
    "unknown_users": (float, 0.0, 1.0),
    "unknown_items": (float, 0.0, 1.0),
    "valid_lists": (int, 1, 10_000_000),
    "seed": (int, 0, 2**31 - 1),
}
ITEM_STARTS = ("factors", "random")
FACTOR_STD = 0.2  # of a started table: above EMBEDDING_STD, so that what is known outweighs what is not
PARTS = ("draw", "forward", "loss", "step")  # of a step: its lists and their rows, scores, costs, gradients and update
FRESH: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "best": -1.0, "seconds": 0.0}  # the progress of a new run

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what is going on, steps done, steps in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What distinguishes one training from another. The defaults were tuned on validation, see experiments/LOG.md."""

    network: str = "ranktower"
    options: Mapping[str, Any] = field(default_factory=dict)  # of the network
    loss: str = "hybrid"
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = "full"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 3e-3
    embedding_lr: float = 1e-3  # of embedding tables, whose rows see few steps each
    weight_decay: float = 0.01
    clip: float = 5.0  # largest gradient norm
    average: float = 0.98  # decay per step of the averaged weights; 0: the last weights
    epochs: int = 12
    steps: int = 100  # of an epoch, at most; 0: as many as it takes to see every list once
    batch: int = 128  # lists of a step
    patience: int = 4  # epochs without a better validation NDCG@10
    unknown_users: float = 0.2  # share of user ids made unknown in training, so that new users have a trained row
    unknown_items: float = 0.02
    item_start: str = "factors"  # item ids start as factors of what was taken together in training, or "random"
    valid_lists: int = 1500  # lists scored after each epoch
    teacher: bool = True  # False: no soft labels, for losses that do not distil
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All that the loop reads, resident as arrays."""

    data: TrainingSet
    user_id: slice | None  # columns of `users` that hold the user's id
    item_id: slice | None
    users: np.ndarray  # (L, user width) int32, a row per training list
    items: np.ndarray  # (I, item width) int32
    valid: HeldOut
    valid_users: np.ndarray  # (V, user width) int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """What changes while training."""

    network: Network
    average: AveragedModel  # of the network's weights over the last steps: what is validated and kept
    loss: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts with weights, as the state file names them."""
        return {"network": self.network, "average": self.average, "loss": self.loss}

    @property
    def best(self) -> Network:
        """The network with averaged weights."""
        return cast(Network, self.average.module)


def train(
    log: Log,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    teacher: Teacher | None = None,
    material: Material | None = None,
    test: bool = True,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Train by a recipe into the folder `out`; returns what metrics.json holds.

    Stops early on validation NDCG@10. With `resume`, goes on from the last whole epoch in `out`, bit for bit as if it
    had never stopped. `teacher`, `material`: made before from this log (`prepare`), to share among runs. Without `test`
    no test list is made, so that the log may lack those events. Of several `processes` (model/distributed.py), all with
    the same log and `out`, the first alone validates and writes; all return the same. Raises TrainError when `out`
    holds something else or the recipe does not fit, DivergedError when the loss is no longer finite.
    """
    say = progress or _silent
    _check(recipe)
    if not resume:
        check_run(out)
    spec = fit_log_spec(log)
    learner = _set_up(recipe, spec, log)
    done = _resumed(out, recipe, spec, learner, processes) if resume else FRESH
    processes.agree({**_config(recipe, spec, learner.network), "events": len(log.grade), "epoch": done["epoch"]})
    if teacher is None or not recipe.teacher:
        teacher = _teacher(log, spec, recipe, out, resume, say) if processes.lead else None
        teacher = _shared(teacher, log, processes)
    material = material or prepare(log, spec, teacher, recipe.valid_lists, say)
    while done["epoch"] < recipe.epochs and done["epoch"] - done["best_epoch"] < recipe.patience:
        line = _epoch(learner, material, recipe, done["epoch"] + 1, say, processes)
        if processes.lead:
            if done is FRESH:  # an earlier run in the folder stays until this one has something to put in its place
                _start(out, recipe, spec, learner, teacher)
            done = _keep(out, learner, recipe, spec, done, line)
            logger.info("%s", line)
        done = processes.told(done)
    metrics: dict[str, Any] = {}
    if processes.lead:
        load_weights(learner.best, out / "weights.safetensors")
        metrics = _finish(log, out, learner.best, material, teacher, done, say, test)
    return cast(dict[str, Any], processes.told(metrics))


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""


# --- set-up ---------------------------------------------------------------------------------------------


def _check(recipe: Recipe) -> None:
    for kind, name, known in (("loss", recipe.loss, LOSSES), ("sampler", recipe.sampler, SAMPLERS)):
        if name not in known:
            raise TrainError(f"{kind} {name!r} is not known: use one of {', '.join(known)}")
    for name, (number, least, most) in RANGES.items():
        value = getattr(recipe, name)
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or (number is int and value != int(value)) or not least <= value <= most:
            what = "a whole number" if number is int else "a number"
            raise TrainError(f"{name} is {value!r}: it must be {what} from {least:g} to {most:g}")
    make_sampler(recipe)
    if recipe.item_start not in ITEM_STARTS:
        raise TrainError(f"item_start is {recipe.item_start!r}: use {' or '.join(ITEM_STARTS)}")
    if recipe.device not in ("cpu", "cuda"):
        raise TrainError(f"device is {recipe.device!r}: use cpu or cuda")
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise TrainError("device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")


def make_sampler(recipe: Recipe) -> Sampler:
    """The recipe's sampler; TrainError names an option that it does not take."""
    try:
        return SAMPLERS[recipe.sampler](**recipe.sampler_options)
    except (TypeError, ValueError) as error:
        raise TrainError(f"sampler {recipe.sampler!r} does not take these options ({error})") from error


def _set_up(recipe: Recipe, spec: FeatureSpec, log: Log) -> Learner:
    """Seeded network and loss, and AdamW with the embedding tables in a group of their own.

    Matrices of the network decay; tables, and vectors and scalars such as norms, biases, scales and margins, do not.
    """
    torch.manual_seed(recipe.seed)
    network = build_network(recipe.network, spec, recipe.options)
    if recipe.item_start == "factors":
        _start_items(network, spec, log)
    network = network.to(recipe.device)
    try:
        told = {"grades": len(log.schema.rungs), "soft_top": log.schema.soft_label.top}
        loss = LOSSES[recipe.loss](**told, **recipe.loss_options).to(recipe.device)
    except (TypeError, ValueError) as error:
        raise TrainError(f"loss {recipe.loss!r} does not take these options ({error})") from error
    tables = {id(p) for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    embeddings = [p for p in network.parameters() if id(p) in tables]
    plain = {name: p for name, p in network.named_parameters() if id(p) not in tables}
    vectors = [p for name, p in plain.items() if p.dim() < 2 or name.endswith("bias")]
    matrices = [p for name, p in plain.items() if p.dim() > 1 and not name.endswith("bias")]
    groups = [
        {"params": matrices, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": [*vectors, *loss.parameters()], "lr": recipe.lr, "weight_decay": 0.0},
        {"params": embeddings, "lr": recipe.embedding_lr, "weight_decay": 0.0},
    ]
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))  # type: ignore[no-untyped-call]
    return Learner(network=network, average=average, loss=loss, optimizer=torch.optim.AdamW(groups, fused=True))


def _start_items(network: Network, spec: FeatureSpec, log: Log) -> None:
    """Put factors of the matrix of who took what in training into the table of item ids. Our own.

    A step moves the rows of its own lists alone, and what this matrix knows of all takes a network many epochs to find.
    An item that nobody took keeps its random start; so does a table of single weights, where a factor means nothing.
    """
    columns = spec.columns("item").get(spec.item_id_name)
    tables = next(module for module in network.modules() if isinstance(module, Tables))
    if columns is None or tables.dim == 1:
        return
    field = next(field for field in spec.item_fields if field.name == spec.item_id_name)
    weight = cast(nn.Embedding, tables[tables.owners.index(spec.table_of(field))]).weight
    taken = (log.split == TRAIN) & (log.grade > 0)
    factors = item_factors(log.user[taken], log.item[taken], len(log.items), dim=weight.shape[1])
    rows = encode_items(spec, log)[:, columns.start]
    known = factors.any(axis=1) & (rows != UNKNOWN)
    if known.any():
        factors *= FACTOR_STD / factors[known].std()
    with torch.no_grad():
        weight[torch.from_numpy(rows[known]).long()] = torch.from_numpy(factors[known])


def _start(out: Path, recipe: Recipe, spec: FeatureSpec, learner: Learner, teacher: Teacher | None) -> None:
    """Open the folder for a new run."""
    open_run(out)
    spec.save(out / "spec.json")
    write_json(out / "config.json", _config(recipe, spec, learner.network))
    if teacher is not None:
        quality = torch.tensor([teacher.auc[rung] for rung in teacher.auc])
        write_tensors(out / "teacher.safetensors", {"soft": torch.from_numpy(teacher.soft), "auc": quality}, {})


def _resumed(out: Path, recipe: Recipe, spec: FeatureSpec, learner: Learner, processes: Processes) -> dict[str, Any]:
    """Put the last whole epoch of the folder into the learner; returns the progress so far."""
    now = _config(recipe, spec, learner.network)
    before = read_json(out / "config.json")
    for key in sorted(now.keys() - {"head", "epochs", "patience", "device"}):
        if before.get(key) != now[key]:
            raise TrainError(f"{out} was trained with {key} {before.get(key)}, this run asks {now[key]}: give the same")
    progress = load_state(out, learner.modules, learner.optimizer)
    if processes.lead:
        _cut_lines(out / "epochs.jsonl", progress["epoch"])
    return progress


def _config(recipe: Recipe, spec: FeatureSpec, network: Network) -> dict[str, Any]:
    values = json.loads(json.dumps(asdict(recipe)))
    return {**values, "spec_id": spec.id, "head": network.head().to_json()}


def _cut_lines(path: Path, epochs: int) -> None:
    """Drop the lines of epochs whose state was never written."""
    lines = path.read_text().splitlines() if path.is_file() else []
    write_text(path, "".join(line + "\n" for line in lines[:epochs]))


def _teacher(log: Log, spec: FeatureSpec, recipe: Recipe, out: Path, resume: bool, say: Progress) -> Teacher | None:
    """The soft labels: of the run when it is resumed, else fitted and kept."""
    path = out / "teacher.safetensors"
    if not recipe.teacher:
        return None
    if resume and path.is_file():
        kept = load_file(path)
        auc = dict(zip(log.schema.rungs, kept["auc"].tolist(), strict=True))
        return Teacher(soft=kept["soft"], auc=auc, logged=log.teacher is not None)
    stages = len(log.schema.rungs) + 1
    seen: list[str] = []

    def forward(what: str) -> None:
        seen.append(what)
        say(f"teacher: {what}", len(seen) - 1, stages)

    teacher = fit_teacher(log, spec, seed=recipe.seed, progress=forward)
    say("teacher", stages, stages)
    return teacher


def _shared(teacher: Teacher | None, log: Log, processes: Processes) -> Teacher | None:
    """Process 0's teacher on every process."""
    about = processes.told(None if teacher is None else {"auc": teacher.auc, "logged": teacher.logged})
    if about is None:
        return None
    soft = np.empty(len(log.grade), dtype=np.float32) if teacher is None else teacher.soft
    return Teacher(soft=processes.filled(soft), **about)


def prepare(
    log: Log, spec: FeatureSpec, teacher: Teacher | None, valid_lists: int, progress: Progress | None = None
) -> Material:
    """Encode everything once: no seed is in it. Raises TrainError where a log has nothing to train on or to validate.

    Validation lists hold no new items, of which most training steps could tell nothing (model/sampling.py).
    """
    say = progress or _silent
    say("lists", 0, 3)
    data = training_set(log, None if teacher is None else teacher.soft)
    if not len(data):
        raise TrainError(
            f"log {log.schema.name}: no training list has a positive: check the feedback columns in log.toml"
        )
    say("lists", 1, 3)
    valid = _sampled(held_out(log, VALID, new_items=False), valid_lists)
    say("lists", 2, 3)
    users, valid_users = (encode_users(spec, log, part) for part in (data.requests, valid.requests))
    say("lists", 3, 3)
    return Material(
        data=data,
        user_id=spec.columns("user").get(spec.user_id_name),
        item_id=spec.columns("item").get(spec.item_id_name),
        users=users,
        items=encode_items(spec, log),
        valid=valid,
        valid_users=valid_users,
    )


def _sampled(held: HeldOut, most: int) -> HeldOut:
    """At most so many of the lists, drawn without regard to their grades, since calibration needs the real base rate.

    Raises TrainError when no list drawn has a positive: there would be nothing to choose an epoch by.
    """
    drawn = np.random.default_rng(0).permutation(len(held.lists))[:most]
    sample = held.take(np.sort(drawn))
    if not (sample.lists.grade > 0).any():
        raise TrainError(
            f"none of {len(drawn):,} validation lists has a positive: give validation more of the time in [split] of "
            "log.toml, or raise --set valid_lists"
        )
    return sample


# --- the loop -------------------------------------------------------------------------------------------


def _epoch(
    learner: Learner, material: Material, recipe: Recipe, epoch: int, say: Progress, processes: Processes
) -> dict[str, Any]:
    """One epoch and, by the first process, its validation; everything random in it depends on (seed, epoch) alone.

    All processes draw the same lists and unknown ids, each masks (dropout) its own units.
    """
    began = time.perf_counter()
    torch.manual_seed(recipe.seed * 100_003 + epoch + (processes.rank << 48))
    rng = np.random.default_rng([recipe.seed, epoch])
    sampler = make_sampler(recipe)
    learner.network.train()
    total, lists, entries = 0.0, 0, 0
    steps = list(_batches(len(material.data), recipe, rng))
    watch = Watch()
    for step, rows in enumerate(steps):
        say(f"epoch {epoch}", step, len(steps))
        drawn = _draw(sampler, material, recipe, rows, rng, processes)
        watch.lap("draw")
        scores, labels, mask, batch = _forward(learner.network, recipe.device, drawn, processes)
        watch.lap("forward")
        loss = learner.loss(scores, labels, mask)
        own = learner.network.regulariser(batch)
        if own is not None:
            own = processes.averaged(own, len(rows))
            loss = loss + own
        watch.lap("loss")
        _step(learner, loss, recipe.clip, len(rows), processes)
        total, lists, entries = total + float(loss.detach()) * len(rows), lists + len(rows), entries + int(mask.sum())
        watch.lap("step")
    seconds = time.perf_counter() - began
    valid = _validate(learner.best, material) if processes.lead else {}
    say(f"epoch {epoch}", len(steps), len(steps))
    return {
        "epoch": epoch,
        "loss": round(total / lists, 6),
        **_terms(learner.loss, scores, labels, mask),
        **({} if own is None else {"regulariser": round(float(own.detach()), 6)}),
        **({"importance": importance} if (importance := learner.network.importance()) else {}),
        **valid,
        "scale": round(learner.best.head().scale, 4),
        "seconds": round(seconds, 3),
        "lists_per_s": round(lists / seconds, 1),
        "samples_per_s": round(entries / seconds, 1),
        "shares": watch.shares(),
    }


class Watch:
    """How long each part of a step took; on a GPU, what it has not done yet counts to the part that waits for it."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """What has passed since the last lap was this part."""
        now = time.perf_counter()
        self._seconds[part] += now - self._since
        self._since = now

    def shares(self) -> dict[str, float]:
        """Of all that was measured."""
        return {part: round(seconds / sum(self._seconds.values()), 4) for part, seconds in self._seconds.items()}


def _batches(count: int, recipe: Recipe, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Shuffled rows of the training lists, a batch at a time."""
    order = rng.permutation(count)
    starts = range(0, count, recipe.batch)
    for at in starts[: recipe.steps or len(starts)]:
        yield order[at : at + recipe.batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The lists of a step (b, n), and what of them this process passes through the network."""

    lists: Lists
    share: np.ndarray  # (s,) the lists that are this process's
    users: np.ndarray  # (s, user width) int32
    items: np.ndarray  # (m, item width) int32, distinct
    place: np.ndarray  # (s, n) int64, rows of items


def _draw(
    sampler: Sampler,
    material: Material,
    recipe: Recipe,
    rows: np.ndarray,
    rng: np.random.Generator,
    processes: Processes,
) -> Drawn:
    lists = sampler.draw(material.data, rows, rng)
    wanted = np.where(
        lists.mask, lists.item, lists.item[lists.mask][:1]
    )  # padding must not bring in an item of its own
    distinct, place = np.unique(wanted, return_inverse=True)
    users = _with_unknowns(material.users[rows], material.user_id, recipe.unknown_users, rng)
    items = _with_unknowns(material.items[distinct], material.item_id, recipe.unknown_items, rng)
    place, share = place.reshape(wanted.shape), processes.share(len(rows))
    if processes.world > 1:
        kept, place = np.unique(place[share], return_inverse=True)
        users, items, place = users[share], items[kept], place.reshape(len(share), -1)
    return Drawn(lists=lists, share=share, users=users, items=items, place=place)


def _forward(network: Network, device: str, drawn: Drawn, processes: Processes) -> tuple[Tensor, Labels, Tensor, Batch]:
    """Scores, labels, mask (b, n) of the lists drawn, vectors of this process's share; a tower meets an item once."""
    lists = drawn.lists
    users, items = torch.from_numpy(drawn.users).to(device), torch.from_numpy(drawn.items).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        user, item = network.user(users), network.item(items)
    chosen = torch.from_numpy(drawn.place).to(device)
    scores = processes.gathered(network.score_lists(user, item, chosen), len(lists.item))
    labels = Labels(
        grade=torch.from_numpy(lists.grade.astype(np.float32)).to(device),
        soft=torch.from_numpy(lists.soft).to(device),
        impression=torch.from_numpy(lists.stage == IMPRESSION).to(device),
    )
    mask = torch.from_numpy(lists.mask).to(device)
    own = torch.from_numpy(drawn.share).to(device)
    positive = (labels.grade > 0) & mask
    return scores, labels, mask, Batch(users, items, user, item, chosen, positive[own], mask[own])


def _with_unknowns(rows: np.ndarray, column: slice | None, share: float, rng: np.random.Generator) -> np.ndarray:
    """Rows (m, width) in which a share of the ids reads UNKNOWN, so that ids never seen have a trained row."""
    if column is None or share == 0.0:
        return rows
    changed = rows.copy()
    changed[rng.random(len(rows)) < share, column] = UNKNOWN
    return changed


def _step(learner: Learner, loss: Tensor, clip: float, lists: int, processes: Processes) -> None:
    if not torch.isfinite(loss):
        raise DivergedError(f"the loss became {float(loss.detach())}: lower the learning rate")
    learner.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    processes.add_gradients(learner.network, learner.loss, lists)
    nn.utils.clip_grad_norm_(learner.network.parameters(), clip)
    learner.optimizer.step()
    learner.average.update_parameters(learner.network)


def _terms(loss: nn.Module, scores: Tensor, labels: Labels, mask: Tensor) -> dict[str, Any]:
    """What the loss has learned of its own; of one with several terms also these on the last batch, unweighted."""
    learned = {name: [round(x, 5) for x in value.flatten().tolist()] for name, value in loss.named_parameters()}
    line: dict[str, Any] = {"learned": learned} if learned else {}
    if isinstance(loss, (Hybrid, ARF)):
        with torch.no_grad():
            costs = loss.costs(scores, labels, mask).tolist()
        line["terms"] = {name: round(cost, 5) for name, cost in zip(loss.weights, costs, strict=True)}
    return line


def _validate(network: Network, material: Material) -> dict[str, float]:
    """NDCG and Recall on the full-stage validation lists."""
    held = material.valid
    scores = score_network(network, material.valid_users, material.items, held.lists)
    if not np.isfinite(scores[held.lists.mask]).all():
        raise DivergedError("a step left weights that are no numbers: lower the learning rate")
    ranked = rank(scores, held.lists.grade, held.lists.mask)
    wanted = (("ndcg", 10), ("recall", 10), ("recall", 50))
    return {f"{name}@{k}": round(float(np.nanmean(METRICS[name](ranked, k))), 6) for name, k in wanted}


def _keep(
    out: Path, learner: Learner, recipe: Recipe, spec: FeatureSpec, done: dict[str, Any], line: dict[str, Any]
) -> dict[str, Any]:
    """Write the epoch: weights if they are the best so far, its line, and last the state that a resume trusts."""
    better = line["ndcg@10"] > done["best"]
    if better:
        save_weights(learner.best, out / "weights.safetensors")
        write_json(out / "config.json", _config(recipe, spec, learner.best))
    with (out / "epochs.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    progress = {
        "epoch": line["epoch"],
        "best_epoch": line["epoch"] if better else done["best_epoch"],
        "best": line["ndcg@10"] if better else done["best"],
        "seconds": round(done["seconds"] + line["seconds"], 3),
    }
    save_state(out, learner.modules, learner.optimizer, progress)
    return progress


# --- artefacts ------------------------------------------------------------------------------------------


def _finish(
    log: Log,
    out: Path,
    network: Network,
    material: Material,
    teacher: Teacher | None,
    done: dict[str, Any],
    say: Progress,
    test: bool,
) -> dict[str, Any]:
    """Calibration and sample requests of the best weights, and their test metrics if these are wanted."""
    say("test", 0, 1)
    fitted = _calibration(network, material)
    metrics = {
        **(_test(log, out, network, material, fitted) if test else {}),
        "best_epoch": done["best_epoch"],
        "valid_ndcg@10": done["best"],
        "train_seconds": done["seconds"],
        "teacher": None if teacher is None else teacher.to_json(),
        "calibration": {"a": fitted.a, "b": fitted.b},
        "log": {"name": log.schema.name, **log.report},
    }
    write_json(out / "warmup.json", _warmup(log, material.valid))
    write_json(out / "metrics.json", metrics)
    say("test", 1, 1)
    return metrics


def _test(log: Log, out: Path, network: Network, material: Material, fitted: Calibration) -> dict[str, Any]:
    """Metrics on the test lists; some of these become heldout.json."""
    spec = FeatureSpec.load(out / "spec.json")
    test = held_out(log, TEST)
    scores = score_network(network, encode_users(spec, log, test.requests), material.items, test.lists)
    rows: dict[str, Row] = {"model": measure(scores, test)}
    rows |= {name: measure(values, test) for name, values in baselines(log, test).items()}
    shown = test.lists.stage == IMPRESSION
    probability = sigmoid(fitted.a * scores[shown] + fitted.b)
    write_json(out / "heldout.json", _held_out_requests(log, test))
    return {
        **rows_to_json(rows),
        "lists": test.describe(),
        "calibration_error": expected_calibration_error(probability, test.lists.grade[shown] > 0),
    }


def _calibration(network: Network, material: Material) -> Calibration:
    """Platt's line from score to the chance that a shown item is taken, on validation impressions."""
    held = material.valid
    scores = score_network(network, material.valid_users, material.items, held.lists)
    shown = held.lists.stage == IMPRESSION
    return calibrate(scores[shown], held.lists.grade[shown] > 0)


def _warmup(log: Log, held: HeldOut) -> list[dict[str, Any]]:
    """Real request bodies: every other one sends the user's features in place of the id."""
    chosen = np.random.default_rng(0).permutation(len(held.lists))[:WARMUP_REQUESTS]
    bodies = []
    for place, row in enumerate(chosen.tolist()):
        body = request_body(log, held.requests, row, held.lists.item[row][held.lists.mask[row]])
        if place % 2:
            del body["user_id"]
            body["user"] = user_features(log, held.requests.user[row])
        bodies.append(body)
    return bodies


def _held_out_requests(log: Log, held: HeldOut) -> list[dict[str, Any]]:
    """Test lists with a positive as bodies, shuffled candidates beside their grades."""
    rng = np.random.default_rng(0)
    positive = np.flatnonzero((held.lists.grade > 0).any(axis=1))
    requests = []
    for row in np.sort(rng.permutation(positive)[:HELD_OUT_REQUESTS]).tolist():
        order = rng.permutation(np.flatnonzero(held.lists.mask[row]))
        body = request_body(log, held.requests, row, held.lists.item[row][order])
        requests.append({"request": body, "grades": held.lists.grade[row][order].tolist()})
    return requests
