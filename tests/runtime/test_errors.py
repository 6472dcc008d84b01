"""Whatever ends a run is reported as one kind of failure."""

import errno

import pytest

from job.runtime.errors import (
    AccessDeniedError,
    ConfigError,
    DataError,
    JobError,
    PermanentError,
    StorageError,
    as_job_error,
)

GIVEN = StorageError("message", remedy="remedy")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), StorageError, id="full disk"),
        pytest.param(RuntimeError("I/O error: No space left on device (os error 28)"), StorageError, id="in words"),
        pytest.param(PermissionError(errno.EACCES, "Permission denied"), AccessDeniedError, id="no access"),
        pytest.param(MemoryError(), PermanentError, id="no memory"),
        pytest.param(OSError(errno.EIO, "Input/output error"), StorageError, id="broken disk"),
        pytest.param(OSError(errno.ENOENT, "No such file or directory"), JobError, id="another error of the system"),
        pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded"), StorageError, id="quota"),
        pytest.param(OSError(errno.ESTALE, "Stale file handle"), StorageError, id="NFS server restarted"),
        pytest.param(OSError(errno.ENOTCONN, "Transport endpoint is not connected"), StorageError, id="FUSE ended"),
        pytest.param(OSError(errno.EROFS, "Read-only file system"), AccessDeniedError, id="read-only"),
        pytest.param(OSError(errno.ENAMETOOLONG, "File name too long"), DataError, id="long name"),
        pytest.param(OSError(errno.EFBIG, "File too large"), ConfigError, id="large file"),
        pytest.param(OSError(errno.ENOLCK, "No locks available"), ConfigError, id="no locks"),
        pytest.param(OSError(errno.ENOSYS, "Function not implemented"), ConfigError, id="not supported"),
        pytest.param(OSError(errno.EMFILE, "Too many open files"), ConfigError, id="open files"),
        pytest.param(OSError(errno.ENOMEM, "Cannot allocate memory"), PermanentError, id="no memory for the system"),
        pytest.param(RuntimeError("No locks available (os error 37)"), ConfigError, id="another in words"),
        pytest.param(RuntimeError("(os error 2)"), JobError, id="an unknown one in words"),
        pytest.param(ValueError("a bug"), JobError, id="unexpected"),
    ],
)
def test_every_error_is_of_a_kind(error, kind):
    """Errors of the system are of the kind that says what to do; any other is unexpected, and its words are kept."""
    found = as_job_error(error)
    assert type(found) is kind
    assert str(error) in found.message
    assert found.remedy


def test_an_error_of_ours_stays_itself():
    """What has a kind already is reported as it is."""
    assert as_job_error(GIVEN) is GIVEN


def test_threads_that_cannot_be_started():
    """A limit of processes is named, with where it is raised."""
    found = as_job_error(RuntimeError("can't start new thread"))
    assert type(found) is ConfigError
    assert "pids" in found.remedy
