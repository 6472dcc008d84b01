"""Standard input, output and error: open from the start, and harmless for whoever prints.

A full disk, a closed terminal or a missing descriptor must not raise inside a library that prints. The result of a
command is different: it either arrives whole, or the command fails.

Imported before everything else: the standard library only, and little of it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from job.runtime.errors import StorageError

STDIN, STDOUT, STDERR = 0, 1, 2
RETRY_SECONDS = 0.05
_missing: set[int] = set()
"""Descriptors that this process was started without."""


def open_missing() -> None:
    """Open `/dev/null` as each of the descriptors 0, 1 and 2 that this process was started without.

    The next file or pipe that is opened would get the number, and whatever libraries print would be written to it.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
            os.set_inheritable(descriptor, True)
            _missing.add(descriptor)
        os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = os.fdopen(STDIN, closefd=False)


def tolerate() -> None:
    """From here on printing never raises: what cannot be written or encoded is dropped or escaped."""
    for name, descriptor in (("stdout", STDOUT), ("stderr", STDERR)):
        old = getattr(sys, name)
        with contextlib.suppress(Exception):
            old.flush()
        with contextlib.suppress(OSError):
            raw = io.BufferedWriter(_Tolerant(descriptor, "w", closefd=False))
            encoding = getattr(old, "encoding", None) or "utf-8"
            new = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, new)


def to_stderr() -> int:
    """Send stdout to stderr from here on, so that the real stdout carries a command's result alone.

    Returns:
        a file descriptor of the real stdout, for `result`.
    """
    real = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    return real


@contextlib.contextmanager
def result(descriptor: int) -> Iterator[TextIO]:
    """The stream for the result of a command; closes the descriptor.

    A reader that leaves early, such as `head`, has read what it wanted: that is no error.

    Raises:
        StorageError: the result cannot be written.
    """
    try:
        if STDOUT in _missing:
            raise StorageError(
                "The result cannot be written: stdout is closed.", remedy="Start the command with an open stdout."
            )
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as stdout:
            yield stdout
    except BrokenPipeError:
        pass
    except OSError as error:
        raise StorageError(
            f"The result cannot be written to stdout: {error.strerror}.",
            remedy="Redirect stdout to a place that can be written and has room.",
        ) from None


class _Tolerant(io.FileIO):
    """A file whose writes never fail."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # the descriptor does not block, and is full
                time.sleep(RETRY_SECONDS)
            return written
        except OSError:
            return memoryview(data).nbytes
