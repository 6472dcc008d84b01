"""Whatever ends a run is reported as one kind of failure."""

import errno

import pytest

from job.runtime.errors import AccessDeniedError, JobError, PermanentError, StorageError, as_job_error

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
