"""The ways a run can fail. Each kind knows its exit code; no other module has these numbers.

The codes are sysexits' where one fits, because schedulers decide by them whether to try again (README, "Exit codes").
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar

from job.runtime.credentials import shown


class JobError(Exception):
    """A failure that the user can act on. It quotes addresses without passwords and signatures (`credentials.shown`).

    Args:
        message: what happened, naming the value and the rule.
        remedy: what to do about it; shown after the message and kept as a field of its own in logs and records.
    """

    kind: ClassVar[str] = "unknown"
    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "unexpected error: the log has the traceback"
    retry: ClassVar[bool] = True
    """Whether whatever runs the container should start it again; every manifest and spec is tested against this.
    For an unexpected error, as for a storage outage, a bounded number of times."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.message = shown(message)
        self.remedy = shown(remedy)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ConfigError(JobError):
    """The environment or the command line is invalid, or a run's inputs changed under the same id."""

    kind = "config"
    exit_code = 78
    meaning = "environment or command line invalid, or the inputs of this run changed"
    retry = False

    def __init__(self, message: str, *, remedy: str = "", problems: Sequence[str] = ()) -> None:
        """Args: problems: each problem in words, when there may be several."""
        super().__init__(message, remedy=remedy)
        self.problems = tuple(shown(problem) for problem in problems)

    def __str__(self) -> str:
        return "\n".join((super().__str__(), *(f"- {problem}" for problem in self.problems)))


class DataError(JobError):
    """The dataset or model is missing, invalid, or leaves nothing to train on."""

    kind = "data"
    exit_code = 65
    meaning = "dataset or model missing or invalid, or nothing to train on"
    retry = False


class AccessDeniedError(JobError):
    """Access was denied: wrong credentials, or a permission is missing."""

    kind = "denied"
    exit_code = 77
    meaning = "wrong credentials, or a permission is missing"
    retry = False


class PermanentError(JobError):
    """Not retryable: the loss diverged, or memory is not enough."""

    kind = "permanent"
    exit_code = 70
    meaning = "a retry would fail in the same way: the loss diverged, or out of memory"
    retry = False


class FencedError(JobError):
    """Another attempt owns the run."""

    kind = "fenced"
    exit_code = 76
    meaning = "another attempt owns the run"
    retry = False


class StorageError(JobError):
    """Storage was unreachable for longer than the patience, or the disk is full."""

    kind = "storage"
    exit_code = 74
    meaning = "storage unreachable for longer than the patience, or disk full"


class InterruptedError(JobError):  # noqa: A001 - the domain's word; the builtin is for retried system calls
    """SIGTERM, SIGINT or SIGHUP asked the process to stop."""

    kind = "interrupted"
    exit_code = 75
    meaning = "SIGTERM, SIGINT or SIGHUP"


KINDS: tuple[type[JobError], ...] = (
    ConfigError,
    DataError,
    AccessDeniedError,
    PermanentError,
    FencedError,
    StorageError,
    InterruptedError,
)


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)


def words(value: object) -> str:
    """The text of an error or of any other value, also where its `__str__` raises."""
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - whatever it is, the value has no text
        return f"({type(value).__name__} without a text: {type(error).__name__})"


def known(error: BaseException) -> JobError | None:
    """The kind of failure that an operating-system error or a lack of memory is; None for an unexpected error."""
    if isinstance(error, JobError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    # safetensors reports the system's error in words only.
    if number in NO_SPACE or any(f"os error {code}" in words(error) for code in NO_SPACE):
        return StorageError(f"The disk is full: {error}.", remedy="Give the scratch directory (TMPDIR) more room.")
    if number in NO_ACCESS:
        return AccessDeniedError(f"A file is not accessible: {error}.", remedy="Fix its owner or mode.")
    if isinstance(error, MemoryError):
        return PermanentError("The machine ran out of memory.", remedy="Give the job more memory.")
    return None


def as_job_error(error: BaseException) -> JobError:
    """What to report of an error: of a known kind, or an unexpected one of kind `unknown`."""
    return known(error) or JobError(f"{type(error).__name__}: {words(error)}", remedy="The log has the traceback.")


class StopRequested(BaseException):
    """Raised in the main thread by a signal of `signals.ASKING`. Not an Exception, so that few libraries swallow it."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name
