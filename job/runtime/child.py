"""A child process that exchanges messages with its parent over pipes: both sides of the connection.

`Child` is what the parent holds, `Parent` what the child's program gets from `serve`. Messages are frozen dataclasses;
each is one line of JSON, `{"<class>": {<fields>}}`. A child outlives its parent only for as long as it takes to abort
what it was doing, however the parent ended. What the messages mean, and which program runs, is decided by the callers.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import IO, Any, NoReturn, Self, TypeVar, cast

import structlog

from job.runtime import credentials, streams
from job.runtime.errors import KINDS, JobError, words
from job.runtime.hardening import HOME

ABORT_SECONDS = 3.0
"""How long a child may take to abort what it is doing once its parent is gone."""
CREDENTIALS = {"job.state.upload_worker": credentials.STORE, "job.inputs.hub_worker": credentials.HUB}
"""The credentials that a child is given, by its module; any other child gets none."""
_KINDS = {kind.kind: kind for kind in KINDS}
# As -m, but the directory of this package is searched last, and the working directory not at all (`hardening`).
_RUN = """
import runpy, sys
home, module = sys.argv[1:]
sys.path[:] = [*(place for place in sys.path if place != home), home]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one process sends to the other; the fields of a subclass are values that JSON has."""


M = TypeVar("M", bound=Message)


@dataclass(frozen=True, kw_only=True)
class Failed(Message):
    """An error of the child's that the parent has to deal with."""

    kind: str
    message: str
    remedy: str

    @classmethod
    def of(cls, error: JobError) -> Failed:
        """The error, to be sent."""
        return cls(kind=error.kind, message=error.message, remedy=error.remedy)

    def error(self) -> JobError:
        """The same error in the parent, where it can be raised."""
        return _KINDS.get(self.kind, JobError)(self.message, remedy=self.remedy)


@dataclass(frozen=True, kw_only=True)
class LogLine(Message):
    """A log line of the child's. The parent writes it, since it knows the run and the secrets to redact."""

    level: str
    event: str
    fields: dict[str, Any]

    def write(self) -> None:
        """Log it."""
        getattr(structlog.get_logger(), self.level)(self.event, **self.fields)


def _encode(message: Message) -> str:
    return json.dumps({type(message).__name__: vars(message)}, default=words) + "\n"


def _decode(line: str, kinds: Mapping[str, type[M]]) -> M | None:
    """The message in a line, or None if the line is not one of these kinds: something else printed it."""
    try:
        ((name, fields),) = json.loads(line).items()
    except (ValueError, AttributeError):
        return None
    return kinds[name](**fields) if name in kinds else None


class Child:
    """A child process, as its parent sees it: send it messages, iterate over those that it sends, close it.

    It has a session of its own, so that Ctrl-C at a terminal reaches only the parent, which decides what ends when.
    Iteration ends with the process; what libraries print in between is left out, and its log lines are logged here.
    As a context manager it is killed at the end of the block.
    """

    def __init__(self, module: str, *, environment: Mapping[str, str], receives: tuple[type[Message], ...]) -> None:
        """Start a module as `python -m` does, with no credentials but those of `CREDENTIALS`.

        Args:
            module: calls `serve` when it is run.
            environment: the environment variables that it may have.
            receives: the kinds of messages that it may send.
        """
        self._kinds: dict[str, type[Message]] = {kind.__name__: kind for kind in (*receives, LogLine)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN, HOME, module],
            cwd=HOME,
            env=credentials.without(environment, but=CREDENTIALS.get(module, ())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._input, self._output = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)

    def send(self, message: Message) -> None:
        """Send a message. It is lost if the process has ended, as the end of the iteration will show."""
        with contextlib.suppress(OSError):
            self._input.write(_encode(message))
            self._input.flush()

    def __iter__(self) -> Iterator[Message]:
        with self._output as lines:
            for line in lines:
                message = _decode(line, self._kinds)
                if isinstance(message, LogLine):
                    message.write()
                elif message is not None:
                    yield message

    def wait(self) -> int:
        """Wait for the process to end; its exit status, negative for a signal."""
        return self._process.wait()

    def close(self, timeout_seconds: float = 0.0) -> None:
        """Let the process abort what it is doing and end; kill it when the timeout is over."""
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._output.close()


class ParentGone(BaseException):
    """The parent has ended, or closed the connection. Not an Exception, so that few libraries swallow it."""


class Parent:
    """The parent process, as its child sees it. Made by `serve`.

    When the parent is gone, `ParentGone` is raised in the main thread, wherever that is; what does not end by it within
    `ABORT_SECONDS` is ended.
    """

    def __init__(self) -> None:
        # Only messages go to the pipe: what libraries print from here on goes to stderr.
        self._output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._sending = threading.Lock()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def receive(self, kind: type[M]) -> M:
        """Wait for the next message of a kind."""
        while True:
            message = _decode(self._lines.get(), {kind.__name__: kind})
            if message is not None:
                return message

    def send(self, message: Message) -> None:
        """Send a message; any thread may."""
        try:
            with self._sending:
                self._output.write(_encode(message))
                self._output.flush()
        except OSError:
            raise ParentGone from None

    def log(self, _: Any, level: str, event: MutableMapping[str, Any]) -> NoReturn:
        """A processor for structlog that ends its chain: the parent logs the line."""
        name = event.pop("event")
        try:
            self.send(LogLine(level=level, event=name, fields=dict(event)))
        except (TypeError, ValueError, RecursionError) as error:  # a value that JSON does not have
            self.send(LogLine(level=level, event=name, fields={"not_logged": type(error).__name__}))
        raise structlog.DropEvent

    def _listen(self) -> None:
        try:
            for line in sys.stdin:
                self._lines.put(line)
        finally:
            threading.Timer(ABORT_SECONDS, os._exit, (1,)).start()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


def serve(program: Callable[[Parent], None]) -> NoReturn:
    """The main function of a child's module: run a program that talks to the parent, then end the process at once.

    SIGTERM, SIGINT and SIGHUP are ignored, since the parent decides when this process ends. An unexpected error is
    printed to stderr, and the exit status is 1.
    """

    def parent_gone(*_: object) -> None:
        raise ParentGone

    signal.signal(signal.SIGUSR1, parent_gone)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    status = 0
    try:
        parent = Parent()
        streams.tolerate()
        structlog.configure(processors=[structlog.processors.format_exc_info, parent.log])
        program(parent)
    except ParentGone:
        pass
    except BaseException:  # noqa: BLE001 - this is the end of the process
        sys.stderr.write(credentials.shown(traceback.format_exc()))
        sys.stderr.flush()
        status = 1
    os._exit(status)  # at once: threads of libraries may still be running
