"""Checkpoints in the output: files under the attempt's own prefix, then one object that is manifest and marker.

A checkpoint exists once its commit object does; files without one are leftovers of an attempt that died.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from job.digests import hashes
from job.errors import StorageError
from job.storage.store import Store

log = structlog.get_logger()
LEFT_OUT = {"training_args.bin"}  # a pickle of settings that the run's record holds as JSON
TRIES = 100


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one attempt of one run keeps its checkpoints."""

    store: Store
    run_id: str
    attempt: int


def commit(place: Place, *, step: int, directory: Path, stall_seconds: float) -> str:
    """Upload a checkpoint directory and commit it; logs `checkpoint_committed`.

    Args:
        step: optimizer steps done.
        stall_seconds: how long training already waited for the files to be written; the upload is added.

    Returns:
        the key of the commit object.
    """
    started = time.monotonic()
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in LEFT_OUT)
    found = hashes(files)
    prefix = f"{place.run_id}/checkpoints/data/{place.attempt:04d}/step-{step:06d}"
    manifest = []
    for path in files:
        name = path.relative_to(directory).as_posix()
        place.store.upload(path, f"{prefix}/{name}", sha256=found[path])
        manifest.append({"name": name, "size": path.stat().st_size, "sha256": found[path]})
    key = _mark(place, {"step": step, "attempt": place.attempt, "data": prefix, "files": manifest})
    seconds = time.monotonic() - started
    log.info(
        "checkpoint_committed",
        step=step,
        bytes=sum(path.stat().st_size for path in files),
        stall_seconds=round(stall_seconds + seconds, 3),
        upload_seconds=round(seconds, 3),
        commit=key,
    )
    return key


def _mark(place: Place, body: dict[str, object]) -> str:
    """Create the next commit object; the number is taken by whoever creates it first."""
    commits = f"{place.run_id}/checkpoints/commits/"
    taken = [int(Path(entry.key).stem) for entry in place.store.entries(commits)]
    first = max(taken, default=0) + 1
    for number in range(first, first + TRIES):
        key = f"{commits}{number:06d}.json"
        if place.store.create(key, json.dumps(body, indent=1).encode()):
            return key
    raise StorageError(f"No free commit number from {first} on under {commits}.", remedy="Another attempt is running.")
