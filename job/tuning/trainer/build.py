"""The trainer, built with every hyperparameter set, checked, and run. Its rows are our own input_ids and labels."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from job.config.schema import Config
from job.runtime.errors import PermanentError
from job.tuning import model as adapter
from job.tuning.device import Device
from job.tuning.fit.control import PassControl
from job.tuning.fit.plan import Plan, padded_plan
from job.tuning.trainer.curriculum import ShortFirst
from job.tuning.trainer.sft import MicroBatchTrainer, WeightedTrainer
from job.tuning.trainer.weighted_loss import COLUMN, use_log_probs

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def build(
    model: Any, dataset: Any, hf_tokenizer: Any, *, config: Config, plan: Plan, device: Device, directory: Path
) -> MicroBatchTrainer:
    """The trainer, checked. From here on its `passes` own the plan.

    Args:
        dataset: columns input_ids, labels, length and perhaps weights; already cut to length.
        plan: to begin with.
        directory: where the trainer writes its checkpoints.

    Raises:
        ConfigError: Unsloth does not train the model with the batches that were asked for.
        PermanentError: it changed other settings.
    """
    weighted = COLUMN in dataset.column_names
    rows = dataset.select_columns(["input_ids", "labels", COLUMN] if weighted else ["input_ids", "labels"])
    # Rendering has cut the rows already. Without this claim Unsloth turns padding-free batches off, since it could not
    # cut ready rows itself.
    rows._unsloth_truncated_to = config.max_length  # noqa: SLF001
    kind = WeightedTrainer if weighted else MicroBatchTrainer
    arguments = _arguments(config, plan, device, directory)
    trainer = kind(model=model, args=arguments, train_dataset=rows, processing_class=hf_tokenizer)
    if weighted:
        use_log_probs(trainer)
    lengths = dataset["length"][:]
    if config.curriculum == "short_first":
        trainer.order = ShortFirst(lengths, seed=config.seed)
    adapter.cast_trainable(trainer.model)
    if plan.batching != "padded" and not _padding_free(trainer):
        # Where Unsloth refuses, it has set the argument back before the trainer was made: this one pads.
        plan = padded_plan(plan, requested=config.batching, model_type=trainer.model.config.model_type)
    trainer.passes = PassControl(trainer, plan, device=device, lengths=lengths)
    _check(trainer, plan, curriculum=config.curriculum)
    return trainer


def _arguments(config: Config, plan: Plan, device: Device, directory: Path) -> SFTConfig:
    """All of them: where one is left out, the library decides."""
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
        gradient_checkpointing=plan.pass_config.gradient_checkpointing != "off",
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


def _padding_free(trainer: MicroBatchTrainer) -> bool:
    return bool(getattr(trainer.data_collator, "padding_free", False))


def _check(trainer: MicroBatchTrainer, plan: Plan, *, curriculum: str) -> None:
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
        "curriculum": (order, curriculum),
        "padding-free": (_padding_free(trainer), plan.batching != "padded"),
    }
    changed = [f"{name} {value} instead of {wanted}" for name, (value, wanted) in effective.items() if value != wanted]
    if changed:
        raise PermanentError(
            f"The training library changed the settings: {'; '.join(changed)}.",
            remedy="Report this with the log: the versions in the image do not fit together.",
        )


def train(trainer: MicroBatchTrainer, callbacks: list[TrainerCallback], *, resume_from: Path | None = None) -> None:
    """Run all steps that are left. The callbacks log, evaluate and save.

    Args:
        resume_from: a verified checkpoint, never the trainer's own search for the newest.
    """
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
