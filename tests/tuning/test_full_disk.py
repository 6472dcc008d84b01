"""A checkpoint for which there is no room, distinguished from other errors by the cause."""

import contextlib
import errno
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from job.tuning.callbacks.save_points import SavePoints
from job.tuning.trainer.full_disk import skip_if_full

LIMIT_BYTES = 1 << 18
WRITERS = {
    "torch": lambda path: torch.save(torch.zeros(1 << 20), path),
    "torch, into a file object": lambda path: torch.save(torch.zeros(1 << 20), path.open("wb")),
    "safetensors": lambda path: save_file({"weight": torch.zeros(1 << 20)}, path),
    "Python": lambda path: path.write_bytes(bytes(1 << 22)),
}


@contextlib.contextmanager
def small_files():
    """No file may grow beyond `LIMIT_BYTES`; Python ignores the signal that says so, and the write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint's directory, half written."""
    directory = tmp_path / "checkpoint-4"
    directory.mkdir()
    (directory / "scheduler.pt").write_bytes(b"half")
    return directory


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_may_not_grow(checkpoint, write):
    """Whoever writes, and however it reports the failed write: the checkpoint is skipped, its files are deleted."""
    with pytest.raises((OSError, RuntimeError, SafetensorError)) as caught, small_files():
        write(checkpoint / "file")
    skip_if_full(caught.value, checkpoint, 4)
    assert not checkpoint.exists()


def wrapped(inner: Exception, outer: Exception) -> Exception:
    """An error that came up while another one was handled."""
    outer.__context__ = inner
    return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
        wrapped(OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("the state could not be saved")),
    ],
    ids=str,
)
def test_the_cause_decides(checkpoint, error):
    """A disk, a quota or a limit on files that is used up, also where a library has wrapped the error."""
    skip_if_full(error, checkpoint, 4)
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        SafetensorError("Error while serializing: I/O error: Is a directory (os error 21)"),
    ],
    ids=str,
)
def test_other_errors_are_raised(checkpoint, error):
    """What has another cause ends the run, and its files are deleted."""
    with pytest.raises(type(error)) as caught:
        skip_if_full(error, checkpoint, 4)
    assert caught.value is error
    assert not checkpoint.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_where_a_checkpoint_is_handed_over(checkpoint, number):
    """The history that does not fit, or a move that needs room, costs the checkpoint and not the run."""

    def save(*_):
        raise OSError(number, "no room")

    points = SavePoints(hooks=SimpleNamespace(save=save))
    points.on_save(SimpleNamespace(output_dir=checkpoint.parent), SimpleNamespace(global_step=4), None)
    assert not checkpoint.exists()
