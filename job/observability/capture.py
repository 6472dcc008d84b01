"""The log pump: a small separate process that turns whatever libraries print into JSON lines.

It owns the real stdout. One pipe carries the job's own finished JSON lines (and control lines, between two record
separators), another carries what was written to file descriptors 1 and 2 by anybody: Python's print, tqdm, C++, child
processes. Being a process, it still delivers the last lines of a parent that aborts. Besides the standard library it
imports `job.runtime.credentials` only, and runs with `python -I -S`, so that it starts in a few milliseconds.

A stdout that is full, closed, not read or read slowly costs lines, which are counted and reported, and never holds the
job for long.
"""

from __future__ import annotations

import collections
import datetime
import json
import os
import re
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from job.runtime import credentials

CONTROL = b"\x1e"
"""First and last byte of a control line; no JSON has it."""
OWN = b'{"timestamp"'
"""How each of the job's own lines begins."""
LONGEST = 32_768
"""Characters of a printed line that are kept, its last ones."""
MOST_WAITING = 1_048_576
"""Bytes that may wait for the reader of the log."""
GRACE_SECONDS = 0.3
STALL_SECONDS = 5.0
"""How long the job waits for a reader that does not keep up. Then lines that find no room are dropped at once, until
the half of what waits is read."""
FINISH_SECONDS = 4.0
"""How long the end waits for such a reader."""
RETRY_SECONDS = 0.05
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class Output:
    """Writes lines to a descriptor in a thread of its own, so that the pump can read on.

    A line that cannot be written is lost. So are lines for which there is no room once it was full for `STALL_SECONDS`.
    The next line that can be written comes after a report of how many were lost.

    Args:
        descriptor: where to.
        report: makes the line that says how many lines were lost, and why.
    """

    def __init__(self, descriptor: int, report: Callable[[int, str], bytes]) -> None:
        self._descriptor = descriptor
        self._report = report
        self._changed = threading.Condition()
        self._waiting: collections.deque[bytes] = collections.deque()
        self._waiting_bytes = 0
        self._done = 0
        """Lines that do not wait any more, written or not."""
        self._patience_ends: float | None = None
        """When lines are dropped; None while there is room."""
        self._lost = 0
        self._reason = ""
        self._torn = False
        """Whether the last line ends in its middle."""
        threading.Thread(target=self._write_all, name="log-output", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Write a line soon; waits for room, for a bounded time."""
        with self._changed:
            if not self._has_room() and self._patience_ends is None:
                self._patience_ends = time.monotonic() + STALL_SECONDS
            left = max(0.0, (self._patience_ends or 0.0) - time.monotonic())
            if self._changed.wait_for(self._has_room, left):
                self._waiting.append(line)
                self._waiting_bytes += len(line)
                self._changed.notify_all()
            else:
                self._lose("stdout is read too slowly, or not at all")

    def finish(self) -> None:
        """Wait until everything is written, while there is progress."""
        self.put(b"")  # writes the report of lost lines, if it can
        with self._changed:
            done = -1
            while self._waiting and done != self._done:
                done = self._done
                self._changed.wait(FINISH_SECONDS)

    def _has_room(self) -> bool:
        return self._waiting_bytes < MOST_WAITING

    def _lose(self, reason: str) -> None:
        with self._changed:
            self._lost += 1
            self._reason = reason

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                line = self._waiting[0]
            self._write(line)
            with self._changed:
                self._waiting.popleft()
                self._waiting_bytes -= len(line)
                self._done += 1
                if self._waiting_bytes <= MOST_WAITING // 2:
                    self._patience_ends = None
                self._changed.notify_all()

    def _write(self, line: bytes) -> None:
        try:
            if lost := self._lost:
                self._write_line(self._report(lost, self._reason))
                with self._changed:
                    self._lost -= lost
            if line:
                self._write_line(line)
        except OSError as error:
            if line:
                self._lose(error.strerror or type(error).__name__)

    def _write_line(self, line: bytes) -> None:
        data = memoryview(b"\n" * self._torn + line + b"\n")
        while data:
            try:
                written = os.write(self._descriptor, data)
            except BlockingIOError:  # somebody made it non-blocking
                time.sleep(RETRY_SECONDS)
                continue
            self._torn = written < len(data)
            data = data[written:]


class Pump:
    """Makes lines for one output of what comes through the two pipes.

    Args:
        out: the descriptor of the output.
        facts: `context` has the fields of every line, `secrets` what must not appear in what was printed; with `plain`
            printed lines stay text. `ended` is the status with which the process before this one ended, `unavailable`
            why there is no process; both are missing otherwise.
    """

    def __init__(self, out: int, facts: Mapping[str, Any]) -> None:
        self.output = Output(out, self._lines_lost)
        self._know(facts)
        if "ended" in facts:
            self.output.put(self.warning("log_process_ended", status=facts["ended"]))
        if "unavailable" in facts:
            self.output.put(self.warning("log_process_not_available", reason=facts["unavailable"]))

    def own(self, line: bytes) -> None:
        """One of the job's own lines: a control line or a finished JSON line. The rest of a line that another pump
        began to read is dropped."""
        if line.startswith(CONTROL) and line.endswith(CONTROL):
            self._know(json.loads(line[1:-1]))
        elif line.startswith(OWN):
            self.output.put(line)

    def foreign(self, line: bytes) -> None:
        """A line of printed output. Text that a carriage return overwrote is dropped, as on a terminal."""
        text = line.rstrip(b"\r\n").rpartition(b"\r")[2].decode(errors="replace")
        text = ANSI.sub("", text).rstrip()
        if not text.strip():
            return
        for secret in self._secrets:
            text = text.replace(secret, credentials.REPLACEMENT)
        text = credentials.shown(text)[-LONGEST:]
        self.output.put(text.encode() if self._plain else self._event("info", "library_output", message=text))

    def _know(self, facts: Mapping[str, Any]) -> None:
        self._context: Mapping[str, Any] = facts.get("context", {})
        self._secrets: list[str] = facts.get("secrets", [])
        self._plain: bool = facts.get("plain", False)

    def _lines_lost(self, lines: int, reason: str) -> bytes:
        return self.warning("log_lines_lost", lines=lines, reason=reason)

    def warning(self, event: str, **fields: Any) -> bytes:
        """A line of the pump's own."""
        return self._event("warning", event, **fields)

    def _event(self, level: str, event: str, **fields: Any) -> bytes:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._plain:
            shown = "  ".join(f"{name}={value}" for name, value in fields.items())
            return f"{now[11:19]} {event.replace('_', ' ')}  {shown}".encode()
        entry = {"timestamp": now, "level": level, "event": event, **self._context, **fields}
        return json.dumps(entry, ensure_ascii=False).encode(errors="replace")


def pump(own: int, foreign: int, out: int, facts: Mapping[str, Any]) -> None:
    """Read both pipes until the job's own ends, then drain what is left of the other.

    Args:
        own: the pipe with the job's own lines.
        foreign: the pipe with what was printed.
        out: where the lines go.
        facts: what `Pump` needs to know.
    """
    sink = Pump(out, facts)
    unfinished = {own: bytearray(), foreign: bytearray()}
    handlers = {own: sink.own, foreign: sink.foreign}
    with selectors.DefaultSelector() as selector:
        for descriptor in unfinished:
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            # When the job has closed its pipe, processes that still hold the other get a moment, no more.
            ready = selector.select(None if own in selector.get_map() else GRACE_SECONDS)
            if not ready:
                break
            for key, _ in ready:
                data = os.read(key.fd, 65_536)
                if not data:
                    selector.unregister(key.fd)
                end, *starts = data.split(b"\n")
                unfinished[key.fd] += end
                for start in starts:
                    handlers[key.fd](bytes(unfinished[key.fd]))
                    unfinished[key.fd] = bytearray(start)
                if key.fd == foreign:
                    unfinished[foreign] = _bounded(unfinished[foreign])
    sink.foreign(bytes(unfinished[foreign]))  # an own line without its end is not JSON
    sink.output.finish()


def _bounded(rest: bytearray) -> bytearray:
    """The unfinished line, without what a carriage return will overwrite. It is cut where no character will be shown:
    a secret that is cut in two would not be found."""
    kept = rest.rpartition(b"\r")[2] if not rest.endswith(b"\r") else rest
    return kept[-8 * LONGEST :]


def main() -> None:
    """The process: `python -c ... <own pipe> <foreign pipe>`, with facts on stdin and the output on stdout."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its parent, after the last line
    pump(int(sys.argv[1]), int(sys.argv[2]), 1, json.loads(sys.stdin.buffer.read() or b"{}"))
    os._exit(0)  # at once: the thread that writes may be waiting for a reader forever
