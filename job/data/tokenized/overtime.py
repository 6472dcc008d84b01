"""A limit of time for what a template and a tokenizer do with one row.

Both were tried before the first row (`job.data.tokenizer.trial`), but a loop or a pattern may explode on some rows
only. A template runs in Python, where an exception from another thread ends it. A tokenizer runs in compiled code, in a
thread that is left behind: the process ends soon, with the error. Seconds are those of computing, so that a machine
that is busy ends nothing. Looking every few seconds costs nothing for each row.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
SECONDS = 300.0
"""Of computing for one row; 2,000 turns with a slow template take less than 100."""
LOOKS = 10
"""In this time."""


class OvertimeError(BaseException):
    """It takes too long. Not an Exception: what a template calls must not catch it."""


class Watch:
    """A context in which this thread gets `OvertimeError` when `current` stays the same for too long."""

    def __init__(self) -> None:
        self.current: Any = None
        """What the thread is doing: any object, another one for each row."""
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread)
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._look, name="overtime", daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watcher.join()

    def _look(self) -> None:
        seen, began = None, 0.0
        while not self._over.wait(SECONDS / LOOKS):
            now = time.clock_gettime(self._clock)
            if self.current is not seen:
                seen, began = self.current, now
            elif seen is not None and now - began > SECONDS:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(OvertimeError)
                )
                return


def result(future: Future[T], seconds: float | None = None) -> T:
    """What another thread computes in compiled code.

    Raises:
        OvertimeError: it takes longer than `SECONDS`; the thread must not be waited for.
    """
    limit = SECONDS if seconds is None else seconds
    computed, began = time.process_time(), time.monotonic()
    while True:
        try:
            return future.result(timeout=limit / LOOKS)
        except TimeoutError:
            if future.done():
                raise
        if min(time.process_time() - computed, time.monotonic() - began) > limit:
            raise OvertimeError


def apart(work: Callable[[], T]) -> T:
    """Compute in a thread of its own. Raises OvertimeError after a tenth of the time, and leaves the thread behind."""
    future: Future[T] = Future()

    def compute() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=compute, name="tokenise-one", daemon=True).start()
    return result(future, SECONDS / LOOKS)
