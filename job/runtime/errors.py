"""The ways a run can fail. Each kind knows its exit code; no other module has these numbers.

The codes are sysexits' where one fits, because schedulers decide by them whether to try again (README, "Exit codes").
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True, kw_only=True)
class SystemCause:
    """What errors of the operating system mean for a run."""

    numbers: tuple[int, ...]
    kind: type[JobError]
    says: str
    """What happened; the path or the error's own words follow."""
    remedy: str


FULL = SystemCause(
    numbers=(errno.ENOSPC,),
    kind=StorageError,
    says="The disk is full",
    remedy="Give the volume that holds it more space.",
)
NO_INODES = SystemCause(
    numbers=(),
    kind=StorageError,
    says="The volume has free bytes, but no inodes for more files",
    remedy="Delete files there, or make the volume with more inodes: a larger one of the same kind has more.",
)
SYSTEM: tuple[SystemCause, ...] = (
    FULL,
    SystemCause(
        numbers=(errno.EDQUOT,),
        kind=StorageError,
        says="The disk quota is used up",
        remedy="Raise the quota of this user or project, or delete files that count in it.",
    ),
    SystemCause(
        numbers=(errno.EROFS,),
        kind=AccessDeniedError,
        says="The file system is read-only",
        remedy="Mount the volume writable. If it was, its kernel found errors on it: check the disk.",
    ),
    SystemCause(
        numbers=(errno.EACCES, errno.EPERM),
        kind=AccessDeniedError,
        says="A file is not accessible",
        remedy="Make it accessible for the user that the job runs as: its owner, its mode, or fsGroup on Kubernetes.",
    ),
    SystemCause(
        numbers=(errno.ENAMETOOLONG, errno.EILSEQ),
        kind=DataError,
        says="A name is too long for its file system, or has characters that it does not take",
        remedy="Rename the object or file: most file systems take 255 bytes for each part of a path.",
    ),
    SystemCause(
        numbers=(errno.EFBIG,),
        kind=ConfigError,
        says="A file may not be this large",
        remedy="Raise the limit of the process (ulimit -f), or use a file system without one (FAT ends at 4 GiB).",
    ),
    SystemCause(
        numbers=(errno.ENOLCK,),
        kind=ConfigError,
        says="The file system has no file locks",
        remedy="Use a local disk, such as an emptyDir or a Docker volume, or start the lock service of the mount "
        "(NFS).",
    ),
    SystemCause(
        numbers=(errno.ENOSYS, errno.ENOTSUP, errno.EXDEV),
        kind=ConfigError,
        says="The file system does not support what the job needs",
        remedy="Use a local disk or a network file system. For a bucket, write its address (s3://...) instead of a "
        "mount.",
    ),
    SystemCause(
        numbers=(errno.ENOTDIR, errno.ELOOP),
        kind=ConfigError,
        says="A path leads through something that is not a directory",
        remedy="Correct the path, or remove the file or link that is in the way.",
    ),
    SystemCause(
        numbers=(errno.EMFILE, errno.ENFILE),
        kind=ConfigError,
        says="Too many files are open",
        remedy="Raise the limit of open files (ulimit -n), to 1024 at least.",
    ),
    SystemCause(
        numbers=(errno.ENOMEM,),
        kind=PermanentError,
        says="The machine ran out of memory",
        remedy="Give the job more memory.",
    ),
    SystemCause(
        numbers=(
            *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO),
            errno.ENOMEDIUM,
        ),
        kind=StorageError,
        says="The volume does not work",
        remedy="Start the run again, on another machine if it comes back: the disk, the server behind the mount or the "
        "process behind it (FUSE) failed.",
    ),
)
"""Whatever is not here is unexpected, unless it was met at a store's own files."""
_IN_WORDS = re.compile(r"\bos error (\d+)\b")
"""How libraries in Rust (safetensors, tokenizers) pass an error of the system on."""


def system_error(error: OSError, path: Path | None = None, *, number: int | None = None) -> JobError | None:
    """What an error of the operating system means; None if it is not one of `SYSTEM`.

    Args:
        error: as it was raised.
        path: where, if the error does not say so.
        number: of the error, where only its words have it.
    """
    number = error.errno if number is None else number
    cause = next((cause for cause in SYSTEM if number in cause.numbers), None)
    if cause is None:
        return None
    place = path or (Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None)
    if cause is FULL and place is not None and _has_no_inodes(place):
        cause = NO_INODES
    where = f"{path} ({error.strerror or error})" if path else words(error)
    user = f", as uid {os.geteuid()}" if cause.kind is AccessDeniedError else ""
    return cause.kind(f"{cause.says}: {where}{user}.", remedy=cause.remedy)


def _has_no_inodes(path: Path) -> bool:
    """Whether the file system of a path takes no more files, although it has room for bytes."""
    for place in (path, *path.parents):
        try:
            state = os.statvfs(place)
        except OSError:
            continue
        return bool(state.f_files) and state.f_favail == 0 and state.f_bavail > 0
    return False


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
    if isinstance(error, OSError) and error.errno is not None:
        return system_error(error)
    if found := _IN_WORDS.search(words(error)):
        return system_error(OSError(words(error)), number=int(found[1]))
    if isinstance(error, MemoryError):
        return PermanentError("The machine ran out of memory.", remedy="Give the job more memory.")
    if isinstance(error, RuntimeError) and "can't start new thread" in words(error):
        return ConfigError(
            "No more threads can be started.",
            remedy="Raise the limit of processes: the container's (pids), or the user's (ulimit -u).",
        )
    return None


def as_job_error(error: BaseException) -> JobError:
    """What to report of an error: of a known kind, or an unexpected one of kind `unknown`."""
    return known(error) or JobError(f"{type(error).__name__}: {words(error)}", remedy="The log has the traceback.")


class StopRequested(BaseException):
    """Raised in the main thread by a signal of `signals.ASKING`. Not an Exception, so that few libraries swallow it."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name
