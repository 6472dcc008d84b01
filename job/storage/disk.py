"""The local disk: atomic writes, and disk errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from job.runtime.errors import JobError, StorageError, system_error

_TEMPORARY_PREFIX = ".finetune-job-"


def is_temporary(name: str) -> bool:
    """Whether a file name is one of `temporary`'s: an unfinished write left the file."""
    return name.startswith(_TEMPORARY_PREFIX)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a JobError that says what to do about it."""
    try:
        yield
    except OSError as error:
        raise _explained(error, path) from error


def _explained(error: OSError, path: Path) -> JobError:
    # A folder that cannot be made since a file has its name; who creates files handles that by itself.
    number = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno
    return system_error(error, path, number=number) or StorageError(
        f"{path} could not be read or written: {error.strerror or error}.", remedy="Check the volume that holds it."
    )


def require_free(directory: Path, size: int) -> None:
    """Fail before a transfer, not in the middle of it, when `size` bytes do not fit."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise StorageError(
            f"{size} bytes do not fit into {directory}, which has {free} bytes free.",
            remedy="Give the volume that holds it more space.",
        )


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yield the name of a new empty file next to `path`, with the mode that the umask gives; removed afterwards."""
    part = path.with_name(f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}.part")
    _create(part)
    try:
        yield part
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _create(part: Path) -> None:
    for attempt in range(5):
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileNotFoundError:  # a concurrent delete took the directory, which was empty
            if attempt == 4:  # noqa: PLR2004 - the last of five
                raise
        else:
            return


def write_synced(path: Path, data: bytes) -> None:
    """Write the file and wait until the disk has it."""
    with path.open("r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file; a reader sees the old content or the new one."""
    with temporary(path) as part:
        part.write_bytes(data)
        part.replace(path)
