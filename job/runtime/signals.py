"""SIGTERM, SIGINT and SIGHUP: ask the run to stop, call who wants to know, and end the process in the platform's time.

The first signal raises `StopRequested` in the main thread, or only sets a flag inside `deferred()`, where the training
loop looks at it between two steps. A thread learns of every signal at once, also while the main thread is inside C
code: it calls the listeners, raises `StopRequested` again where somebody swallowed it (an exception that a finaliser or
a bare `except` meets is lost) until somebody acknowledges it, and ends the process when the grace is used up. A second
signal ends it at once.

The life of a process: `install`, the imports, `enable`; whoever catches `StopRequested` for good calls `acknowledge`.

The standard library only, and little of it: this is imported before everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from job.runtime.errors import InterruptedError, StopRequested  # noqa: A004 - the domain's word

SAME_SIGNAL_SECONDS = 1.0  # `timeout`, make and terminals signal a whole group: the same request arrives twice
MARGIN_SECONDS = 1.0  # of the grace, kept for the end itself
WAKEUP_SECONDS = 1.0
LAST_WORDS_SECONDS = 0.7
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_WAKEUP = signal.SIGUSR1  # only ever sent by this module to this process


class _Request:
    """The request to stop, and what is known of it. One per process, because signals are the process's."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.asked_at = 0.0
        self.grace_seconds = 15.0
        self.raised = False
        """Whether the main thread was given `StopRequested`."""
        self.acknowledged = False
        """Whether it was caught where it belongs."""
        self.deferring = 1
        """How many want a signal to set the flag only. The first is the start of the program, until `enable`."""
        self.listeners: list[Callable[[], None]] = []
        self.last_words: Callable[[], None] = lambda: None

    def record(self, number: int) -> None:
        """The first signal counts."""
        if self.signal_name is None:
            self.asked_at = time.monotonic()
            self.signal_name = signal.Signals(number).name

    def raise_if_asked(self) -> None:
        """Give the main thread `StopRequested`, unless it is deferred."""
        if self.signal_name is not None and not self.deferring:
            self.raised = True
            raise StopRequested(self.signal_name)


_request = _Request()


def install() -> None:
    """Catch the signals from here on. To be called once, in the main thread, before anything that takes time.

    They only set the flag until `enable`: nobody would catch an exception in the middle of an import. A SIGHUP that is
    ignored stays so: `nohup` asked for it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in ASKING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)
    signal.signal(_WAKEUP, _on_wakeup)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


def enable() -> None:
    """From here on somebody catches `StopRequested`; raises it if a signal came in the meantime."""
    _request.deferring -= 1
    _request.raise_if_asked()


def asked() -> str | None:
    """The name of the signal that asked the process to stop, or None."""
    return _request.signal_name


def grace(seconds: float) -> None:
    """Set how long the platform waits between its signal and SIGKILL."""
    _request.grace_seconds = seconds


def seconds_left() -> float:
    """Until the process ends itself; infinite while nobody asked."""
    if _request.signal_name is None:
        return float("inf")
    return _request.asked_at + _request.grace_seconds - MARGIN_SECONDS - time.monotonic()


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` once, in another thread, as soon as a signal comes."""
    _request.listeners.append(listener)


def last_words(say: Callable[[], None]) -> None:
    """Set what to do before the process ends itself because the grace is used up or a second signal came."""
    _request.last_words = say


def acknowledge() -> None:
    """`StopRequested` was caught where it belongs: it is not raised again."""
    _request.acknowledged = True


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal only sets the flag; raises `StopRequested` on leaving, or on entering, if it is set."""
    _request.raise_if_asked()
    _request.deferring += 1
    try:
        yield
    finally:
        _request.deferring -= 1
    _request.raise_if_asked()


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Inside `deferred()`: a stretch that may be interrupted at any point, because nothing of it is needed."""
    outer, _request.deferring = _request.deferring, 0
    try:
        _request.raise_if_asked()
        yield
    finally:
        _request.deferring = outer


def _on_signal(number: int, _: FrameType | None) -> None:
    """In the main thread, as soon as it runs Python code."""
    _request.record(number)
    if not (_request.raised or _request.acknowledged):
        _request.raise_if_asked()


def _on_wakeup(_: int, __: FrameType | None) -> None:
    """In the main thread, while nobody has acknowledged the request."""
    if not _request.acknowledged:
        _request.raise_if_asked()


def _watch(wakeup_pipe: int) -> None:
    """The thread: Python writes the number of each signal into the pipe, whatever the main thread is doing."""
    while (number := os.read(wakeup_pipe, 1)[0]) not in ASKING:
        pass
    _request.record(number)
    threading.Thread(target=_enforce_grace, name="grace", daemon=True).start()
    for listener in _request.listeners:
        threading.Thread(target=listener, name="stop-listener", daemon=True).start()
    while number := os.read(wakeup_pipe, 1)[0]:
        if number in ASKING and time.monotonic() - _request.asked_at > SAME_SIGNAL_SECONDS:
            _end()


def _enforce_grace() -> None:
    """Wake the main thread until the request is acknowledged, and end the process when the grace is over."""
    main = threading.main_thread().ident
    while (left := seconds_left()) > 0:
        time.sleep(min(WAKEUP_SECONDS, left))
        if not (_request.acknowledged or _request.deferring or main is None):
            signal.pthread_kill(main, _WAKEUP)
    _end()


def _end() -> None:
    speaking = threading.Thread(target=_request.last_words, name="last-words", daemon=True)
    speaking.start()
    speaking.join(LAST_WORDS_SECONDS)
    os._exit(InterruptedError.exit_code)
