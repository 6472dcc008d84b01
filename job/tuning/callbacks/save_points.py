"""When a checkpoint is saved, and when training stops for a signal."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from job.runtime import signals
from job.tuning.hooks import Hooks
from job.tuning.trainer.full_disk import skip_if_full


@dataclass
class SavePoints(TrainerCallback):
    """Asks for a checkpoint every `save_every` steps or `save_minutes`, whichever comes first, at the last step, and
    when a signal asks the run to stop, if there is time.

    It decides on `on_log`, the last event before the trainer saves: only then is the step complete.
    """

    hooks: Hooks
    _last: float = 0.0
    _decided: float = 0.0
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
        self._decided = now

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not directory.exists():  # the disk was full
            return
        try:
            self.hooks.save(state.global_step, directory, lambda: time.monotonic() - self._decided)
        except OSError as error:
            skip_if_full(error, directory, state.global_step)
        self._stall_seconds = time.monotonic() - self._decided
