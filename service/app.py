"""The HTTP service: routes, the bodies they read, the headers they send, and what starts and stops with them."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib import import_module
from time import monotonic, perf_counter_ns
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from threadpoolctl import threadpool_limits

from cache.aside import fetch_aside
from cache.mirror import MirrorStore
from cache.store import ReadableStore, open_store
from kernel import engine
from model.errors import RankTowerError
from service import problems
from service.admin import BODY_BYTES, Admin, caller_of
from service.admission import Admission, Permit
from service.answers import JSON, Answer, Answerer, Limits, answer_batch, answer_rank, answer_retrieve
from service.at_once import ARRIVED, BATCH, RANK, STATE, AtOnce
from service.errors import BodyTooLarge, StoreFailed
from service.live import Serving
from service.media import ARROW_ROOM, check_encoding, form_of, is_loaded, spoken
from service.openapi import TITLE, VERSION, describe, documented
from service.ranker import Ranker
from service.refresh import Refresher, Standing
from service.settings import Settings
from service.shadow import ShadowScorer
from service.telemetry import StageClock, Telemetry
from service.user_cache import UserCache

MAX_SAMPLE = 100_000
COMMA = ord(",")
MAP_WITHIN_S = 30.0  # what lies here is mapped, tried out and warm in much less
FEWER = "send fewer candidates a request, or raise RANKTOWER_MAX_BODY_BYTES"
REQUEST_NS = 200_000  # what a ranking costs whatever its candidates: decoding, encoding, the user tower

log = logging.getLogger(__name__)


class Service:
    """What the routes of one process share."""

    def __init__(self, settings: Settings, store: ReadableStore | None) -> None:
        """store: what the settings name, where none is given."""
        aside = partial(fetch_aside, settings.store, settings.huge_pages) if store is None else None
        store = store or open_store(settings.store)
        self.settings = settings
        self.telemetry = Telemetry()
        self.limits = Limits(max_candidates=settings.max_candidates, max_batch=settings.max_batch)
        self.store = store
        self.draining = False
        self.refresher = Refresher(
            store,
            settings.cache_dir,
            retrieval=settings.retrieval,
            user_cache=self._user_cache(),
            refresh_s=settings.refresh_s,
            huge_pages=settings.huge_pages,
            aside=aside,
            on_swap=self._announce,
            on_rollout=self._announce_rollout,
            on_failure=self.telemetry.refresh_failures.inc,
            on_wait=self._tell_waiting,
            contact=store.contact_s if isinstance(store, MirrorStore) else monotonic,
        )
        self.admin, self.shadow = Admin(settings), ShadowScorer(self.telemetry)
        self._warned: str | None = None  # the release whose lack of an index is in the log

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and watch releases while the application runs; unready first, then drained, then stopped."""
        self.admission = Admission(in_flight=self.settings.max_in_flight, queue=self.settings.max_queue)
        self.at_once = AtOnce(self)
        self.pool = ThreadPoolExecutor(self.settings.pool_threads, thread_name_prefix="rank")
        self.refresher.start()
        restore = self._drain_on_sigterm()
        try:
            await self._map_first()
            gc.freeze()  # what is loaded stays: a full collection over it would hold up a request for 10 ms and more
            with threadpool_limits(limits=1, user_api="blas"):  # NumPy's own threads fight those of the pool
                yield
        finally:
            self.draining = True
            restore()
            self.pool.shutdown()
            self.shadow.stop()
            await asyncio.get_running_loop().run_in_executor(None, self.refresher.stop)
            self.store.close()

    async def _map_first(self) -> None:
        """A worker that starts beside others leaves the socket to them until it can answer, too."""
        if isinstance(self.store, MirrorStore) and self.store.holds_current():
            tried = partial(self.refresher.wait_until, lambda now: now.ranker is not None or now.failures > 0)
            await asyncio.get_running_loop().run_in_executor(None, tried, MAP_WITHIN_S)

    async def answer(self, request: Request, answerer: Answerer) -> Response:
        """Read the body, wait for a permit, answer on the event loop or, where that takes long, in the pool."""
        arrived_ns = _arrived_ns(request.scope)
        self.admission.check_room()
        content_type, accept = (request.headers.get(name, "") for name in ("content-type", "accept"))
        form = form_of(content_type, answerer)
        check_encoding(request.headers.get("content-encoding", ""))
        if not is_loaded(content_type, accept):
            await asyncio.get_running_loop().run_in_executor(None, import_module, ARROW_ROOM)
        answerer = spoken(accept, answerer, form)
        body = await read_body(request, self.settings.max_body_bytes)
        clock = StageClock()
        async with self.admission.admit(arrived_ns) as permit:
            serving = self.refresher.serving()
            answer = await self._work(answerer, permit, serving, body, form, clock)
        self.count(answer, clock)
        headers = {"Server-Timing": clock.header(), "X-RankTower-Release": answer.release}
        return Response(answer.body, media_type=answer.media_type, headers=headers)

    async def _work(
        self, answerer: Answerer, permit: Permit, serving: Serving, body: bytes, form: str, clock: StageClock
    ) -> Answer:
        """On the event loop what is quick, in the pool what is not, which must be known before anything is decoded."""

        def begin() -> Answer:
            clock.lap("queue")  # waiting for a thread of the pool is waiting, too
            return answerer(permit, serving, body, self.limits, clock)

        if self.is_quick(serving, answerer, body, form):
            return begin()
        return await asyncio.get_running_loop().run_in_executor(self.pool, begin)

    def is_quick(self, serving: Serving, answerer: Answerer, body: bytes, form: str) -> bool:
        """Whether the event loop may answer. A search may not: it takes as long as its index is large."""
        if answerer is answer_retrieve:
            return False
        rankings = min(body.count(b"{"), self.limits.max_batch) if answerer is answer_batch else 1
        budget_ns = self.settings.inline_ms * 1e6 - REQUEST_NS * rankings
        candidate_ns = serving.candidate_ns
        enough = budget_ns / max(candidate_ns, 1.0)
        return candidate_ns * _most_candidates(body, form, enough) <= budget_ns

    def count(self, answer: Answer, clock: StageClock) -> None:
        """What telemetry keeps of an answer."""
        self.telemetry.observe_stages(clock)
        for ranking in answer.rankings:
            self.telemetry.candidates.observe(ranking.candidates)
            self.telemetry.missing.inc(len(ranking.missing))
            self.telemetry.unknown_users.inc(ranking.user_known is False)
        serving = self.refresher.standing.serving
        if serving is not None and not serving.is_alone:
            self._count_releases(answer, clock)
            self.shadow.offer(serving, answer)

    def _count_releases(self, answer: Answer, clock: StageClock) -> None:
        counts = Counter(ranking.release for ranking in answer.rankings)
        for release, rankings in counts.items():
            self.telemetry.observe_release(release, rankings)
            if len(counts) == 1:
                self.telemetry.observe_release_seconds(release, clock)

    def state(self) -> dict[str, Any]:
        """`schema.Ready`."""
        standing = self.refresher.standing
        staleness_s = standing.staleness_s()
        return {
            "ready": standing.ranker is not None and not self.draining,
            "release": standing.ranker.release if standing.ranker else None,
            "bundle": standing.ranker.bundle.id if standing.ranker else None,
            "kernel": standing.ranker.table.level if standing.ranker else engine.level(),
            "draining": self.draining,
            "users": standing.users,
            "retrieval": standing.ranker is not None and standing.ranker.index is not None,
            "rollout": rollout_state(standing),
            "changes": {
                "watermark": standing.ranker.watermark if standing.ranker else None,
                "items": standing.ranker.changed if standing.ranker else 0,
                "behind_s": round(standing.behind_s(), 3),
                "dead": standing.dead,
            },
            "store": {
                "url": self.store.url,
                "reachable": standing.reachable,
                "staleness_s": None if staleness_s is None else round(staleness_s, 3),
                "failure": standing.failure,
                "failures": standing.failures,
            },
        }

    def compared(self) -> dict[str, Any]:
        """`schema.RolloutState` with what the shadow found."""
        state = rollout_state(self.refresher.standing)
        if state["shadow"] is not None:
            state["shadow"]["compared"] = self.telemetry.shadow_means(state["shadow"]["release"])
        return state

    def metrics(self) -> bytes:
        """Those that are told by events, and how this process stands now."""
        standing = self.refresher.standing
        if standing.ranker is not None:
            self.telemetry.serve_changes(
                standing.ranker.watermark, standing.ranker.changed, standing.behind_s(), standing.dead
            )
        return self.telemetry.render(standing.staleness_s())

    def _user_cache(self) -> UserCache | None:
        """None where the setting is 0."""
        if not self.settings.user_cache:
            return None
        hit, miss = self.telemetry.user_cache_hits.inc, self.telemetry.user_cache_misses.inc
        return UserCache(self.settings.user_cache, on_hit=hit, on_miss=miss)

    def _tell_waiting(self, why: str) -> None:
        log.info("listening on %s; waiting: %s", self.settings.url, why)

    def _announce(self, ranker: Ranker) -> None:
        first = self.refresher.standing.swaps == 1
        head = ranker.head
        log.info(
            "%s release %s: %d items, %d users, %s %dx%dx%d%s",
            "RankTower is ready at " + self.settings.url + " with" if first else "now serving",
            ranker.release,
            len(ranker.items),
            len(ranker.users) if ranker.users else 0,
            *(head.kind, head.user_heads, head.item_heads, head.dim),
            ", retrieval on" if ranker.index else "",
        )
        if self.settings.retrieval and ranker.index is None and self._warned != ranker.release:
            self._warned = ranker.release
            log.warning("/v1/retrieve answers 409: %s", ranker.no_index())
        self.telemetry.serve_release(ranker.release, ranker.bundle.id)

    def _announce_rollout(self, standing: Standing) -> None:
        state = rollout_state(standing)
        for canary in state["canaries"]:
            if canary["serving"]:
                log.info("canary %s answers %g %% of the users", canary["release"], 100 * canary["weight"])
        if (shadow := state["shadow"]) is not None and shadow["serving"]:
            log.info("shadow %s scores %g %% of the requests", shadow["release"], 100 * shadow["share"])
        if not standing.rollout.releases:
            log.info("release %s answers alone", standing.current)
        shares = {(each["release"], "canary"): each["weight"] for each in state["canaries"] if each["serving"]}
        left = 1.0 - sum(shares.values())
        if standing.ranker is not None and standing.rollout.releases:
            shares[standing.ranker.release, "current"] = left
        if shadow is not None and shadow["serving"]:
            shares[shadow["release"], "shadow"] = shadow["share"]
        self.telemetry.show_shares(shares, set(standing.refused))

    def _drain_on_sigterm(self) -> Callable[[], None]:
        """Turn unready at SIGTERM and let the server stop `drain_s` later; returns what undoes this."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        stop, loop = signal.getsignal(signal.SIGTERM), asyncio.get_running_loop()
        if not callable(stop):
            return lambda: None

        def begin() -> None:
            self.draining = True
            log.info("draining for %g s, then stopping", self.settings.drain_s)
            loop.call_later(self.settings.drain_s, stop, signal.SIGTERM, None)

        def restore() -> None:
            signal.signal(signal.SIGTERM, stop)

        signal.signal(signal.SIGTERM, lambda number, frame: loop.call_soon_threadsafe(begin))
        return restore


def rollout_state(standing: Standing) -> dict[str, Any]:
    """`schema.RolloutState`, without what the shadow found."""

    def told(release: str) -> dict[str, Any]:
        serving = standing.serving is not None and release in standing.serving.beside
        return {"serving": serving, "refused": standing.refused.get(release)}

    rollout = standing.rollout
    canaries = [{"release": each.release, "weight": each.weight, **told(each.release)} for each in rollout.canaries]
    shadow = rollout.shadow
    return {
        "canaries": canaries,
        "shadow": shadow and {"release": shadow.release, "share": shadow.share, **told(shadow.release), "compared": []},
    }


def _most_candidates(body: bytes, form: str, enough: float) -> int:
    """A bound from above on the candidates of a body. Commas, a close one, are counted only where the size alone does
    not show that `enough` are not exceeded: counting takes 10 us of a body of 5,000, by `bytes.count` 40."""
    if form != JSON:
        return len(body) // 4  # a text takes the 4 octets of its place at least, an integer 8
    most = len(body) // 2
    return most if most <= enough else int(np.count_nonzero(np.frombuffer(body, np.uint8) == COMMA))


async def read_body(request: Request, limit_bytes: int, remedy: str = FEWER) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is known to be, before reading it where it says so itself."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit_bytes:
        raise _too_large(announced[:20], limit_bytes, remedy)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit_bytes:
            raise _too_large(f"more than {limit_bytes}", limit_bytes, remedy)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(size: str, limit_bytes: int, remedy: str) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size} octets, this service takes {limit_bytes}", remedy=remedy)


def _arrived_ns(scope: Scope) -> int:
    """When a request came (perf_counter_ns): now, unless it comes from the short way."""
    return int(scope.get("state", {}).get(ARRIVED, 0)) or perf_counter_ns()


class Observed:
    """Count and time every answer, by the route's template: an unknown path is one label, whatever it was."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app, self.telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        arrived_ns, status = _arrived_ns(scope), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self.telemetry.observe_answer(route, status, (perf_counter_ns() - arrived_ns) / 1e9)


def create_app(settings: Settings, store: ReadableStore | None = None) -> FastAPI:
    """The application over the store that the settings name, or over the given one.

    Under `ranktower serve` plain rankings go past it (`at_once`): what must see every request, such as a check of who
    asks, belongs in front of the service, not in a middleware here.
    """
    log.info("kernel level %s", settings.choose_kernel())
    service = Service(settings, store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with service.running():
            yield {STATE: service.at_once}

    app = FastAPI(title=TITLE, version=VERSION, lifespan=lifespan, redirect_slashes=False, redoc_url=None)
    app.state.service = service
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.add_middleware(Observed, telemetry=service.telemetry)
    for kind in (RankTowerError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _refuse)
    _add_answers(app, service)
    _add_state(app, service)
    _add_admin(app, service)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    return problems.problem_of(request, error)


def _add_answers(app: FastAPI, service: Service) -> None:
    """The routes that rank, as `AtOnce` leaves requests to them."""

    @app.post(RANK, **documented("rank"))
    async def rank(request: Request) -> Response:
        """Rank candidates for one user."""
        return await service.answer(request, answer_rank)

    @app.post(BATCH, **documented("batch"))
    async def rank_batch(request: Request) -> Response:
        """Rank for several users in one request."""
        return await service.answer(request, answer_batch)

    @app.post("/v1/retrieve", **documented("retrieve"))
    async def retrieve(request: Request) -> Response:
        """Find the best items of the whole catalogue for one user."""
        return await service.answer(request, answer_retrieve)


def _add_state(app: FastAPI, service: Service) -> None:
    """The routes that tell what is served and how it fares."""

    @app.get("/v1/release", **documented("release"))
    async def release() -> Response:
        """What is served: release, head, network, counts, metrics."""
        document = service.refresher.ranker().describe() | {"rollout": service.compared()}
        return Response(orjson.dumps(document), media_type=JSON)

    @app.get("/v1/sample", **documented("sample"))
    async def sample(
        items: Annotated[int, Query(ge=0, le=MAX_SAMPLE)] = 100,
        users: Annotated[int, Query(ge=0, le=MAX_SAMPLE)] = 0,
        seed: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
    ) -> Response:
        """Ids drawn from the current release, for load tests and demonstrations."""
        ranker = service.refresher.ranker()
        drawn = await asyncio.get_running_loop().run_in_executor(service.pool, ranker.sample, items, users, seed)
        document = {"release": ranker.release, "items": drawn[0], "users": drawn[1]}
        return Response(orjson.dumps(document), media_type=JSON)

    @app.get("/livez", **documented("livez"))  # what the document shows; the route below is found first
    @app.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
    async def livez() -> Response:
        """Whether the process answers at all."""
        return Response(b'{"alive":true}', media_type=JSON)

    @app.get("/readyz", **documented("readyz"))
    @app.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
    async def readyz(request: Request) -> Response:
        """Whether a release is loaded and the process is not on its way out, and how it stands with its store."""
        state = service.state()
        if state["ready"]:
            return Response(orjson.dumps(state), media_type=JSON)
        return problems.not_ready(request, state, service.refresher.why())

    @app.get("/metrics", **documented("metrics"))
    async def metrics() -> Response:
        """Metrics in the Prometheus text format."""
        return Response(service.metrics(), media_type=CONTENT_TYPE_LATEST)


async def _of_store(call: Callable[[], Any]) -> Any:
    """What an admin call answers. Raises StoreFailed where this process ends before the store has answered."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, call)
    except asyncio.CancelledError:  # by the server, which would log a defect
        raise StoreFailed(
            "this service stopped before the store had answered", remedy="see what is live, and ask another replica"
        ) from None


def _add_admin(app: FastAPI, service: Service) -> None:
    """The calls that change what is live: never on the short way, off without a token, apart from the ranking pool."""

    @app.get("/admin/releases", **documented("admin_releases"))
    async def admin_releases(request: Request) -> Response:
        """What is live, how the shadow compares, and who changed what."""
        service.admin.check(request.headers.get("authorization", ""))
        told = await _of_store(service.admin.audit)
        return Response(orjson.dumps(told | {"here": service.compared()}), media_type=JSON)

    @app.post("/admin/releases/{verb}", **documented("admin_change"))
    async def admin_change(request: Request, verb: str) -> Response:
        """Change what is live: activate, promote, rollback, canary, shadow or abort."""
        service.admin.check(request.headers.get("authorization", ""))
        body = await read_body(request, BODY_BYTES, "send one change, with no more than the fields of /openapi.json")
        caller = caller_of(request.headers, request.client.host if request.client else "unknown")
        answer = await _of_store(partial(service.admin.change, verb, body, caller))
        return Response(orjson.dumps(answer), media_type=JSON)
