"""What dead attempts left on a scratch volume, with real processes that are really killed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from job.runtime.errors import ConfigError
from job.runtime.workspace import workspace
from tests.jobs import ROOT

pytestmark = pytest.mark.process

HOLD = """
import sys
from pathlib import Path
from job.runtime.workspace import workspace
with workspace(Path(sys.argv[1]), "run") as work:
    (work / "weights").write_bytes(b"0" * 1000)
    print(work, flush=True)
    sys.stdin.read()
"""


def _holder(scratch):
    """A process that works in a directory of its own until it is killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, scratch], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return child, Path(child.stdout.readline().strip())


def test_what_a_killed_attempt_left_is_removed(tmp_path):
    """The next attempt removes the directory of one that was killed, and leaves that of one which is alive."""
    (dead, left), (living, kept) = _holder(tmp_path), _holder(tmp_path)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        (tmp_path / "work" / "never-locked").mkdir()
        (tmp_path / "inputs").mkdir()
        with workspace(tmp_path, "run") as mine:
            assert not left.exists()
            assert (kept / "weights").exists()
            assert {path for path in (tmp_path / "work").iterdir() if path.is_dir()} == {kept, mine}
        assert not mine.exists()
        assert (tmp_path / "inputs").exists()
    finally:
        living.kill()
        living.wait()


def test_a_scratch_without_locks_is_a_configuration_error(tmp_path, monkeypatch):
    """A file system whose locks do not work (NFS without its lock daemon) is named, with what to do."""

    def refused(_descriptor, _operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(ConfigError, match=str(tmp_path)) as raised, workspace(tmp_path, "run"):
        pass
    assert "TMPDIR" in raised.value.remedy
