"""Several transfers in parallel: the first failure stops the others, and nobody waits for a thread that hangs."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Stopped(Exception):  # noqa: N818 - not an error: another thread of the same transfer failed
    """The transfer that this call belongs to has been stopped."""


def each(act: Callable[[T, threading.Event], R], items: Iterable[T], *, workers: int) -> list[R]:
    """`act(item, stop)` for every item, results in order.

    The first failure, or an exception from a signal handler, sets `stop` and is raised at once. Threads that are still
    running end at `stop` or at their own next failure, so `act` must open the files that it writes by itself.
    """
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="transfer")
    try:
        futures = [pool.submit(act, item, stop) for item in items]
        done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        _raise_first(done)
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _raise_first(done: set[concurrent.futures.Future[R]]) -> None:
    errors = [error for future in done if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
