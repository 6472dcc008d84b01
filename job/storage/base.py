"""The interface that everything above storage uses: `Store`, and `Entry` for one stored object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored object, as seen at one moment."""

    key: str
    """Relative to the store's root, parts separated by `/`."""
    size: int
    """Bytes."""
    etag: str | None
    """Changes when the object does; without quotes. Not an MD5: do not compare it with one."""
    version: str | None
    """The version id, where the bucket keeps versions and the store told it (a listing does not)."""


class Store(Protocol):
    """A flat space of objects under one root.

    Every method may raise StorageError (unreachable past the patience, disk full), AccessDeniedError (refused past the
    denied patience) and DataError (no such bucket, or a key that is refused, see `uri.checked_key`).
    """

    uri: str

    def list_objects(self, prefix: str = "") -> list[Entry]:
        """All objects whose key starts with `prefix` (a plain string prefix), sorted by key."""
        ...

    def names(self, prefix: str) -> list[str]:
        """What stands directly under a folder's prefix, at most a thousand, sorted: keys, and folders with a `/` at
        their end."""
        ...

    def head(self, key: str) -> Entry | None:
        """The object as it is now, or None."""
        ...

    def read(self, key: str) -> bytes | None:
        """The content of a small object, or None."""
        ...

    def read_start(self, key: str, size: int) -> bytes | None:
        """The first `size` bytes of an object that has as many, or None."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Create or replace a small object, whole or not at all."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Create a small object; False when one exists already. Of several creators exactly one gets True."""
        ...

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """Create or replace an object from a file, whole or not at all; its size is verified afterwards.

        Args:
            path: the file; it must not change meanwhile.
            key: where to.
            sha256: what the file must hold, in hexadecimal digits; DamagedError when it holds something else.
        """
        ...

    def download(self, entry: Entry, path: Path) -> None:
        """Write exactly the object that `entry` describes to `path`, whole or not at all.

        Raises:
            ChangedError: the object is another one by now.
            DamagedError: its bytes do not match the store's checksum.
            MissingError: it is gone.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""
        ...

    def copy(self, key: str, target: str) -> None:
        """Create or replace the object `target` with the content of `key`, inside the store.

        Raises:
            MissingError: there is no `key`.
        """
        ...

    def sweep(self, prefix: str) -> int:
        """Remove what uploads that were broken off have left under `prefix`, which no listing shows (parts of
        multipart uploads, temporary files). Only for a prefix that nobody is uploading to.

        Returns:
            how many were removed.
        """
        ...


def create(store: Store, key: str, data: bytes, *, conditional: bool) -> bool:
    """Create an object that must not be there; the data must be unlike that of any other writer.

    Args:
        conditional: whether the store is known to refuse a second creation. If not, look first and read back after.
    """
    if conditional:
        return store.create(key, data)
    if store.head(key) is not None:
        return False
    store.write(key, data)
    return store.read(key) == data
