"""Bring what a URI names to local files. What is here already and unchanged is not fetched again."""

from __future__ import annotations

import dataclasses
import difflib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from job.runtime.errors import DataError
from job.storage.base import Entry, Store
from job.storage.disk import disk_errors, write_atomically
from job.storage.faults import ChangedError, MissingError
from job.storage.open import open_store
from job.storage.parallel import each
from job.storage.uri import S3Address, parents, parse

INDEX = ".finetune-job-fetched.json"
SMALL_BYTES = 32 << 20
"""Larger objects come one after another, each over several connections."""

WORKERS = 8
_CHANGED_ATTEMPTS = 3
_INDEX_SECONDS = 5.0
_NEARBY = 8


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
    wanted: Callable[[str], bool] | None = None,
    names: frozenset[str] | None = None,
) -> list[Fetched]:
    """Download an object, or all objects under a prefix, and return them sorted by key.

    Args:
        uri: `s3://`, `file://` or an absolute path; of local files the paths are returned in place.
        directory: where the files go, under their relative keys. It also keeps an index of what it holds.
        patience_seconds: see `open_store`.
        wanted: which keys to take; all when None.
        names: take only these, by full URI; what else is there is logged and left.

    Raises:
        MissingError: nothing is there; it names what stands near.
        ChangedError: an object was written again and again while it was read.
        StorageError, AccessDeniedError, DataError: see `Store`.
    """
    for attempt in range(1, _CHANGED_ATTEMPTS):
        try:
            return _bring(uri, directory, patience_seconds, wanted, names)
        except ChangedError as error:
            structlog.get_logger().warning("fetch_changed", error=error.message, tries=attempt)
    return _bring(uri, directory, patience_seconds, wanted, names)


def look(
    uri: str, *, patience_seconds: float = 3600.0, wanted: Callable[[str], bool] | None = None
) -> dict[str, Entry]:
    """What `fetch` would bring, by full URI, without bringing it; empty when nothing is there."""
    try:
        found = find(uri, patience_seconds, wanted)
    except MissingError:
        return {}
    return {found.name(entry): entry for entry in found.entries}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Objects, and the store whose root makes their keys what `Fetched.key` promises."""

    store: Store
    entries: list[Entry]

    def name(self, entry: Entry) -> str:
        """The object's full URI."""
        return f"{self.store.uri.rstrip('/')}/{entry.key}"

    def fetched(self, entry: Entry, path: Path) -> Fetched:
        """The object, once it is at `path`."""
        return Fetched(
            name=self.name(entry), path=path, key=entry.key, size=entry.size, etag=entry.etag, version=entry.version
        )


def find(uri: str, patience_seconds: float, wanted: Callable[[str], bool] | None) -> Found:
    """The object of that name, else everything under it.

    Raises:
        MissingError: nothing is there; it names what stands near.
    """
    address = parse(uri)
    found = _find_local(address) if isinstance(address, Path) else _find_remote(address, patience_seconds)
    if not found.entries:
        near = _names_in(address.parent) if isinstance(address, Path) else _near(address, patience_seconds)
        raise _nothing(uri, near)
    chosen = [entry for entry in found.entries if wanted is None or wanted(entry.key)]
    if not chosen:
        raise _nothing(uri, [entry.key for entry in found.entries])
    return dataclasses.replace(found, entries=chosen)


def _find_local(path: Path) -> Found:
    if path.is_dir():
        store = open_store(str(path))
        return Found(store=store, entries=store.list_objects())
    store = open_store(str(path.parent))
    entry = store.head(path.name) if path.name else None
    return Found(store=store, entries=[entry] if entry else [])


def _names_in(folder: Path) -> list[str]:
    with disk_errors(folder):
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _find_remote(address: S3Address, patience_seconds: float) -> Found:
    key = address.key.strip("/")
    if key and not address.key.endswith("/"):
        folder, _, name = key.rpartition("/")
        store = open_store(f"s3://{address.bucket}/{folder}", patience_seconds=patience_seconds)
        entry = store.head(name)
        if entry is not None:
            return Found(store=store, entries=[entry])
    store = open_store(f"s3://{address.bucket}/{key}", patience_seconds=patience_seconds)
    return Found(store=store, entries=store.list_objects())


def _near(address: S3Address, patience_seconds: float) -> list[str]:
    """The names in the nearest folder above a key that has any."""
    store = open_store(f"s3://{address.bucket}", patience_seconds=patience_seconds)
    key = address.key.strip("/")
    for folder in [*(parents(key) if key else []), ""]:
        names = store.names(f"{folder}/" if folder else "")
        if names:
            return names
    return []


def _nothing(uri: str, near: list[str]) -> MissingError:
    name = uri.rstrip("/").rpartition("/")[2]
    by_name = {candidate.rstrip("/").rpartition("/")[2]: candidate for candidate in near}
    closest = [by_name[match] for match in difflib.get_close_matches(name, by_name, n=_NEARBY, cutoff=0.5)]
    there = ", ".join(closest or near[:_NEARBY])
    return MissingError(
        f"{uri} holds nothing to read." + (f" Near it: {there}." if there else " There is nothing near it either."),
        remedy="Correct the address.",
    )


def _bring(
    uri: str,
    directory: Path,
    patience_seconds: float,
    wanted: Callable[[str], bool] | None,
    names: frozenset[str] | None,
) -> list[Fetched]:
    found = find(uri, patience_seconds, wanted)
    if names is not None:
        found = _only(found, names)
    if isinstance(parse(uri), Path):
        return [found.fetched(entry, Path(found.store.uri) / entry.key) for entry in found.entries]
    _require_distinct(found.entries)
    index = _Index(directory, found.store.uri)
    try:
        _download(found, directory, index)
    finally:
        index.save()
    return [found.fetched(entry, directory / entry.key) for entry in found.entries]


def _only(found: Found, names: frozenset[str]) -> Found:
    """What the run began with: objects that came later are not part of it."""
    entries = [entry for entry in found.entries if found.name(entry) in names]
    later = [found.name(entry) for entry in found.entries if found.name(entry) not in names]
    if later:
        structlog.get_logger().warning("inputs_added_later", ignored=len(later), first=later[:_NEARBY])
    return dataclasses.replace(found, entries=entries)


def _require_distinct(entries: list[Entry]) -> None:
    keys = {entry.key for entry in entries}
    for entry in entries:
        for folder in parents(entry.key):
            if folder in keys:
                raise DataError(
                    f"{folder!r} is an object and also the folder of {entry.key!r}: a disk cannot hold both.",
                    remedy="Rename one of them.",
                )


def _download(found: Found, directory: Path, index: _Index) -> None:
    def take(entry: Entry, _: threading.Event) -> None:
        found.store.download(entry, directory / entry.key)
        index.add(entry)

    missing = [entry for entry in found.entries if not index.holds(entry)]
    each(take, [entry for entry in missing if entry.size <= SMALL_BYTES], workers=WORKERS)
    for entry in missing:
        if entry.size > SMALL_BYTES:
            take(entry, threading.Event())


class _Index:
    """What a directory holds: for each file the object it came from, and the file's own size and time."""

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
        """Whether the file is there, is that object, and nobody touched it since."""
        return self._files.get(entry.key) == self._record(entry) is not None

    def add(self, entry: Entry) -> None:
        """The object has just been downloaded."""
        with self._lock:
            self._files[entry.key] = self._record(entry)
            if time.monotonic() - self._saved > _INDEX_SECONDS:
                self._save()

    def save(self) -> None:
        """Write the index down."""
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
