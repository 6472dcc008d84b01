"""Work in a background thread, which is waited for where its result is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """One call in its own thread, which ends with the process at the latest.

    The thread is a daemon: whatever it waits for, it does not delay the end of the process. An exception is raised
    where the result is asked for. A signal interrupts that wait at once.
    """

    def __init__(self, work: Callable[[], T], *, name: str) -> None:
        self._future: Future[T] = Future()
        self._work = work
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(self._work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self._future.set_exception(error)

    def result(self) -> T:
        """Wait for what the work returns; raises what it raised."""
        return self._future.result()

    def ended(self, seconds: float) -> bool:
        """Wait for the end, in success or failure, for at most `seconds`; returns whether it came."""
        try:
            self._future.exception(timeout=seconds)
        except TimeoutError:
            return False
        return True
