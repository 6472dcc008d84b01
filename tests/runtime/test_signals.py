"""SIGTERM, SIGINT and SIGHUP, with real processes that really get them."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from job.runtime.errors import InterruptedError  # noqa: A004 - the domain's word
from tests.jobs import ROOT

pytestmark = pytest.mark.process

PROLOGUE = """
import os, signal, sys, time
from job.runtime import signals
from job.runtime.errors import StopRequested
signals.install()
def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
def say(word):
    os.write(1, f"{word}\\n".encode())  # in one piece: several threads say something
signals.last_words(lambda: say("last words"))
"""


def run(code: str, *, hang_up: str = "SIG_DFL") -> tuple[int, list[str]]:
    """Run code after the prologue; its exit code and what it printed.

    Args:
        hang_up: what a SIGHUP does at the start, whatever it does where the tests run (they may run under nohup).
    """
    before = f"import signal\nsignal.signal(signal.SIGHUP, signal.{hang_up})\n"
    program = before + PROLOGUE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, timeout=30
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_raised_in_the_main_thread(number):
    """The first signal is an exception, with the signal's name, and the listeners are called."""
    code, said = run(f"""
    signals.listen(lambda: say("listener"))
    signals.enable()
    try:
        ask(signal.{number})
        time.sleep(10)
    except StopRequested as stop:
        signals.acknowledge()
        say(stop.signal_name)
    time.sleep(0.3)
    say(signals.seconds_left() < signals.MARGIN_SECONDS + 15)
    """)
    assert code == 0
    assert sorted(said) == sorted([number, "listener", "True"])


def test_nohup_is_respected():
    """A SIGHUP that was ignored at the start stays so; any other signal still stops the run."""
    _, said = run(
        """
    signals.enable()
    try:
        ask(signal.SIGHUP)
        time.sleep(0.3)
        say("continues")
        ask(signal.SIGTERM)
        time.sleep(10)
    except StopRequested as stop:
        signals.acknowledge()
        say(stop.signal_name)
    """,
        hang_up="SIG_IGN",
    )
    assert said == ["continues", "SIGTERM"]


def test_before_enable_a_signal_only_sets_the_flag():
    """While the program is imported nobody would catch the exception: it comes with `enable`."""
    _, said = run("""
    ask()
    say(signals.asked())
    try:
        signals.enable()
    except StopRequested:
        signals.acknowledge()
        say("raised")
    """)
    assert said == ["SIGTERM", "raised"]


def test_deferred_and_immediate():
    """Inside `deferred` the flag is set and the exception comes at the end; an `immediate` stretch is interrupted."""
    _, said = run("""
    signals.enable()
    try:
        with signals.deferred():
            try:
                with signals.immediate():
                    ask()
                    time.sleep(10)
            except StopRequested:
                say("interrupted")
            say("continues")
        say("never")
    except StopRequested:
        signals.acknowledge()
        say("raised at the end")
    """)
    assert said == ["interrupted", "continues", "raised at the end"]


def test_a_swallowed_request_is_raised_again():
    """Whoever catches everything does not keep the run from stopping; an acknowledged request is not repeated."""
    _, said = run("""
    signals.WAKEUP_SECONDS = 0.1
    signals.enable()
    try:
        ask()
        time.sleep(10)
    except BaseException:
        say("swallowed")
    try:
        time.sleep(10)
    except StopRequested:
        signals.acknowledge()
        say("raised again")
    time.sleep(0.5)
    say("quiet")
    """)
    assert said == ["swallowed", "raised again", "quiet"]


@pytest.mark.parametrize(
    "waiting", ["time.sleep(20)", "import ctypes; ctypes.PyDLL(None).sleep(2)"], ids=["Python", "C that holds the lock"]
)
def test_the_grace_ends_the_process(waiting):
    """When the grace is used up the process says its last words and ends with 75, whatever the main thread does."""
    started = time.monotonic()
    code, said = run(f"""
    signals.grace(1.5)
    signals.enable()
    try:
        ask()
    except StopRequested:
        signals.acknowledge()
    {waiting}
    time.sleep(20)
    """)
    assert code == InterruptedError.exit_code
    assert said == ["last words"]
    assert time.monotonic() - started < 10


def test_a_second_signal_ends_the_process():
    """Whoever asks twice does not want to wait; the same signal twice within a second is one request."""
    code = """
    signals.enable()
    try:
        say("ready")
        time.sleep(60)
    except StopRequested:
        signals.acknowledge()
        say("asked")
        time.sleep(60)
    """
    command = [sys.executable, "-c", PROLOGUE + textwrap.dedent(code)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, signal.SIGTERM)
        assert child.stdout.readline() == "asked\n"
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(1.3)
        assert child.poll() is None
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(10) == InterruptedError.exit_code
    finally:
        child.kill()
        child.wait()
