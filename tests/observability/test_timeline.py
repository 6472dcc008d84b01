"""Seconds by part of a run, and work beside the main thread."""

import contextlib
import os
import signal
import threading
import time

import pytest

from job.observability.timeline import PARTS, Timeline, compile_seconds
from job.runtime.background import Background


def test_a_part_never_takes_longer_than_the_run():
    """What two threads, or two spans inside each other, spend on one part at the same time counts once."""
    timeline, started, both = Timeline(), time.monotonic(), threading.Barrier(2)

    def download() -> None:
        with timeline.span("download"), timeline.span("download"):
            both.wait()
            both.wait()

    other = threading.Thread(target=download)
    other.start()
    download()
    other.join()
    passed = time.monotonic() - started
    assert 0 <= timeline.seconds()["download"] <= passed + 0.001


def test_a_part_that_fails_is_measured():
    """A span counts also when its block raises; parts add up; what never was is 0."""
    timeline = Timeline()
    timeline.add("load", 2.0)
    with contextlib.suppress(KeyError), timeline.span("load"):
        raise KeyError
    assert timeline.seconds().keys() == set(PARTS)
    assert 2.0 <= timeline.seconds()["load"] < 3.0
    assert timeline.seconds()["export"] == 0.0


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [
        pytest.param([], 0.0, id="no step"),
        pytest.param([9.0], 0.0, id="nothing to compare with"),
        pytest.param([9.0, 1.0, 1.0, 4.0], 8.0, id="the median of the others"),
        pytest.param([1.0, 2.0], 0.0, id="never negative"),
    ],
)
def test_compiling_is_what_the_first_step_takes_more(steps, seconds):
    """Compile time is the first step's minus the median of those after it."""
    assert compile_seconds(steps) == seconds


def test_an_exception_comes_out_where_the_result_is_asked_for():
    """Work beside the main thread gives its result, or raises what it raised, to whoever waits."""
    assert Background(lambda: 7, name="seven").result() == 7

    def fail() -> None:
        raise ValueError("no")

    failing = Background(fail, name="fail")
    assert failing.ended(5)
    with pytest.raises(ValueError, match="no"):
        failing.result()


def test_a_signal_ends_the_wait():
    """Waiting for a result is cancelled by an exception out of a signal handler, though the work continues."""

    class _AskedError(Exception):
        pass

    def raise_asked(*_: object) -> None:
        raise _AskedError

    go_on = threading.Event()
    before = signal.signal(signal.SIGUSR2, raise_asked)
    try:
        waiting = Background(go_on.wait, name="waiting")
        assert not waiting.ended(0.01)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        with pytest.raises(_AskedError):
            waiting.result()
    finally:
        signal.signal(signal.SIGUSR2, before)
        go_on.set()
