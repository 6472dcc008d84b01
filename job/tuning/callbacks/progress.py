"""Each step's numbers: `train_progress` in the log and the metrics; the end of a run that diverges."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import math
import time
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch
from transformers import TrainerCallback

from job.runtime.errors import PermanentError
from job.tuning.device import Device, memory
from job.tuning.hooks import Hooks
from job.tuning.trainer.collator import CountingCollator

log = structlog.get_logger()
SMOOTH_STEPS = 20


@dataclass
class Progress(TrainerCallback):
    """Logs `train_progress` and keeps the curves; ends the run when the loss is NaN or infinite."""

    device: Device
    collator: CountingCollator
    log_steps: int
    hooks: Hooks
    step: int = 0
    """Optimizer steps done."""
    _began: bool = False
    _started: float = 0.0
    _seconds: list[float] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Called once a step, after the step's loss was read (which waits for the GPU)."""
        if "loss" not in logs:
            return
        self._seconds.append(time.perf_counter() - self._started)
        self._check(state.global_step, logs)
        self._tokens.append(self.collator.pop_tokens())
        self.step = state.global_step
        state.log_history.clear()  # the run's record keeps it; here it would grow with every checkpoint
        entry = self._entry(state, logs)
        self.hooks.note({"event": "train_progress", **entry})
        if not self._began:
            self._began = True
            self.hooks.first_step()
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
        # In fp16 the gradient scaler meets an overflow by skipping the step: that is not a divergence.
        for name in ("loss", "grad_norm") if self.device.dtype is not torch.float16 else ("loss",):
            if not math.isfinite(float(logs.get(name, 0.0))):
                raise PermanentError(
                    f"Training diverged: {name} is {float(logs[name])} at step {step}.",
                    remedy="Lower TUNE_LEARNING_RATE, raise TUNE_WARMUP, or look for broken rows in the data.",
                )
