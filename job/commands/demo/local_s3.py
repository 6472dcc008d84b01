"""A real S3 server on loopback, for the demo and the tests: moto's, in a process of its own.

It knows how to start one and how to end it. It keeps objects in memory, forgets them at the end, checks no
credentials, and is never part of a real run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_STOP_SECONDS = 5.0
CONDITIONS = frozenset(("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"))


@contextlib.contextmanager
def serve(*, log: Path | None = None) -> Iterator[str]:
    """Yield the endpoint URL of a fresh, empty server; end its process afterwards.

    Args:
        log: the file that the server's own output is appended to; dropped when None.

    Raises:
        OSError: the server ended before it could listen.
    """
    from job.runtime import credentials, process  # noqa: PLC0415 - the child runs this file without the package

    with contextlib.ExitStack() as stack:
        output: IO[bytes] | int = stack.enter_context(log.open("ab")) if log else subprocess.DEVNULL
        # -P: this file runs as a script, and its neighbours must not shadow top-level packages.
        child = subprocess.Popen(
            [sys.executable, "-P", __file__],
            env=credentials.without(process.variables()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
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
    argparse.ArgumentParser(
        prog="python -m job.commands.demo.local_s3",
        description="A local S3 server for the demo and the tests: it takes a free port of 127.0.0.1 and prints it, "
        "keeps objects in memory, and ends when its standard input does.",
    ).parse_args()
    # The parent needs none of this.
    from moto.moto_server.werkzeug_app import (  # noqa: PLC0415
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server  # noqa: PLC0415

    application = _one_condition_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    sys.stdin.read()


def _one_condition_at_a_time(application: Callable[..., Any]) -> Callable[..., Any]:
    """Two conditional writers could both win, because moto checks the condition and then writes, in several threads."""
    lock = threading.Lock()

    def locked(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        conditional = environ["REQUEST_METHOD"] in {"PUT", "POST"} and CONDITIONS & environ.keys()
        if not conditional:
            return application(environ, start_response)
        # Read first: a client that stops in the middle of its body must not hold the lock.
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with lock:
            return application({**environ, "wsgi.input": io.BytesIO(body)}, start_response)

    return locked


if __name__ == "__main__":
    _main()
