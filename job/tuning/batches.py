"""Padded batches for evaluation and generation, without the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structlog
import torch

from job.tuning.device import out_of_memory

log = structlog.get_logger()
IGNORED = -100
"""The label of tokens that are not learned."""


def by_length(lengths: Sequence[int], size: int, run: Callable[[list[int]], None]) -> None:
    """Run over row numbers in batches of `size`, the longest first: padding is small, and memory trouble comes early.

    A batch that runs out of memory is halved, and all later ones are as small; of one row, the error is raised.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        error = ""
        try:
            run(order[:size])
        except RuntimeError as found:
            if size == 1 or not out_of_memory(found):
                raise
            error = str(found).splitlines()[0]
        if error:  # only here: what the batch had allocated is let go with its error
            torch.cuda.empty_cache()
            log.warning("evaluation_batch_halved", reason=error, was=size, now=size // 2)
            size //= 2
            continue
        order = order[size:]


def pad(rows: Sequence[Sequence[int]], *, value: int, left: bool = False) -> torch.Tensor:
    """Rows of token ids as a (rows, longest) tensor of int64."""
    longest = max(len(row) for row in rows)
    filled = [
        [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64)


def mask(rows: Sequence[Sequence[int]], *, left: bool = False) -> torch.Tensor:
    """The attention mask that belongs to `pad`: 1 where a token is, shape (rows, longest)."""
    return pad([[1] * len(row) for row in rows], value=0, left=left)


def training_batch(rows: Sequence[dict[str, Any]], *, pad_id: int, device: str) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each (rows, longest)."""
    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": pad(ids, value=pad_id),
        "attention_mask": mask(ids),
        "labels": pad([row["labels"] for row in rows], value=IGNORED),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
