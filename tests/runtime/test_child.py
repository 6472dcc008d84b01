"""A child process and its parent: what is sent arrives, and neither outlives what it should not."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from structlog.testing import capture_logs

from job.runtime import child
from job.runtime.child import Child, Failed
from job.runtime.errors import KINDS, JobError, StorageError
from tests.jobs import ROOT
from tests.runtime.child_program import Answer, Ask

pytestmark = pytest.mark.process

PARENT = """
import os, sys, time
from job.runtime.child import Child
from tests.runtime.child_program import Answer, Ask
child = Child("tests.runtime.child_program", environment=dict(os.environ), receives=(Answer,))
child.send(Ask(what=sys.argv[1], value=sys.argv[2]))
time.sleep(60)
"""


def start():
    return Child("tests.runtime.child_program", environment=dict(os.environ), receives=(Answer, Failed))


@pytest.fixture
def running():
    with start() as process:
        yield process


def waited(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_messages_arrive_in_order_and_nothing_else(capfd):
    """What libraries print before or in between is not a message; it goes to stderr."""
    asked = [Ask(what="echo", value="a\nb\u2028\"'"), Ask(what="print", value="printed"), Ask(what="echo", value="c")]
    with start() as running:
        for ask in asked:
            running.send(ask)
        answers = iter(running)
        assert [next(answers).value for _ in asked] == [ask.value for ask in asked]
    assert capfd.readouterr().err.count("printed") == 2


def test_log_lines_are_logged_by_the_parent(running):
    """A log line of the child appears in the parent's log, with its level and fields, and is no message."""
    running.send(Ask(what="log", value="hello"))
    with capture_logs() as logs:
        assert isinstance(next(iter(running)), Answer)
    assert logs == [{"event": "child_said", "value": "hello", "log_level": "warning"}]


def test_an_error_is_the_same_in_the_parent(running):
    """An error arrives with its kind, message and remedy."""
    running.send(Ask(what="refuse", value="It is full."))
    failed = next(iter(running))
    assert isinstance(failed, Failed)
    assert (type(failed.error()), str(failed.error())) == (StorageError, "It is full. Do something.")


@pytest.mark.parametrize("kind", [JobError, *KINDS])
def test_every_kind_of_error_has_its_way_back(kind):
    """Whatever kind an error has, the parent raises the same one."""
    error = Failed.of(kind("message", remedy="remedy")).error()
    assert (type(error), error.message, error.remedy) == (kind, "message", "remedy")


def test_the_child_has_a_session_of_its_own(running):
    """Ctrl-C at a terminal reaches the parent's session only."""
    running.send(Ask(what="echo"))
    assert next(iter(running)).session != os.getsid(0)


def test_a_child_gets_no_credentials():
    """What is not in the table of credentials gets none, whatever its parent passes on."""
    given = {
        **os.environ,
        "HF_TOKEN": "planted",
        "AWS_SECRET_ACCESS_KEY": "planted",
        "DB": "pg://u:planted@h",
        "X": "x",
    }
    with Child("tests.runtime.child_program", environment=given, receives=(Answer,)) as process:
        process.send(Ask(what="echo"))
        next(iter(process))
        environment = psutil.Process(process._process.pid).environ()
    assert environment["X"] == "x"
    assert "planted" not in str(environment)


def test_an_unexpected_error_ends_the_child(capfd):
    """The iteration ends, the status is 1, and the traceback is on stderr; what is sent afterwards is lost."""
    with start() as running:
        running.send(Ask(what="fail", value="oh no https://u:p@host"))
        assert list(running) == []
        assert running.wait() == 1
        running.send(Ask(what="echo"))
    assert "ValueError: oh no https://***@host" in capfd.readouterr().err


def test_a_child_that_dies_ends_the_iteration(running):
    """The parent learns of a SIGKILL by the end of the messages, and by the status."""
    running._process.kill()
    assert list(running) == []
    assert running.wait() == -signal.SIGKILL


def test_close_lets_the_child_abort(running, tmp_path):
    """A child that is closed aborts what it is doing, within the timeout."""
    running.send(Ask(what="work", value=str(tmp_path)))
    waited((tmp_path / "started").exists)
    running.close(20)
    assert (tmp_path / "aborted").exists()
    assert running.wait() == 0


def test_close_kills_what_does_not_end(running, tmp_path):
    """A child that does not end within the timeout is killed."""
    running.send(Ask(what="hang", value=str(tmp_path)))
    waited((tmp_path / "started").exists)
    running.close(0.1)
    assert running.wait() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_the_parents_affair(running, number):
    """A child that is signalled continues: the parent decides when it ends."""
    running.send(Ask(what="echo"))
    answers = iter(running)
    next(answers)
    running._process.send_signal(number)
    running.send(Ask(what="echo", value="still here"))
    assert next(answers).value == "still here"


@pytest.mark.parametrize("what", ["work", "hang"])
def test_no_child_outlives_its_parent(tmp_path, what):
    """When the parent is killed, its child aborts what it is doing; one that cannot be aborted is ended soon after."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, what, str(tmp_path)], cwd=ROOT)
    try:
        waited((tmp_path / "started").exists)
        (process,) = psutil.Process(parent.pid).children()
    finally:
        parent.kill()
        parent.wait()
    waited(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, child.ABORT_SECONDS + 10)
    assert (tmp_path / "aborted").exists() == (what == "work")
