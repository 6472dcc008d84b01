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
    """The version id, where the bucket keeps versions and the store reported it (a listing does not)."""


class Store(Protocol):
    """A flat space of objects under one root.

    Every method may raise StorageError (unreachable past the patience, disk full), AccessDeniedError (refused past the
    denied patience), ConfigError (a mistake in the settings of the store, or a file system that cannot do this) and
    DataError (no such bucket, an object that cannot be read, or an invalid key, see `uri.checked_key`).
    """

    uri: str

    def list_objects(self, prefix: str = "") -> list[Entry]:
        """All objects whose key starts with `prefix` (a plain string prefix), sorted by key."""
        ...

    def names(self, prefix: str) -> list[str]:
        """The names directly under a folder's prefix, at most a thousand, sorted: keys, and folders with a `/` at the
        end."""
        ...

    def head(self, key: str) -> Entry | None:
        """The object as it is now, or None."""
        ...

    def read(self, key: str) -> bytes | None:
        """The content of a small object, or None."""
        ...

    def read_start(self, key: str, size: int) -> bytes | None:
        """The first `size` bytes of an object, all of a shorter one, or None."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Create or replace a small object atomically."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Create a small object; False when one exists already. Of several creators exactly one gets True."""
        ...

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        """Replace a small object if its content is still `expected`; returns whether it was replaced.

        Atomic where the store honours `If-Match`. Elsewhere, and in a directory, another writer may come between the
        comparison and the write.
        """
        ...

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """Create or replace an object from a file, atomically; its size is verified afterwards.

        Args:
            path: the file; it must not change during the upload.
            key: where to.
            sha256: of the file, in hexadecimal digits; DamagedError when the file has another one.
        """
        ...

    def download(self, entry: Entry, path: Path) -> None:
        """Write exactly the object that `entry` describes to `path`, atomically.

        Raises:
            ChangedError: the object has been replaced.
            DamagedError: its bytes do not match the store's checksum.
            MissingError: it does not exist any more.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""
        ...

    def copy(self, key: str, target: str) -> None:
        """Create or replace the object `target` with the content of `key`, inside the store.

        Raises:
            MissingError: `key` does not exist.
        """
        ...

    def remove_unfinished(self, prefix: str) -> int:
        """Remove what cancelled uploads have left under `prefix`, which no listing shows (parts of multipart uploads,
        temporary files). Only for a prefix that nobody is uploading to.

        Returns:
            how many were removed.
        """
        ...


def create(store: Store, key: str, data: bytes, *, conditional: bool) -> bool:
    """Create an object that must not exist; no other writer may have the same data.

    Args:
        store: where.
        key: of the object.
        data: its content.
        conditional: whether the store honours conditional writes. If not, check before the write and read back after.

    Returns:
        whether this call created it.
    """
    if conditional:
        return store.create(key, data)
    if store.head(key) is not None:
        return False
    store.write(key, data)
    return store.read(key) == data
