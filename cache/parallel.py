"""Work that waits for disk, network or hashing, on a few threads: results in order, so many in memory and no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 4  # hashes and sockets let go of the interpreter; more than four neither Redis nor two cores would feed

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], values: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """`work` of each value, in their order, `threads` at a time, and as many results again that wait to be taken.

    Raises what `work` raised of the first value that failed; nothing is begun after that, what has begun comes to its
    end. So it does when the caller takes no more.
    """
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[R]] = deque()
        try:
            for value in values:
                begun.append(pool.submit(work, value))
                if len(begun) == 2 * threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
