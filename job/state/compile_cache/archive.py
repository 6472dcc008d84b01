"""A tree of small files <-> one compressed file (tar inside Zstandard) whose name is the SHA-256 of its bytes.

Nothing in an archive is trusted when it is read: regular files only, under plain relative names, within limits. Whether
the files themselves are harmful is not checked.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from job.observability.json_text import encoded
from job.runtime.errors import JobError
from job.runtime.hashing import sha256
from job.state.compile_cache.members import LONGEST_NAME, Member, Members
from job.storage.uri import checked_key, parents

SUFFIX = ".tar.zst"
LABEL = "label.json"
BELOW = "files/"
MOST_FILES = 100_000
"""And folders."""
LONGEST_LABEL = 1 << 20
DISK_BLOCK = 4096
"""What a file or a folder takes on the disk at least, also an empty one."""


def name_of(path: Path) -> str:
    """The name that an archive must have: that of its content."""
    return sha256(path) + SUFFIX


def pack(files: Mapping[str, Path], target: Path, *, label: Mapping[str, Any]) -> list[str]:
    """Write files to one archive. The same files give the same bytes.

    Args:
        files: by the name inside the archive.
        label: a JSON object that comes first.

    Returns:
        the names that were packed. Left out are files that were deleted in the meantime, and names that `unpack` would
        not take.
    """
    packed = []
    with pa.output_stream(str(target), compression="zstd") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        _add(tar, LABEL, encoded(label), executable=False)
        for name, path in sorted(files.items()):
            try:
                data, executable = path.read_bytes(), os.access(path, os.X_OK)
                if len(f"{BELOW}{name}".encode()) > LONGEST_NAME:
                    continue
            except (OSError, UnicodeEncodeError):
                continue
            _add(tar, f"{BELOW}{name}", data, executable=executable)
            packed.append(name)
    return packed


def _add(tar: tarfile.TarFile, name: str, data: bytes, *, executable: bool) -> None:
    member = tarfile.TarInfo(name)  # with time 0 and no owner: the bytes depend on the files alone
    member.size = len(data)
    member.mode = 0o700 if executable else 0o600
    tar.addfile(member, io.BytesIO(data))


def unpack(
    source: Path, directory: Path, *, most_bytes: int, cancelled: Callable[[], bool] = lambda: False
) -> tuple[dict[str, Any], list[str]]:
    """Write an archive's files under `directory`.

    Args:
        source: the archive.
        directory: where to.
        most_bytes: the limit for all files and folders together, counted in whole blocks of the disk.
        cancelled: asked before each file; True ends it.

    Returns:
        the label, and the files' names.

    Raises:
        ValueError: it was not written by `pack`, exceeds a limit, or was cancelled.
        OSError: the disk.
    """
    try:
        with pa.input_stream(str(source), compression="zstd") as stream:
            members = iter(Members(stream))
            label = _label(next(members, None))
            return label, list(_files(members, directory, most_bytes, cancelled))
    except (tarfile.TarError, pa.ArrowException, RecursionError) as error:
        raise ValueError(f"it cannot be unpacked: {type(error).__name__}: {error}") from error


def _label(member: Member | None) -> dict[str, Any]:
    named = member is not None and member.name == LABEL and member.regular and member.size <= LONGEST_LABEL
    label = json.loads(b"".join(member.content())) if member is not None and named else None
    if not isinstance(label, dict):
        raise ValueError("it does not begin with a label")  # noqa: TRY004 - the archive's fault
    return label


def _files(members: Iterator[Member], directory: Path, most_bytes: int, cancelled: Callable[[], bool]) -> Iterator[str]:
    folders: set[str] = set()
    blocks = 0
    for count, member in enumerate(members, 1):
        if cancelled():
            raise ValueError("the restore was given up")
        name = _checked_name(member)
        folders.update(itertools.takewhile(lambda folder: folder not in folders, parents(name)))
        blocks += max(1, -(-member.size // DISK_BLOCK))
        if (blocks + len(folders)) * DISK_BLOCK > most_bytes or count + len(folders) > MOST_FILES:
            raise ValueError(f"it holds more than {MOST_FILES:,} files, or more bytes than there is room for")
        _write(member, directory / name)
        yield name


def _checked_name(member: Member) -> str:
    if not member.regular:
        raise ValueError(f"{member.name!r} in it is not a regular file")
    if not member.name.startswith(BELOW):
        raise ValueError(f"{member.name!r} in it is not below {BELOW}")
    name = member.name.removeprefix(BELOW)
    try:
        return checked_key(name)
    except JobError as error:
        raise ValueError(f"{name!r} in it is not a valid file name") from error


def _write(member: Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:  # x: no name twice, and never through an existing link
        for data in member.content():
            file.write(data)
    path.chmod(0o700 if member.executable else 0o600)


def place(names: Iterable[str], source: Path, directory: Path) -> int:
    """Link files of one directory into another on the same disk, each atomically; existing files stay.

    Returns:
        how many did not exist.
    """
    placed = 0
    for name in names:
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source / name)
        except FileExistsError:
            continue
        placed += 1
    return placed
