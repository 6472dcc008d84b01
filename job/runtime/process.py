"""What the process knows of itself: rank and pod as the platform gives them, its age, its GPUs, its scratch
directory."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from job.runtime import secrets
from job.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Process:
    """Where this process runs, as the platform tells it."""

    rank: int
    world_size: int
    host: str
    pod: str | None
    gpus: tuple[str, ...]
    """The cards' names, as the driver tells without any library."""

    @classmethod
    def current(cls) -> Process:
        """The facts that torchrun and Kubernetes pass along."""
        return cls(
            rank=int(os.environ.get("RANK") or "0"),
            world_size=int(os.environ.get("WORLD_SIZE") or "1"),
            host=socket.gethostname(),
            pod=os.environ.get("POD_NAME") or os.environ.get("HOSTNAME"),
            gpus=_gpus(),
        )


def place_problems() -> list[str]:
    """RANK and WORLD_SIZE come from torchrun, or from a platform that starts several processes."""
    return [
        f"{name}={value!r} is not a whole number. Unset it, or start the job as torchrun does."
        for name in ("RANK", "WORLD_SIZE")
        if (value := os.environ.get(name)) and not value.isdecimal()
    ]


def seconds_since_start() -> float:
    """How long this process has been running."""
    return time.time() - psutil.Process().create_time()


def _gpus() -> tuple[str, ...]:
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
            found.append(lines.get("Model", "unknown").strip())
    return tuple(found)


def scratch() -> Path:
    """The one directory that a run needs to write besides its output: downloads, caches, staging.

    It lies under `TMPDIR` and is private to the user, since `/tmp` may be shared.
    """
    try:
        # gettempdir alone would take another directory in silence where TMPDIR cannot be written.
        parent = os.environ.get("TMPDIR") or tempfile.gettempdir()
        path = Path(parent) / f"finetune-job-{os.getuid()}"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"No directory to work in: {error}.", remedy="Set TMPDIR to a writable directory with room for the model."
        ) from None
    if path.stat().st_uid != os.getuid():
        raise ConfigError(
            f"The scratch directory {path} belongs to another user.", remedy="Set TMPDIR to a directory of your own."
        )
    return path


def gpu_present() -> bool:
    """Whether the machine shows a GPU device, told without importing torch (WSL shows /dev/dxg)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def secret_values() -> frozenset[str]:
    """The values of all variables whose names say that they are secret, and passwords inside URLs."""
    return secrets.values(os.environ)
