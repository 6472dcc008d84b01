"""Trainer events -> progress events, evaluations and save points. Decides when; run.py says what happens then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import TrainerCallback

from job.errors import HopelessError
from job.tuning.device import Device, memory
from job.tuning.trainer import CountingCollator

log = structlog.get_logger()
SMOOTH_STEPS = 20


@dataclass
class Progress(TrainerCallback):
    """Logs `train_progress` and keeps the curves; ends the run when the loss is no number any more."""

    device: Device
    collator: CountingCollator
    log_steps: int
    record: Callable[[dict[str, Any]], None]
    losses: list[float] = field(default_factory=list)
    first_step_seconds: float | None = None
    _began: float = 0.0
    _started: float = 0.0
    _seconds: list[float] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        if self.first_step_seconds is None:
            self.first_step_seconds = now - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Called once a step, after the step's loss was read (which waits for the GPU)."""
        if "loss" not in logs:
            return
        self._seconds.append(time.perf_counter() - self._started)
        self._tokens.append(self.collator.tokens)
        self.collator.tokens = 0
        self._check(state.global_step, logs)
        self.losses.append(float(logs["loss"]))
        entry = self._entry(state, logs)
        self.record({"event": "train_progress", **entry})
        if state.global_step % self.log_steps == 0 or state.global_step == state.max_steps:
            log.info("train_progress", **entry)

    def _entry(self, state: Any, logs: dict[str, Any]) -> dict[str, Any]:
        recent = slice(-SMOOTH_STEPS, None)
        seconds = sum(self._seconds[recent])
        # The first step compiles and warms caches: it would spoil the estimate of all that follow.
        steady = self._seconds[1:][recent] or self._seconds
        left = state.max_steps - state.global_step
        return {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": round(float(state.epoch or 0), 4),
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens_per_second": round(sum(self._tokens[recent]) / seconds, 1) if seconds else 0.0,
            "step_seconds": round(self._seconds[-1], 4),
            "eta_seconds": round(left * sum(steady) / len(steady), 1),
            **memory(self.device),
        }

    def _check(self, step: int, logs: dict[str, Any]) -> None:
        # In fp16 the gradient scaler meets an overflow by skipping the step: that is no divergence.
        for name in ("loss", "grad_norm") if self.device.dtype is not torch.float16 else ("loss",):
            if not math.isfinite(float(logs.get(name, 0.0))):
                raise HopelessError(
                    f"Training diverged: {name} is {float(logs[name])} at step {step}.",
                    remedy="Lower TUNE_LEARNING_RATE, raise TUNE_WARMUP, or look for broken rows in the data.",
                )


@dataclass
class Evaluations(TrainerCallback):
    """Runs `evaluate` every so many steps. The last step is left to the caller, which evaluates at the end anyway.

    It acts on `on_log`, after `Progress` has taken the step's time.
    """

    every: int
    evaluate: Callable[[int], None]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        due = state.global_step % self.every == 0 and state.global_step < state.max_steps
        if due and "loss" in logs:
            self.evaluate(state.global_step)


@dataclass
class SavePoints(TrainerCallback):
    """Asks for a checkpoint every so many steps or minutes, whichever comes first, and at the last step."""

    steps: int | None
    minutes: float
    saved: Callable[[int, Path, float], None]
    _last: float = 0.0
    _asked: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due_steps = self.steps is not None and state.global_step % self.steps == 0
        due_time = time.monotonic() - self._last >= self.minutes * 60
        control.should_save = due_steps or due_time or state.global_step == state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._asked = time.monotonic()  # the last callback before the trainer writes the files

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.saved(state.global_step, directory, self._last - self._asked)
