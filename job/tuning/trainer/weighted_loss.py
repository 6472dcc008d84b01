"""The loss with a weight per token: sum(w * cross-entropy) / sum(w), both sums over the whole optimizer step.

The log-probability of each label comes from TRL's fused head (`model(..., fused_lm_head=True)`): it runs the same
decoder on the same batch, padding-free or padded, and projects only labelled tokens through the head, in chunks, so
that there are never logits of a whole batch. Its kernels are Unsloth's on either device. TRL's own per-token losses
(`loss_type="dft"`) go the same way.
"""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

from typing import Any

import torch
from trl.trainer import utils as trl_utils

from job.data.rendering.labels import IGNORED
from job.runtime.errors import PermanentError

COLUMN = "weights"


class WeightedCollator:
    """Adds the weights of the rows to what the trainer's own collator makes of them, in the same shape as the labels.

    It wraps that collator after the trainer is built: see `CountingCollator`.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def padding_free(self) -> bool:
        """Whether the rows are concatenated into one."""
        return bool(getattr(self.inner, "padding_free", False))

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Collate `rows` as the inner collator does, with `weights`: float32, 0 where labels are ignored."""
        batch = self.inner(rows)
        weights = [torch.tensor(row[COLUMN], dtype=torch.float32) for row in rows]
        lines = [torch.cat(weights)] if self.padding_free else weights
        filled = torch.zeros(batch["labels"].shape)
        for line, values in zip(filled, lines, strict=True):
            line[: len(values)] = values
        if not torch.equal(filled > 0, batch["labels"] != IGNORED):
            raise PermanentError(
                "The training library moved or changed labels: the weights of TUNE_ROLE_WEIGHTS do not fit them.",
                remedy="Report this with the log: the versions in the image do not fit together.",
            )
        return {**batch, COLUMN: filled}


class WeightedLoss:
    """For a Trainer whose collator is a `WeightedCollator`."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, and what their losses are divided by: the sum of all weights."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        total = sum(sample[COLUMN].sum(dtype=torch.float64) for sample in samples)
        return samples, total.float().to(self.args.device) if samples else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of one micro-batch in the step's loss."""
        inputs = dict(inputs)
        weights = inputs.pop(COLUMN)
        outputs = model(**inputs, fused_lm_head=True)
        loss = -(outputs.log_probs * weights[:, 1:]).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def use_log_probs(trainer: Any) -> None:
    """Make a trainer ready for `WeightedLoss`."""
    # The trainer brings a fused head, which also computes entropies that nothing uses.
    trl_utils.add_fused_lm_head(trainer.model.get_base_model(), outputs=("log_probs",))
    trainer.model_accepts_loss_kwargs = True  # the loss is divided by the step's sum: not again by its micro-batches
    trainer.data_collator = WeightedCollator(trainer.data_collator)
