"""The order of the training rows under TUNE_CURRICULUM=short_first."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

from collections.abc import Iterator, Sequence

import torch


class ShortFirst(torch.utils.data.Sampler[int]):
    """Row numbers: in the first epoch the shortest rows first, ties as in the dataset; shuffled in all later ones.

    "SortaGrad" (Amodei et al. 2015, "Deep Speech 2", section 3.2). An epoch's order follows from its number, the
    lengths and the seed alone: a run that resumes in the middle of one continues in the same order.
    """

    def __init__(self, lengths: Sequence[int], *, seed: int) -> None:
        self._lengths = lengths
        self._seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer calls it before each epoch, also the one that it resumes in."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        if self.epoch == 0:
            return iter(sorted(range(len(self)), key=self._lengths.__getitem__))
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        return iter(torch.randperm(len(self), generator=generator).tolist())
