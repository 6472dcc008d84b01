"""Compile caches between runs, under `TUNE_CACHE`: what Triton, Inductor and Unsloth compiled, and what Python compiled
where packages were installed without compiled modules.

An archive is `<TUNE_CACHE>/<key>/<sha256>.tar.zst`. The key says what its files were compiled for
(`job.state.compile_cache.key`), the name is the hash of its bytes. Each run that compiled something new adds one
archive with just that, and none is ever changed, so that two runs at the same time cannot damage each other's. The hash
detects damage, not malice: the run loads the restored code, so anyone who can write there can run code in the job.

Nothing here may end a run, or delay it by more than `PATIENCE_SECONDS`, or `LAST_SECONDS` at its end, or
`bytecode.PATIENCE_SECONDS` where Python's modules would otherwise have to be compiled.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from job.runtime import gpus
from job.runtime.background import Background
from job.state.compile_cache import archive, bytecode, key
from job.storage.base import Entry, Store
from job.storage.faults import DamagedError
from job.storage.open import open_store

log = structlog.get_logger()
PATIENCE_SECONDS = 5.0
"""How long the run waits for a restore that is not done when its files are needed."""
STORE_PATIENCE_SECONDS = 5.0
SAVING_PATIENCE_SECONDS = 60.0
SETTLE_SECONDS = 60.0
"""From the first step until the first save: other shapes may still be compiled."""
QUIET_SECONDS = 10.0
"""A file that changed within this time may not be complete: it is saved at the end."""
LAST_SECONDS = 30.0
"""How long the end of a run waits for the last save."""
MOST_ARCHIVES = 8
"""Under one key, damaged ones not counted."""
MOST_BYTES = 4 << 30
"""What a restore may write, archives and their files: docs/operations.md reserves 5 GB of the scratch disk for it."""
LEAST_FREE_BYTES = 2 << 30
"""What a restore must leave free on the scratch disk, for data and checkpoints."""
SHOWN = 100
"""Characters of a key that is not the cache's."""
_ARCHIVE = re.compile(r"[0-9a-f]{64}" + re.escape(archive.SUFFIX))
_TEMPORARY = re.compile(r"tmp\..*|__pycache__|locks?|.*\.(lock|tmp|pyc\.\d+)")
"""Names of files that the libraries need only while they write, or can make again at no cost."""


class CompileCache:
    """One run's side of the kept caches. Without `TUNE_CACHE` its methods do nothing."""

    def __init__(
        self, uri: str | None, settings: Mapping[str, Any], *, scratch: Path, work: Path, saves: bool = True
    ) -> None:
        """See the class.

        Args:
            uri: `TUNE_CACHE`.
            settings: the run's settings by variable name.
            scratch: the directory above the restored caches.
            work: a directory on the same disk as `scratch`, removed with the attempt.
            saves: whether this process adds what it compiled.
        """
        self._uri, self._settings, self._scratch, self._work, self._saves = uri, settings, scratch, work, saves
        self._facts: dict[str, Any] = {}
        self._key = ""
        self._timed_out = threading.Event()
        self._left = MOST_BYTES
        self._seen: set[str] | None = None  # keys of the archives at the start, once they are listed
        self._damaged: set[str] = set()  # of these keys
        self._kept: set[str] = set()  # names of the files in the archives
        self._restoring: Background[None] | None = None
        self._saving: Background[None] | None = None
        self._last = threading.Event()

    @property
    def directory(self) -> Path | None:
        """Where the libraries must put what they compile; None leaves their own places."""
        return self._scratch / "compiled" / self._key if self._key else None

    def begin(self, shape: Mapping[str, Any]) -> None:
        """Restore, in the background, the caches for this machine, these versions and settings, and this model.

        Args:
            shape: the model's config.json.
        """
        if self._uri is None:
            return
        self._facts = key.facts(self._settings, shape, gpus=gpus.find(), scratch=self._scratch)
        self._key = key.key(self._facts)
        self._restoring = Background(self._restore, name="compile-cache")

    def wait(self) -> None:
        """Wait for the restore, with a timeout; what is not restored by then is not used."""
        if not self._ended(PATIENCE_SECONDS):
            self._timed_out.set()
            _ignored("the restore timed out")

    def wait_for_modules(self) -> None:
        """The same before Python's compiled modules are needed; what is restored later may still be useful."""
        self._ended(bytecode.PATIENCE_SECONDS)

    def _ended(self, patience_seconds: float) -> bool:
        return self._restoring is None or self._restoring.ended(patience_seconds)

    def save_soon(self) -> None:
        """The first step is done: save what is new, in the background, and at the end what was compiled later."""
        if self._uri is not None and self._saves and self._saving is None:
            self._saving = Background(self._save_twice, name="compile-cache-save")

    def save_now(self) -> None:
        """Training is over: nothing more will be compiled. Returns at once."""
        self._last.set()

    def finish(self) -> None:
        """Wait for the last save, with a timeout."""
        self._last.set()
        if self._saving is not None and not self._saving.ended(LAST_SECONDS):
            _not_saved(f"it was not finished within {LAST_SECONDS:g} s after the end of the run")

    def _store(self, patience_seconds: float) -> Store:
        return open_store(
            self._uri or "",
            patience_seconds=patience_seconds,
            denied_patience_seconds=STORE_PATIENCE_SECONDS,
            reply_seconds=patience_seconds,
        )

    def _restore(self) -> None:
        started = time.monotonic()
        restored: dict[Entry, int] = {}  # how many files of each archive were new here
        try:
            store = self._store(STORE_PATIENCE_SECONDS)
            archives = store.list_objects(f"{self._key}/")
            self._seen = {entry.key for entry in archives}
            for entry in archives:
                if self._timed_out.is_set() or len(restored) == MOST_ARCHIVES:
                    break
                if (count := self._restore_one(store, entry)) is not None:
                    restored[entry] = count
        except Exception as error:  # noqa: BLE001 - a run without a cache is slower, and otherwise the same
            _ignored(_words(error))
            return
        if self._timed_out.is_set():
            return
        seconds = round(time.monotonic() - started, 3)
        if not archives:
            log.info("compile_cache_empty", key=self._key, made_for=self._facts, restore_seconds=seconds)
        elif restored:
            files, size = sum(restored.values()), sum(entry.size for entry in restored)
            log.info("compile_cache_restored", key=self._key, files=files, bytes=size, restore_seconds=seconds)

    def _restore_one(self, store: Store, entry: Entry) -> int | None:
        """Download, verify and unpack one archive.

        Returns:
            how many of its files are new here; None if it cannot be used, or the restore timed out.
        """
        try:
            with self._staging() as staging:
                self._download(store, entry, staging / "archive")
                if self._timed_out.is_set():
                    return None
                names = self._unpack(staging)
                if self._timed_out.is_set() or self.directory is None:
                    return None
                count = archive.place(names, staging / "files", self.directory)
        except Exception as error:  # noqa: BLE001 - an archive that is not good is not used
            if isinstance(error, DamagedError):
                self._damaged.add(entry.key)
            _ignored(_words(error), archive=entry.key)
            return None
        self._kept |= set(names)
        return count

    def _download(self, store: Store, entry: Entry, path: Path) -> None:
        name, room = entry.key.rpartition("/")[2], self._room()
        if not _ARCHIVE.fullmatch(name):
            raise ValueError(f"{name} ({entry.size} bytes) was not written by this job")
        if entry.size > room:
            raise ValueError(f"it has {entry.size} bytes, and there is room for {room} bytes")
        self._left -= entry.size
        store.download(entry, path)
        if archive.name_of(path) != name:
            raise DamagedError("it is damaged: its SHA-256 is not the one in its name")

    def _unpack(self, staging: Path) -> list[str]:
        label, names = archive.unpack(
            staging / "archive", staging / "files", most_bytes=self._room(), cancelled=self._timed_out.is_set
        )
        if label.get("key") != self._key:
            raise ValueError(f"it was made for another key, {str(label.get('key'))[:SHOWN]!r}")
        self._left -= sum((staging / "files" / name).stat().st_size for name in names)
        return names

    def _room(self) -> int:
        """Bytes that the restore may still write."""
        return max(0, min(self._left, shutil.disk_usage(self._work).free - LEAST_FREE_BYTES))

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A temporary directory on the disk of the caches."""
        with tempfile.TemporaryDirectory(prefix="compiled-", dir=self._work) as staging:
            yield Path(staging)

    def _save_twice(self) -> None:
        over = self._last.wait(SETTLE_SECONDS)
        self._save(older_than_seconds=0 if over else QUIET_SECONDS)
        if not over:
            self._last.wait()
            self._save(older_than_seconds=0)

    def _save(self, *, older_than_seconds: float) -> None:
        started = time.monotonic()
        try:
            new = {name: path for name, path in self._files(older_than_seconds) if self._is_new(name, path)}
            if not new:
                return
            if self._seen is None:
                _not_saved("the archives could not be listed at the start")
                return
            store = self._store(SAVING_PATIENCE_SECONDS)
            if reason := self._reason_not_to_save(
                self._seen, {entry.key for entry in store.list_objects(f"{self._key}/")}
            ):
                log.info("compile_cache_unchanged", key=self._key, reason=reason)
                return
            size = self._upload(store, new)
        except Exception as error:  # noqa: BLE001 - the run is complete without its cache
            _not_saved(_words(error))
            return
        seconds = round(time.monotonic() - started, 3)
        log.info("compile_cache_saved", key=self._key, files=len(new), bytes=size, save_seconds=seconds)

    def _is_new(self, name: str, path: Path) -> bool:
        """Whether a file is in no archive yet and will be useful; a compiled module of Python's is made useful."""
        return name not in self._kept and (path.suffix != bytecode.SUFFIX or bytecode.bind_to_source(path))

    def _reason_not_to_save(self, seen: set[str], now: set[str]) -> str:
        """Why nothing may be added to the archives; empty if something may.

        Args:
            seen: the archives at the start.
            now: the archives as they are now.
        """
        if self._timed_out.is_set():
            return "the restore timed out"
        if now - seen:
            return "another run has saved in the meantime"
        return f"{MOST_ARCHIVES} archives are kept already" if len(seen - self._damaged) >= MOST_ARCHIVES else ""

    def _upload(self, store: Store, new: Mapping[str, Path]) -> int:
        with self._staging() as staging:
            path = staging / "archive"
            packed = archive.pack(new, path, label={"key": self._key, "made_for": self._facts})
            name = archive.name_of(path)
            # Any other writer of this name writes the same bytes; a damaged archive of this name is repaired.
            store.upload(path, f"{self._key}/{name}", sha256=name.removesuffix(archive.SUFFIX))
            self._seen = {*(self._seen or ()), f"{self._key}/{name}"}
            self._damaged.discard(f"{self._key}/{name}")
            self._kept |= set(packed)
            return path.stat().st_size

    def _files(self, older_than_seconds: float) -> Iterator[tuple[str, Path]]:
        """The files worth keeping, by name below the directory, where the libraries may still write and delete."""
        if self.directory is None:
            return
        newest = time.time() - older_than_seconds
        for folder, folders, names in os.walk(self.directory):  # ignores directories that are deleted at the same time
            if not Path(folder).is_relative_to(self.directory / bytecode.FOLDER):  # there, any name may be a package's
                folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]
            for path in (Path(folder, name) for name in names if not _TEMPORARY.fullmatch(name)):
                try:
                    found = path.lstat()
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(found.st_mode) and found.st_mtime <= newest:
                    yield path.relative_to(self.directory).as_posix(), path


def _ignored(reason: str, **fields: Any) -> None:
    log.warning("compile_cache_ignored", reason=reason, **fields)


def _not_saved(reason: str) -> None:
    log.warning("compile_cache_not_saved", reason=reason)


def _words(error: Exception) -> str:
    return getattr(error, "message", None) or f"{type(error).__name__}: {error}"
