"""Trainer events -> progress events, evaluations and save points. Decides when; `training` says what happens then."""

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

from job.runtime import signals
from job.runtime.errors import PermanentError, StopRequested
from job.tuning.device import Device, memory
from job.tuning.trainer import CountingCollator, skip_if_full

log = structlog.get_logger()
SMOOTH_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run does at the events of its training loop."""

    note: Callable[[dict[str, Any]], None]
    """Keeps a line of the metrics."""
    ready: Callable[[], None]
    """The plan is in force, and the first step is about to begin."""
    first_step: Callable[[], None]
    """After the first step of this process."""
    evaluate: Callable[[int], Any] | None
    """None where no rows were held out."""
    evaluated: Callable[[int], bool]
    """Whether the evaluation at a step was done already, before an interruption."""
    evaluate_every: int
    """Optimizer steps."""
    save: Callable[[int, Path, Callable[[], float]], None]
    """Takes over the files of a checkpoint: the step, where they are, and the seconds that training has waited."""
    save_every: int
    """Optimizer steps."""
    save_minutes: float
    """The longest time between checkpoints."""
    worth_saving: Callable[[float], bool]
    """When asked to stop: whether a checkpoint fits into what is left of the grace, given how long the last one made
    training wait."""
    poll: Callable[[], None]
    """Every step; raises what ends the run."""


@dataclass
class Settled(TrainerCallback):
    """Puts the plan in force, once the trainer has made model and optimizer ready."""

    settle: Callable[[], None]
    hooks: Hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with signals.immediate():  # nothing of it is needed by an attempt that ends here
            self.settle()
        self.hooks.ready()


@dataclass
class Progress(TrainerCallback):
    """Logs `train_progress` and keeps the curves; ends the run when the loss is no number any more."""

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
        self._tokens.append(self.collator.taken())
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
        # In fp16 the gradient scaler meets an overflow by skipping the step: that is no divergence.
        for name in ("loss", "grad_norm") if self.device.dtype is not torch.float16 else ("loss",):
            if not math.isfinite(float(logs.get(name, 0.0))):
                raise PermanentError(
                    f"Training diverged: {name} is {float(logs[name])} at step {step}.",
                    remedy="Lower TUNE_LEARNING_RATE, raise TUNE_WARMUP, or look for broken rows in the data.",
                )


@dataclass
class Evaluations(TrainerCallback):
    """Evaluates every so many steps. The last step is left to the caller, which evaluates at the end anyway.

    It acts on `on_log`, after `Progress` has taken the step's time. Nothing of an evaluation stays in the model, so a
    signal may break it off.
    """

    hooks: Hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What the interruption kept from being evaluated."""
        if state.global_step > 0 and not self.hooks.evaluated(state.global_step):
            self._evaluate_if_due(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self._evaluate_if_due(state)

    def _evaluate_if_due(self, state: Any) -> None:
        step = state.global_step
        if self.hooks.evaluate is None or step % self.hooks.evaluate_every or step >= state.max_steps:
            return
        try:
            with signals.immediate():
                self.hooks.evaluate(step)
        except StopRequested:
            log.info("evaluation_cancelled", step=step)


@dataclass
class SavePoints(TrainerCallback):
    """Asks for a checkpoint every so many steps or minutes, whichever comes first, at the last step, and when a signal
    asks the run to stop, if there is time.

    It decides on `on_log`, the last event before the trainer saves: only then is the step complete.
    """

    hooks: Hooks
    _last: float = 0.0
    _asked: float = 0.0
    _stall_seconds: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        self.hooks.poll()
        step, now = state.global_step, time.monotonic()
        due = step % self.hooks.save_every == 0 or now - self._last >= self.hooks.save_minutes * 60
        stop = signals.asked() is not None
        if stop:
            due = self.hooks.worth_saving(self._stall_seconds)
            control.should_training_stop = True
        control.should_save = due or (step == state.max_steps and not stop)
        self._asked = now

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not directory.exists():  # the disk was full
            return
        try:
            self.hooks.save(state.global_step, directory, lambda: time.monotonic() - self._asked)
        except OSError as error:
            skip_if_full(error, directory, state.global_step)
        self._stall_seconds = time.monotonic() - self._asked


@dataclass
class Hyperparameters(TrainerCallback):
    """A resumed optimizer brings the settings of its checkpoint along: where the user changed them on purpose, the new
    ones hold from here on."""

    learning_rate: float
    weight_decay: float

    def on_train_begin(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        groups = events["optimizer"].param_groups
        scheduler = getattr(events["lr_scheduler"], "scheduler", events["lr_scheduler"])
        scheduler.base_lrs = [self.learning_rate] * len(groups)
        for number, (group, factor) in enumerate(zip(groups, scheduler.lr_lambdas, strict=True)):
            group["initial_lr"] = self.learning_rate
            group["lr"] = self.learning_rate * factor(scheduler.last_epoch)
            group["weight_decay"] = self.weight_decay if number == 0 else 0.0  # the second: biases and norms
        scheduler._last_lr = [group["lr"] for group in groups]  # noqa: SLF001 - what is logged for the next step
