"""One side of benchmarks/gpu.py as a process of its own: how it is started, and what it left behind."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_numbers import SEED, SIZES, WARM_UP

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent / "gpu_sides"
LAST_WORDS, SAID = 3000, 400
"""Characters of a failed process's log that are printed, and that are kept."""
SPARE_SECONDS = 60
"""What a process that was started in time may take beyond the budget."""
TIGHT_MICROS = ("8", "16", "32")
SETTINGS = ("micro_batch", "accumulation", "padding_free", "gradient_checkpointing", "optimizer")
OF_SCRIPTS = ("collator", "adapter_dtype", "memory_peak_allocated_bytes")
ROUNDED = 0.01
"""How far tokens may be off that were made of seconds and a rate, relatively."""
SMOOTHED = 20
"""Steps over which the job's `tokens_per_second` goes."""


@dataclass(kw_only=True)
class Ended:
    """A process that ended. The job says it in its log, the scripts by their side.json."""

    code: int
    began: float
    """Unix time."""
    seconds: float
    log: Path
    said: dict[str, Any] | None = None
    """What a script wrote; None for the job, or if it wrote nothing."""

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-LAST_WORDS:]

    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of the log."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    found.append(entry)
        return found

    def progress(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line.get("event") == "train_progress"]

    def step_ends(self) -> list[float]:
        """Unix time at the end of each step. The job logs a step when its loss was read, for which the card must have
        finished it; the scripts wait for the card."""
        if self.said is not None:
            return self.said["step_ends"]
        return [datetime.datetime.fromisoformat(line["timestamp"]).timestamp() for line in self.progress()]

    def first_step_seconds(self) -> float:
        """From the start of the process to the end of its first step."""
        return round(self.step_ends()[0] - self.began, 1)

    def lived(self, steps: int) -> bool:
        """Whether it ended well, after so many steps."""
        return not self.code and len(self.step_ends()) == steps

    def losses(self) -> list[float]:
        return self.said["losses"] if self.said is not None else [line["loss"] for line in self.progress()]

    def memory_peak(self) -> int:
        """Bytes that torch's allocator held on the card at most."""
        if self.said is not None:
            return self.said["memory_peak_bytes"]
        return max((line["gpu_memory_peak_bytes"] for line in self.progress()), default=0)

    def settings(self) -> dict[str, Any]:
        """How it trained. The job may change its mind when memory is short: what it said last counts."""
        if self.said is not None:
            return {key: self.said.get(key) for key in (*SETTINGS, *OF_SCRIPTS)}
        found: dict[str, Any] = {}
        for line in self.lines():
            found |= line["plan"] if isinstance(line.get("plan"), dict) else {}
            found |= {key: line[key] for key in SETTINGS if found and key in line}
        return {**found, "padding_free": found.get("batching") != "padded"}

    def was_fed(self, tokens: Sequence[int]) -> bool:
        """Whether it trained on so many tokens in each step, so that rows and order are those of the other sides. The
        job reports only a running mean."""
        if self.said is not None:
            passes, cut = self.said["pass_tokens"], self.said["accumulation"]
            return [sum(passes[at : at + cut]) for at in range(0, len(tokens) * cut, cut)] == list(tokens)
        lines = self.progress()[:SMOOTHED]
        seen = lines[-1]["tokens_per_second"] * sum(line["step_seconds"] for line in lines)
        return abs(seen / sum(tokens[: len(lines)]) - 1) <= ROUNDED


@dataclass(kw_only=True)
class Sides:
    """Starts them, one at a time, each with compile caches of its own."""

    asked: argparse.Namespace
    scratch: Path
    model: Path
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    _job_cache: str = ""

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def run(
        self, part: str, side: str, *, steps: int | None, batch: int, name: str, outside: dict[str, str] | None = None
    ) -> Ended | None:
        """Run a side on the rows of a part; None if there is no time left, or if it cannot run here.

        Args:
            steps: None trains the asked epochs.
            outside: variables of gpu_sides/outside.
        """
        if side == "plain" and self.asked.device == "cpu":
            self.skipped.append("plain: TRL's own trainer needs triton, so it is left out on a CPU")
            return None
        if self.elapsed() > self.asked.budget_seconds:
            self.skipped.append(f"{name}: no time left")
            return None
        environment = self.environment(side)
        if outside:
            paths = [str(HERE / "outside"), *filter(None, [environment.get("PYTHONPATH")])]
            environment |= {**outside, "PYTHONPATH": os.pathsep.join(paths)}
        if side == "job":
            environment |= self.job_settings(part, steps=steps, batch=batch, name=name)
            command = ["-m", "job"]
        else:
            command = self.script(part, side, steps=steps, batch=batch, name=name)
        ended = self.start(name, command, environment)
        print(f"{name}: exit code {ended.code} after {ended.seconds:.0f} s", flush=True)
        if side == "job":
            shutil.copy(ended.log, self.asked.output / f"gpu-{self.asked.size}-{name}.jsonl")
        elif (path := self.scratch / name / "side.json").exists():
            ended.said = json.loads(path.read_text())
        if ended.code:
            print(ended.last_words(), flush=True)
            self.failures.append(f"{name} ended with {ended.code}: {ended.last_words()[-SAID:]}")
        return ended

    def script(self, part: str, side: str, *, steps: int | None, batch: int, name: str) -> list[str]:
        """A competitor's command line."""
        command = [str(HERE / ("plain.py" if side == "plain" else "tutorial.py"))]
        command += ["--model", str(self.model), "--output", str(self.scratch / name)]
        command += ["--max-length", str(SIZES[self.asked.size].longest), "--batch", str(batch)]
        if side == "collator-free":
            command.append("--no-collator")
        if part == "tight":
            command += ["--micro", *TIGHT_MICROS]
        if part == "adapter":
            return [*command, "--rows", str(self.scratch / "adapter.jsonl"), "--epochs", str(self.asked.epochs)]
        return [*command, "--tokens", str(self.scratch / f"{part}.tokens"), "--steps", str(steps)]

    def job_settings(self, part: str, *, steps: int | None, batch: int, name: str) -> dict[str, str]:
        """The job's variables: what all sides share, and its own defaults for the rest."""
        known = steps or math.ceil(self.asked.rows / batch) * self.asked.epochs
        settings = {
            "model": self.model,
            "dataset": self.scratch / f"{part}.jsonl",
            "output": self.scratch / "runs",
            "run_id": name,
            "device": self.asked.device,
            "max_length": SIZES[self.asked.size].longest,
            "batch_size": batch,
            "learning_rate": 2e-4,
            "warmup": min(WARM_UP, known - 1),
            "seed": SEED,
            "eval_fraction": 0,
            "samples": 0,
            "log_format": "json",
            **({"epochs": self.asked.epochs} if steps is None else {"max_steps": steps}),
        }
        if self.job_cache() == "TUNE_CACHE":
            settings["cache"] = self.caches("job")
        return {f"TUNE_{key.upper()}": str(value) for key, value in settings.items()}

    def environment(self, side: str) -> dict[str, str]:
        """Caches of the side's own, no network, nothing of the caller's TUNE_*.

        The job has a cache that outlives its machine, TUNE_CACHE; where it has none, its scratch is kept instead.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNE_")}
        caches = self.caches(side)
        caches.mkdir(parents=True, exist_ok=True)
        kept |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_AUTO_INSTALL": "0"}
        kept["PYTHONUNBUFFERED"] = "1"
        if self.asked.device == "cpu":
            kept |= {"UNSLOTH_FORCE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "10000"}
        if side == "job":
            scratch = caches
            if self.job_cache() == "TUNE_CACHE":
                scratch = self.scratch / "tmp"  # always the same, as on machines of one image, and always empty
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
            return kept | {"TMPDIR": str(scratch)}
        return kept | {
            "HF_HOME": str(caches / "huggingface"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
            "XDG_CACHE_HOME": str(caches / "other"),
        }

    def caches(self, side: str) -> Path:
        return self.scratch / "caches" / side

    def is_cold(self, side: str) -> bool:
        """Whether a start now would find no compiled kernels."""
        directory = self.caches(side)
        return not (directory.is_dir() and any(path.is_file() for path in directory.rglob("*")))

    def job_cache(self) -> str:
        """What keeps the job's compiled kernels: TUNE_CACHE, or TMPDIR if it does not know that."""
        if not self._job_cache:
            command = [sys.executable, "-m", "job", "variables"]
            listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            self._job_cache = "TUNE_CACHE" if "TUNE_CACHE" in listed else "TMPDIR"
        return self._job_cache

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> Ended:
        """Run Python with a command line to its end, or to the end of the time."""
        log = self.scratch / f"{name}.log"
        left = self.asked.budget_seconds + SPARE_SECONDS - self.elapsed()
        began, clock = time.time(), time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            process.wait(max(left, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Ended(code=process.returncode, began=began, seconds=time.monotonic() - clock, log=log)
