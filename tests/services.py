"""A real service in this process: uvicorn on a free port in a thread, and an HTTP client for it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from cache.file_store import FileStore
from cache.store import ReleaseStore
from service.app import Service, create_app
from service.at_once import RankProtocol
from service.refresh import Standing
from service.settings import Settings
from tests.tiny_releases import TinyRelease, publish

TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Running:
    """A service, its address and a client."""

    service: Service
    http: httpx.Client
    server: uvicorn.Server

    def stop(self) -> None:
        """Tell the server to stop, and return once it no longer listens and has told its connections."""
        self.server.should_exit = True
        while self.server.servers and self.server.servers[0].is_serving():
            threading.Event().wait(0.01)

    def until(self, reached: Callable[[Standing], bool]) -> None:
        assert self.service.refresher.wait_until(reached, TIMEOUT_S), self.service.refresher.standing

    def until_ready(self) -> None:
        self.until(lambda standing: standing.ranker is not None)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)


@contextmanager
def running(store: ReleaseStore, **given: Any) -> Iterator[Running]:
    """A service over a store. It answers at once; `until_ready` waits for its first release."""
    app = create_app(Settings(store=store.url, **{"refresh_s": 0.1, **given}), store)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, ws="none", log_config=None, access_log=False, loop="uvloop", http=RankProtocol)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
                yield Running(app.state.service, http, server)
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_S)


@contextmanager
def running_release(release: TinyRelease, folder: Path, **given: Any) -> Iterator[Running]:
    """The same over a new file store in `folder` that holds this release, once it is loaded."""
    store = FileStore(f"file://{folder}")
    publish(release, store)
    with running(store, **given) as service:
        service.until_ready()
        yield service
