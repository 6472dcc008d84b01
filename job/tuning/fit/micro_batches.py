"""An optimizer step's batch -> the passes in which its gradients are added up.

The trainer always takes the whole batch at once, and this cuts it: into as few passes as memory allows. Every pass is
divided by the labelled tokens of the whole batch, so that the sum over the passes is the same gradient however it is
cut, up to rounding. That also makes a pass repeatable: where memory runs out, the step begins again, cut smaller, and
nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

LENGTHS = "packed_seq_lengths"
PER_OCTAVE = 8
"""Lengths between one and its double."""
GRAIN = 64
"""Lengths are multiples of it, so that kernels that were compiled for one fit the next."""
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What one pass may hold."""

    rows: int
    """Sequences."""
    tokens: int | None = None
    """Of padding-free passes: where it is set, it counts instead of `rows`."""

    def groups(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Sequences of these lengths in passes, in their order. One that is longer than a pass may be stands alone."""
        start, held = 0, 0
        for at, length in enumerate(lengths):
            full = at - start >= self.rows if self.tokens is None else held + length > self.tokens
            if full and at > start:
                yield slice(start, at)
                start, held = at, 0
            held += length
        if start < len(lengths):
            yield slice(start, len(lengths))


def cut(batch: Batch, limit: Limit) -> Iterator[dict[str, torch.Tensor]]:
    """The passes of a collated batch.

    Args:
        batch: padding-free, with `packed_seq_lengths` (sequences,) and all else (1, tokens); or padded, with all of it
            (rows, longest) and `attention_mask` among it.
    """
    return _flat(batch, limit) if LENGTHS in batch else _padded(batch, limit)


def _flat(batch: Batch, limit: Limit) -> Iterator[dict[str, torch.Tensor]]:
    lengths = batch[LENGTHS].tolist()
    start = 0
    for group in limit.groups(lengths):
        stop = start + sum(lengths[group])
        yield {name: values[group] if name == LENGTHS else values[:, start:stop] for name, values in batch.items()}
        start = stop


def _padded(batch: Batch, limit: Limit) -> Iterator[dict[str, torch.Tensor]]:
    """The longest rows first, so that rows of like length are padded together."""
    lengths = batch["attention_mask"].sum(dim=1)
    order = torch.argsort(lengths, descending=True, stable=True)
    for chosen in torch.split(order, limit.rows):
        longest = int(lengths[chosen[0]])
        yield {name: values[chosen, :longest] for name, values in batch.items()}


def bucket(tokens: int) -> int:
    """The length, of eight in each octave, that holds so many tokens and at least one of padding."""
    wanted = tokens + 1
    step = max(GRAIN, 2 ** (math.ceil(math.log2(wanted)) - 1) // PER_OCTAVE)
    return math.ceil(wanted / step) * step


def layout(total: int, *, longest: int, rows: int) -> list[int]:
    """Lengths of `rows` + 1 sequences of which `total` tokens may consist, the first as long as one may be.

    What is recorded with it holds for all others: kernels take from it how long a sequence is at most.
    """
    lengths = []
    left = total - 1
    while left:
        lengths.append(min(longest, left))
        left -= lengths[-1]
    lengths.append(1)
    return lengths + [0] * (rows + 1 - len(lengths))
