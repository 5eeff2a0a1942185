"""A TCP proxy on loopback that delays what one server answers, or resets its connections, when told to."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

from loadtest.serving import HOST

PIECE = 1 << 16  # bytes passed on at a time
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: closing sends RST, not FIN
TICK_S = 1e-6  # between pieces that were due together: timers that are due at one time have no order


class Proxy:
    """Listens on `port` and passes on to another. Its two switches may be set by any thread, at any time."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_s = 0.0  # of every piece that the server sends
        self.resetting = False  # every connection, once either side sends something

    async def run(self, stopped: asyncio.Event) -> None:
        async with await asyncio.start_server(self._pass, sock=self._listener):
            await stopped.wait()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its beginning to its end."""
        upstream = None
        try:
            there, upstream = await asyncio.open_connection(HOST, self._target)
            ways = (self._pump(reader, upstream, delayed=False), self._pump(there, writer, delayed=True))
            tasks = [asyncio.ensure_future(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
        except OSError:
            pass  # nobody listens there: the client hears of it as its connection is reset
        finally:
            _reset(writer)
            if upstream is not None:
                upstream.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delayed: bool) -> None:
        """Pass on until either side ends or is reset."""
        loop, due_s = asyncio.get_running_loop(), 0.0
        with suppress(OSError):
            while piece := await reader.read(PIECE):
                if self.resetting:
                    return
                due_s = max(due_s + TICK_S, loop.time() + (self.delay_s if delayed else 0.0))
                if due_s <= loop.time():
                    writer.write(piece)
                    await writer.drain()
                else:
                    loop.call_at(due_s, writer.write, piece)


def _reset(writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("socket")
    with suppress(OSError):  # it is gone already
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    """A proxy before the server on that port, run by a thread of its own within the block."""
    made, stopped, loop = Proxy(target), asyncio.Event(), asyncio.new_event_loop()
    thread = Thread(target=lambda: loop.run_until_complete(made.run(stopped)), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
