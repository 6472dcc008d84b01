"""The directory that one attempt works in, under the scratch directory; those of dead attempts are removed.

A killed process cannot clean up, and on a volume that outlives it every attempt would leave its data, checkpoints and
merged weights. Each attempt holds a lock on its own directory for as long as it lives; the kernel releases it with the
process, so that a directory without a held lock belongs to nobody.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import structlog
from filelock import AcquireReturnProxy, FileLock, Timeout

from job.runtime.errors import AccessDeniedError, ConfigError, StorageError, known

log = structlog.get_logger()
LOCK = "lock"


@contextlib.contextmanager
def workspace(scratch: Path, run_id: str) -> Iterator[Path]:
    """An empty directory for this attempt alone; it is removed at the end of the block.

    Raises:
        ConfigError: the file system of `scratch` has no locks.
    """
    place = scratch / "work"
    place.mkdir(exist_ok=True)
    with _lock(place):  # nobody sweeps between the making of a directory and its lock
        _sweep(place)
        work = Path(tempfile.mkdtemp(prefix=f"{run_id}-", dir=place))
        held = _lock(work)
    with held:
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _lock(directory: Path) -> AcquireReturnProxy[FileLock]:
    """Wait for the lock on a directory; it is released at the end of a `with` block, or with the process."""
    try:
        return FileLock(directory / LOCK, fallback_to_soft=False).acquire()
    except OSError as error:
        if isinstance(known(error), AccessDeniedError | StorageError):
            raise
        raise ConfigError(
            f"Files in the scratch directory {directory} cannot be locked: {error.strerror}.",
            remedy="Point TMPDIR to a local disk, such as an emptyDir or a Docker volume: a lock shows which of the "
            "directories there belong to running attempts.",
        ) from error


def _sweep(place: Path) -> None:
    """Remove the directories whose owners are dead."""
    for work in place.iterdir():
        if work.is_dir() and _abandoned(work):
            shutil.rmtree(work, ignore_errors=True)
            log.info("scratch_cleaned", path=str(work))


def _abandoned(work: Path) -> bool:
    try:
        FileLock(work / LOCK, fallback_to_soft=False).acquire(blocking=False).lock.release()
    except FileNotFoundError:
        return True  # its owner is just removing it
    except (Timeout, OSError):
        return False
    return True
