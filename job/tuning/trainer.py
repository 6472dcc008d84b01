"""The trainer: TRL's SFTTrainer under Unsloth, every hyperparameter set, fed with our own input_ids and labels."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from job.config.schema import Config
from job.runtime.errors import NO_SPACE, PermanentError
from job.tuning import model as adapter
from job.tuning.checkpoint_files import write_adapter
from job.tuning.curriculum import ShortFirst
from job.tuning.device import out_of_memory
from job.tuning.fit.micro_batches import cut
from job.tuning.fit.plan import Plan, padded
from job.tuning.fit.search import PassSearch
from job.tuning.weighted_loss import COLUMN, WeightedLoss, use_log_probs

log = structlog.get_logger()
LEAST_FREE_BYTES = 1 << 20
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


class _Trainer(SFTTrainer):
    """Checkpoints hold what a resume needs: no model card and no tokenizer, which would cost training a second each."""

    order: ShortFirst | None = None
    """None shuffles every epoch."""
    fitting: PassSearch
    """How a step's batch is cut."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a whole step, in as many passes as it takes; returns the step's loss.

        A step that runs out of memory begins again, cut smaller.

        Raises:
            PermanentError: it takes several passes, and the loss of each would be a mean of its own.
        """
        while True:
            error = ""
            parts = list(cut(inputs, self.fitting.limit))
            if num_items_in_batch is None and len(parts) > 1:
                raise _not_a_sum(model, len(parts))
            try:
                losses = [self.one_pass(model, part, num_items_in_batch) for part in parts]
                return torch.stack(losses).sum()
            except RuntimeError as found:
                if not out_of_memory(found):
                    raise
                error = str(found).splitlines()[0]
            model.zero_grad()  # only here: the error held on to what the pass had allocated
            self.fitting.shrink(error, step=self.state.global_step + 1)

    def one_pass(self, model: Any, batch: Any, items: Any) -> torch.Tensor:
        """Add up one pass's gradients; returns its share of the step's loss."""
        loss: torch.Tensor = super().training_step(model, batch, items)
        return loss

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


class _WeightedTrainer(WeightedLoss, _Trainer):
    """The same, for rows that carry weights."""


def _not_a_sum(model: Any, passes: int) -> PermanentError:
    return PermanentError(
        f"The loss of {model.config.model_type} models is a mean over each pass, so that {passes} passes do not add up "
        "to the batch's.",
        remedy="Lower TUNE_BATCH_SIZE, or raise TUNE_MICRO_BATCH, until one pass holds the batch, and report this with "
        "the log: the training library did not count the labels.",
    )


def skip_if_full(error: Exception, directory: Path, step: int) -> None:
    """Give a checkpoint up that does not fit on the disk, and go on; any other error is raised."""
    shutil.rmtree(directory, ignore_errors=True)
    if not _disk_full(error, directory.parent):
        raise error
    log.warning("checkpoint_skipped", step=step, reason=f"the disk is full: {error}")


def _disk_full(error: Exception, directory: Path) -> bool:
    """Torch and safetensors say in words only that a write failed."""
    words = any(f"os error {number}" in str(error) for number in NO_SPACE)
    known = isinstance(error, OSError) and error.errno in NO_SPACE
    return words or known or shutil.disk_usage(directory).free < LEAST_FREE_BYTES


def build(
    model: Any, dataset: Any, hf_tokenizer: Any, *, config: Config, fitting: PassSearch, directory: Path
) -> SFTTrainer:
    """The trainer, checked. It takes whole batches; `fitting` cuts them.

    Args:
        dataset: columns input_ids, labels, length and perhaps weights; already cut to length.
        directory: where the trainer writes its checkpoints.

    Raises:
        ConfigError: Unsloth does not train the model with the batches that were asked for.
        PermanentError: it changed other settings.
    """
    plan = fitting.plan
    weighted = COLUMN in dataset.column_names
    rows = dataset.select_columns(["input_ids", "labels", COLUMN] if weighted else ["input_ids", "labels"])
    # Rendering has cut the rows already. Without this claim Unsloth turns padding-free batches off, since it could not
    # cut ready rows itself.
    rows._unsloth_truncated_to = config.max_length  # noqa: SLF001
    kind = _WeightedTrainer if weighted else _Trainer
    trainer = kind(
        model=model, args=_arguments(config, fitting, directory), train_dataset=rows, processing_class=hf_tokenizer
    )
    if weighted:
        use_log_probs(trainer)
    if config.curriculum == "short_first":
        trainer.order = ShortFirst(dataset["length"][:], seed=config.seed)
    adapter.cast_trainable(trainer.model)
    trainer.fitting = fitting
    fitting.trainer, fitting.collate = trainer, trainer.data_collator
    if plan.batching != "padded" and not _padding_free(trainer):
        # Where Unsloth refuses, it has set the argument back before the trainer was made: this one pads.
        fitting.plan = padded(plan, config, model=trainer.model.config.model_type)
    _check(trainer, fitting.plan, config)
    return trainer


def _arguments(config: Config, fitting: PassSearch, directory: Path) -> SFTConfig:
    """All of them: where one is left out, the library decides."""
    plan, device = fitting.plan, fitting.device
    return SFTConfig(
        output_dir=str(directory),
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=1,
        max_steps=plan.steps,
        num_train_epochs=plan.epochs,
        learning_rate=plan.learning_rate,
        warmup_steps=plan.warmup_steps,
        lr_scheduler_type=plan.schedule,
        optim=plan.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        bf16=device.dtype is torch.bfloat16,
        fp16=device.dtype is torch.float16,
        gradient_checkpointing=plan.gradient_checkpointing != "off",
        padding_free=plan.batching != "padded",
        packing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,  # only those wanted are there
        dataloader_num_workers=0,
        dataloader_drop_last=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        eval_strategy="no",
        save_strategy="no",
        save_only_model=False,
        push_to_hub=False,
        **ADAM,
    )


def _padding_free(trainer: SFTTrainer) -> bool:
    return bool(getattr(trainer.data_collator, "padding_free", False))


def _check(trainer: SFTTrainer, plan: Plan, config: Config) -> None:
    """Unsloth and TRL change arguments with a printed line at most: what counts is what they ended up with."""
    arguments = trainer.args
    sampler = trainer._get_train_sampler()  # noqa: SLF001 - what the training loop asks
    order = "short_first" if isinstance(sampler, ShortFirst) else "none"
    effective = {
        "batch": (arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps, plan.batch_size),
        "steps": (arguments.max_steps, plan.steps),
        "learning rate": (arguments.learning_rate, plan.learning_rate),
        "schedule": (getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type), plan.schedule),
        "warm-up": (arguments.warmup_steps, plan.warmup_steps),
        "optimizer": (getattr(arguments.optim, "value", arguments.optim), plan.optimizer),
        "curriculum": (order, config.curriculum),
        "padding-free": (_padding_free(trainer), plan.batching != "padded"),
    }
    changed = [f"{name} {found} instead of {wanted}" for name, (found, wanted) in effective.items() if found != wanted]
    if changed:
        raise PermanentError(
            f"The training library changed the settings: {'; '.join(changed)}.",
            remedy="Report this with the log: the versions in the image do not fit together.",
        )


class CountingCollator:
    """Counts the tokens of each batch that passes, padding excluded, without a device sync.

    It wraps the trainer's own collator after the trainer is built: given to the constructor, a collator would switch
    Unsloth's padding-free batches off in silence.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._tokens: deque[int] = deque()

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Collate `rows` as the inner collator does."""
        self._tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)

    def taken(self) -> int:
        """The tokens of the step that is done now: batches are made one ahead of the steps that take them."""
        return self._tokens.popleft() if self._tokens else 0


def train(trainer: SFTTrainer, callbacks: list[TrainerCallback], *, resume_from: Path | None = None) -> None:
    """Run all steps that are left. The callbacks log, evaluate and save.

    Args:
        resume_from: a verified checkpoint, never the trainer's own search for the newest.
    """
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
