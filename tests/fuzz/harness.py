"""One input tried against one target: what came of it that should not have."""

import hashlib
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import zstandard
from hypothesis import strategies as st

from job.runtime.errors import JobError
from tests.jobs import ROOT

CPU_SECONDS = 20
"""What one input may take; it takes milliseconds."""
DATA, CONFIG = 65, 78
OPEN = "open"
"""The folder of findings whose fault is known and not mended yet."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that reads what others wrote."""

    name: str
    inputs: st.SearchStrategy[bytes]
    run: Callable[[bytes, Path], None]
    """Reads an input; the directory is its own, empty, and removed afterwards."""
    codes: frozenset[int] = frozenset({DATA, CONFIG})
    """Exit codes of errors that fit."""
    errors: tuple[type[BaseException], ...] = ()
    """Other exceptions that it may raise, as its docstring says."""


class TooSlow(BaseException):
    """An input took longer than `CPU_SECONDS`."""


class UnexpectedError(Exception):
    """What should not have come of an input.

    Args:
        origin: the same for all inputs that show the same fault: the kind of error, and where it was raised.
    """

    def __init__(self, origin: str, detail: str) -> None:
        super().__init__(f"{origin}: {detail}")
        self.origin = origin


def check(target: Target, data: bytes, work: Path) -> None:
    """Run a target on an input.

    Raises:
        UnexpectedError: it did not answer as it should.
    """
    directory = work / "input"
    directory.mkdir()
    try:
        with _bounded():
            target.run(data, directory)
    except UnexpectedError:
        raise
    except JobError as error:
        if error.exit_code not in target.codes:
            raise UnexpectedError(f"exit-{error.exit_code}-{origin_of(error)}", str(error)) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if not isinstance(error, target.errors):
            raise UnexpectedError(origin_of(error), f"{error}"[:500]) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise `TooSlow` once the input has taken too much of a processor, however busy the machine is."""

    def too_slow(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def origin_of(error: BaseException) -> str:
    """The kind of an error, and the last place in this project's code that it came through."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT / "job") and frame.name != "collecting"
    ]
    place = f"{Path(own[-1].filename).relative_to(ROOT / 'job').with_suffix('')}.{own[-1].name}" if own else "elsewhere"
    return f"{type(error).__name__}-{place.replace('/', '.')}"


def quiet() -> None:
    """Drop what is logged, but keep the error of a check that failed (`unexpected_of_a_check`)."""
    structlog.configure(processors=[_keep])


failed: list[BaseException] = []
"""Errors that a check has logged as unexpected."""


def _keep(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if event["event"] == "check_failed" and (error := sys.exc_info()[1]):
        failed.append(error)
    raise structlog.DropEvent


class Input(bytes):
    """An input, which hypothesis does not show whole."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


def keep(directory: Path, target: str, origin: str, data: bytes) -> Path:
    """Write a finding, compressed, to a file whose name says what it shows."""
    path = directory / f"{target}--{origin}--{hashlib.sha256(data).hexdigest()[:8]}.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(data))
    return path


def kept(directory: Path) -> Iterator[tuple[Path, str, str, bytes]]:
    """Each finding's file, target, origin and input."""
    for path in sorted(directory.glob("*--*--*.zst")):
        target, origin, _ = path.name.split("--")
        yield path, target, origin, zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
