"""When the held-out rows are evaluated during training."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

from dataclasses import dataclass
from typing import Any

import structlog
from transformers import TrainerCallback

from job.runtime import signals
from job.runtime.errors import StopRequested
from job.tuning.hooks import Hooks

log = structlog.get_logger()


@dataclass
class Evaluations(TrainerCallback):
    """Evaluates every `evaluate_every` steps. The last step is left to the caller, which evaluates at the end anyway.

    It acts on `on_log`, after `Progress` has taken the step's time. An evaluation leaves nothing in the model, so a
    signal may cancel it.
    """

    hooks: Hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Makes up for the evaluation that an interruption prevented."""
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
