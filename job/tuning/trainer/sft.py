"""The trainer's class: a step in micro-batches that fit, and checkpoints of what a resume needs."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from trl import SFTTrainer

from job.model.schedule import rate_factor
from job.runtime.errors import PermanentError
from job.tuning.checkpoint_files import write_adapter
from job.tuning.device import out_of_memory
from job.tuning.fit.control import PassControl
from job.tuning.fit.micro_batches import split
from job.tuning.trainer.curriculum import ShortFirst
from job.tuning.trainer.full_disk import skip_if_full
from job.tuning.trainer.weighted_loss import WeightedLoss


class MicroBatchTrainer(SFTTrainer):
    """Takes a step's whole batch and splits it itself.

    Checkpoints hold what a resume needs: no model card and no tokenizer, which would cost training a second each.
    """

    order: ShortFirst | None = None
    """None shuffles every epoch."""
    passes: PassControl
    """How a step's batch is split; given by `build`, since it needs the finished trainer."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a whole step, in as many micro-batches as it takes; returns the step's loss.

        A step that runs out of memory starts over, with smaller micro-batches.

        Raises:
            PermanentError: it takes several micro-batches, and the loss of each would be a mean of its own.
        """
        while True:
            reason = ""
            parts = list(split(inputs, self.passes.limit))
            if num_items_in_batch is None and len(parts) > 1:
                raise _not_a_sum(model, len(parts))
            try:
                losses = [self.run_micro_batch(model, part, num_items_in_batch) for part in parts]
                return torch.stack(losses).sum()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            model.zero_grad()  # only here: the error held on to what the micro-batch had allocated
            self.passes.shrink(reason, step=self.state.global_step + 1)

    def run_micro_batch(self, model: Any, batch: Any, items: Any) -> torch.Tensor:
        """Add up one micro-batch's gradients; returns its share of the step's loss."""
        loss: torch.Tensor = super().training_step(model, batch, items)
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The course of the learning rate: that of `job.model.schedule`, whose first step trains."""
        if self.lr_scheduler is None:
            factor = functools.partial(
                rate_factor,
                kind=getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type),
                steps=num_training_steps,
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order or super()._get_train_sampler(train_dataset)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            Trainer._save_checkpoint(self, model, trial)  # noqa: SLF001 - not TRL's, which writes a model card first
        except (OSError, RuntimeError, SafetensorError) as error:
            skip_if_full(error, directory, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_adapter(self.model, directory, step=self.state.global_step)
        self.model.peft_config["default"].save_pretrained(directory)


class WeightedTrainer(WeightedLoss, MicroBatchTrainer):
    """The same, for rows that carry weights."""


def _not_a_sum(model: Any, count: int) -> PermanentError:
    return PermanentError(
        f"The loss of {model.config.model_type} models is a mean over each micro-batch, so that {count} micro-batches "
        "do not add up to the batch's.",
        remedy="Lower TUNE_BATCH_SIZE, or raise TUNE_MICRO_BATCH, until one micro-batch holds the batch, and report "
        "this with the log: the training library did not count the labels.",
    )
