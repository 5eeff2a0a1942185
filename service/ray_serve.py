"""A catalogue in shards on Ray Serve: a deployment for each shard, and one that speaks HTTP and gathers.

Ray Serve starts replicas, places them, restarts those that die and spreads requests over them; what is asked and how it
is merged is in service/shard.py and service/gather.py, which know nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import logging.config
import signal
from threading import Event
from time import perf_counter_ns
from typing import Any

import orjson
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cache.on_ray import connected
from cache.shards import Shard, shard_url
from service.admission import Permit
from service.answers import JSON, Limits, answer_retrieve
from service.app import read_body
from service.errors import NotReady, SettingsError
from service.gather import Gatherer, choose_bundle
from service.media import check_encoding, form_of
from service.problems import KINDS, problem, problem_of
from service.run import log_config
from service.settings import GatherSettings
from service.shard import Held, Outcome, ShardReplica
from service.telemetry import StageClock

APP = "ranktower"
ONE_LOOP = {  # without threads between Ray's event loop and ours, nor between handles and it: neither is ever held up
    "env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
}
QUIET = {"enable_access_log": False}
ROUTES = {"/v1/rank": "POST", "/v1/retrieve": "POST", "/livez": "GET", "/readyz": "GET"}

log = logging.getLogger(__name__)


class RemoteShard:
    """`service.gather.Shard`, through the handle of its deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def held(self) -> list[Held]:
        held: list[Held] = await _settled(self._handle.held.remote())
        return held

    async def rank(self, *asked: Any) -> Outcome:
        outcome: Outcome = await _settled(self._handle.rank.remote(*asked))
        return outcome

    async def retrieve(self, *asked: Any) -> Outcome:
        outcome: Outcome = await _settled(self._handle.retrieve.remote(*asked))
        return outcome


async def _settled(response: Any) -> Any:
    """What a call gives; who gives up on it cancels it."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


class Ingress:
    """The HTTP side: bodies, answers and problems as `ranktower serve` has them."""

    def __init__(self, settings: GatherSettings, *shards: DeploymentHandle) -> None:
        self._settings = settings
        self._gatherer = Gatherer(
            [RemoteShard(handle) for handle in shards],
            deadline_ms=settings.deadline_ms,
            partial=settings.partial,
            limits=Limits(max_candidates=settings.max_candidates, max_batch=settings.max_batch),
        )
        self._watching = asyncio.get_running_loop().create_task(self._gatherer.watch())

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._respond(request)
        except Exception as error:
            response = problem_of(request, error)
            if response.status_code == KINDS[Exception].status:
                log.exception("a request failed")
            return response

    async def _respond(self, request: Request) -> Response:
        path = request.url.path
        if path not in ROUTES:
            raise HTTPException(404)
        if request.method not in (ROUTES[path], "HEAD" if ROUTES[path] == "GET" else ""):
            raise HTTPException(405, headers={"Allow": ROUTES[path]})
        if path == "/livez":
            return Response(b'{"alive":true}', media_type=JSON)
        if path == "/readyz":
            return self._ready(request)
        return await self._answer(request, path)

    async def _answer(self, request: Request, path: str) -> Response:
        permit = Permit(perf_counter_ns())
        form_of(request.headers.get("content-type", ""), answer_retrieve)  # JSON alone
        check_encoding(request.headers.get("content-encoding", ""))
        body, clock = await read_body(request, self._settings.max_body_bytes), StageClock()
        answer = self._gatherer.rank if path == "/v1/rank" else self._gatherer.retrieve
        content, bundle = await answer(body, permit, clock)
        headers = {"Server-Timing": clock.header(), "X-RankTower-Release": bundle}
        return Response(content, media_type=JSON, headers=headers)

    def _ready(self, request: Request) -> Response:
        """200 while every shard answers with one bundle, or any where partial answers are allowed."""
        held = self._gatherer.held
        chosen = choose_bundle(held)
        lacking = [number for number, shard in enumerate(held) if chosen not in shard]
        state = {
            "ready": chosen is not None and (self._settings.partial or not lacking),
            "bundle": chosen and chosen.bundle,
            "shards": [{"shard": number, "bundles": [each.bundle for each in s]} for number, s in enumerate(held)],
        }
        if state["ready"]:
            return Response(orjson.dumps(state), media_type=JSON)
        return problem(
            KINDS[NotReady],
            f"shards {', '.join(map(str, lacking))} of {len(held)} do not answer, or not with the bundle of the others",
            instance="/readyz",
            field=None,
            remedy="publish and activate every shard with one bundle; see the logs of Ray Serve",
            more=state,
        )


def application(settings: GatherSettings) -> Application:
    """Deployments `shard-0` to `shard-N-1` and `ingress`."""
    shards = []
    for number in range(settings.shards):
        shard = Shard(number, settings.shards)
        deployment = serve.deployment(
            ShardReplica,
            name=f"shard-{number}",
            num_replicas=settings.replicas,
            max_ongoing_requests=settings.max_queue,
            health_check_period_s=1.0,
            ray_actor_options={"num_cpus": settings.replica_cpus, "runtime_env": ONE_LOOP},
            logging_config=QUIET,
        )
        shards.append(deployment.bind(settings.model_copy(update={"store": shard_url(settings.store, shard)})))
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        max_ongoing_requests=settings.max_queue,
        ray_actor_options={"num_cpus": 0, "runtime_env": ONE_LOOP},
        logging_config=QUIET,
    )
    return ingress.bind(settings, *shards)


def run(settings: GatherSettings) -> None:
    """Deploy, and serve until SIGTERM or Ctrl-C. Raises StoreError where there is no such cluster, SettingsError where
    Ray Serve has this application, or another port, already."""
    logging.config.dictConfig(log_config(settings.log_level))
    with connected(settings.ray_address):
        serve.start(http_options={"host": settings.host, "port": settings.port})
        _check_free(settings)
        stopping = Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        serve.run(application(settings), name=APP, route_prefix="/")
        log.info("RankTower gathers %d shards of %s at %s", settings.shards, settings.store, settings.url)
        stopping.wait()
        serve.delete(APP)


def _check_free(settings: GatherSettings) -> None:
    if APP in serve.status().applications:
        raise SettingsError(
            f"Ray Serve at {settings.ray_address} runs an application {APP} already",
            field="ray_address",
            remedy="end the other `ranktower gather` first",
        )
    port = _get_global_client().http_config.port  # Serve that runs already keeps its own, and only logs it
    if port != settings.port:
        raise SettingsError(
            f"Ray Serve at {settings.ray_address} listens on port {port}, not {settings.port}",
            field="port",
            remedy=f"give --port {port}, or shut Ray Serve down first",
        )
