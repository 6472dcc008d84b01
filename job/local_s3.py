"""A real S3 server on loopback, for the demo and the tests: moto's, in a process of its own.

It knows how to start one and how to end it. It keeps objects in memory, forgets them at the end, checks no
credentials, and is never part of a real run.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_STOP_SECONDS = 5.0


@contextlib.contextmanager
def serve(*, log: Path | None = None) -> Iterator[str]:
    """Yield the endpoint URL of a fresh, empty server; end its process afterwards.

    Args:
        log: the file that the server's own output is appended to; dropped when None.

    Raises:
        OSError: the server ended before it could listen.
    """
    with contextlib.ExitStack() as stack:
        output: IO[bytes] | int = stack.enter_context(log.open("ab")) if log else subprocess.DEVNULL
        # -P: this file runs as a script, and its neighbours must not shadow top-level packages.
        child = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True
        )
        stack.callback(_stop, child)
        yield f"http://127.0.0.1:{_port(child, log)}"


def _port(child: subprocess.Popen[str], log: Path | None) -> int:
    """The port that the kernel gave the child, which says so only once it listens: no race for a free port."""
    line = child.stdout.readline() if child.stdout else ""
    if not line:
        where = f"its output is in {log}" if log else "pass log= to keep its output"
        raise OSError(f"the local S3 server ended with status {child.wait()} before it listened; {where}")
    return int(line)


def _stop(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.communicate(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def _main() -> None:
    """The child: listen, say where, and end when the parent's end of the pipe closes, however the parent dies."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer  # noqa: PLC0415 - the parent needs no moto

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _main()
