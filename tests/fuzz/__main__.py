"""`make fuzz`: look for inputs that break something, for hours, with another seed in every round.

It prints its seed; `SEED=...` repeats it. What it finds is kept in `tests/fuzz/findings/`, where `make test` tries it
again. It ends by itself, with 1 if something was found.
"""

import argparse
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.fuzz import harness
from tests.jobs import ROOT

FINDINGS = Path(__file__).parent / "findings"
HANG_CPU_SECONDS = 90
"""What one input may take before the process is killed: the child itself gives up earlier, unless it is in C code."""
LOOK_SECONDS = 2.0


def main(asked: argparse.Namespace) -> int:
    """Rounds until the time is over; returns how many faults were found."""
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(2**32)
    end, found, rounds = time.monotonic() + asked.seconds, 0, 0
    _say(f"seed {seed}, {asked.seconds:.0f} s, findings in {asked.findings}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        work = Path(place)
        model = work / "model"
        subprocess.run([sys.executable, "-m", "tests.tiny", str(model)], cwd=ROOT, check=True, capture_output=True)
        while time.monotonic() < end:
            found += Round(asked, work, seed + rounds, end).run()
            rounds += 1
            _say(f"{rounds} rounds, {found} found, {max(0, end - time.monotonic()):.0f} s left")
    return found


class Round:
    """Every target once, with one seed; a process that dies is replaced for those that are left."""

    def __init__(self, asked: argparse.Namespace, work: Path, seed: int, end: float) -> None:
        self._asked, self._work, self._seed, self._end = asked, work, seed, end
        self._done: list[str] = []
        self._found = 0

    def run(self) -> int:
        """Returns how many faults were found."""
        while time.monotonic() < self._end and not self._once():
            pass
        return self._found

    def _once(self) -> bool:
        """One process; returns whether it came to its end, or the time did."""
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.child", str(self._work), str(self._asked.findings)]
        command += ["--seed", str(self._seed), "--examples", str(self._asked.examples)]
        left = [name for name in self._names() if name not in self._done]
        command += [part for name in left for part in ("--target", name)]
        environment = {**os.environ, "FUZZ_MODEL": str(self._work / "model"), "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        reason = ""
        try:
            for line in self._lines(child):
                if line is None:
                    reason = "hang"
                    break
                self._hear(json.loads(line))
        finally:
            child.kill()
            status = child.wait()
        if time.monotonic() >= self._end or (status == 0 and not reason):
            return True
        self._died(reason or f"died-{signal.Signals(-status).name if status < 0 else status}")
        return False

    def _names(self) -> list[str]:
        if self._asked.target:
            return list(self._asked.target)
        os.environ["FUZZ_MODEL"] = str(self._work / "model")
        from tests.fuzz.targets import targets

        return list(targets())

    def _lines(self, child: subprocess.Popen[str]) -> Iterator[str | None]:
        """What it says; None when it hangs. Ends with it, or with the time."""
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=lambda: [lines.put(line) for line in child.stdout or ()], daemon=True)
        reader.start()
        current, since = 0.0, 0.0
        while time.monotonic() < self._end:
            try:
                yield lines.get(timeout=LOOK_SECONDS)
                continue
            except queue.Empty:
                if not reader.is_alive():
                    return
            try:
                times = psutil.Process(child.pid).cpu_times()
                changed = (self._work / "current").stat().st_mtime
            except (psutil.Error, OSError):
                continue
            if changed != current:
                current, since = changed, times.user + times.system
            elif times.user + times.system - since > HANG_CPU_SECONDS:
                yield None
                return

    def _hear(self, said: dict[str, str]) -> None:
        if name := said.get("tried"):
            self._done.append(name)
        elif name := said.get("found"):
            (self._work / name).rename(self._asked.findings / name)
            self._note(said["origin"], name)

    def _died(self, origin: str) -> None:
        """What was tried when the process died is a finding, too."""
        name, _, data = (self._work / "current").read_bytes().partition(b"\n")
        target = name.decode()
        self._done.append(target)
        if any(origin == other and target == whose for _, whose, other, _ in harness.kept(self._asked.findings)):
            return
        self._note(origin, harness.keep(self._asked.findings, target, origin, data).name)

    def _note(self, origin: str, name: str) -> None:
        self._found += 1
        _say(f"found {origin}: {name} (seed {self._seed})")


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--examples", type=int, default=100, help="inputs for each target in a round")
    parser.add_argument("--findings", type=Path, default=FINDINGS)
    parser.add_argument("--target", action="append")
    asked = parser.parse_args()
    asked.findings.mkdir(parents=True, exist_ok=True)
    sys.exit(1 if main(asked) else 0)
