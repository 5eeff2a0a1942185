"""The whole line once, on real logs: data, train, export, publish, serve, then held-out users ranked over HTTP."""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loadtest.serving import free_port, serve_command, served
from model.datasets import Log, read_log
from model.datasets.log import TRAIN
from model.metrics import ndcg, rank, recall
from ranktower_client import Ranking, RankTower

VAR = Path("var")
K = 10
SHOWN_USERS, SHOWN_ITEMS = 2, 5
console = Console(highlight=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Lists that training never saw, padded to one width; bodies as the HTTP API takes them."""

    bodies: list[dict[str, Any]]
    grade: np.ndarray  # (L, n) int
    mask: np.ndarray  # (L, n) bool
    popularity: np.ndarray  # (L, n) int, how often each candidate was taken in training


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="movielens", help="movielens, or a folder of KuaiRand or of your own log")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--once", action="store_true", help="end after the report instead of serving on")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    store = f"file://./{VAR}/releases"
    learn_and_publish(options.data, store)
    port = options.port if is_free(options.port) else free_port()
    step(5, "serve", [*serve_command(store, port), "--retrieval"])
    with served(store, port=port, flags=["--retrieval"]) as url:
        show(url)
        console.print(
            f"\nDone in {time.monotonic() - started:.0f} s. The service answers at [bold]{url}[/] ({url}/docs)."
        )
        if sys.stdout.isatty() and not options.once:
            console.print(
                f"`make refresh PORT={port}` in another terminal publishes changed items to it. Ctrl-C ends it."
            )
            with suppress(KeyboardInterrupt):
                signal.pause()
    return 0


def learn_and_publish(data: str, store: str) -> None:
    """Steps 1 to 4, each one verb of the command line, printed as a user would type it."""
    log, run, bundle = VAR / "log", VAR / "run", VAR / "bundle"
    published = ["--users", str(log), "--index", "flat"]
    verbs = [
        ("data", [data, "--out", str(log)]),
        ("train", ["--log", str(log), "--out", str(run)]),
        ("export", ["--run", str(run), "--out", str(bundle)]),
        ("publish", ["--bundle", str(bundle), "--items", str(log / "items.parquet"), *published, "--store", store]),
    ]
    for number, (verb, rest) in enumerate(verbs, start=1):
        command = [sys.executable, "-m", "service.cli", verb, *rest]
        step(number, verb, command)
        began = time.monotonic()
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(code)
        console.print(f"[dim]{verb} took {time.monotonic() - began:.1f} s[/]")


def step(number: int, verb: str, command: Sequence[str]) -> None:
    console.rule(f"[bold]{number}/6 {verb}", align="left")
    console.print(f"[dim]$ ranktower {' '.join(command[3:])}[/]", soft_wrap=True)


def is_free(port: int) -> bool:
    """Whether nobody listens on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            console.print(f"port {port} is taken: using a free one")
            return False
    return True


# --- step 6: rank held-out users -------------------------------------------------------------------------------------


def show(url: str) -> None:
    """Rank every held-out list over HTTP; print some users, the metrics and the stage times."""
    console.rule("[bold]6/6 rank held-out users over HTTP", align="left")
    log = read_log(VAR / "log")
    held_out = read_held_out(VAR / "run" / "heldout.json", log)
    titles = dict(zip(log.items.ids.tolist(), item_titles(log), strict=True))
    with RankTower(url, timeout_s=10.0) as client:
        rankings = [
            client.rank(**body, top_k=len(body["candidates"]))
            for body in track(held_out.bodies, "ranking", console=console, transient=True)
        ]
    for row in np.flatnonzero((held_out.grade > 0).any(axis=1))[:SHOWN_USERS]:
        show_user(held_out, int(row), rankings[row], titles)
    show_metrics(held_out, rankings)
    show_stages(rankings)


def item_titles(log: Log) -> list[str]:
    """What to call each item: its title where the log has one, else its id."""
    title = log.items.columns.get(log.schema.columns.title) if log.schema.columns.title else None
    return [str(name) for name in (log.items.ids if title is None else title).tolist()]


def read_held_out(path: Path, log: Log) -> HeldOut:
    lists = json.loads(path.read_text())
    bodies = [entry["request"] for entry in lists]
    taken = log.item[(log.grade > 0) & (log.split == TRAIN)]
    often = dict(zip(log.items.ids.tolist(), np.bincount(taken, minlength=len(log.items)).tolist(), strict=True))
    width = max(len(entry["grades"]) for entry in lists)

    def padded(rows: list[list[int]]) -> np.ndarray:
        return np.array([row + [0] * (width - len(row)) for row in rows])

    return HeldOut(
        bodies=bodies,
        grade=padded([entry["grades"] for entry in lists]),
        mask=np.arange(width) < np.array([[len(body["candidates"])] for body in bodies]),
        popularity=padded([[often[item] for item in body["candidates"]] for body in bodies]),
    )


def show_user(held_out: HeldOut, row: int, ranking: Ranking, titles: dict[Any, str]) -> None:
    body = held_out.bodies[row]
    table = Table(
        title=f"user {body.get('user_id')}, {len(body['candidates'])} candidates", title_justify="left", box=None
    )
    for name in ("item", "score", "probability", "took it later"):
        table.add_column(name, justify="left" if name == "item" else "right")
    for place in range(min(SHOWN_ITEMS, len(ranking))):
        probability = "" if ranking.probabilities is None else f"{ranking.probabilities[place]:.3f}"
        grade = int(held_out.grade[row, ranking.positions[place]])
        name = titles.get(ranking.ids[place], str(ranking.ids[place]))
        table.add_row(name, f"{ranking.scores[place]:.3f}", probability, f"yes ({grade})" if grade else "")
    recent = [titles.get(item, str(item)) for item in body.get("history", [])[-3:]]
    console.print(table)
    console.print(f"[dim]liked before: {', '.join(recent) or 'nothing yet'}[/]\n")


def show_metrics(held_out: HeldOut, rankings: Sequence[Ranking]) -> None:
    shape = held_out.grade.shape
    ours = np.full(shape, -np.inf)
    for row, ranking in enumerate(rankings):
        ours[row, ranking.positions] = np.nan_to_num(ranking.scores, nan=-np.inf)
    chance = np.zeros(shape)  # all tied: metrics give ties their expected value
    table = Table(title=f"{shape[0]} held-out lists of {shape[1]} candidates", title_justify="left", box=None)
    for name in ("", f"Recall@{K}", f"NDCG@{K}"):
        table.add_column(name, justify="right" if name else "left")
    for name, scores in (("RankTower, over HTTP", ours), ("popularity", held_out.popularity), ("random", chance)):
        ranked = rank(scores, held_out.grade, held_out.mask)
        table.add_row(name, f"{np.nanmean(recall(ranked, K)):.4f}", f"{np.nanmean(ndcg(ranked, K)):.4f}")
    console.print(table)


def show_stages(rankings: Sequence[Ranking]) -> None:
    table = Table(title="stage times of one request, in us (median)", title_justify="left", box=None)
    stages = list(rankings[-1].timings)
    for stage in stages:
        table.add_column(stage, justify="right")
    table.add_row(*(f"{1000 * np.median([ranking.timings[stage] for ranking in rankings]):.0f}" for stage in stages))
    console.print()
    console.print(table)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
