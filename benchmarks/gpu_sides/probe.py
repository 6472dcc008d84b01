"""What the competitors' scripts record of their steps, and where they write it."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Steps(TrainerCallback):
    """The time at the end of each step, when the device has finished, and the step's loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - transformers' names
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class Counting:
    """The trainer's collator, which counts the tokens of each batch before they are padded.

    It is put in after the trainer is built: given to the trainer it would change what Unsloth does.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)


def watch(trainer: Any) -> tuple[Steps, Counting]:
    """Record the steps of a trainer that is about to train."""
    steps, counting = Steps(), Counting(trainer.data_collator)
    trainer.add_callback(steps)
    trainer.data_collator = counting
    return steps, counting


def write(output: Path, trainer: Any, steps: Steps, counting: Counting, **more: Any) -> None:
    """`<output>/side.json`."""
    gpu = torch.cuda.is_available()
    found = {
        "step_ends": steps.ends,
        "losses": steps.losses,
        "pass_tokens": counting.tokens,
        "micro_batch": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
        "padding_free": bool(getattr(counting.inner, "padding_free", False)),
        "collator": type(counting.inner).__name__,
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "gradient_checkpointing": bool(trainer.args.gradient_checkpointing),
        "adapter_dtype": str(next(p.dtype for p in trainer.model.parameters() if p.requires_grad)),
        "memory_peak_bytes": torch.cuda.max_memory_reserved() if gpu else 0,
        "memory_peak_allocated_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
        "torch": torch.__version__,
        **more,
    }
    (output / "side.json").write_text(json.dumps(found))
