"""Settings of the optimizer that the user changed on purpose before a resume."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback


@dataclass
class Hyperparameters(TrainerCallback):
    """A resumed optimizer brings the settings of its checkpoint along; from here on these ones hold instead."""

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
