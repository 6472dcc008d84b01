"""Run `python -m job` as a container would: a process, environment variables, nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("AWS_", "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA", "HOME", "LANG", "HF_ENDPOINT", "SSL_CERT")


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


def start(tmp_path: Path, **variables: object) -> subprocess.Popen:
    """Start a job; `model=...` sets TUNE_MODEL, a name in capitals is taken as it is."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    named = {(name if name.isupper() else f"TUNE_{name.upper()}"): str(value) for name, value in variables.items()}
    (tmp_path / "scratch").mkdir(exist_ok=True)
    # One thread: two test processes with two threads each would wait for each other on two cores.
    environment = {**kept, "TMPDIR": str(tmp_path / "scratch"), "OMP_NUM_THREADS": "1", **named}
    return subprocess.Popen(
        [sys.executable, "-m", "job"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(child: subprocess.Popen, *, seconds: float = 240) -> Ended:
    """Wait for a job; every line of its output must be JSON."""
    started = time.monotonic()
    try:
        output, _ = child.communicate(timeout=seconds)
    finally:
        child.kill()
    lines = [json.loads(line) for line in output.splitlines()]
    return Ended(code=child.returncode, lines=lines, seconds=time.monotonic() - started)


def run(tmp_path: Path, **variables: object) -> Ended:
    """Start a job and wait for its end."""
    return finish(start(tmp_path, **variables))


def stop_at(child: subprocess.Popen, event: str, number: int = signal.SIGTERM) -> Ended:
    """Send a signal when an event appears, then wait for the end."""
    lines = []
    for line in child.stdout:
        lines.append(json.loads(line))
        if lines[-1]["event"] == event:
            child.send_signal(number)
            break
    ended = finish(child)
    return Ended(code=ended.code, lines=lines + ended.lines, seconds=ended.seconds)
