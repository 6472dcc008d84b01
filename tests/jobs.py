"""Run `python -m job` as a container would: a process, environment variables, nothing else."""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.zygote import KEPT, ROOT, Zygote


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended, and every line that it logged."""

    code: int
    lines: list[dict]
    seconds: float

    def events(self, name: str) -> list[dict]:
        """All events of one kind."""
        return [line for line in self.lines if line["event"] == name]

    def event(self, name: str) -> dict:
        """The only, or last, event of one kind."""
        found = self.events(name)
        assert found, f"no {name} in {[line['event'] for line in self.lines]}; last: {self.lines[-3:]}"
        return found[-1]


class Forked:
    """A job that the zygote started, used like a `subprocess.Popen` whose standard error is its standard output."""

    def __init__(self, parent: Zygote, environment: dict[str, str], output: Path) -> None:
        self._zygote = parent
        os.mkfifo(output)
        self.pid = parent.fork({"env": environment, "log": str(output), "hooks": []})
        self.stdout = output.open("rb")  # both sides wait here for each other

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._zygote.codes.get(self.pid)

    def wait(self, timeout: float = 240) -> int:
        code = self._zygote.wait(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired("job", timeout)
        return code

    def communicate(self, timeout: float) -> tuple[bytes, None]:
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired("job", timeout)
        self.wait(10)
        return found[0], None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@functools.cache
def zygote() -> Zygote:
    """One for each test process, started when it is first needed."""
    directory = tempfile.TemporaryDirectory(prefix="zygote-")
    started = Zygote(Path(directory.name))
    atexit.register(directory.cleanup)
    atexit.register(started.close)
    return started


def start(tmp_path: Path, *, fresh: bool = False, **variables: object) -> subprocess.Popen | Forked:
    """Start a job; `model=...` sets TUNE_MODEL, a name in capitals is taken as it is.

    Args:
        fresh: a new interpreter that imports everything itself, ten seconds that most tests need not wait.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    named = {(name if name.isupper() else f"TUNE_{name.upper()}"): str(value) for name, value in variables.items()}
    (tmp_path / "scratch").mkdir(exist_ok=True)
    # One thread that waits passively: test processes share the cores.
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**kept, "TMPDIR": str(tmp_path / "scratch"), **threads, **named}
    if not fresh:
        return Forked(zygote(), environment, tmp_path / f"output-{uuid.uuid4().hex[:8]}")
    return subprocess.Popen(
        [sys.executable, "-m", "job"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(child: subprocess.Popen | Forked, *, seconds: float = 240) -> Ended:
    """Wait for a job; every line of its output must be JSON."""
    started = time.monotonic()
    try:
        output, _ = child.communicate(timeout=seconds)
    finally:
        child.kill()
    lines = [json.loads(line) for line in output.splitlines()]
    return Ended(code=child.returncode, lines=lines, seconds=time.monotonic() - started)


def run(tmp_path: Path, *, fresh: bool = False, **variables: object) -> Ended:
    """Start a job and wait for its end."""
    return finish(start(tmp_path, fresh=fresh, **variables))


def stop_at(child: subprocess.Popen | Forked, event: str, number: int = signal.SIGTERM) -> Ended:
    """Send a signal when an event appears, then wait for the end."""
    lines = []
    for line in child.stdout:
        lines.append(json.loads(line))
        if lines[-1]["event"] == event:
            child.send_signal(number)
            break
    ended = finish(child)
    return Ended(code=ended.code, lines=lines + ended.lines, seconds=ended.seconds)
