"""The job's side of the log pump (`job.observability.capture`): starts it, replaces it when it ends, and ends it.

The ends of both pipes from which the pump reads stay open here. So what is written while no pump runs waits for the
next one, and no library that prints meets a broken pipe. Where no process can be started, or too many have ended, a
thread of this process does the pump's work.
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

import structlog

from job.observability import capture
from job.runtime import process, streams

CHECK_SECONDS = 0.5
DRAIN_SECONDS = 5.0
MOST_STARTS = 10
KEPT_VARIABLES = ("LD_LIBRARY_PATH",)
"""All of the environment that the process gets: it needs no credentials."""


class LogPump:
    """Puts the pump between file descriptors 1 and 2 and the real stdout.

    Args:
        facts: what the pump needs to know, as JSON (`capture.Pump`).

    Raises:
        OSError: no pipe can be opened.
    """

    def __init__(self, facts: Callable[[], str]) -> None:
        self._facts = facts
        self._own_read, own_write = os.pipe()
        self._foreign_read, foreign_write = os.pipe()
        self._own_write: int | None = own_write
        self._unsent = b""
        self._writing = threading.RLock()  # a finaliser may log while its thread is logging
        self._stdout = os.dup(streams.STDOUT)
        self.stderr = os.dup(streams.STDERR)
        """The real stderr."""
        self._starts = 0
        self._reason = ""
        self._thread: threading.Thread | None = None
        self._process = self._start()
        os.dup2(foreign_write, streams.STDOUT)
        os.dup2(foreign_write, streams.STDERR)
        os.close(foreign_write)
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="log-pump-watch", daemon=True)
        self._watcher.start()

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
            self._unsent += line.encode(errors="replace") + b"\n"
            try:
                while self._unsent:
                    self._unsent = self._unsent[os.write(self._own_write, self._unsent) :]
            except OSError:  # a library closed descriptors that are not its own
                self._unsent = b""

    def control(self) -> None:
        """Send the pump what it needs to know now."""
        mark = capture.CONTROL.decode()
        self.write(f"{mark}{self._facts()}{mark}")

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
        if not self._ended_well(end):  # killed with lines in the pipes
            self._process = self._start()
            self._ended_well(end)

    def _start(self) -> subprocess.Popen[bytes] | None:
        """A new process; or a thread, and None."""
        self._starts += 1
        try:
            started = self._new_process()
        except Exception as error:  # noqa: BLE001 - whatever it is, the run continues
            self._reason = str(error)
            pipes = (self._own_read, self._foreign_read, self._stdout)
            facts = json.loads(self._facts())
            self._thread = threading.Thread(target=capture.pump, args=(*pipes, facts), name="log-pump", daemon=True)
            self._thread.start()
            return None
        with contextlib.suppress(OSError), started.stdin:  # type: ignore[union-attr]
            started.stdin.write(self._facts().encode())  # type: ignore[union-attr]
        return started

    def _new_process(self) -> subprocess.Popen[bytes]:
        if self._starts > MOST_STARTS:
            raise ChildProcessError(f"{MOST_STARTS} of them ended")
        return subprocess.Popen(
            [sys.executable, "-I", "-S", capture.__file__, str(self._own_read), str(self._foreign_read)],
            pass_fds=(self._own_read, self._foreign_read),
            env={name: value for name, value in process.variables().items() if name in KEPT_VARIABLES},
            stdin=subprocess.PIPE,
            stdout=self._stdout,
            stderr=self.stderr,
            start_new_session=True,  # Ctrl-C at a terminal reaches the job, not the process that writes its log
        )

    def _watch(self) -> None:
        """The thread: replaces a pump that ended, and wakes one that was stopped."""
        log = structlog.get_logger()
        while not self._closing.wait(CHECK_SECONDS) and self._process:
            if (status := self._process.poll()) is None:
                self._process.send_signal(signal.SIGCONT)
                continue
            self._process = self._start()
            log.warning("log_process_ended", status=status)
        if self._process is None:
            log.warning("log_process_not_available", reason=self._reason)

    def _ended_well(self, end: float) -> bool:
        """Wait for the pump; False if something else ended it. It is killed when the time is up."""
        left = max(0.0, end - time.monotonic())
        if self._process is None:
            if self._thread:
                self._thread.join(left)
            return True
        try:
            return self._process.wait(left) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            return True
