"""The directory that one attempt works in, under the scratch directory; what dead attempts left there is removed.

A killed process cannot clean up, and on a volume that outlives it every attempt would leave its data, checkpoints and
merged weights. Each holds a lock on its own directory for as long as it lives, so that one without a lock is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import structlog

log = structlog.get_logger()
LOCK = "lock"


@contextlib.contextmanager
def workspace(scratch: Path, run_id: str) -> Iterator[Path]:
    """An empty directory for this attempt alone; it is gone with the block."""
    place = scratch / "work"
    place.mkdir(exist_ok=True)
    with (place / LOCK).open("wb") as door:
        fcntl.flock(door, fcntl.LOCK_EX)  # nobody sweeps between the making of a directory and its lock
        _sweep(place)
        work = Path(tempfile.mkdtemp(prefix=f"{run_id}-", dir=place))
        lock = (work / LOCK).open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove the directories whose owners are dead."""
    for work in place.iterdir():
        if work.is_dir() and _abandoned(work):
            shutil.rmtree(work, ignore_errors=True)
            log.info("scratch_cleaned", path=str(work))


def _abandoned(work: Path) -> bool:
    try:
        with (work / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
