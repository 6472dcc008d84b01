"""An optimizer step's batch -> the micro-batches in which its gradients are added up.

The trainer always takes the whole batch at once, and this splits it: into as few micro-batches as memory allows. Each
is divided by the labelled tokens of the whole batch, so that their sum is the same gradient however the batch is split,
up to rounding. That also makes a step repeatable: where memory runs out, it starts over with smaller micro-batches, and
nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # arithmetic needs no torch
    import torch

LENGTHS = "packed_seq_lengths"
PER_OCTAVE = 8
"""Lengths between one and its double."""
GRAIN = 64
"""Lengths are multiples of it, so that kernels that were compiled for one fit the next."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What one micro-batch may hold."""

    rows: int
    """Sequences."""
    tokens: int | None = None
    """Of padding-free micro-batches: where it is set, it counts instead of `rows`."""

    def groups(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Sequences of these lengths in groups within the limit, in their order. A sequence that is longer than the
        limit has a group of its own."""
        start, held = 0, 0
        for at, length in enumerate(lengths):
            full = at - start >= self.rows if self.tokens is None else held + length > self.tokens
            if full and at > start:
                yield slice(start, at)
                start, held = at, 0
            held += length
        if start < len(lengths):
            yield slice(start, len(lengths))


def split(batch: Mapping[str, torch.Tensor], limit: Limit) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of a collated batch.

    Args:
        batch: padding-free, with `packed_seq_lengths` (sequences,) and all else (1, tokens); or padded, with all of it
            (rows, longest) and `attention_mask` among it.
    """
    return _split_flat(batch, limit) if LENGTHS in batch else _split_padded(batch, limit)


def _split_flat(batch: Mapping[str, torch.Tensor], limit: Limit) -> Iterator[dict[str, torch.Tensor]]:
    lengths = batch[LENGTHS].tolist()
    start = 0
    for group in limit.groups(lengths):
        stop = start + sum(lengths[group])
        yield {name: values[group] if name == LENGTHS else values[:, start:stop] for name, values in batch.items()}
        start = stop


def _split_padded(batch: Mapping[str, torch.Tensor], limit: Limit) -> Iterator[dict[str, torch.Tensor]]:
    """The longest rows first, so that rows of similar length are padded together."""
    lengths = batch["attention_mask"].sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    for chosen in order.split(limit.rows):
        longest = int(lengths[chosen[0]])
        yield {name: values[chosen, :longest] for name, values in batch.items()}


def tokens_of_longest(lengths: Sequence[int], rows: int) -> int:
    """The tokens of the `rows` longest sequences."""
    return sum(sorted(lengths)[-rows:])


def bucket_length(tokens: int) -> int:
    """The length, of eight in each octave, that holds these tokens and at least one of padding."""
    wanted = tokens + 1
    octave: int = 2 ** (math.ceil(math.log2(wanted)) - 1)
    step = max(GRAIN, octave // PER_OCTAVE)
    return math.ceil(wanted / step) * step


def bucket_sequences(total: int, *, longest: int, rows: int) -> list[int]:
    """Lengths of `rows` + 1 sequences that make up `total` tokens, the first as long as a sequence may be.

    What is recorded with it holds for all others: kernels take from it how long a sequence is at most.
    """
    lengths = []
    left = total - 1
    while left:
        lengths.append(min(longest, left))
        left -= lengths[-1]
    lengths.append(1)
    return lengths + [0] * (rows + 1 - len(lengths))
