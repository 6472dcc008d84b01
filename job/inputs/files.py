"""The files that were read, and what identifies their contents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.inputs.data_files import LeftOut
from job.inputs.hub import HubFetched
from job.runtime.hashing import sha256
from job.storage.fetch import Fetched


@dataclass(frozen=True, kw_only=True)
class File:
    """One file that was read."""

    name: str
    """As the user knows it."""
    path: Path
    size: int
    etag: str | None
    version: str | None

    def as_json(self) -> dict[str, Any]:
        """For `inputs.json`: what identifies the content, not the local path."""
        return {"name": self.name, "size": self.size, "etag": self.etag, "version": self.version}


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """The files of one or more places on this disk."""

    files: tuple[File, ...] = ()
    held_out: tuple[File, ...] = ()
    """Files that become the evaluation set."""
    left_out: tuple[LeftOut, ...] = ()
    """By full name."""

    def __add__(self, other: DataFiles) -> DataFiles:
        return DataFiles(
            files=self.files + other.files,
            held_out=self.held_out + other.held_out,
            left_out=self.left_out + other.left_out,
        )


def identity(name: str, etag: str | None, path: Path | None) -> str | None:
    """What distinguishes a file's content: the store's ETag, or the SHA-256 of a data file on this disk. Its time does
    not: a volume that is filled for every pod has other times and the same content."""
    if not name.startswith("/"):
        return etag
    return None if path is None else f"sha256:{sha256(path)}"


def fetched_file(fetched: Fetched) -> File:
    """A file as its store describes it."""
    return File(name=fetched.name, path=fetched.path, size=fetched.size, etag=fetched.etag, version=fetched.version)


def identified(fetched: Fetched) -> File:
    """A file that is read whole."""
    file = fetched_file(fetched)
    return replace(file, etag=identity(file.name, file.etag, file.path))


def repository_files(found: HubFetched) -> tuple[File, ...]:
    """The files of a repository on the hub; its commit identifies their contents."""
    return tuple(
        File(
            name=f"{found.name}/{name}",
            path=found.path / name,
            size=(found.path / name).stat().st_size,
            etag=None,
            version=found.commit,
        )
        for name in found.files
    )
