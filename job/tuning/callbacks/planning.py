"""When the plan is chosen: after the trainer has prepared model and optimizer, before the first step."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from job.runtime import signals
from job.tuning.hooks import Hooks


@dataclass
class Planning(TrainerCallback):
    """Chooses the plan and puts it in force."""

    choose: Callable[[], None]
    hooks: Hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with signals.immediate():  # nothing of it is needed by an attempt that ends here
            self.choose()
        self.hooks.ready()
