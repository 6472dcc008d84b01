"""Finished files -> the output: hashes, uploads, and the list of published files."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from job.runtime.hashing import hashes
from job.storage.base import Store

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One published file."""

    name: str
    """Relative to the run, e.g. `adapter/adapter_model.safetensors`."""
    size: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """For `done.json`."""
        return asdict(self)


def publish(store: Store, *, run_id: str, name: str, directory: Path) -> list[Artifact]:
    """Upload a directory as `<run id>/<name>/...` and log `artifact_uploaded`.

    Returns:
        the files, sorted by name.
    """
    started = time.monotonic()
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    found = hashes(files)
    published = []
    for path in files:
        key = f"{name}/{path.relative_to(directory).as_posix()}"
        store.upload(path, f"{run_id}/{key}", sha256=found[path])
        published.append(Artifact(name=key, size=path.stat().st_size, sha256=found[path]))
    log.info(
        "artifact_uploaded",
        name=name,
        uri=f"{store.uri.rstrip('/')}/{run_id}/{name}/",
        files=len(published),
        bytes=sum(artifact.size for artifact in published),
        upload_seconds=round(time.monotonic() - started, 3),
    )
    return published
