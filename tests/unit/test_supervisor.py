"""What ties processes together; tests/integration/test_workers.py runs them."""

from __future__ import annotations

import multiprocessing
import socket
import threading

import pytest
import uvicorn

from cache.errors import StoreError
from service.settings import Settings
from service.supervisor import serve_workers, when_gone

TIMEOUT_S = 20.0


def test_a_pipe_that_is_closed_tells_that_the_other_process_is_gone() -> None:
    theirs, ours = multiprocessing.Pipe(duplex=False)
    gone = threading.Event()
    when_gone(theirs, gone.set)
    assert not gone.is_set()
    ours.close()
    assert gone.wait(TIMEOUT_S)


def test_a_store_that_no_process_could_open_is_refused_before_any_starts() -> None:
    with socket.socket() as listener, pytest.raises(StoreError, match="no store answers to ftp:"):
        serve_workers(Settings(store="ftp://somewhere"), listener, uvicorn.Config, {})
