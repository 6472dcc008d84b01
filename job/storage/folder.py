"""A folder of input files on this disk: every file in it that can be read, or an error that names what cannot.

Links are followed, each file is listed once, and nothing is passed over in silence. `DirectoryStore` is for what the
job writes itself; this is for what others left there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from job.runtime.errors import DataError
from job.storage.base import Entry
from job.storage.disk import disk_errors, is_temporary

KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What of a folder matters, by the names of files and folders without those above them."""

    enters: Callable[[str], bool]
    """Whether a folder is entered; another one is only named, whatever is in it and whoever may read it."""
    reads: Callable[[str], bool]
    """Whether a file is going to be read; another one may be a pipe, or not readable."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a folder holds, by keys relative to it."""

    entries: list[Entry]
    folders: list[str]
    """Folders that were not entered; their names end with `/`."""
    repeated: dict[str, str]
    """Links to what is listed under another name, and that name."""


def listed(root: Path, rule: Rule) -> Listing:
    """All files below a folder.

    Raises:
        DataError: a link to nothing or to a folder around it, or a file to be read that is none, or whose name is not
            UTF-8.
        AccessDeniedError: this user may not list a folder, or not read a file.
        StorageError: the disk fails.
    """
    walk = _Walk(root=root, rule=rule, pending=[("", os.path.realpath(root))])
    walk.walk()
    entries = sorted(walk.entries.values(), key=lambda entry: entry.key)
    return Listing(entries=entries, folders=sorted(walk.folders), repeated=walk.repeated)


def check_file(path: Path) -> None:
    """Raise the errors of `listed` for one file, which is going to be read; nothing happens when it does not exist."""
    _check_link(path)
    with disk_errors(path):
        mode = path.stat().st_mode if path.exists() else stat.S_IFDIR
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = KINDS.get(stat.S_IFMT(mode), "a device")
        raise DataError(f"{path} is {kind}, not a file.", remedy="Copy the data into a file.")
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"The name of {os.fsencode(path)!r} is not UTF-8.", remedy="Rename the file.") from None
    if stat.S_ISREG(mode):
        with disk_errors(path):
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _check_link(path: Path) -> None:
    """Raise DataError for a link that leads nowhere."""
    with disk_errors(path):
        try:
            path.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DataError(f"{path} is a link that leads back to itself.", remedy="Remove the link.") from None
            if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                raise
            if path.is_symlink():
                raise DataError(
                    f"{path} is a link to {path.readlink()}, which is not there.",
                    remedy="Restore what it points to, or remove the link.",
                ) from None


@dataclass(kw_only=True)
class _Walk:
    root: Path
    rule: Rule
    pending: list[tuple[str, str]]
    """Folders to list: prefix and real path."""
    links: list[str] = field(default_factory=list)
    """Links to follow, once all that has a name of its own is known."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """By real path."""
    entered: dict[str, str] = field(default_factory=dict)
    """Prefixes by real path."""
    folders: list[str] = field(default_factory=list)
    repeated: dict[str, str] = field(default_factory=dict)

    def walk(self) -> None:
        """List everything; a link's target is listed in the next round."""
        while self.pending or self.links:
            while self.pending:
                prefix, real = self.pending.pop()
                if real not in self.entered:  # two links may lead to a folder, and to another in it
                    self._list(prefix, real)
            links, self.links = sorted(self.links), []
            for key in links:
                self._follow(key)

    def _list(self, prefix: str, real: str) -> None:
        self.entered[real] = prefix
        with disk_errors(self.root / prefix), os.scandir(self.root / prefix) as found:
            names = [(entry.name, entry.is_symlink()) for entry in found if not is_temporary(entry.name)]
        for name, is_link in sorted(names):
            if is_link:
                self.links.append(prefix + name)
            else:
                self._add(prefix + name, str(Path(real, name)))

    def _follow(self, key: str) -> None:
        path = self.root / key
        if self.rule.enters(path.name) or self.rule.reads(path.name):
            _check_link(path)
        elif not path.exists():
            return
        real = os.path.realpath(path)
        entered = self.entered.get(real)
        if entered is not None and key.startswith(entered):
            raise DataError(f"{path} is a link to {real}, a folder around it.", remedy="Remove the link.")
        if entered is not None or real in self.entries:
            self.repeated[key] = entered or self.entries[real].key
        else:
            self._add(key, real)

    def _add(self, key: str, real: str) -> None:
        path = self.root / key
        with disk_errors(path):
            state = path.stat()
        if not stat.S_ISDIR(state.st_mode):
            if self.rule.reads(path.name):
                check_file(path)
            self.entries[real] = Entry(key=key, size=state.st_size, etag=f"{state.st_mtime_ns:x}", version=None)
        elif self.rule.enters(path.name):
            self.pending.append((f"{key}/", real))
        else:
            self.folders.append(f"{key}/")
