"""The optimizer steps of a run: the arithmetic of `check`'s estimate and of training itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from job.config.schema import Config
from job.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run, and the micro-batches of each."""

    steps: int
    per_epoch: int
    """Steps in one epoch; the last of them may be smaller."""
    micro_batch: int
    gradient_accumulation: int
    """Micro-batches in a step."""
    warmup_steps: int

    @property
    def epochs(self) -> float:
        """Epochs in the whole run."""
        return self.steps / self.per_epoch


def schedule(config: Config, *, examples: int) -> Schedule:
    """Plan the steps for this many training sequences.

    Raises:
        ConfigError: the warm-up is as long as the run.
    """
    micro = config.rows_in_pass
    per_epoch = math.ceil(examples / config.batch_size)
    steps = config.max_steps or max(1, math.ceil(per_epoch * config.epochs))
    warmup = int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * steps)
    if warmup >= steps > 1:
        raise ConfigError(
            f"TUNE_WARMUP={config.warmup:g} is {warmup} steps, and the run has {steps}.",
            remedy="Lower the warm-up: the learning rate would never reach its value.",
        )
    return Schedule(
        steps=steps,
        per_epoch=per_epoch,
        micro_batch=micro,
        gradient_accumulation=math.ceil(config.batch_size / micro),
        warmup_steps=0 if config.schedule == "constant" else min(warmup, steps - 1),
    )
