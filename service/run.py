"""Run the service: listen on the address, then one process, or a supervisor and its processes on the same socket."""

from __future__ import annotations

import logging
import logging.config
import socket
import sys
from functools import partial
from typing import Any

import uvicorn

from service.app import create_app
from service.at_once import RankProtocol
from service.errors import SettingsError
from service.settings import Settings, unknown_variables
from service.supervisor import Worker, serve_workers

BACKLOG = 2048  # connections that the kernel keeps for us
STOP_WITHIN_S = 10  # for requests that are still at work when the server stops
IDLE_S = 75  # a connection without requests: longer than balancers keep theirs (60 s), so that they close first
SWITCH_S = 0.0001  # a thread that opens a release gives the interpreter back so soon: usually fifty times later
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises SettingsError when the address cannot be had."""
    logging.config.dictConfig(log_config(settings.log_level))
    for name, remedy in unknown_variables():
        log.warning("%s is in the environment, but no setting: %s", name, remedy)
    sys.setswitchinterval(SWITCH_S)
    with listen(settings.host, settings.port) as listener:
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        if settings.workers == 1:
            uvicorn.Server(_config(settings, create_app(settings))).run(sockets=[listener])
        else:
            serve_workers(settings, listener, partial(_config, settings), log_config(settings.log_level))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SettingsError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"{host}:{port} cannot be listened on ({error.strerror or error})",
            field="port",
            remedy="choose another --host or --port, or end what listens there",
        ) from error
    listener.set_inheritable(True)
    return listener


def _config(settings: Settings, app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=isinstance(app, Worker),
        workers=settings.workers,
        loop="uvloop",
        http=RankProtocol,
        ws="none",
        lifespan="on",
        access_log=False,
        proxy_headers=False,  # nothing here depends on where a request comes from
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_S,
        log_config=log_config(settings.log_level),
        timeout_graceful_shutdown=STOP_WITHIN_S,
    )


def log_config(level: str) -> dict[str, Any]:
    """One format for all loggers, on stderr; uvicorn applies it in every worker."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": LINE}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        "loggers": {name: {"level": "WARNING"} for name in ("uvicorn", "faiss.loader")},
    }
