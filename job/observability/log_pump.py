"""The job's side of the log pump (`job.observability.capture`): starts it, replaces it when it ends, and ends it.

The ends of both pipes from which the pump reads stay open here. So what is written while no pump runs waits for the
next one, and no library that prints meets a broken pipe. Where no process can be started, or too many have ended, the
thread that watches it does the pump's work. That thread never logs: it would wait for a line that waits for the pump.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from job.observability import capture
from job.runtime import process, streams
from job.runtime.hardening import HOME

CHECK_SECONDS = 0.5
DRAIN_SECONDS = 5.0
MOST_STARTS = 10
KEPT_VARIABLES = ("LD_LIBRARY_PATH",)
"""All of the environment that the process gets: it needs no credentials."""
# The directory of this package comes last (`job.runtime.hardening`).
_RUN = "import sys; sys.path.append(sys.argv.pop(1)); from job.observability import capture; capture.main()"


class LogPump:
    """Puts the pump between file descriptors 1 and 2 and the real stdout.

    Args:
        facts: what the pump needs to know, values that JSON has (`capture.Pump`).

    Raises:
        OSError, RuntimeError: no pipe can be opened, no thread started.
    """

    def __init__(self, facts: Callable[[], dict[str, Any]]) -> None:
        self._facts = facts
        self._own_read, own_write = os.pipe()
        self._foreign_read, foreign_write = os.pipe()
        self._own_write: int | None = own_write
        self._unsent = memoryview(b"")
        self._writing = threading.RLock()  # a finaliser may log while its thread is logging
        self._stdout = os.dup(streams.STDOUT)
        self.stderr = os.dup(streams.STDERR)
        """The real stderr."""
        self._starts = 0
        self._closing = threading.Event()
        self._process = self._start()
        self._watcher = threading.Thread(target=self._watch, name="log-pump-watch", daemon=True)
        self._watcher.start()
        os.dup2(foreign_write, streams.STDOUT)
        os.dup2(foreign_write, streams.STDERR)
        os.close(foreign_write)
        os.register_at_fork(after_in_child=self._in_fork)

    @property
    def pid(self) -> int | None:
        """The process's id; None where a thread does its work."""
        return self._process.pid if self._process else None

    def write(self, line: str) -> None:
        """Write one of the job's own lines; dropped once the pump is closed."""
        with self._writing:
            if self._own_write is None:
                return
            # A signal may raise between two writes: the next call sends the rest of the line first.
            self._unsent = memoryview(bytes(self._unsent) + line.encode(errors="replace") + b"\n")
            try:
                while self._unsent:
                    self._unsent = self._unsent[os.write(self._own_write, self._unsent) :]
            except OSError:  # a library closed descriptors that are not its own
                self._unsent = memoryview(b"")

    def control(self) -> None:
        """Send the pump what it needs to know now."""
        mark = capture.CONTROL.decode()
        self.write(f"{mark}{json.dumps(self._facts())}{mark}")

    def close(self) -> None:
        """Deliver everything, for at most `DRAIN_SECONDS`."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with self._writing:
            if self._own_write is None:
                return
            os.close(self._own_write)
            self._own_write = None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, streams.STDOUT)
        os.dup2(nowhere, streams.STDERR)
        self._closing.set()
        self._watcher.join(DRAIN_SECONDS)
        end = time.monotonic() + DRAIN_SECONDS
        if self._process and (status := self._ended(self._process, end)):  # killed with lines in the pipes
            self._process = self._start(ended=status)
            if self._process:
                self._ended(self._process, end)
            else:
                self._pump()

    def _start(self, **news: Any) -> subprocess.Popen[bytes] | None:
        """A new process; None where there can be none, and the pump's work is left to this process."""
        self._starts += 1
        self._news = news
        try:
            started = self._new_process()
        except Exception as error:  # noqa: BLE001 - whatever it is, the run continues
            self._news = {**news, "unavailable": str(error)}
            return None
        with contextlib.suppress(OSError), started.stdin:  # type: ignore[union-attr]
            started.stdin.write(json.dumps({**self._facts(), **news}).encode())  # type: ignore[union-attr]
        return started

    def _new_process(self) -> subprocess.Popen[bytes]:
        if self._starts > MOST_STARTS:
            raise ChildProcessError(f"{MOST_STARTS} of them ended")
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _RUN, HOME, str(self._own_read), str(self._foreign_read)],
            pass_fds=(self._own_read, self._foreign_read),
            env={name: value for name, value in process.variables().items() if name in KEPT_VARIABLES},
            stdin=subprocess.PIPE,
            stdout=self._stdout,
            stderr=self.stderr,
            start_new_session=True,  # Ctrl-C at a terminal reaches the job, not the process that writes its log
        )

    def _watch(self) -> None:
        """The thread: replaces a pump that ended, and wakes one that was stopped."""
        while self._process and not self._closing.wait(CHECK_SECONDS):
            if (status := self._process.poll()) is None:
                self._process.send_signal(signal.SIGCONT)
            else:
                self._process = self._start(ended=status)
        if self._process is None:
            self._pump()

    def _pump(self) -> None:
        """Do the pump's work in this thread, until the job's own pipe is closed."""
        capture.pump(self._own_read, self._foreign_read, self._stdout, {**self._facts(), **self._news})

    def _ended(self, pump: subprocess.Popen[bytes], end: float) -> int:
        """Wait for the pump; its status, 0 where the time was up and it had to be killed."""
        pump.send_signal(signal.SIGCONT)
        try:
            return pump.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pump.kill()
            return 0

    def _in_fork(self) -> None:
        """In a process that was forked from this one: another thread may have been writing, and is not here."""
        self._writing = threading.RLock()
        self._unsent = memoryview(b"")
