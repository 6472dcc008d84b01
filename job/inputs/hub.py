"""Models and datasets from the Hugging Face Hub, or what `HF_ENDPOINT` names instead.

The process that trains is offline, so a child process (`hub_download`) does the work, in the environment that the
user gave.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from job.inputs.hub_files import Request
from job.runtime import libraries
from job.runtime.errors import AccessDeniedError, ConfigError, DataError, JobError, StorageError

_NAME = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True, kw_only=True)
class HubFetched:
    """A repository's files on this disk."""

    path: Path
    """The directory that holds them; other files may be there as well."""
    name: str
    """`org/name`."""
    commit: str
    files: tuple[str, ...]
    """Relative to `path`, sorted."""


class _UnreachableError(Exception):
    """The hub does not answer, or not now."""


def fetch_model(name: str, directory: Path, *, patience_seconds: float = 3600.0, weights: bool = True) -> HubFetched:
    """Download a model's weights (safetensors only), configuration, tokenizer and templates.

    Args:
        name: `org/name` or `org/name@revision`.
        directory: where to; what is there already is not fetched again.
        patience_seconds: how long an outage is waited for.
        weights: False brings stubs with the headers and sizes of the weights.

    Raises:
        DataError: no such repository or revision, or no safetensors in it.
        AccessDeniedError: gated or private, and the token does not open it.
        StorageError: unreachable past the patience, or offline.
    """
    return _fetch(replace(_request("model", name, directory), weights=weights), patience_seconds)


def fetch_dataset(uri: str, directory: Path, *, patience_seconds: float = 3600.0) -> HubFetched:
    """Download the data files of a dataset's split.

    Args:
        uri: `hf://datasets/org/name[@revision][:split]`. Without a split: the only one there is, else `train`.
        directory: where to; what is there already is not fetched again.
        patience_seconds: how long an outage is waited for.

    Raises:
        DataError: no such repository, revision or split, or it is not clear which files are meant.
        AccessDeniedError: gated or private, and the token does not open it.
        StorageError: unreachable past the patience, or offline.
    """
    return _fetch(_request("dataset", uri.removeprefix("hf://datasets/"), directory), patience_seconds)


def _request(kind: str, name: str, directory: Path) -> Request:
    found = _NAME.fullmatch(name)
    if found is None or (kind == "model" and found["split"]):
        raise ConfigError(
            f"{name!r} is no name of a {kind} on the hub.",
            remedy="Use org/name or org/name@revision; for a dataset :split may follow.",
        )
    place = str(directory.absolute())
    return Request(kind=kind, repo=found["repo"], revision=found["revision"], split=found["split"], directory=place)


def _fetch(request: Request, patience_seconds: float) -> HubFetched:
    def before_sleep(state: RetryCallState) -> None:
        structlog.get_logger().warning(
            "storage_retry",
            operation="hub_download",
            key=request.repo,
            error=str(state.outcome.exception()) if state.outcome else "",
            tries=state.attempt_number,
            next_seconds=round(state.upcoming_sleep, 3),
            patience_seconds=patience_seconds,
        )

    retrying = Retrying(
        retry=retry_if_exception_type(_UnreachableError),
        wait=wait_random_exponential(multiplier=0.5, max=min(60.0, max(patience_seconds, 0.1))),
        stop=stop_after_delay(patience_seconds),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return retrying(_run_child, request)
    except _UnreachableError as error:
        raise StorageError(
            f"The hub could not be reached for {patience_seconds:.0f} s to read {request.repo}: {error}.",
            remedy="Run again when it answers, or give the address of a copy in S3 or on disk.",
        ) from error


def _run_child(request: Request) -> HubFetched:
    child = subprocess.Popen(
        [sys.executable, "-m", "job.inputs.hub_worker", json.dumps(asdict(request))],
        cwd=Path(__file__).parents[2],
        env=libraries.child_environment(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        outcome = _listen(child)
    finally:
        child.kill()
        child.communicate()
    return _understood(outcome, child.returncode)


def _listen(child: subprocess.Popen[str]) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    for line in child.stdout or ():
        with contextlib.suppress(ValueError):
            outcome = json.loads(line)
        if progress := outcome.get("progress"):
            structlog.get_logger().info("transfer_progress", **progress)
    child.wait()
    return outcome


def _understood(outcome: dict[str, Any], status: int) -> HubFetched:
    if fetched := outcome.get("fetched"):
        return HubFetched(
            path=Path(fetched["path"]), name=fetched["name"], commit=fetched["commit"], files=tuple(fetched["files"])
        )
    message = outcome.get("message", f"the process that downloads ended with status {status}")
    remedy = outcome.get("remedy", "")
    kinds: dict[str, type[JobError]] = {"data": DataError, "denied": AccessDeniedError, "storage": StorageError}
    if outcome.get("kind") in kinds:
        raise kinds[outcome["kind"]](message, remedy=remedy)
    raise _UnreachableError(message)
