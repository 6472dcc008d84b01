"""What the process knows of itself: rank and pod as the platform gives them, its environment and age, the CPUs of
its container, its scratch directory."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from job.runtime import gpus
from job.runtime.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")
SHARED = ("/tmp", "/var/tmp")  # noqa: S108 - the directories themselves
METADATA = ("169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23")
"""Where platforms give credentials to their machines, containers and pods."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """Where this process runs, as the platform describes it."""

    rank: int
    world_size: int
    host: str
    pod: str | None

    @classmethod
    def current(cls) -> Process:
        """The facts that torchrun and Kubernetes pass along."""
        return cls(
            rank=int(os.environ.get("RANK") or "0"),
            world_size=int(os.environ.get("WORLD_SIZE") or "1"),
            host=socket.gethostname(),
            pod=os.environ.get("POD_NAME") or os.environ.get("HOSTNAME"),
        )

    @property
    def gpus(self) -> tuple[str, ...]:
        """The names of the cards of this machine."""
        return gpus.find().names


def variables() -> dict[str, str]:
    """The environment as it is now."""
    # One by one: another thread may be removing names, as libraries do when they are imported.
    found = ((name, os.environ.get(name)) for name in list(os.environ))
    return {name: value for name, value in found if value is not None}


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


def cpu_quota() -> float | None:
    """CPUs that the container may use (cgroup v2: `<quota> <period>` or `max ...`); None without a limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def is_scratch(path: Path) -> bool:
    """Whether a path lies where a run keeps what may be lost: in the directory of `scratch`, or anywhere below
    `TMPDIR` if that was set to a place of its own."""
    temporary = os.environ.get("TMPDIR")
    parent = Path(temporary or tempfile.gettempdir()).resolve()
    place = path.resolve()
    private = bool(temporary) and str(parent) not in SHARED
    return place.is_relative_to(parent if private else parent / f"finetune-job-{os.getuid()}")


def expand_no_proxy() -> None:
    """Add to `NO_PROXY` the addresses of its ranges that a run may ask: stores and services for credentials.

    Go's programs and curl take ranges (10.0.0.0/8) there; Python's libraries compare names only (urllib, botocore).
    """
    endpoints = (value for name, value in variables().items() if "ENDPOINT" in name or name.endswith("_URI"))
    hosts = [*METADATA, *filter(None, map(_host, endpoints))]
    for name in ("NO_PROXY", "no_proxy"):
        entries = [entry.strip() for entry in os.environ.get(name, "").split(",")]
        ranges = [found for entry in entries if "/" in entry and (found := _network(entry))]
        inside = [host for host in hosts if any(_address(host) in found for found in ranges) and host not in entries]
        if inside:
            os.environ[name] = ",".join([*entries, *dict.fromkeys(inside)])


def _host(url: str) -> str | None:
    """The host of a URL if it is an address."""
    try:
        host = urlsplit(url.strip()).hostname
        return host if host and _address(host) else None
    except ValueError:
        return None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def scratch() -> Path:
    """The one directory that a run needs to write besides its output: downloads, caches, staging.

    It lies under `TMPDIR` and is private to the user, since `/tmp` may be shared.
    """
    try:
        # gettempdir alone would silently take another directory where TMPDIR is not writable.
        parent = os.environ.get("TMPDIR") or tempfile.gettempdir()
        path = Path(parent) / f"finetune-job-{os.getuid()}"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The scratch directory cannot be created: {error}.",
            remedy="Set TMPDIR to a writable directory with room for the model.",
        ) from None
    if path.stat().st_uid != os.getuid():
        raise ConfigError(
            f"The scratch directory {path} belongs to another user.", remedy="Set TMPDIR to a directory of your own."
        )
    return path
