"""A checkpoint for which there is no room on the disk: how it is recognised, and what is done then."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import structlog

from job.runtime.errors import NO_SPACE

log = structlog.get_logger()
NO_ROOM = {*NO_SPACE, errno.EFBIG}
"""The disk is full, the user's quota is used up, or the file may not grow (`ulimit -f`, or a limit of the file
system)."""
LEAST_FREE_BYTES = 1 << 20
_RUST = re.compile(r"\bos error (\d+)")
"""How safetensors passes the system's error on: as the standard library of Rust prints it."""
_TORCH = ("PytorchStreamWriter failed", "unexpected pos ")
"""How torch says that a file was not written; it has lost the system's error by then
(caffe2/serialize/inline_container.cc)."""


def skip_if_full(error: Exception, directory: Path, step: int) -> None:
    """Skip a checkpoint for which there is no room, with a warning; any other error is raised.

    Args:
        error: what ended the writing.
        directory: of the checkpoint; its files are deleted in any case.
        step: of the checkpoint.
    """
    full = _no_room(error, directory.parent)  # before files are deleted, which makes room
    shutil.rmtree(directory, ignore_errors=True)
    if not full:
        raise error
    log.warning("checkpoint_skipped", step=step, reason=f"the disk is full: {str(error).partition(chr(10))[0]}")


def _no_room(error: Exception, directory: Path) -> bool:
    return any(map(_says_no_room, _causes(error))) or shutil.disk_usage(directory).free < LEAST_FREE_BYTES


def _says_no_room(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return True
    text = str(error)
    return any(int(number) in NO_ROOM for number in _RUST.findall(text)) or any(words in text for words in _TORCH)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it: libraries wrap them, or fail once more while they clean up."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
