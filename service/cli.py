"""The command `ranktower`: the verbs of model and cache, and serve and rank. Heavy imports happen inside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cache.cli import app as cache_app
from cache.errors import disk_error
from kernel.errors import KernelError
from model.cli import app as model_app
from model.errors import RankTowerError

if TYPE_CHECKING:
    from service.ranker import Ranker, Ranking

app = typer.Typer(
    name="ranktower",
    help="The pre-ranking stage of a recommender cascade: learn, publish, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(model_app)
app.add_typer(cache_app)

DEFAULT_STORE = "file://./var/releases"


@app.callback()
def choose_kernel() -> None:
    """The pre-ranking stage of a recommender cascade: learn, publish, serve."""
    from service.settings import load_kernel_settings

    load_kernel_settings().choose_kernel()


@app.command()
def serve(
    store: Annotated[str | None, typer.Option(help="URL of the release store.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for what a remote store sends.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; all map the same files.")] = None,
    retrieval: Annotated[bool | None, typer.Option(help="Load the index and answer /v1/retrieve.")] = None,
    max_candidates: Annotated[int | None, typer.Option(help="Most candidates of one ranking.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most rankings of one batch.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest body.")] = None,
    max_in_flight: Annotated[int | None, typer.Option(help="Requests at work at the same time, by worker.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests waiting; more get 429.")] = None,
    pool_threads: Annotated[int | None, typer.Option(help="Threads for large requests.")] = None,
    inline_ms: Annotated[float | None, typer.Option(help="Estimated work up to which the event loop does it.")] = None,
    user_cache: Annotated[int | None, typer.Option(help="Outputs of the user tower to keep; 0 for none.")] = None,
    huge_pages: Annotated[bool | None, typer.Option(help="Read items into huge pages where there are some.")] = None,
    refresh_s: Annotated[float | None, typer.Option(help="Longest time between two looks at the store.")] = None,
    drain_s: Annotated[float | None, typer.Option(help="After SIGTERM, unready but answering for so long.")] = None,
    kernel: Annotated[str | None, typer.Option(help="auto, avx512-vnni, avx512, avx2, portable or numpy.")] = None,
    require_native: Annotated[bool | None, typer.Option(help="Refuse to start with the NumPy reference alone.")] = None,
    admin_token: Annotated[
        str | None, typer.Option(help="Token of the admin calls; others see flags, not the environment.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Answer requests from the store's current release, and follow it. Every flag is also RANKTOWER_<NAME>."""
    given = dict(locals())
    from service.run import run
    from service.settings import load_settings

    run(load_settings(**given))


@app.command()
def gather(
    store: Annotated[str | None, typer.Option(help="URL that the shards were published with.")] = None,
    shards: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas of each shard.")] = None,
    replica_cpus: Annotated[float | None, typer.Option(help="Processors that Ray keeps for each replica.")] = None,
    deadline_ms: Annotated[int | None, typer.Option(help="Of requests without one.")] = None,
    partial: Annotated[bool | None, typer.Option(help="Answer without shards that are late or dead.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="host:port of a Ray cluster; local: one of its own.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, on every node with a replica.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder, on each node, for what a remote store sends.")] = None,
    retrieval: Annotated[bool | None, typer.Option(help="Load the indexes and answer /v1/retrieve.")] = None,
    max_candidates: Annotated[int | None, typer.Option(help="Most candidates of one ranking.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Answer from a catalogue in shards (`publish --shard`) on Ray Serve. Every flag is also RANKTOWER_<NAME>."""
    given = dict(locals())
    from cache.errors import StoreError
    from service.settings import load_gather_settings

    settings = load_gather_settings(**given)
    try:
        from service.ray_serve import run
    except ImportError as error:
        raise StoreError(f"gather needs Ray Serve ({error}): pip install 'ranktower[ray]'") from error
    run(settings)


@app.command()
def rank(
    store: Annotated[str, typer.Option(help="URL of the release store.")] = DEFAULT_STORE,
    cache_dir: Annotated[Path, typer.Option(help="Folder for what a remote store sends.")] = Path("var/cache"),
    user_id: Annotated[str | None, typer.Option(help="A user of the user table.")] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Item ids with commas between them; ids that contain commas need --json.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="File with a body as for POST /v1/rank; - for standard input.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Items to print.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Add the item head that each user head chose.")] = False,
) -> None:
    """Rank one request here, without a server, and print a table."""
    ranker = _current(store, cache_dir)
    body = _body(json, ranker, user_id=user_id, candidates=candidates, top_k=top_k, explain=explain)
    _print(ranker.rank(ranker.decoders.rank(body)))


def _current(store: str, cache_dir: Path) -> Ranker:
    """The store's current release with its users, under what came after it."""
    from cache.errors import StoreError
    from cache.overlay import Overlay
    from cache.store import open_store
    from service.ranker import Ranker

    opened = open_store(store)
    release = opened.current()
    if release is None:
        raise StoreError(f"{opened.url} holds no current release: run `ranktower publish --store {opened.url}`")
    folder = opened.fetch(release, cache_dir)
    ranker = Ranker.open(folder)
    ranker = ranker.with_users(opened.fetch_users(ranker.spec.id, cache_dir))
    overlay = opened.fetch_changes(folder, cache_dir).overlay
    if overlay is not None:
        ranker = ranker.with_overlay(Overlay.open(overlay))
    opened.close()  # the overlay is gone with it, and stays mapped here
    return ranker


def _body(json: Path | None, ranker: Ranker, **given: Any) -> bytes:
    """The request: the JSON as it is, or one made of flags, with ids read as the release has them."""
    import orjson

    from service.errors import RequestError

    if json is not None:
        if given["user_id"] or given["candidates"]:
            raise RequestError("--json is a whole request", remedy="leave out --user-id and --candidates")
        try:
            return sys.stdin.buffer.read() if str(json) == "-" else json.read_bytes()
        except OSError as error:
            raise RequestError(f"{json} cannot be read ({error.strerror})", remedy="name a file, or -") from error
    texts = [text for text in (given["candidates"] or "").split(",") if text.strip()]
    if not texts:
        raise RequestError("there are no candidates", remedy="give --candidates 1,2,3 or --json body.json")
    document: dict[str, Any] = {
        "candidates": [_id(text, ranker.spec.item_id_type) for text in texts],
        "user_id": None if given["user_id"] is None else _id(given["user_id"], ranker.spec.user_id_type),
        "top_k": given["top_k"],
        "explain": given["explain"],
    }
    return orjson.dumps(document)


def _id(text: str, kind: str) -> int | str:
    """What cannot be an integer stays text: the decoder says what is wrong with it."""
    try:
        return int(text) if kind == "int" and abs(int(text)) < 2**63 else text.strip()
    except ValueError:
        return text.strip()


def _print(ranking: Ranking) -> None:
    from rich.console import Console
    from rich.table import Table

    known = {None: "", True: ", user known", False: ", user not in the user table"}[ranking.user_known]
    table = Table(box=None)
    explained = ranking.explanation is not None
    for name in ("", "id", "score", "probability", *(["item heads"] if explained else [])):
        table.add_column(name, justify="right")
    heads = [] if ranking.explanation is None else ranking.explanation.item_heads.tolist()
    for place, (item, score) in enumerate(zip(ranking.ids, ranking.scores.tolist(), strict=True)):
        known_item = score == score
        probability = ranking.probabilities[place] if ranking.probabilities is not None and known_item else None
        table.add_row(
            str(place + 1),
            str(item),
            f"{score:.4f}" if known_item else "unknown",
            "" if probability is None else f"{probability:.4f}",
            *([" ".join(map(str, heads[place])) if place < len(heads) else ""] if explained else []),
        )
    console = Console(highlight=False, markup=False)  # an id in brackets is no style
    console.print(f"release {ranking.release}, watermark {ranking.watermark}{known}", soft_wrap=True)
    console.print(table)


def main() -> None:
    """Run a verb; what a user can mend is one line and exit code 2."""
    try:
        app()
    except (RankTowerError, KernelError) as error:
        _give_up(str(error))
    except OSError as error:
        _give_up(disk_error(error))


def _give_up(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
