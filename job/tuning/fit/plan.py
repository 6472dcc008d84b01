"""How the run's optimizer steps are cut on this device, and every effective hyperparameter.

Candidates are ordered by an estimate of a step's seconds; `job.tuning.fit.search` takes the first that a probe
confirms. The estimate need not be exact, only right about which of two is quicker. A step takes whichever is longer,
what the card computes or what Python needs to launch it:

- computing: 2 operations for each parameter and token forward, as many backward through the frozen weights, and as many
  again where activations are recomputed (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1),
  at half the card's rate for large matrix products.
- launching: a layer's forward and backward take Python 10 ms in all, a third more with recomputation, at any size of
  the pass; a recorded graph takes 0.1 ms (`benchmarks/results/gpu-profile-*.json`, on an H100).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import structlog

from job.config.schema import Config
from job.model.memory import peak_memory
from job.model.schedule import schedule
from job.model.shape import Shape
from job.runtime.errors import ConfigError
from job.tuning.device import Device

log = structlog.get_logger()
CPU_OPTIMIZER = "adamw_torch_fused"
LAYER_SECONDS, GRAPH_SECONDS = 0.01, 0.0001
RECOMPUTED_LAUNCHES = 4 / 3
EFFICIENCY = 0.5
FAR_TOO_LARGE = 1.3
"""A candidate whose estimated memory is so much more than there is needs no probe."""


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """How a batch is cut into passes, and how a pass is run. It never changes what is learned."""

    micro_batch: int
    """Sequences in a pass."""
    tokens_in_pass: int | None
    """Of packed passes: as many tokens as the `micro_batch` longest sequences have, in however many sequences."""
    gradient_checkpointing: str
    """`off`, `on` or `unsloth`."""
    cuda_graphs: bool

    def __str__(self) -> str:
        unit = f"{self.micro_batch} sequences" if self.tokens_in_pass is None else f"{self.tokens_in_pass:,} tokens"
        words = f"passes of {unit}, checkpointing {self.gradient_checkpointing}"
        return f"{words}, CUDA graphs" if self.cuda_graphs else words


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the run does. Logged and recorded."""

    examples: int
    steps: int
    epochs: float
    batch_size: int
    micro_batch: int
    tokens_in_pass: int | None
    gradient_checkpointing: str
    cuda_graphs: bool
    batching: str
    """`padded`, `padding_free` or `packed`."""
    optimizer: str
    learning_rate: float
    warmup_steps: int
    schedule: str
    compute_dtype: str
    deterministic: bool
    reasons: tuple[str, ...] = ()
    """Why it is cut so."""

    @property
    def cut(self) -> PassConfig:
        """The part that the device decides."""
        return PassConfig(**{name: getattr(self, name) for name in PassConfig.__dataclass_fields__})

    def reproducibility_facts(self) -> dict[str, Any]:
        """What a run that goes on bit for bit meets again: all but the reasons, of which nothing follows."""
        found = asdict(self)
        del found["reasons"]
        return found

    def with_pass(self, cut: PassConfig, *reasons: str) -> Plan:
        """The plan with another cut."""
        found = {name: getattr(cut, name) for name in PassConfig.__dataclass_fields__}
        return replace(self, **found, reasons=(*self.reasons, *reasons))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A cut, and what it is expected to take."""

    cut: PassConfig
    seconds: float
    """Of one optimizer step."""
    bytes: int
    """At the peak of the largest pass; 0 where the model's shape is unknown."""


def plan(config: Config, device: Device, *, lengths: Sequence[int], learning_rate: float) -> Plan:
    """Decide what `auto` means for this run. On a GPU the cut is the one to begin with, until the card was asked.

    Args:
        lengths: of the training sequences, in tokens.
        learning_rate: the usual rate for the model's size, taken where the user set none.

    Raises:
        ConfigError: the warm-up is as long as the run.
    """
    steps = schedule(config, examples=len(lengths))
    gpu = device.kind == "cuda"
    batching = config.batching if config.batching != "auto" else "packed" if gpu else "padded"
    checkpointing = config.gradient_checkpointing
    rows = min(steps.micro_batch, config.batch_size)
    return Plan(
        examples=len(lengths),
        steps=steps.steps,
        epochs=steps.epochs,
        batch_size=config.batch_size,
        micro_batch=rows,
        tokens_in_pass=_capacity(lengths, rows) if batching == "packed" else None,
        gradient_checkpointing=checkpointing if checkpointing != "auto" else "unsloth" if gpu else "off",
        cuda_graphs=False,
        batching=batching,
        optimizer=config.optimizer if gpu else CPU_OPTIMIZER,
        learning_rate=learning_rate if config.learning_rate == "auto" else config.learning_rate,
        warmup_steps=steps.warmup_steps,
        schedule=config.schedule,
        compute_dtype=str(device.dtype).removeprefix("torch."),
        deterministic=config.deterministic,
    )


def padded(planned: Plan, config: Config, *, model: str) -> Plan:
    """The same plan for a model whose sequences Unsloth does not let stand one behind the other.

    Args:
        model: its type, as transformers names it.

    Raises:
        ConfigError: that is what the user asked for.
    """
    if config.batching != "auto":
        raise ConfigError(
            f"TUNE_BATCHING={config.batching}, but Unsloth does not train {model} models padding-free.",
            remedy="Set TUNE_BATCHING=padded.",
        )
    reason = f"padded: Unsloth does not train {model} models padding-free"
    log.info("batching_padded", was=planned.batching, model_type=model)
    return replace(planned, batching="padded", tokens_in_pass=None, reasons=(*planned.reasons, reason))


def candidates(
    planned: Plan, config: Config, shape: Shape | None, *, lengths: Sequence[int], rate: float, graphs: bool
) -> list[Candidate]:
    """All cuts that the settings allow, the quickest first.

    Args:
        shape: of the model; None where it is unknown: then the plainest order is kept.
        lengths: of the training sequences, in tokens.
        rate: of large 16-bit matrix products on this card, in operations a second.
        graphs: whether the model's passes may be recorded.
    """
    found = []
    for rows in _halves(planned.batch_size) if config.micro_batch == "auto" else [planned.micro_batch]:
        for checkpointing in _checkpointings(config):
            for recorded in (True, False) if graphs and checkpointing == "off" else (False,):
                cut = PassConfig(
                    micro_batch=rows,
                    tokens_in_pass=_capacity(lengths, rows) if planned.batching == "packed" else None,
                    gradient_checkpointing=checkpointing,
                    cuda_graphs=recorded,
                )
                found.append(
                    Candidate(
                        cut=cut,
                        seconds=_seconds(cut, planned, shape, lengths, rate),
                        bytes=_bytes(cut, planned, config, shape, lengths),
                    )
                )
    return sorted(found, key=lambda one: one.seconds)


def smaller(cut: PassConfig, lengths: Sequence[int]) -> PassConfig | None:
    """What to go on with where a cut ran out of memory; None if there is nothing smaller."""
    if cut.micro_batch > 1:
        rows = cut.micro_batch // 2
        tokens = None if cut.tokens_in_pass is None else _capacity(lengths, rows)
        return replace(cut, micro_batch=rows, tokens_in_pass=tokens)
    if cut.cuda_graphs:
        return replace(cut, cuda_graphs=False)
    if cut.gradient_checkpointing != "unsloth":
        return replace(cut, gradient_checkpointing="unsloth")
    return None


def _halves(batch: int) -> list[int]:
    return sorted({math.ceil(batch / 2**n) for n in range(batch.bit_length() + 1)}, reverse=True)


def _checkpointings(config: Config) -> tuple[str, ...]:
    asked = config.gradient_checkpointing
    return ("off", "unsloth") if asked == "auto" else (asked,)


def _capacity(lengths: Sequence[int], rows: int) -> int:
    return sum(sorted(lengths)[-rows:])


def _passes(cut: PassConfig, planned: Plan, lengths: Sequence[int]) -> int:
    if cut.tokens_in_pass is None:
        return math.ceil(planned.batch_size / cut.micro_batch)
    mean = sum(lengths) / len(lengths)
    return math.ceil(planned.batch_size * mean / cut.tokens_in_pass)


def _seconds(cut: PassConfig, planned: Plan, shape: Shape | None, lengths: Sequence[int], rate: float) -> float:
    if shape is None:
        return _passes(cut, planned, lengths) + (cut.gradient_checkpointing != "off") / 2
    recomputed = cut.gradient_checkpointing != "off"
    tokens = planned.batch_size * (max(lengths) if planned.batching == "padded" else sum(lengths) / len(lengths))
    computing = 2 * shape.parameters * tokens * (3 if recomputed else 2) / (rate * EFFICIENCY)
    each = GRAPH_SECONDS if cut.cuda_graphs else LAYER_SECONDS * (RECOMPUTED_LAUNCHES if recomputed else 1)
    return max(computing, each * shape.layers * _passes(cut, planned, lengths)) + computing / 100


def _bytes(cut: PassConfig, planned: Plan, config: Config, shape: Shape | None, lengths: Sequence[int]) -> int:
    if shape is None:
        return 0
    padded = planned.batching == "padded"
    tokens = cut.micro_batch * max(lengths) if padded else _capacity(lengths, cut.micro_batch)
    return peak_memory(shape, config, tokens=tokens, checkpointing=cut.gradient_checkpointing).total


def asked(config: Config) -> dict[str, Any]:
    """What the settings say of the cut, as an attempt records it."""
    return {"micro_batch": config.micro_batch, "gradient_checkpointing": config.gradient_checkpointing}


def freed(config: Config) -> str:
    """What of the cut is left to be decided where it does not fit as the settings have it; empty where all of it is."""
    most = {"micro_batch": 1, "gradient_checkpointing": "unsloth"}
    fixed = [f"TUNE_{name.upper()}" for name, value in asked(config).items() if value not in ("auto", most[name])]
    return f"Leave {' and '.join(fixed)} at auto. " if fixed else ""


def taken_over(earlier: dict[str, Any], planned: Plan, config: Config, device: Device) -> PassConfig | None:
    """How an earlier attempt cut its batches: done again on a card of the same name, to round as it did, unless the
    settings ask for something else than it did and than they asked for then (memory may have run out since).

    Args:
        earlier: `Finetune.reproducibility_facts` that it recorded.
    """
    found = as_recorded(earlier.get("plan") or {})
    if found is None:
        return None
    if earlier.get("device") != device.name:
        log.warning("plan_recomputed", was=earlier.get("device"), now=device.name)
        return None
    then = earlier.get("asked") or {}
    other = any(value not in ("auto", getattr(found, name), then.get(name)) for name, value in asked(config).items())
    return None if other or earlier["plan"]["batching"] != planned.batching else found


def as_trained(planned: Plan, earlier: dict[str, Any]) -> Plan:
    """The plan of a run whose last step was made in an earlier attempt, on whatever card: cut as it was there."""
    recorded = earlier.get("plan") or {}
    found = as_recorded(recorded)
    return planned if found is None else replace(planned.with_pass(found), batching=recorded["batching"])


def as_recorded(recorded: dict[str, Any]) -> PassConfig | None:
    """The cut of a plan that an earlier attempt recorded; None if it was of another layout."""
    try:
        return PassConfig(**{name: recorded[name] for name in PassConfig.__dataclass_fields__})
    except KeyError:
        return None
