"""A child's program for the tests of `job.runtime.child`: it does what it is asked, and leaves traces."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from job.runtime.child import Failed, Message, Parent, serve
from job.runtime.errors import StorageError


@dataclass(frozen=True, kw_only=True)
class Ask(Message):
    """What to do, and with what."""

    what: str
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer(Message):
    """What came of it."""

    value: str
    session: int


def program(parent: Parent) -> None:
    """Serve until the parent is gone."""
    while True:
        ask = parent.receive(Ask)
        ACTS[ask.what](parent, ask.value)
        parent.send(Answer(value=ask.value, session=os.getsid(0)))


def _print(_: Parent, value: str) -> None:
    print(value, flush=True)  # noqa: T201 - what libraries do
    os.write(1, f"{value}\n".encode())


def _log(_: Parent, value: str) -> None:
    structlog.get_logger().warning("child_said", value=value)


def _refuse(parent: Parent, value: str) -> None:
    parent.send(Failed.of(StorageError(value, remedy="Do something.")))


def _fail(_: Parent, value: str) -> None:
    raise ValueError(value)


def _work(_: Parent, value: str) -> None:
    """Work that takes long and cleans up when it is aborted."""
    try:
        Path(value, "started").touch()
        time.sleep(60)
    finally:
        Path(value, "aborted").touch()


def _hang(_: Parent, value: str) -> None:
    """Work that cannot be aborted."""
    while True:
        try:
            Path(value, "started").touch()
            time.sleep(60)
        except BaseException:  # noqa: BLE001 - what libraries do
            pass


ACTS = {
    "echo": lambda *_: None,
    "print": _print,
    "log": _log,
    "refuse": _refuse,
    "fail": _fail,
    "work": _work,
    "hang": _hang,
}


if __name__ == "__main__":
    os.write(1, b"a library's greeting\n{}\n[1]\n3\n")
    serve(program)
