"""The log pump: a small separate process that turns whatever libraries print into JSON lines.

It owns the real stdout. One pipe carries the job's own finished JSON lines (and control lines, marked by a record
separator), another carries what was written to file descriptors 1 and 2 by anybody: Python's print, tqdm, C++, child
processes. Being a process, it still delivers the last lines of a parent that aborts. It uses the standard library
only and runs with `python -I -S`, so that it starts in a few milliseconds.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import selectors
import signal
import sys

CONTROL = b"\x1e"
LONGEST = 32_768
GRACE_SECONDS = 0.3
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class Pump:
    """Merges the two pipes into whole lines on one descriptor."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._context: dict[str, object] = {}
        self._secrets: list[str] = []

    def own(self, line: bytes) -> None:
        """One of the job's own lines: a control line or a finished JSON line."""
        if line.startswith(CONTROL):
            message = json.loads(line[1:])
            self._context = message["context"]
            self._secrets = message["secrets"]
        else:
            self._write(line)

    def foreign(self, line: bytes) -> None:
        """A line of printed output. Text that a carriage return overwrote is dropped, as on a terminal."""
        text = line.rstrip(b"\r\n").rpartition(b"\r")[2].decode(errors="replace")
        text = ANSI.sub("", text).rstrip()
        if not text.strip():
            return
        for secret in self._secrets:
            text = text.replace(secret, "***")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"timestamp": now, "level": "info", "event": "library_output", **self._context, "message": text}
        self._write(json.dumps(entry, ensure_ascii=False).encode())

    def _write(self, line: bytes) -> None:
        data = line + b"\n"
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except BrokenPipeError:
            self._out = os.open(os.devnull, os.O_WRONLY)  # the reader of the log is gone; the run continues


def pump(own: int, foreign: int, out: int) -> None:
    """Read both pipes until the job's own ends, then drain what is left of the other."""
    sink = Pump(out)
    buffers = {own: b"", foreign: b""}
    handlers = {own: sink.own, foreign: sink.foreign}
    with selectors.DefaultSelector() as selector:
        for descriptor in buffers:
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
                *lines, rest = (buffers[key.fd] + data).split(b"\n")
                for line in lines:
                    handlers[key.fd](line)
                buffers[key.fd] = _bounded(rest) if key.fd == foreign else rest
    for descriptor, rest in buffers.items():
        if rest:
            handlers[descriptor](rest)


def _bounded(rest: bytes) -> bytes:
    """The unfinished line, without what a carriage return will overwrite, and never longer than a line may be."""
    kept = rest.rpartition(b"\r")[2] if not rest.endswith(b"\r") else rest
    return kept[-LONGEST:]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its parent, after the last line
    pump(int(sys.argv[1]), int(sys.argv[2]), 1)
