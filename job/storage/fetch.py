"""The objects that a URI names -> local files. Unchanged files from an earlier download are used again."""

from __future__ import annotations

import dataclasses
import difflib
import json
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import structlog

from job.runtime.errors import DataError
from job.storage.base import Entry, Store
from job.storage.directory import DirectoryStore
from job.storage.disk import disk_errors, write_atomically
from job.storage.faults import ChangedError, MissingError
from job.storage.folder import Rule, check_file, listed
from job.storage.open import open_store
from job.storage.parallel import each
from job.storage.uri import S3Address, parents, parse

INDEX = ".finetune-job-fetched.json"
SMALL_BYTES = 32 << 20
"""Larger objects are downloaded one after another, each over several connections."""

T = TypeVar("T")
WORKERS = 8
_CHANGED_ATTEMPTS = 3
_INDEX_SECONDS = 5.0
_SHOWN = 8
EVERYTHING = Rule(enters=lambda name: not name.startswith(".."), reads=lambda _: True)
"""All that is in a folder, apart from where Kubernetes keeps the versions of a mounted ConfigMap."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """One object, on this disk."""

    name: str
    """Its full URI, as a user would write it."""
    path: Path
    key: str
    """Relative to the URI that was fetched; the file's name when that named one object."""
    size: int
    """Bytes."""
    etag: str | None
    version: str | None


def fetch(
    uri: str,
    directory: Path,
    *,
    patience_seconds: float = 3600.0,
    names: frozenset[str] | None = None,
) -> list[Fetched]:
    """Download an object, or all objects under a prefix, and return them sorted by key.

    Args:
        uri: `s3://`, `file://` or an absolute path; of local files the paths are returned in place.
        directory: where the files go, under their relative keys. It also keeps an index of what it holds.
        patience_seconds: see `open_store`.
        names: take only these, by full URI; other objects are logged and ignored.

    Raises:
        MissingError: there are no such objects; it lists similar names.
        ChangedError: an object was changed during the download, several times.
        StorageError, AccessDeniedError, DataError: see `Store`.
    """

    def once() -> list[Fetched]:
        resolved = resolve(uri, patience_seconds=patience_seconds)
        return download(resolved if names is None else resolved.only(names), directory)

    return again_if_changed(once)


def again_if_changed(read: Callable[[], T]) -> T:
    """The result of listing and reading objects; a limited number of times again if one was changed meanwhile."""
    for attempt in range(1, _CHANGED_ATTEMPTS):
        try:
            return read()
        except ChangedError as error:
            structlog.get_logger().warning("fetch_changed", error=error.message, tries=attempt)
    return read()


def download(resolved: Resolved, directory: Path) -> list[Fetched]:
    """The objects as files on this disk; those that are there already stay in place.

    Raises: see `fetch`; ChangedError at the first change.
    """
    if isinstance(resolved.store, DirectoryStore):
        return [resolved.fetched(entry, resolved.store.root / entry.key) for entry in resolved.entries]
    _require_distinct(resolved.entries)
    index = _Index(directory, resolved.store.uri)
    try:
        _download(resolved, directory, index)
    finally:
        index.save()
    return [resolved.fetched(entry, directory / entry.key) for entry in resolved.entries]


def list_objects(uri: str, *, patience_seconds: float = 3600.0) -> dict[str, Entry]:
    """The objects that `fetch` would download, by full URI; empty when there are none."""
    try:
        resolved = resolve(uri, patience_seconds=patience_seconds)
    except MissingError:
        return {}
    return {resolved.name(entry): entry for entry in resolved.entries}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The objects that a URI names, and the store with the URI as its root, which their keys are relative to."""

    store: Store
    entries: list[Entry]
    named: bool = False
    """Whether the URI is the name of the one object."""
    folders: Sequence[str] = ()
    """Folders that were not entered; their names end with `/`."""
    repeated: Mapping[str, str] = field(default_factory=dict)
    """Links to what is listed under another name, and that name."""

    def name(self, entry: Entry) -> str:
        """The object's full URI."""
        return f"{self.store.uri.rstrip('/')}/{entry.key}"

    def only(self, names: Collection[str]) -> Resolved:
        """Those with these full URIs; the others, which were added later, are logged."""
        later = [name for entry in self.entries if (name := self.name(entry)) not in names]
        if later:
            structlog.get_logger().warning("inputs_added_later", ignored=len(later), first=later[:_SHOWN])
        return replace(self, entries=[entry for entry in self.entries if self.name(entry) in names])

    def fetched(self, entry: Entry, path: Path) -> Fetched:
        """The object as a local file at `path`."""
        return Fetched(
            name=self.name(entry), path=path, key=entry.key, size=entry.size, etag=entry.etag, version=entry.version
        )


def resolve(uri: str, rule: Rule = EVERYTHING, *, patience_seconds: float) -> Resolved:
    """Like `find`, with every name of a file that has several by links to it.

    Raises: see `find`; MissingError also where there are folders only.
    """
    found = find(uri, rule, patience_seconds=patience_seconds)
    entries = {entry.key: entry for entry in found.entries}
    links = [replace(entries[key], key=link) for link, key in found.repeated.items() if key in entries]
    if not entries:
        raise _missing(uri, [*found.folders])
    return replace(found, entries=sorted([*found.entries, *links], key=lambda entry: entry.key))


def find(uri: str, rule: Rule, *, patience_seconds: float) -> Resolved:
    """The object of that name, else all objects under it.

    Args:
        uri: `s3://`, `file://` or an absolute path.
        rule: what of a local folder matters; objects of a bucket are all listed.
        patience_seconds: see `open_store`.

    Raises:
        MissingError: there are none; it lists similar names.
        DataError, AccessDeniedError, StorageError: see `job.storage.folder.listed` and `Store`.
    """
    address = parse(uri)
    resolved = _find_local(address, rule) if isinstance(address, Path) else _find_remote(address, patience_seconds)
    if not (resolved.entries or resolved.folders):
        near = _names_in(address.parent) if isinstance(address, Path) else _nearest_names(address, patience_seconds)
        raise _missing(uri, near)
    return resolved


def _find_local(path: Path, rule: Rule) -> Resolved:
    check_file(path)
    if path.is_dir():
        found = listed(path, rule)
        return Resolved(
            store=open_store(str(path)), entries=found.entries, folders=found.folders, repeated=found.repeated
        )
    store = open_store(str(path.parent))
    entry = store.head(path.name) if path.name else None
    return Resolved(store=store, entries=[entry] if entry else [], named=True)


def _names_in(folder: Path) -> list[str]:
    with disk_errors(folder):
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _find_remote(address: S3Address, patience_seconds: float) -> Resolved:
    key = address.key.strip("/")
    below = open_store(f"s3://{address.bucket}/{key}", patience_seconds=patience_seconds)
    if key and not address.key.endswith("/"):
        folder, _, name = key.rpartition("/")
        store = open_store(f"s3://{address.bucket}/{folder}", patience_seconds=patience_seconds)
        entry = store.head(name)
        if entry is not None and (entry.size or not below.names("")):  # tools mark folders by empty objects
            return Resolved(store=store, entries=[entry], named=True)
    return Resolved(store=below, entries=below.list_objects())


def _nearest_names(address: S3Address, patience_seconds: float) -> list[str]:
    """The names in the nearest folder above a key that is not empty."""
    store = open_store(f"s3://{address.bucket}", patience_seconds=patience_seconds)
    key = address.key.strip("/")
    for folder in [*(parents(key) if key else []), ""]:
        names = store.names(f"{folder}/" if folder else "")
        if names:
            return names
    return []


def _missing(uri: str, near: list[str]) -> MissingError:
    name = uri.rstrip("/").rpartition("/")[2]
    by_name = {candidate.rstrip("/").rpartition("/")[2]: candidate for candidate in near}
    closest = [by_name[match] for match in difflib.get_close_matches(name, by_name, n=_SHOWN, cutoff=0.5)]
    shown = ", ".join(closest or near[:_SHOWN])
    return MissingError(
        f"{uri} holds nothing to read." + (f" Near it: {shown}." if shown else " There is nothing near it either."),
        remedy="Correct the address.",
    )


def _require_distinct(entries: list[Entry]) -> None:
    keys = {entry.key for entry in entries}
    for entry in entries:
        for folder in parents(entry.key):
            if folder in keys:
                raise DataError(
                    f"{folder!r} is an object and also the folder of {entry.key!r}: a disk cannot hold both.",
                    remedy="Rename one of them.",
                )


def _download(resolved: Resolved, directory: Path, index: _Index) -> None:
    def download(entry: Entry, _: threading.Event) -> None:
        resolved.store.download(entry, directory / entry.key)
        index.add(entry)

    missing = [entry for entry in resolved.entries if not index.holds(entry)]
    each(download, [entry for entry in missing if entry.size <= SMALL_BYTES], workers=WORKERS)
    for entry in missing:
        if entry.size > SMALL_BYTES:
            download(entry, threading.Event())


class _Index:
    """The files of a directory: for each the object that it was downloaded from, and its own size and time."""

    def __init__(self, directory: Path, uri: str) -> None:
        self._directory, self._uri, self._path = directory, uri, directory / INDEX
        self._lock = threading.Lock()
        self._files = self._load()
        self._saved = time.monotonic()

    def _load(self) -> dict[str, object]:
        try:
            files = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return files if isinstance(files, dict) else {}

    def holds(self, entry: Entry) -> bool:
        """Whether the file exists, is a download of that object, and has not been changed since."""
        return self._files.get(entry.key) == self._record(entry) is not None

    def add(self, entry: Entry) -> None:
        """The object has just been downloaded."""
        with self._lock:
            self._files[entry.key] = self._record(entry)
            if time.monotonic() - self._saved > _INDEX_SECONDS:
                self._save()

    def save(self) -> None:
        """Write the index."""
        with self._lock:
            self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        with disk_errors(self._path):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(self._files, indent=1, sort_keys=True).encode())

    def _record(self, entry: Entry) -> dict[str, object] | None:
        try:
            state = (self._directory / entry.key).stat()
        except OSError:
            return None
        if state.st_size != entry.size:
            return None
        return {"uri": self._uri, **dataclasses.asdict(entry), "modified_ns": state.st_mtime_ns}
