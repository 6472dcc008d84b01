"""Checkpoints in the output: files under the attempt's own prefix, then one ledger record that is manifest and marker.

A checkpoint exists once its record does; files without one were left by an attempt that was killed. Files that are read
back are verified against the record before they are used.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import structlog

from job.observability.json_text import encoded
from job.runtime.errors import ConfigError, DataError, JobError, PermanentError
from job.runtime.hashing import hashes
from job.state.json_object import LAYOUT
from job.state.ledger import Entry, Ledger
from job.storage.base import Store
from job.storage.faults import ChangedError, DamagedError, MissingError

log = structlog.get_logger()
HISTORY = "history.jsonl"
_DATA = re.compile(r"checkpoints/data/(?P<attempt>\d+)/step-(?P<step>\d+)/")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A verified checkpoint on this disk."""

    directory: Path
    step: int
    number: int
    """Of its ledger record."""
    prefix: str
    """Of its files in the output."""
    body: dict[str, Any]
    """The ledger record: fingerprint, plan, device, versions, and the attempt that wrote it."""

    def history(self) -> bytes:
        """The metrics up to this checkpoint, as JSON Lines."""
        return (self.directory / HISTORY).read_bytes()


def upload(store: Store, *, run_id: str, attempt: int, step: int, directory: Path) -> dict[str, Any]:
    """Upload a checkpoint's files, under the attempt's own prefix.

    Returns:
        the fields of its ledger record: `step`, `data` (the prefix) and `files` (name, size, sha256).
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    found = hashes(files)
    prefix = f"{run_id}/checkpoints/data/{attempt:04d}/step-{step:06d}"
    manifest = []
    for path in files:
        name = path.relative_to(directory).as_posix()
        store.upload(path, f"{prefix}/{name}", sha256=found[path])
        manifest.append({"name": name, "size": path.stat().st_size, "sha256": found[path]})
    return {"step": step, "data": prefix, "files": manifest}


def restore(ledger: Ledger, directory: Path, *, check: Callable[[Path, dict[str, Any]], None]) -> Restored | None:
    """Download and verify the newest intact checkpoint below the attempt's own fence.

    A damaged one is logged, noted in the output, and skipped.

    Args:
        ledger: of the run.
        directory: where to; emptied first.
        check: reads the files as the trainer will and raises DamagedError where they do not fit together, or do not fit
            their record.

    Returns:
        the checkpoint; None if the run has none.

    Raises:
        PermanentError: checkpoints exist, and none is intact.
        FencedError: a later attempt has taken over.
        StorageError, AccessDeniedError: the store failed, which never counts as "no checkpoint".
    """
    damaged: list[str] = []
    for entry in ledger.newest_first(below=ledger.last):
        if entry.kind not in {"checkpoint", None} or (entry.body is None and _no_files(ledger)):
            continue
        try:
            return _restore(ledger, entry, directory, check)
        except (DamagedError, MissingError, ChangedError) as error:
            ledger.check_all()  # a later attempt deletes the checkpoints that it does not need
            damaged.append(f"commit {entry.number}: {error.message}")
            log.warning("checkpoint_damaged", commit=entry.number, reason=error.message)
            _note_damage(ledger, entry, error)
    if damaged:
        raise PermanentError(
            f"No checkpoint of run {ledger.run_id} is intact ({'; '.join(damaged[:3])}).",
            remedy="Restore the objects from the bucket's versions or a backup, or start over with TUNE_RESUME=fresh.",
        )
    return None


def _no_files(ledger: Ledger) -> bool:
    """Whether the run has no file of any checkpoint: then a record that is not readable was none either."""
    return not ledger.store.list_objects(f"{ledger.run_id}/checkpoints/data/")


def nothing_to_resume(uri: str) -> ConfigError:
    """The error for a run that must be resumed and has no checkpoint."""
    return ConfigError(
        f"TUNE_RESUME=require, but {uri} has no checkpoint.",
        remedy="Correct TUNE_OUTPUT and TUNE_RUN_ID, or set TUNE_RESUME=auto to start from the base model.",
    )


def _restore(ledger: Ledger, entry: Entry, directory: Path, check: Callable[[Path, dict[str, Any]], None]) -> Restored:
    body = entry.body
    if body is None:
        raise DamagedError("the record itself is not valid")
    step, prefix = body["step"], body["data"]
    try:
        wanted = {str(file["name"]): (int(file["size"]), str(file["sha256"])) for file in body["files"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"the record's list of files is not valid: {error!r}") from None
    if not _DATA.fullmatch(f"{prefix.removeprefix(f'{ledger.run_id}/')}/") or HISTORY not in wanted:
        raise DamagedError(f"the record has the prefix {prefix!r} with {', '.join(wanted) or 'no files'}")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, (size, _) in wanted.items():
        _download(ledger.store, f"{prefix}/{name}", size, directory / _safe(name))
    found = hashes([directory / name for name in wanted])
    for name, (_, sha256) in wanted.items():
        if found[directory / name] != sha256:
            uri = f"{ledger.store.uri.rstrip('/')}/{prefix}/{name}"
            raise DamagedError(f"{uri} does not have the SHA-256 of its record")
    check(directory, body)
    restored = Restored(directory=directory, step=step, number=entry.number, prefix=prefix, body=body)
    _check_history(restored)
    return restored


def _check_history(restored: Restored) -> None:
    try:
        entries = [json.loads(line) for line in restored.history().splitlines()]
        steps = [entry["step"] for entry in entries if entry["event"] == "train_progress"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{HISTORY} is not valid: {error!r}") from None
    if steps != list(range(1, restored.step + 1)):
        raise DamagedError(f"{HISTORY} is not of step {restored.step}")


def _safe(name: str) -> str:
    parts = PurePosixPath(name).parts
    if name != "/".join(parts) or not parts or ".." in parts or parts[0] == "/" or "\\" in name:
        raise DamagedError(f"the record has a file with the invalid name {name!r}")
    return name


def _download(store: Store, key: str, size: int, path: Path) -> None:
    entry, name = store.head(key), f"{store.uri.rstrip('/')}/{key}"
    if entry is None:
        raise MissingError(f"{name} is missing")
    if entry.size != size:
        raise DamagedError(f"{name} has {entry.size} bytes, its record says {size}")
    store.download(entry, path)


def _note_damage(ledger: Ledger, entry: Entry, error: DataError) -> None:
    """Write a note for people. Nothing reads it: if the transfer was damaged, the object itself may be intact."""
    body = {"layout": LAYOUT, "commit": entry.number, "attempt": ledger.attempt, "reason": error.message}
    with contextlib.suppress(JobError):
        ledger.store.write(f"{ledger.run_id}/checkpoints/damaged/{entry.number:06d}.json", encoded(body, indent=1))


def prune(store: Store, *, run_id: str, attempts: range, kept: Iterable[str]) -> int:
    """Delete the checkpoint files of these attempts, except those of the kept checkpoints.

    Only to be called after the caller's own commit: then no earlier attempt can commit any more. Ledger and attempts
    stay.

    Args:
        store: the output.
        run_id: the run.
        attempts: from the one that last started over to the caller.
        kept: prefixes of the checkpoints whose files stay.

    Returns:
        how many objects were deleted.
    """
    kept_prefixes = tuple(f"{prefix}/" for prefix in kept)
    deleted = 0
    for entry in store.list_objects(f"{run_id}/checkpoints/data/"):
        place = _DATA.match(entry.key.removeprefix(f"{run_id}/"))
        if place and int(place["attempt"]) in attempts and not entry.key.startswith(kept_prefixes):
            store.delete(entry.key)
            deleted += 1
    return deleted
