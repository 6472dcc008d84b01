"""The pass configurations that a plan allows, quickest first, by an estimate of a step's seconds and memory.

`job.tuning.fit.search` takes the first that a probe confirms. The estimate need not be exact, only right about which of
two is quicker. A step takes whichever is longer, what the GPU computes or what Python needs to launch it:

- computing: 2 operations for each parameter and token forward, as many backward through the frozen weights, and as many
  again where activations are recomputed (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1),
  at half the GPU's rate for large matrix products.
- launching: a layer's forward and backward take Python 10 ms in all, a third more with recomputation, at any size of
  the micro-batch; a recorded graph takes 0.1 ms (`benchmarks/results/gpu-profile-*.json`, on an H100).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from job.config.schema import Config
from job.model.memory import peak_memory
from job.model.shape import Shape
from job.tuning.fit.micro_batches import tokens_of_longest
from job.tuning.fit.plan import PassConfig, Plan

LAYER_SECONDS, GRAPH_SECONDS = 0.01, 0.0001
RECOMPUTED_LAUNCHES = 4 / 3
EFFICIENCY = 0.5
FAR_TOO_LARGE = 1.3
"""A candidate whose estimated memory is this many times what the GPU has needs no probe."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the time and memory of a step depend on, whatever the plan."""

    lengths: Sequence[int]
    """Of the training sequences, in tokens."""
    shape: Shape | None
    """Of the model; None where it is unknown: then the plainest order is kept."""
    state_bytes: int
    """What the optimizer will keep."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A pass configuration, and what it is expected to take."""

    pass_config: PassConfig
    seconds: float
    """Of one optimizer step."""
    bytes: int
    """At the peak of the largest micro-batch; 0 where the model's shape is unknown."""


def candidates(planned: Plan, config: Config, workload: Workload, *, rate: float, graphs: bool) -> list[Candidate]:
    """All pass configurations that the settings allow, the quickest first.

    Args:
        rate: of large 16-bit matrix products on this GPU, in operations a second.
        graphs: whether CUDA graphs may be tried.
    """
    rows = _halves(planned.batch_size) if config.micro_batch == "auto" else [planned.pass_config.micro_batch]
    requested = config.gradient_checkpointing
    allowed = [
        PassConfig(
            micro_batch=micro_batch,
            tokens_in_pass=tokens_of_longest(workload.lengths, micro_batch) if planned.batching == "packed" else None,
            gradient_checkpointing=checkpointing,
            cuda_graphs=recorded,
        )
        for micro_batch in rows
        for checkpointing in (("off", "unsloth") if requested == "auto" else (requested,))
        for recorded in ((True, False) if graphs and checkpointing == "off" else (False,))
    ]
    estimated = [
        Candidate(
            pass_config=one,
            seconds=_seconds(one, planned, workload, rate),
            bytes=_bytes(one, planned, config, workload),
        )
        for one in allowed
    ]
    return sorted(estimated, key=lambda candidate: candidate.seconds)


def smaller(pass_config: PassConfig, lengths: Sequence[int]) -> PassConfig | None:
    """What to continue with where memory ran out; None if there is nothing smaller."""
    if pass_config.micro_batch > 1:
        rows = pass_config.micro_batch // 2
        tokens = None if pass_config.tokens_in_pass is None else tokens_of_longest(lengths, rows)
        return replace(pass_config, micro_batch=rows, tokens_in_pass=tokens)
    if pass_config.cuda_graphs:
        return replace(pass_config, cuda_graphs=False)
    if pass_config.gradient_checkpointing != "unsloth":
        return replace(pass_config, gradient_checkpointing="unsloth")
    return None


def _halves(batch: int) -> list[int]:
    return sorted({math.ceil(batch / 2**n) for n in range(batch.bit_length() + 1)}, reverse=True)


def _count(pass_config: PassConfig, planned: Plan, lengths: Sequence[int]) -> int:
    """The micro-batches of a step, on average."""
    if pass_config.tokens_in_pass is None:
        return math.ceil(planned.batch_size / pass_config.micro_batch)
    mean = sum(lengths) / len(lengths)
    return math.ceil(planned.batch_size * mean / pass_config.tokens_in_pass)


def _seconds(pass_config: PassConfig, planned: Plan, workload: Workload, rate: float) -> float:
    shape, lengths = workload.shape, workload.lengths
    count, recomputed = _count(pass_config, planned, lengths), pass_config.gradient_checkpointing != "off"
    if shape is None:
        return count + recomputed / 2
    tokens = planned.batch_size * (max(lengths) if planned.batching == "padded" else sum(lengths) / len(lengths))
    computing = 2 * shape.parameters * tokens * (3 if recomputed else 2) / (rate * EFFICIENCY)
    each = GRAPH_SECONDS if pass_config.cuda_graphs else LAYER_SECONDS * (RECOMPUTED_LAUNCHES if recomputed else 1)
    return max(computing, each * shape.layers * count) + computing / 100


def _bytes(pass_config: PassConfig, planned: Plan, config: Config, workload: Workload) -> int:
    if workload.shape is None:
        return 0
    rows, lengths = pass_config.micro_batch, workload.lengths
    tokens = rows * max(lengths) if planned.batching == "padded" else tokens_of_longest(lengths, rows)
    return peak_memory(workload.shape, config, tokens=tokens, checkpointing=pass_config.gradient_checkpointing).total
