"""SIGTERM and SIGINT: ask the run to stop, tell those who want to know, and end the process before it is ended.

The first signal raises `StopRequested` in the main thread, or only sets a flag inside `deferred()`, where the training
loop looks at it between two steps. A thread of its own is told of every signal at once, also while the main thread is
inside C code: it calls the listeners, raises `StopRequested` again where somebody swallowed it (an exception that a
finaliser or a bare `except` meets is lost), and ends the process when the grace is used up. A second signal ends it at
once.

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

SAME_SIGNAL_SECONDS = 1.0  # `timeout`, make and terminals signal a whole group: the same wish arrives twice
MARGIN_SECONDS = 1.0  # of the grace, kept for the end itself
WAKEUP_SECONDS = 1.0
LAST_WORDS_SECONDS = 0.7
ASKING = (signal.SIGTERM, signal.SIGINT)
_WAKEUP = signal.SIGUSR1  # only ever sent by this module to this process


class _State:
    """What is known of the wish to stop. One per process: signals are the process's."""

    name: str | None = None
    asked_at = 0.0
    grace_seconds = 15.0
    raised = False
    acknowledged = False
    deferring = 1
    """How many want signals to set the flag only; the first is the start of the program, until `ready`."""
    listeners: list[Callable[[], None]] = []  # noqa: RUF012 - there is one state
    last_words: Callable[[], None] = staticmethod(lambda: None)
    wakeup_pipe: tuple[int, int] | None = None


_state = _State()


def install() -> None:
    """Catch the signals from here on. To be called once, in the main thread, before anything that takes time.

    They only set the flag until `ready`: an exception in the middle of an import would meet nobody.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    _state.wakeup_pipe = (reading, writing)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in ASKING:
        signal.signal(number, _on_signal)
    signal.signal(_WAKEUP, _on_wakeup)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


def enable() -> None:
    """From here on somebody catches `StopRequested`; raises it if a signal came meanwhile."""
    _state.deferring -= 1
    _raise_if_asked()


def asked() -> str | None:
    """The name of the signal that asked the process to stop, or None."""
    return _state.name


def grace(seconds: float) -> None:
    """How long the platform waits between its signal and SIGKILL."""
    _state.grace_seconds = seconds


def seconds_left() -> float:
    """Until the process ends itself; infinite while nobody asked."""
    if _state.name is None:
        return float("inf")
    return _state.asked_at + _state.grace_seconds - MARGIN_SECONDS - time.monotonic()


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` once, in another thread, as soon as a signal comes."""
    _state.listeners.append(listener)


def last_words(say: Callable[[], None]) -> None:
    """What to do when the grace is used up, or a second signal comes, before the process ends itself."""
    _state.last_words = say


def acknowledge() -> None:
    """`StopRequested` has await_model where it belongs: it need not be raised again."""
    _state.acknowledged = True


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal only sets the flag; raises `StopRequested` on leaving, or on entering, if it is set."""
    _raise_if_asked()
    _state.deferring += 1
    try:
        yield
    finally:
        _state.deferring -= 1
    _raise_if_asked()


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Inside `deferred()`: a stretch that may be broken off at any point, because nothing of it is needed."""
    outer, _state.deferring = _state.deferring, 0
    try:
        _raise_if_asked()
        yield
    finally:
        _state.deferring = outer


def _raise_if_asked() -> None:
    if _state.name is not None and not _state.deferring:
        _state.raised = True
        raise StopRequested(_state.name)


def _on_signal(number: int, _: FrameType | None) -> None:
    """In the main thread, as soon as it runs Python code."""
    _note(number)
    if not (_state.raised or _state.acknowledged):
        _raise_if_asked()


def _on_wakeup(_: int, __: FrameType | None) -> None:
    if not _state.acknowledged:
        _raise_if_asked()


def _note(number: int) -> None:
    if _state.name is None:
        _state.asked_at = time.monotonic()
        _state.name = signal.Signals(number).name


def _watch(reading: int) -> None:
    """The thread: numbers of signals come through the pipe, whatever the main thread is doing."""
    while (number := os.read(reading, 1)[0]) not in ASKING:
        pass
    _note(number)
    threading.Thread(target=_attend, name="grace", daemon=True).start()
    for listener in _state.listeners:
        threading.Thread(target=listener, name="stop-listener", daemon=True).start()
    while number := os.read(reading, 1)[0]:
        if number in ASKING and time.monotonic() - _state.asked_at > SAME_SIGNAL_SECONDS:
            _end()


def _attend() -> None:
    """Wake the main thread until `StopRequested` was acknowledged, and end the process when the grace is over."""
    main = threading.main_thread().ident
    while (left := seconds_left()) > 0:
        time.sleep(min(WAKEUP_SECONDS, left))
        if not (_state.acknowledged or _state.deferring or main is None):
            signal.pthread_kill(main, _WAKEUP)
    _end()


def _end() -> None:
    speaking = threading.Thread(target=_state.last_words, name="last-words", daemon=True)
    speaking.start()
    speaking.join(LAST_WORDS_SECONDS)
    os._exit(InterruptedError.exit_code)
