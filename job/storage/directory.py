"""A directory used like a bucket, with its guarantees: atomic writes, one winner per create, idempotent deletes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from job.runtime.hashing import sha256 as sha256_of
from job.storage.base import Entry
from job.storage.disk import disk_errors, is_temporary, require_free, sync, temporary, write_synced
from job.storage.faults import ChangedError, DamagedError, MissingError
from job.storage.uri import checked_key

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}
MOST_NAMES = 1000
_ABSENT = (FileNotFoundError, NotADirectoryError)


class DirectoryStore:
    """Objects are files under `root`; the temporary files of unfinished writes are never listed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def list_objects(self, prefix: str = "") -> list[Entry]:
        """See `Store.list_objects`. Links to files are followed, links to directories are not: the job makes none."""
        top = self.root / prefix.rpartition("/")[0]
        with disk_errors(top):
            found = [_entry(checked_key(key), path) for key, path in self._files(top) if key.startswith(prefix)]
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.key)

    def _files(self, top: Path) -> Iterator[tuple[str, Path]]:
        for folder, _, names in os.walk(top, onerror=_unless_absent):
            for name in names:
                path = Path(folder, name)
                if not is_temporary(name) and path.is_file():
                    yield path.relative_to(self.root).as_posix(), path

    def head(self, key: str) -> Entry | None:
        """See `Store.head`."""
        path = self._path(key)
        with disk_errors(path):
            return _entry(key, path)

    def names(self, prefix: str) -> list[str]:
        """See `Store.names`."""
        folder = self.root / prefix
        with disk_errors(folder):
            if not folder.is_dir():
                return []
            found = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not is_temporary(path.name))
        return [prefix + name for name in found[:MOST_NAMES]]

    def read(self, key: str) -> bytes | None:
        """See `Store.read`."""
        path = self._path(key)
        with disk_errors(path):
            try:
                return path.read_bytes()
            except (*_ABSENT, IsADirectoryError):
                return None

    def read_start(self, key: str, size: int) -> bytes | None:
        """See `Store.read_start`."""
        path = self._path(key)
        with disk_errors(path):
            try:
                with path.open("rb") as file:
                    return file.read(size)
            except (*_ABSENT, IsADirectoryError):
                return None

    def write(self, key: str, data: bytes) -> None:
        """See `Store.write`."""
        path = self._path(key)
        with disk_errors(path), temporary(path) as part:
            write_synced(part, data)
            _put_in_place(part, path)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`. A link to a complete file makes it atomic, except on file systems without links."""
        path = self._path(key)
        with disk_errors(path), temporary(path) as part:
            write_synced(part, data)
            try:
                path.hardlink_to(part)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_exclusively(path, data)
            sync(path.parent)
            return True

    def replace(self, key: str, data: bytes, *, expected: bytes) -> bool:
        """See `Store.replace`."""
        if self.read(key) != expected:
            return False
        self.write(key, data)
        return True

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """See `Store.upload`."""
        target = self._path(key)
        with disk_errors(target), temporary(target) as part:
            require_free(part.parent, path.stat().st_size)
            shutil.copyfile(path, part)
            if sha256 is not None and sha256_of(part) != sha256:
                raise DamagedError(f"{path} does not have the SHA-256 {sha256}.", remedy="It changed: write it again.")
            sync(part)
            _put_in_place(part, target)

    def download(self, entry: Entry, path: Path) -> None:
        """See `Store.download`."""
        source = self._path(entry.key)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            require_free(path.parent, entry.size)
            with temporary(path) as part:
                self._require_same(entry, source)
                shutil.copyfile(source, part)
                self._require_same(entry, source)
                part.replace(path)

    def _require_same(self, entry: Entry, source: Path) -> None:
        now = _entry(entry.key, source)
        if now is None:
            raise MissingError(f"{source} does not exist any more.", remedy="Restore it.")
        if (now.size, now.etag) != (entry.size, entry.etag or now.etag):
            raise ChangedError(f"{source} changed while it was read.", remedy="Run again when it is complete.")

    def delete(self, key: str) -> None:
        """See `Store.delete`. Directories that become empty are deleted too."""
        path = self._path(key)
        with disk_errors(path):
            with contextlib.suppress(*_ABSENT):
                path.unlink()
            for folder in path.relative_to(self.root).parents:
                if folder == Path() or not _removed_if_empty(self.root / folder):
                    break

    def copy(self, key: str, target: str) -> None:
        """See `Store.copy`."""
        if self.head(key) is None:
            raise MissingError(f"{self._path(key)} does not exist any more.", remedy="Restore it.")
        self.upload(self._path(key), target)

    def remove_unfinished(self, prefix: str) -> int:
        """See `Store.remove_unfinished`."""
        top = self.root / prefix.rpartition("/")[0]
        found = [Path(folder, name) for folder, _, names in os.walk(top) for name in names if is_temporary(name)]
        mine = [path for path in found if path.relative_to(self.root).as_posix().startswith(prefix)]
        with disk_errors(top):
            for path in mine:
                path.unlink(missing_ok=True)
        return len(mine)

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)


def _unless_absent(error: OSError) -> None:
    """A folder that cannot be listed is no empty folder, but one may be deleted meanwhile."""
    if not isinstance(error, _ABSENT):
        with disk_errors(Path(error.filename)):
            raise error


def _entry(key: str, path: Path) -> Entry | None:
    try:
        state = path.stat()
    except _ABSENT:
        return None
    if path.is_dir():
        return None
    return Entry(key=key, size=state.st_size, etag=f"{state.st_mtime_ns:x}", version=None)


def _put_in_place(part: Path, path: Path) -> None:
    part.replace(path)
    sync(path.parent)


def _create_exclusively(path: Path, data: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _removed_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
