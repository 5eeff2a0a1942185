"""The two clients: a call becomes bytes, bytes go through a course of attempts, the answer becomes a value."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Unpack

import httpx

from ranktower_client.errors import RETRIED, DeadlineExceeded, RankTowerError, error_of, transport_error_of
from ranktower_client.retries import Course, RetryPolicy
from ranktower_client.wire import (
    Ids,
    Query,
    Ranking,
    RankOptions,
    Release,
    RetrieveOptions,
    batch_body,
    rank_body,
    ranking_of,
    rankings_of,
    release_of,
    retrieve_body,
)

RANK, BATCH, RETRIEVE = "/v1/rank", "/v1/rank:batch", "/v1/retrieve"
RELEASE, READY = "/v1/release", "/readyz"
JSON = {"Content-Type": "application/json"}
FIRST_ATTEMPT_ONLY = RetryPolicy(retries=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One HTTP request, ready to be sent any number of times."""

    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=JSON.copy)


class _Form(NamedTuple):
    """What a ranking is asked and answered in."""

    body: Callable[[Ids, RankOptions], bytes]
    read: Callable[[httpx.Response], Ranking]
    headers: Mapping[str, str]

    def call(self, candidates: Ids, options: RankOptions) -> _Call:
        return _Call(method="POST", path=RANK, body=self.body(candidates, options), headers=self.headers)


class RankTower:
    """Asks a RankTower service, blocking. Thread-safe; keeps connections open, so make one and share it.

    url: the service, as `http://host:port`. timeout_s: for a whole call, attempts and pauses included.
    retries: attempts after the first, on 429, 503 and broken connections only. Every method raises RankTowerError.
    arrow: `rank` sends and receives Arrow, which neither side has to parse; it needs `ranktower-client[arrow]`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 2.0,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
        arrow: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = _checked(url)
        self._timeout_s = timeout_s
        self._policy = RetryPolicy(retries=retries)
        self._form = _form(arrow)
        self._http = httpx.Client(base_url=self.url, headers=dict(headers or {}), transport=transport)

    def rank(self, candidates: Ids, **options: Unpack[RankOptions]) -> Ranking:
        """Rank `candidates` (ids of one type; a list or a NumPy array) for one user, best first.

        Options: user_id, user, context, history, top_k, on_missing, explain, deadline_ms, as in docs/api.md.
        """
        return self._form.read(self._send(self._form.call(candidates, options)))

    def rank_batch(self, queries: Sequence[Query]) -> list[Ranking]:
        """Rank for several users in one request; all answers come from one release, in the order of the queries."""
        answer = self._send(_Call(method="POST", path=BATCH, body=batch_body(queries)))
        return rankings_of(answer, len(queries))

    def retrieve(self, **options: Unpack[RetrieveOptions]) -> Ranking:
        """The best items of the whole catalogue for one user; positions are -1. Needs a release with an index.

        Options: user_id, user, context, history, top_k, per_head, explain, deadline_ms.
        """
        return ranking_of(self._send(_Call(method="POST", path=RETRIEVE, body=retrieve_body(options))))

    def release(self) -> Release:
        """The release that serves now."""
        return release_of(self._send(_Call(method="GET", path=RELEASE)))

    def ready(self) -> bool:
        """Whether the service would answer now. Asks once; a service that cannot be reached is not ready."""
        try:
            self._send(_Call(method="GET", path=READY), FIRST_ATTEMPT_ONLY)
        except (*RETRIED, DeadlineExceeded):
            return False
        return True

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> RankTower:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _send(self, call: _Call, policy: RetryPolicy | None = None) -> httpx.Response:
        course = Course(policy or self._policy, self._timeout_s)
        while True:
            try:
                return self._attempt(call, course.left_s())
            except RankTowerError as error:
                time.sleep(course.pause_after(error))

    def _attempt(self, call: _Call, left_s: float) -> httpx.Response:
        try:
            answer = self._http.request(call.method, call.path, content=call.body, headers=call.headers, timeout=left_s)
        except httpx.HTTPError as error:
            raise transport_error_of(error, self.url) from error
        return _accepted(answer)


class AsyncRankTower:
    """RankTower for asyncio: the same calls, awaited. One instance belongs to one event loop."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 2.0,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
        arrow: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = _checked(url)
        self._timeout_s = timeout_s
        self._policy = RetryPolicy(retries=retries)
        self._form = _form(arrow)
        self._http = httpx.AsyncClient(base_url=self.url, headers=dict(headers or {}), transport=transport)

    async def rank(self, candidates: Ids, **options: Unpack[RankOptions]) -> Ranking:
        """Rank `candidates` (ids of one type; a list or a NumPy array) for one user, best first.

        Options: user_id, user, context, history, top_k, on_missing, explain, deadline_ms, as in docs/api.md.
        """
        return self._form.read(await self._send(self._form.call(candidates, options)))

    async def rank_batch(self, queries: Sequence[Query]) -> list[Ranking]:
        """Rank for several users in one request; all answers come from one release, in the order of the queries."""
        answer = await self._send(_Call(method="POST", path=BATCH, body=batch_body(queries)))
        return rankings_of(answer, len(queries))

    async def retrieve(self, **options: Unpack[RetrieveOptions]) -> Ranking:
        """The best items of the whole catalogue for one user; positions are -1. Needs a release with an index.

        Options: user_id, user, context, history, top_k, per_head, explain, deadline_ms.
        """
        return ranking_of(await self._send(_Call(method="POST", path=RETRIEVE, body=retrieve_body(options))))

    async def release(self) -> Release:
        """The release that serves now."""
        return release_of(await self._send(_Call(method="GET", path=RELEASE)))

    async def ready(self) -> bool:
        """Whether the service would answer now. Asks once; a service that cannot be reached is not ready."""
        try:
            await self._send(_Call(method="GET", path=READY), FIRST_ATTEMPT_ONLY)
        except (*RETRIED, DeadlineExceeded):
            return False
        return True

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncRankTower:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _send(self, call: _Call, policy: RetryPolicy | None = None) -> httpx.Response:
        course = Course(policy or self._policy, self._timeout_s)
        while True:
            try:
                return await self._attempt(call, course.left_s())
            except RankTowerError as error:
                await asyncio.sleep(course.pause_after(error))

    async def _attempt(self, call: _Call, left_s: float) -> httpx.Response:
        request = self._http.request(call.method, call.path, content=call.body, headers=call.headers, timeout=left_s)
        try:
            answer = await asyncio.wait_for(request, left_s)
        except httpx.HTTPError as error:
            raise transport_error_of(error, self.url) from error
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer from {self.url} within {left_s:.3f} s") from error
        return _accepted(answer)


def _form(arrow: bool) -> _Form:
    """Raises ImportError where Arrow is wanted and pyarrow is not there."""
    if not arrow:
        return _Form(rank_body, ranking_of, JSON)
    try:
        import ranktower_client.arrow as form
    except ImportError as error:
        raise ImportError(f"arrow=True needs pyarrow ({error}): pip install 'ranktower-client[arrow]'") from error
    return _Form(form.rank_body, form.ranking_of, form.HEADERS)


def _checked(url: str) -> str:
    """The URL without a closing slash. Raises ValueError when it is not one of HTTP."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url!r}: write http://HOST:PORT")
    return url.rstrip("/")


def _accepted(answer: httpx.Response) -> httpx.Response:
    """The answer, if it is one of success. Raises what it stands for otherwise."""
    if answer.is_success:
        return answer
    raise error_of(answer)
