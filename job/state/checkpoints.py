"""Checkpoints in the output: files under the attempt's own prefix, then one ledger record that is manifest and marker.

A checkpoint exists once its record does; files without one are leftovers of an attempt that died. What is read back
is verified against the record before anybody may use it.
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

from job.runtime.errors import ConfigError, DataError, JobError, PermanentError
from job.runtime.hashing import hashes
from job.state.ledger import LAYOUT, Entry, Ledger
from job.storage.base import Store
from job.storage.faults import ChangedError, DamagedError, MissingError

log = structlog.get_logger()
HISTORY = "history.jsonl"
_DATA = re.compile(r"checkpoints/data/(?P<attempt>\d+)/step-(?P<step>\d+)/")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was verified, on this disk."""

    directory: Path
    step: int
    number: int
    """Of its ledger record."""
    prefix: str
    """Where its files are in the output."""
    body: dict[str, Any]
    """The whole record: fingerprint, plan, device, versions, and the attempt that wrote it."""

    def history(self) -> bytes:
        """The metrics up to this checkpoint, as JSON Lines."""
        return (self.directory / HISTORY).read_bytes()


def upload(store: Store, *, run_id: str, attempt: int, step: int, directory: Path) -> dict[str, Any]:
    """Bring a checkpoint's files to the output, under the attempt's own prefix.

    Returns:
        what its ledger record says of them: `step`, `data` (the prefix) and `files` (name, size, sha256).
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
    """The newest good checkpoint below the attempt's own fence, downloaded and verified; None if none was ever made.

    A bad one is logged, marked, and passed over.

    Args:
        directory: where to; emptied first.
        check: reads the files as the trainer will and raises DamagedError where they do not fit together, or do not fit
            their record.

    Raises:
        PermanentError: checkpoints exist, and none is good.
        StorageError, AccessDeniedError: the store; never taken for "no checkpoint".
    """
    bad: list[str] = []
    for entry in ledger.newest_first(below=ledger.last):
        if entry.kind not in {"checkpoint", None}:
            continue
        try:
            return _bring(ledger, entry, directory, check)
        except (DamagedError, MissingError, ChangedError) as error:
            bad.append(f"commit {entry.number}: {error.message}")
            log.warning("checkpoint_damaged", commit=entry.number, reason=error.message)
            _mark(ledger, entry, error)
    if bad:
        raise PermanentError(
            f"No checkpoint of run {ledger.run_id} is whole ({'; '.join(bad[:3])}).",
            remedy="Restore the objects from the bucket's versions or a backup, or start over with TUNE_RESUME=fresh.",
        )
    return None


def none_there(uri: str) -> ConfigError:
    """The error for a run that may only be resumed, and cannot be."""
    return ConfigError(
        f"TUNE_RESUME=require, but {uri} holds no checkpoint.",
        remedy="Correct TUNE_OUTPUT and TUNE_RUN_ID, or set TUNE_RESUME=auto to begin from the base model.",
    )


def _bring(ledger: Ledger, entry: Entry, directory: Path, check: Callable[[Path, dict[str, Any]], None]) -> Restored:
    body = entry.body
    if body is None:
        raise DamagedError("the record itself cannot be understood")
    step, prefix = body["step"], body["data"]
    try:
        wanted = {str(file["name"]): (int(file["size"]), str(file["sha256"])) for file in body["files"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"the record's files cannot be understood: {error!r}") from None
    if not _DATA.fullmatch(f"{prefix.removeprefix(f'{ledger.run_id}/')}/") or HISTORY not in wanted:
        raise DamagedError(f"the record names {prefix!r} with {', '.join(wanted) or 'no files'}")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, (size, _) in wanted.items():
        _download(ledger.store, f"{prefix}/{name}", size, directory / _safe(name))
    found = hashes([directory / name for name in wanted])
    for name, (_, sha256) in wanted.items():
        if found[directory / name] != sha256:
            raise DamagedError(f"{prefix}/{name} does not have the SHA-256 of its record")
    check(directory, body)
    restored = Restored(directory=directory, step=step, number=entry.number, prefix=prefix, body=body)
    _check_history(restored)
    return restored


def _check_history(restored: Restored) -> None:
    try:
        entries = [json.loads(line) for line in restored.history().splitlines()]
        steps = [entry["step"] for entry in entries if entry["event"] == "train_progress"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{HISTORY} cannot be understood: {error!r}") from None
    if steps != list(range(1, restored.step + 1)):
        raise DamagedError(f"{HISTORY} is not of step {restored.step}")


def _safe(name: str) -> str:
    parts = PurePosixPath(name).parts
    if name != "/".join(parts) or not parts or ".." in parts or parts[0] == "/" or "\\" in name:
        raise DamagedError(f"the record names a file {name!r}")
    return name


def _download(store: Store, key: str, size: int, path: Path) -> None:
    entry = store.head(key)
    if entry is None:
        raise MissingError(f"{key} is not there")
    if entry.size != size:
        raise DamagedError(f"{key} has {entry.size} bytes, its record says {size}")
    store.download(entry, path)


def _mark(ledger: Ledger, entry: Entry, error: DataError) -> None:
    """Leave a note beside the commits. Nobody decides by it: damage on the way may have spared the object itself."""
    body = {"layout": LAYOUT, "commit": entry.number, "attempt": ledger.attempt, "reason": error.message}
    with contextlib.suppress(JobError):
        ledger.store.write(
            f"{ledger.run_id}/checkpoints/damaged/{entry.number:06d}.json", json.dumps(body, indent=1).encode()
        )


def prune(store: Store, *, run_id: str, attempts: range, kept: Iterable[str]) -> int:
    """Delete checkpoint files that nobody needs any more: those of these attempts, but for `kept`.

    Only to be called after an own commit: then no lower attempt can commit any more. Ledger and attempts stay.

    Args:
        attempts: those of the run's present life, up to the caller.
        kept: prefixes whose files stay.

    Returns:
        how many objects were deleted.
    """
    stay = tuple(f"{prefix}/" for prefix in kept)
    deleted = 0
    for entry in store.list_objects(f"{run_id}/checkpoints/data/"):
        place = _DATA.match(entry.key.removeprefix(f"{run_id}/"))
        if place and int(place["attempt"]) in attempts and not entry.key.startswith(stay):
            store.delete(entry.key)
            deleted += 1
    return deleted
