"""File systems that misbehave, real ones: full, without inodes, read-only, with limits, without renames or locks."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from job.runtime.errors import ConfigError, DataError, JobError, StorageError
from job.storage.open import open_store
from tests.jobs import ROOT

MOUNTS = bool(shutil.which("unshare")) and subprocess.call(["unshare", "-m", "true"], stderr=subprocess.DEVNULL) == 0
WRITE = """
import json, sys
from job.runtime.errors import JobError
from job.storage.open import open_store
for place in sys.argv[1:]:
    try:
        for number in range(100):
            open_store(place).write(f"key{number}", b"x" * 50_000)
        print(json.dumps([0, "", ""]))
    except JobError as error:
        print(json.dumps([error.exit_code, error.message, error.remedy]))
"""
REFUSED = """
import errno, json, sys
from pathlib import Path
from tests.misbehaving import refuse
from job.runtime.errors import as_job_error
from job.runtime.workspace import workspace
from job.stages import preflight
place, call, number = sys.argv[1:]
refuse(call, getattr(errno, number))
try:
    if call == "flock":
        with workspace(Path(place), "run"):
            pass
    else:
        preflight.probe_output(place)
    print(json.dumps([0, "", ""]))
except Exception as error:
    found = as_job_error(error)
    print(json.dumps([found.exit_code, found.message, found.remedy]))
"""


def _said(command: list[str]) -> list[tuple[int, str, str]]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.process
@pytest.mark.skipif(not MOUNTS, reason="needs a mount namespace")
def test_mounts(tmp_path: Path) -> None:
    """A full disk, one without inodes and one that is read-only are told apart, each with what helps."""
    full, inodes, read_only = (tmp_path / name for name in ("full", "inodes", "read_only"))
    for place in (full, inodes, read_only):
        place.mkdir()
    mounted = (
        f"mount -t tmpfs -o size=1m none {full} && mount -t tmpfs -o nr_inodes=20,size=100m none {inodes}"
        f" && mount -t tmpfs -o ro none {read_only}"
        f' && exec "$0" -c "$1" {full} {inodes} {read_only}'
    )
    found = _said(["unshare", "-m", "sh", "-c", mounted, sys.executable, WRITE])
    assert [code for code, _, _ in found] == [74, 74, 77]
    for (_, message, remedy), says, helps in zip(
        found, ("disk is full", "no inodes", "read-only"), ("more space", "inodes", "writable"), strict=True
    ):
        assert says in message
        assert helps in remedy


@pytest.mark.process
@pytest.mark.parametrize(
    ("call", "number", "code", "says", "remedy"),
    [
        ("rename", "ENOSYS", 78, "does not support", "instead of a mount"),  # mountpoint-s3
        ("rename", "EPERM", 78, "does not let a file be replaced", "instead of a mount"),  # gcsfuse and others
        ("rename", "EXDEV", 78, "does not support", "local disk"),
        ("link", "EPERM", 0, "", ""),  # without hard links files are created exclusively
        ("fsync", "EIO", 74, "volume does not work", "another machine"),
        ("fsync", "EDQUOT", 74, "quota", "Raise the quota"),  # where quotas are checked late (NFS)
        ("fsync", "ESTALE", 74, "volume does not work", "server behind the mount"),
        ("flock", "ENOLCK", 78, "cannot be locked", "TMPDIR"),
        ("flock", "ENOSYS", 78, "cannot be locked", "TMPDIR"),
    ],
)
def test_what_a_file_system_refuses(tmp_path: Path, call: str, number: str, code: int, says: str, remedy: str) -> None:
    """What a run will need is tried before it begins; the kernel itself refuses here."""
    ((found, message, helps),) = _said([sys.executable, "-c", REFUSED, str(tmp_path), call, number])
    assert (found, says in message, remedy in helps) == (code, True, True), (found, message, helps)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A limit of the process (`ulimit -f`) cannot get better by itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ConfigError, match="may not be this large") as caught:
            open_store(str(tmp_path)).write("key", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit -f" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == []


def test_too_many_open_files(tmp_path: Path) -> None:
    """So can a limit of open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(ConfigError, match="Too many files"):
            open_store(str(tmp_path)).write("key", b"x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("key", "kind", "says"),
    [
        ("k" * 300, DataError, "too long"),
        ("file/key", ConfigError, "not a directory"),
        ("loop/key", ConfigError, "not a"),
    ],
)
def test_names(tmp_path: Path, key: str, kind: type[JobError], says: str) -> None:
    """A name that the file system does not take, and a path through a file or a circle of links."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(kind, match=says) as caught:
        open_store(str(tmp_path)).write(key, b"x")
    assert str(tmp_path / key) in caught.value.message


def test_a_disk_error_that_is_not_known(tmp_path: Path) -> None:
    """Whatever else a store's own files fail with is an outage of the volume."""
    from job.storage.disk import disk_errors

    with pytest.raises(StorageError, match="could not be read or written"), disk_errors(tmp_path):
        raise OSError(errno.EBADMSG, "Bad message")
