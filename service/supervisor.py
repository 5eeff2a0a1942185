"""Several processes: a supervisor, one refresher that asks the store and fetches, and workers that map what is here."""

from __future__ import annotations

import logging
import logging.config
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from cache.aside import NICE
from cache.durable import holding
from cache.mirror import Mirror, MirrorStore
from cache.store import open_store
from service.settings import Settings, load_settings

if TYPE_CHECKING:
    from fastapi import FastAPI

RESTART_PAUSE_S = 1.0  # between two starts of a refresher
MIRROR, METRICS = "mirror", "metrics"  # folders of a run

log = logging.getLogger(__name__)
spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshing:
    """What the refresher is started with. It ends when the other end of `supervisor` is gone; signals pass it by."""

    settings: Settings
    mirror: Path
    supervisor: Connection
    logging: dict[str, Any]

    def __call__(self) -> None:
        os.nice(NICE)
        for number in (signal.SIGINT, signal.SIGTERM):  # which reach the whole group, while workers drain
            signal.signal(number, signal.SIG_IGN)
        logging.config.dictConfig(self.logging)
        when_gone(self.supervisor, lambda: os._exit(0))  # at once: what was half fetched is completed next time
        settings = self.settings
        with holding(self.mirror):
            store = open_store(settings.store)
            Mirror(
                store,
                settings.cache_dir,
                self.mirror,
                refresh_s=settings.refresh_s,
                huge_pages=settings.huge_pages,
            ).run()


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The factory that uvicorn calls in a worker. It drains when the other end of `supervisor` is gone."""

    url: str  # of the store
    mirror: Path
    supervisor: Connection

    def __call__(self) -> FastAPI:
        from service.app import create_app  # not in the refresher, which needs no ONNX Runtime

        when_gone(self.supervisor, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return create_app(load_settings(), MirrorStore(self.mirror, self.url))


def when_gone(other: Connection, act: Callable[[], None]) -> None:
    """Act once the process that holds the other end of a pipe has closed it, or has died in whatever way."""

    def watch() -> None:
        with suppress(EOFError, OSError):
            other.recv_bytes()
        act()

    threading.Thread(target=watch, name="supervisor", daemon=True).start()


class Supervisor(Multiprocess):
    """uvicorn's supervisor of workers, with a refresher beside them. Either is started again when it ends."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, refreshing: Refreshing) -> None:
        super().__init__(config, [listener])
        self._refreshing = refreshing
        self.refresher = self._new_refresher()

    def init_processes(self) -> None:
        self._start_refresher()
        super().init_processes()

    def keep_subprocess_alive(self) -> None:
        before = {worker.pid: worker for worker in self.processes}
        super().keep_subprocess_alive()
        for gone in before.keys() - {worker.pid for worker in self.processes}:
            _forget_metrics(gone)
            log.warning("worker %s ended with %s: another was started%s", gone, *_ending(before[gone].exitcode))
        ended = self.refresher.exitcode
        if ended is None or self.should_exit.is_set() or monotonic() < self._started_s + RESTART_PAUSE_S:
            return
        log.warning("the refresher, process %s, ended with %d: starting another", self.refresher.pid, ended)
        self.refresher = self._new_refresher()
        self._start_refresher()

    def _new_refresher(self) -> SpawnProcess:
        return spawn.Process(target=self._refreshing, name="refresher", daemon=True)

    def _start_refresher(self) -> None:
        self._started_s = monotonic()
        self.refresher.start()
        log.info("process %s is the refresher", self.refresher.pid)


def _ending(code: int | None) -> tuple[int | None, str]:
    """The exit code of a worker, and what a kill may mean: a worker ends by itself in no other way."""
    return code, " (killed: see the kernel's log for memory that ran out)" if code == -signal.SIGKILL else ""


def _forget_metrics(worker: int | None) -> None:
    """Else the release that a dead worker served would be reported for ever."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker)  # type: ignore[no-untyped-call]


def serve_workers(
    settings: Settings, listener: socket.socket, config: Callable[[Any], uvicorn.Config], logging: dict[str, Any]
) -> None:
    """Serve with several processes until a signal ends them: the workers drain first, the refresher goes last."""
    url = open_store(settings.store).url  # a wrong URL is refused here, not in every process
    theirs, ours = spawn.Pipe(duplex=False)
    with TemporaryDirectory(prefix="ranktower-", ignore_cleanup_errors=True) as name:
        mirror, metrics = Path(name, MIRROR), Path(name, METRICS)
        mirror.mkdir()
        metrics.mkdir()
        settings.share(metrics)
        worker = Worker(url=url, mirror=mirror, supervisor=theirs)
        refreshing = Refreshing(settings=settings, mirror=mirror, supervisor=theirs, logging=logging)
        supervisor = Supervisor(config(worker), listener, refreshing)
        try:
            supervisor.run()
        finally:
            ours.close()
            if supervisor.refresher.pid is not None:
                supervisor.refresher.join()
