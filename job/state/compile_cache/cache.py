"""Compile caches between runs: what Triton, Inductor and Unsloth compiled, and Python where packages came without
compiled modules, kept under `TUNE_CACHE`.

`<TUNE_CACHE>/<key>/<sha256>.tar.zst`: the key says for what it was compiled (`job.state.compile_cache.key`), the name
what the archive must hold. Each run that compiled something new adds one archive with just that, and none is ever
changed, so that two runs at once cannot spoil each other's. The hash tells damage, not malice: what is restored is code
that the run loads, so whoever may write there can run code in the job.

Nothing here may end a run, or hold it up by more than `PATIENCE_SECONDS`, or `LAST_SECONDS` at its end, or
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

from job.config.schema import Config
from job.runtime import gpus
from job.runtime.background import Background
from job.state.compile_cache import archive, bytecode, key
from job.storage.base import Entry, Store
from job.storage.faults import DamagedError
from job.storage.open import open_store

log = structlog.get_logger()
PATIENCE_SECONDS = 5.0
"""Of the run with a restore that is not done when it is needed."""
STORE_PATIENCE_SECONDS = 5.0
SAVING_PATIENCE_SECONDS = 60.0
SETTLE_SECONDS = 60.0
"""After the first step, until what was compiled is saved: a few other shapes may come yet."""
QUIET_SECONDS = 10.0
"""A file that was changed so lately may not be finished: it has to wait until the end."""
LAST_SECONDS = 30.0
MOST_PARTS = 8  # whole ones
MOST_BYTES = 4 << 30
"""That a restore may write, archives and what they hold: docs/operations.md leaves 5 GB of the scratch disk for it."""
LEAST_FREE_BYTES = 2 << 30
"""Of the scratch disk, which no restore may take: the run has data and checkpoints to put there."""
_PART = re.compile(r"[0-9a-f]{64}" + re.escape(archive.SUFFIX))
_PASSING = re.compile(r"tmp\..*|__pycache__|locks?|.*\.(lock|tmp|pyc\.\d+)")
"""Names of what the libraries need while they write, or can make anew for nothing."""


class CompileCache:
    """One run's side of the kept caches. Without `TUNE_CACHE` nothing of it does anything."""

    def __init__(self, config: Config, *, scratch: Path, work: Path, saves: bool = True) -> None:
        """Args: work: a directory on the same disk as `scratch`, which ends with the attempt."""
        self._config, self._uri, self._scratch, self._work, self._saves = config, config.cache, scratch, work, saves
        self._facts: dict[str, Any] = {}
        self._key = ""
        self._given_up = threading.Event()
        self._left = MOST_BYTES
        self._seen: set[str] | None = None  # archives that were there at the start, once they were listed
        self._damaged: set[str] = set()  # of them
        self._kept: set[str] = set()  # files that are in them
        self._restoring: Background[None] | None = None
        self._saving: Background[None] | None = None
        self._last = threading.Event()

    @property
    def directory(self) -> Path | None:
        """Where the libraries must put what they compile; None leaves them where they are."""
        return self._scratch / "compiled" / self._key if self._key else None

    def begin(self, shape: Mapping[str, Any]) -> None:
        """Restore, in the background, what was compiled for this machine, these versions and settings, and this model.

        Args:
            shape: the model's config.json.
        """
        if self._uri is None:
            return
        self._facts = key.facts(self._config, shape, gpus=gpus.find(), scratch=self._scratch)
        self._key = key.key(self._facts)
        self._restoring = Background(self._restore, name="compile-cache")

    def wait(self) -> None:
        """Let the restore come to its end, within the patience; later it is not wanted any more."""
        if not self._ended(PATIENCE_SECONDS):
            self._given_up.set()
            _ignored("it takes too long to come")

    def wait_for_modules(self) -> None:
        """The same before Python's compiled modules are needed; what comes later may still be of use."""
        self._ended(bytecode.PATIENCE_SECONDS)

    def _ended(self, patience_seconds: float) -> bool:
        return self._restoring is None or self._restoring.ended(patience_seconds)

    def save_soon(self) -> None:
        """The first step is done: save what is new, in the background, and at the end what came later."""
        if self._uri is not None and self._saves and self._saving is None:
            self._saving = Background(self._save_twice, name="compile-cache-save")

    def save_now(self) -> None:
        """Training is over: no need to wait for more. Returns at once."""
        self._last.set()

    def finish(self) -> None:
        """Let what is being saved arrive, if that does not take long."""
        self._last.set()
        if self._saving is not None and not self._saving.ended(LAST_SECONDS):
            _not_saved(f"it was not done within {LAST_SECONDS:g} s after the end of the run")

    def _store(self, patience_seconds: float) -> Store:
        return open_store(
            self._uri or "",
            patience_seconds=patience_seconds,
            denied_patience_seconds=STORE_PATIENCE_SECONDS,
            reply_seconds=patience_seconds,
        )

    def _restore(self) -> None:
        started = time.monotonic()
        placed: dict[Entry, int] = {}
        try:
            store = self._store(STORE_PATIENCE_SECONDS)
            parts = store.list_objects(f"{self._key}/")
            self._seen = {entry.key for entry in parts}
            for part in parts:
                if self._given_up.is_set() or len(placed) == MOST_PARTS:
                    break
                if (count := self._bring(store, part)) is not None:
                    placed[part] = count
        except Exception as error:  # noqa: BLE001 - a run without a cache is slower, and no worse
            _ignored(_words(error))
            return
        if self._given_up.is_set():
            return
        seconds = round(time.monotonic() - started, 3)
        if not parts:
            log.info("compile_cache_empty", key=self._key, made_for=self._facts, restore_seconds=seconds)
        elif placed:
            files, size = sum(placed.values()), sum(part.size for part in placed)
            log.info("compile_cache_restored", key=self._key, files=files, bytes=size, restore_seconds=seconds)

    def _bring(self, store: Store, part: Entry) -> int | None:
        """Download, verify and unpack one archive; how many of its files were not there yet, or None if it is no good,
        or not wanted any more."""
        try:
            with self._staging() as staging:
                self._download(store, part, staging / "archive")
                if self._given_up.is_set():
                    return None
                names = self._unpacked(staging)
                if self._given_up.is_set() or self.directory is None:
                    return None
                count = archive.place(names, staging / "files", self.directory)
        except Exception as error:  # noqa: BLE001 - as above
            if isinstance(error, DamagedError):
                self._damaged.add(part.key)
            _ignored(_words(error), part=part.key)
            return None
        self._kept |= set(names)
        return count

    def _download(self, store: Store, part: Entry, path: Path) -> None:
        name, room = part.key.rpartition("/")[2], self._room()
        if not _PART.fullmatch(name):
            raise ValueError(f"{name} ({part.size} bytes) is none of ours")
        if part.size > room:
            raise ValueError(f"it has {part.size} bytes, more than the {room} bytes that there is room for")
        self._left -= part.size
        store.download(part, path)
        if archive.name_of(path) != name:
            raise DamagedError("it is damaged: it does not have the SHA-256 that is its name")

    def _unpacked(self, staging: Path) -> list[str]:
        label, names = archive.unpack(staging / "archive", staging / "files", most_bytes=self._room())
        if label.get("key") != self._key:
            raise ValueError(f"it was made for something else, {label.get('key')!r}")
        self._left -= sum((staging / "files" / name).stat().st_size for name in names)
        return names

    def _room(self) -> int:
        """Bytes that the restore may still write."""
        return max(0, min(self._left, shutil.disk_usage(self._work).free - LEAST_FREE_BYTES))

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A directory on the disk where the caches are, gone with the block."""
        with tempfile.TemporaryDirectory(prefix="compiled-", dir=self._work) as staging:
            yield Path(staging)

    def _save_twice(self) -> None:
        hurried = self._last.wait(SETTLE_SECONDS)
        self._save(older_than_seconds=0 if hurried else QUIET_SECONDS)
        if not hurried:
            self._last.wait()
            self._save(older_than_seconds=0)

    def _save(self, *, older_than_seconds: float) -> None:
        started = time.monotonic()
        try:
            new = {name: path for name, path in self._files(older_than_seconds) if self._worth_keeping(name, path)}
            if not new:
                return
            if self._seen is None:
                _not_saved("what is there could not be listed at the start")
                return
            store = self._store(SAVING_PATIENCE_SECONDS)
            if reason := self._enough(self._seen, {entry.key for entry in store.list_objects(f"{self._key}/")}):
                log.info("compile_cache_unchanged", key=self._key, reason=reason)
                return
            size = self._upload(store, new)
        except Exception as error:  # noqa: BLE001 - as above
            _not_saved(_words(error))
            return
        seconds = round(time.monotonic() - started, 3)
        log.info("compile_cache_saved", key=self._key, files=len(new), bytes=size, save_seconds=seconds)

    def _worth_keeping(self, name: str, path: Path) -> bool:
        """Whether it is new and will be of use; a compiled module of Python's is made so."""
        return name not in self._kept and (path.suffix != bytecode.SUFFIX or bytecode.made_to_last(path))

    def _enough(self, seen: set[str], there: set[str]) -> str:
        """Why nothing is to be added to the archives that are there; empty if something is."""
        if self._given_up.is_set():
            return "what is there did not come in time"
        if there - seen:
            return "another run has saved meanwhile"
        return f"{MOST_PARTS} archives are there" if len(seen - self._damaged) >= MOST_PARTS else ""

    def _upload(self, store: Store, new: Mapping[str, Path]) -> int:
        with self._staging() as staging:
            path = staging / "archive"
            packed = archive.pack(new, path, label={"key": self._key, "made_for": self._facts})
            name = archive.name_of(path)
            # Whoever else writes this name writes these bytes; what was damaged under it becomes whole.
            store.upload(path, f"{self._key}/{name}", sha256=name.removesuffix(archive.SUFFIX))
            self._seen = {*(self._seen or ()), f"{self._key}/{name}"}
            self._damaged.discard(f"{self._key}/{name}")
            self._kept |= set(packed)
            return path.stat().st_size

    def _files(self, older_than_seconds: float) -> Iterator[tuple[str, Path]]:
        """What is worth keeping, by its name below the directory; the libraries may still write and remove there."""
        if self.directory is None:
            return
        newest = time.time() - older_than_seconds
        for folder, folders, names in os.walk(self.directory):  # passes over directories that vanish
            if not Path(folder).is_relative_to(self.directory / bytecode.FOLDER):  # where any name may be a package's
                folders[:] = [name for name in folders if not _PASSING.fullmatch(name)]
            for path in (Path(folder, name) for name in names if not _PASSING.fullmatch(name)):
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
