"""A tree of small files <-> one compressed file (tar inside Zstandard) whose name is the SHA-256 of its bytes.

Nothing in an archive is trusted when it is read: regular files only, under plain relative names, within limits. Whether
the files themselves are harmful is not checked.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from job.runtime.errors import JobError
from job.runtime.hashing import sha256
from job.storage.uri import checked_key

SUFFIX = ".tar.zst"
LABEL = "label.json"
MOST_FILES = 200_000
LONGEST_LABEL = 1 << 20
CHUNK = 1 << 20


def name_of(path: Path) -> str:
    """The name that an archive must have: that of its content."""
    return sha256(path) + SUFFIX


def pack(files: Mapping[str, Path], target: Path, *, label: Mapping[str, Any]) -> list[str]:
    """Write files to one archive. The same files give the same bytes.

    Args:
        files: by the name inside the archive.
        label: a JSON object that comes first.

    Returns:
        the names that were packed: files that were deleted in the meantime are left out.
    """
    packed = []
    with pa.output_stream(str(target), compression="zstd") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        _add(tar, LABEL, json.dumps(label, sort_keys=True).encode(), executable=False)
        for name, path in sorted(files.items()):
            try:
                data, executable = path.read_bytes(), os.access(path, os.X_OK)
            except OSError:
                continue
            _add(tar, f"files/{name}", data, executable=executable)
            packed.append(name)
    return packed


def _add(tar: tarfile.TarFile, name: str, data: bytes, *, executable: bool) -> None:
    member = tarfile.TarInfo(name)  # with time 0 and no owner: the bytes depend on the files alone
    member.size = len(data)
    member.mode = 0o700 if executable else 0o600
    tar.addfile(member, io.BytesIO(data))


def unpack(source: Path, directory: Path, *, most_bytes: int) -> tuple[dict[str, Any], list[str]]:
    """Write an archive's files under `directory`.

    Args:
        source: the archive.
        directory: where to.
        most_bytes: the limit for all files together.

    Returns:
        the label, and the files' names.

    Raises:
        ValueError: it was not written by `pack`, or exceeds a limit.
        OSError: the disk.
    """
    try:
        with (
            pa.input_stream(str(source), compression="zstd") as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            return _label(tar), _files(tar, directory, most_bytes)
    except (tarfile.TarError, pa.ArrowException, EOFError) as error:
        raise ValueError(f"it cannot be unpacked: {type(error).__name__}: {error}") from error


def _label(tar: tarfile.TarFile) -> dict[str, Any]:
    member = tar.next()
    content = tar.extractfile(member) if member and member.name == LABEL and member.size <= LONGEST_LABEL else None
    label = json.load(content) if content else None
    if not isinstance(label, dict):
        raise ValueError("it does not begin with a label")  # noqa: TRY004 - the archive's fault
    return label


def _files(tar: tarfile.TarFile, directory: Path, most_bytes: int) -> list[str]:
    names: list[str] = []
    total = 0
    while (member := tar.next()) is not None:
        name = _checked_name(member)
        names.append(name)
        total += member.size
        if total > most_bytes or len(names) > MOST_FILES:
            raise ValueError(f"it holds more than {MOST_FILES:,} files, or more bytes than there is room for")
        _write(tar, member, directory / name)
    return names


def _checked_name(member: tarfile.TarInfo) -> str:
    if not member.isreg():
        raise ValueError(f"{member.name!r} in it is not a regular file")
    if not member.name.startswith("files/"):
        raise ValueError(f"{member.name!r} in it is not below files/")
    name = member.name.removeprefix("files/")
    try:
        return checked_key(name)
    except JobError as error:
        raise ValueError(f"{name!r} in it is not a valid file name") from error


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = tar.extractfile(member)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:  # x: no name twice, and never through an existing link
        while content is not None and (data := content.read(CHUNK)):
            file.write(data)
    path.chmod(0o700 if member.mode & 0o100 else 0o600)


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
