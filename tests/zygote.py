"""Starts jobs in a second instead of ten: a process that has imported the training stack, and forks for each job.

What runs in the fork is `python -m job`'s own `__main__`, as a process of its own that is really signalled and really
killed. A hook may be installed in the fork before it starts (`tests.faults.points`), for faults at an exact place.

Requests are JSON lines on standard input, answers JSON lines on standard output: the pid of each job, later its status.
"""

import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("AWS_", "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA", "HOME", "LANG", "HF_ENDPOINT", "SSL_CERT", "COVERAGE_")
"""Beginnings of the names of variables that a job in a test inherits."""


class Zygote:
    """The process that forks jobs."""

    def __init__(self, scratch: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
        self._errors = (scratch / "zygote.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(scratch)],
            cwd=ROOT,
            env={**kept, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.pid = self._process.pid
        self._lock = threading.Condition()
        self._started: list[int] = []
        self.codes: dict[int, int] = {}
        assert json.loads(self._process.stdout.readline()) == {"ready": True}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            message = json.loads(line)
            with self._lock:
                if "started" in message:
                    self.codes.pop(message["started"], None)  # the kernel uses numbers again
                    self._started.append(message["started"])
                else:
                    self.codes[message["ended"]] = message["code"]
                self._lock.notify_all()

    def fork(self, request: dict[str, Any]) -> int:
        """Start a job; returns its pid."""
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            while not self._started:
                self._lock.wait(1)
                assert self._process.poll() is None, "the zygote died"
            return self._started.pop()

    def wait(self, pid: int, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it still runs."""
        end = time.monotonic() + seconds
        with self._lock:
            while pid not in self.codes and time.monotonic() < end:
                self._lock.wait(max(0.0, min(0.5, end - time.monotonic())))
            return self.codes.get(pid)

    def close(self) -> None:
        """End it, and every job that it still has."""
        for child in psutil.Process(self._process.pid).children(recursive=True):
            child.kill()
        self._process.stdin.close()
        self._process.wait(10)
        self._errors.close()


def main() -> None:
    """Import, then fork until standard input closes."""
    from job.runtime import libraries

    libraries.prepare(libraries.LibrarySettings(scratch=Path(sys.argv[1]), expect_gpu=False))
    for name in ("boto3", "datasets"):
        importlib.import_module(name)
    for name in ("job.run", "job.storage.s3.store", "job.stages.train", "job.tuning.finetune"):
        importlib.import_module(name)

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout.flush()  # what the libraries printed is no job's output
    _say(answers, {"ready": True})
    pids = set()
    buffer = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.01)
        if readable:
            data = os.read(0, 65536)
            if not data:
                os._exit(0)
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                pid = _fork(json.loads(line))
                pids.add(pid)
                _say(answers, {"started": pid})
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pids.discard(pid)
                _say(answers, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _say(answers, message) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _fork(request) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, 256)
        os.environ.clear()
        os.environ.update(request["env"])
        tempfile.tempdir = None
        sys.argv = ["job"]
        for name, *arguments in request["hooks"]:
            getattr(importlib.import_module("tests.faults.points"), name)(*arguments)
        runpy.run_module("job", run_name="__main__", alter_sys=True)
    except BaseException:  # noqa: BLE001 - the fork must not continue as a second zygote
        import traceback

        traceback.print_exc()
    os._exit(99)


if __name__ == "__main__":
    main()
