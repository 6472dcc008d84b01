"""No core dumps, and no modules from the working directory, with real processes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.process

READS = [sys.executable, "-c", "import os; open(os.environ['TUNE_MODEL_FILE']).read()"]
JOB = [sys.executable, "-m", "job"]
SHADOWS = (
    *("structlog", "json", "yaml", "torch", "argparse", "signal", "resource", "__future__", "psutil", "environs"),
    *("boto3", "pyarrow", "numpy", "rich", "ssl", "secrets", "decimal", "hashlib", "logging", "tests", "conftest"),
)


@pytest.fixture
def plain():
    """This environment without the job's variables, without a way to import it, and without what `coverage` adds."""
    others = ("TUNE_", "PYTHON", "HF_", "COVERAGE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


def killed(command, number, *, environment, fifo):
    """The wait status of a process that is killed while it reads, where core dumps may be of any size."""
    child = subprocess.Popen(
        ["bash", "-c", 'ulimit -c unlimited && exec "$@"', "bash", *command],
        cwd=fifo.parent,
        env={**environment, "TUNE_MODEL_FILE": str(fifo)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with opened(fifo, child):
        child.send_signal(number)
        _, status = os.waitpid(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return status


@contextlib.contextmanager
def opened(fifo, child):
    """The end of a pipe that is written to, once the child has opened the other."""
    end = time.monotonic() + 20
    while time.monotonic() < end and child.poll() is None:
        try:
            writing = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.02)
        else:
            yield
            os.close(writing)
            return
    raise AssertionError("it never read")


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_crash_leaves_no_core_dump(plain, tmp_path, number):
    """A process that a signal kills, where a core dump is allowed, leaves none of its memory."""
    fifo = tmp_path / "model"
    os.mkfifo(fifo)
    if not os.WCOREDUMP(killed(READS, number, environment=plain, fifo=fifo)):
        pytest.skip("this machine writes no core dumps")
    status = killed(JOB, number, environment={**plain, "PYTHONPATH": str(ROOT)}, fifo=fifo)
    assert (os.WIFSIGNALED(status), os.WTERMSIG(status)) == (True, number)
    assert not os.WCOREDUMP(status)


def test_no_memory_for_a_program_that_takes_core_dumps(plain, tmp_path):
    """Where the kernel pipes dumps to a program, no limit holds: the dump has none of the memory, nor children's."""
    fifo = tmp_path / "model"
    os.mkfifo(fifo)
    child = subprocess.Popen(
        JOB,
        cwd=tmp_path,
        env={**plain, "PYTHONPATH": str(ROOT), "TUNE_MODEL_FILE": str(fifo)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with opened(fifo, child):
        family = [child.pid, *(process.pid for process in psutil.Process(child.pid).children())]
        filters = [int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) for pid in family]
    child.wait()
    assert len(filters) > 1
    assert set(filters) == {0}


def shadow(directory, *more):
    """Put modules there that say so when they are run."""
    for name in (*SHADOWS, *more):
        (directory / f"{name}.py").write_text(f"open({str(directory / ('ran-' + name))!r}, 'w')\n")


def ran(directory):
    return sorted(path.name for path in directory.glob("ran-*"))


@pytest.mark.parametrize("path", [str(ROOT), f":{ROOT}"], ids=["PYTHONPATH", "PYTHONPATH with an empty place"])
def test_the_working_directory_is_not_searched(plain, tmp_path, path):
    """The modules of the directory where the job is started are not run. Those by which a site customises Python are,
    where PYTHONPATH itself names the directory."""
    shadow(tmp_path, *(("sitecustomize", "usercustomize") if path == str(ROOT) else ()))
    command = [sys.executable, "-m", "job", "variables"]
    environment = {**plain, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran(tmp_path) == []
    assert (done.returncode, done.stdout[:5]) == (0, "TUNE_"), done.stderr


FETCH = "import sys; sys.path.append(sys.argv[1]); from pathlib import Path; from job.inputs.hub import fetch_model; "
FETCH += "fetch_model('org/name', Path('nowhere'), patience_seconds=0)"


@pytest.mark.parametrize(
    "command", [["-m", "job", "variables"], ["-P", "-c", FETCH]], ids=["the job", "a child process"]
)
def test_a_clone_hides_no_package(plain, tmp_path, command):
    """In a clone the working directory has the package itself: what else lies there is not run."""
    shutil.copytree(ROOT / "job", tmp_path / "job", ignore=shutil.ignore_patterns("__pycache__"))
    shadow(tmp_path)
    environment = {**plain, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, *command, *([str(tmp_path)] if "-P" in command else [])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran(tmp_path) == []
    assert "TUNE_MODEL" in done.stdout or "local cache does not hold org/name" in done.stderr


def test_the_image_searches_no_working_directory():
    """Platforms start the image's process where they like; there Python itself leaves the directory out."""
    assert "    PYTHONSAFEPATH=1 \\\n" in (ROOT / "Dockerfile").read_text()
