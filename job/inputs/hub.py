"""Models and datasets from the Hugging Face Hub, or what `HF_ENDPOINT` names instead.

The process that trains is offline, so another one (`job.inputs.hub_worker`) downloads, in the environment that the user
gave. The messages between the two are defined here.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from job.inputs.data_files import HUB, LeftOut, Side
from job.runtime import libraries
from job.runtime.child import Child, Failed, Message
from job.runtime.errors import ConfigError, JobError, StorageError

BRIEF_SECONDS = 45.0
"""How long a mistake is retried that may be a machine which is just starting."""
_NAME = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True, kw_only=True)
class Request(Message):
    """What to download, and where to."""

    kind: str
    """`model` or `dataset`."""
    repo: str
    revision: str | None
    split: str | None
    directory: str
    weights: bool = True
    """False asks for stubs with the headers of the weights (`job.inputs.safetensors_stub`)."""
    side: Side = "training"
    """Of a dataset: what its files are for."""
    hold_out: bool = False
    """Of a dataset: whether it may bring an evaluation set (`job.inputs.data_files.choose`)."""


@dataclass(frozen=True, kw_only=True)
class Downloaded(Message):
    """The worker's answer: where the files are."""

    path: str
    commit: str
    files: list[str]
    held_out: list[str] = field(default_factory=list)
    left_out: list[list[str]] = field(default_factory=list)
    """Name and reason of each."""


@dataclass(frozen=True, kw_only=True)
class Unreachable(Message):
    """The worker's answer when another try may help."""

    reason: str
    brief: bool
    """Whether only a short wait may help; then it ends with this error, else with one that the hub is unreachable."""
    kind: str
    message: str
    remedy: str


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
    held_out: tuple[str, ...] = ()
    """Of a dataset, relative to `path`: files that become the evaluation set."""
    left_out: tuple[LeftOut, ...] = ()


class _UnreachableError(Exception):
    """The hub does not respond, or not now."""

    def __init__(self, reason: str, *, instead: JobError | None = None) -> None:
        super().__init__(reason)
        self.instead = instead
        """What it ends with after a short wait."""


def fetch_model(name: str, directory: Path, *, patience_seconds: float = 3600.0, weights: bool = True) -> HubFetched:
    """Download a model's weights (safetensors only), configuration, tokenizer and templates.

    Args:
        name: `org/name` or `org/name@revision`.
        directory: where to; files that are already there are not downloaded again.
        patience_seconds: how long an outage is retried.
        weights: False downloads stubs with the headers and sizes of the weights.

    Raises:
        DataError: no such repository or revision, or it is not a model (`job.inputs.model_files`).
        AccessDeniedError: gated or private, and the token does not give access.
        StorageError: unreachable past the patience, or offline.
    """
    return _fetch(_request("model", name, directory, weights=weights), patience_seconds)


def fetch_dataset(
    uri: str,
    directory: Path,
    *,
    patience_seconds: float = 3600.0,
    side: Side = "training",
    hold_out: bool = False,
) -> HubFetched:
    """Download the data files of a dataset.

    Args:
        uri: `hf://datasets/org/name[@revision][:split]`. Without a split, those that `data_files.choose` takes.
        directory: where to; files that are already there are not downloaded again.
        patience_seconds: how long an outage is retried.
        side: what the files are for.
        hold_out: whether the dataset may bring an evaluation set.

    Raises:
        DataError: no such repository, revision or split, or it is not clear which files are meant.
        AccessDeniedError: gated or private, and the token does not give access.
        StorageError: unreachable past the patience, or offline.
    """
    request = _request("dataset", uri.removeprefix(HUB), directory)
    return _fetch(dataclasses.replace(request, side=side, hold_out=hold_out), patience_seconds)


def _request(kind: str, name: str, directory: Path, *, weights: bool = True) -> Request:
    found = _NAME.fullmatch(name)
    if found is None or (kind == "model" and found["split"]):
        raise ConfigError(
            f"{name!r} is not the name of a {kind} on the hub.",
            remedy="Use org/name or org/name@revision; for a dataset :split may follow.",
        )
    return Request(
        kind=kind,
        repo=found["repo"],
        revision=found["revision"],
        split=found["split"],
        directory=str(directory.absolute()),
        weights=weights,
    )


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
        stop=lambda state: (state.seconds_since_start or 0.0) >= _limit(state, patience_seconds),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return retrying(_download, request)
    except _UnreachableError as error:
        if error.instead is not None:
            raise error.instead from error
        raise StorageError(
            f"The hub could not be reached for {patience_seconds:.0f} s to read {request.repo}: {error}.",
            remedy="Run again when it answers, or give the address of a copy in S3 or on disk.",
        ) from error


def _limit(state: RetryCallState, patience_seconds: float) -> float:
    """How long to try, given how it failed last."""
    error = state.outcome.exception() if state.outcome else None
    brief = isinstance(error, _UnreachableError) and error.instead is not None
    return min(BRIEF_SECONDS, patience_seconds) if brief else patience_seconds


def _download(request: Request) -> HubFetched:
    """One try, in a process that ends with it."""
    environment = libraries.child_environment(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")
    answers = (Downloaded, Failed, Unreachable)
    with Child("job.inputs.hub_worker", environment=environment, receives=answers) as worker:
        worker.send(request)
        match next(iter(worker), None):
            case Downloaded() as found:
                return HubFetched(
                    path=Path(found.path),
                    name=request.repo,
                    commit=found.commit,
                    files=tuple(found.files),
                    held_out=tuple(found.held_out),
                    left_out=tuple(LeftOut(name=name, reason=reason) for name, reason in found.left_out),
                )
            case Failed() as failed:
                raise failed.error()
            case Unreachable() as answer:
                failed = Failed(kind=answer.kind, message=answer.message, remedy=answer.remedy)
                raise _UnreachableError(answer.reason, instead=failed.error() if answer.brief else None)
            case _:
                raise _UnreachableError(f"the process that downloads ended with status {worker.wait()}")
