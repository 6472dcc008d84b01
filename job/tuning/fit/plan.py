"""What the run does on this device: its steps, every effective hyperparameter, and how a step's batch is split.

Decides what `auto` means as far as the settings, the data and the kind of device say it. On a GPU the pass
configuration is only the one to begin with: `job.tuning.fit.search` measures what fits. Knows what earlier attempts
recorded; needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from job.config.schema import Config
from job.model.schedule import schedule
from job.runtime.errors import ConfigError
from job.tuning.fit.micro_batches import Limit, tokens_of_longest

if TYPE_CHECKING:  # it imports torch
    from job.tuning.device import Device

log = structlog.get_logger()
CPU_OPTIMIZER = "adamw_torch_fused"


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """How a step's batch is split into micro-batches, and how each is run. It never changes what is learned."""

    micro_batch: int
    """Sequences in a micro-batch."""
    tokens_in_pass: int | None
    """Of packed micro-batches: as many tokens as the `micro_batch` longest sequences have, in however many
    sequences."""
    gradient_checkpointing: str
    """`off`, `on` or `unsloth`."""
    cuda_graphs: bool

    @property
    def limit(self) -> Limit:
        """What a micro-batch may hold."""
        return Limit(rows=self.micro_batch, tokens=self.tokens_in_pass)

    def as_json(self) -> dict[str, Any]:
        """Its fields, as a plan's record has them among its own."""
        return {
            "micro_batch": self.micro_batch,
            "tokens_in_pass": self.tokens_in_pass,
            "gradient_checkpointing": self.gradient_checkpointing,
            "cuda_graphs": self.cuda_graphs,
        }

    @classmethod
    def from_json(cls, plan: Mapping[str, Any]) -> PassConfig | None:
        """That of a recorded plan; None if the record has another layout."""
        try:
            return cls(
                micro_batch=plan["micro_batch"],
                tokens_in_pass=plan["tokens_in_pass"],
                gradient_checkpointing=plan["gradient_checkpointing"],
                cuda_graphs=plan["cuda_graphs"],
            )
        except KeyError:
            return None

    def __str__(self) -> str:
        unit = f"{self.micro_batch} sequences" if self.tokens_in_pass is None else f"{self.tokens_in_pass:,} tokens"
        words = f"micro-batches of {unit}, checkpointing {self.gradient_checkpointing}"
        return f"{words}, CUDA graphs" if self.cuda_graphs else words


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the run does. Logged and recorded."""

    examples: int
    steps: int
    epochs: float
    batch_size: int
    pass_config: PassConfig
    """The part that the device decides."""
    batching: str
    """`padded`, `padding_free` or `packed`."""
    optimizer: str
    learning_rate: float
    warmup_steps: int
    schedule: str
    compute_dtype: str
    deterministic: bool
    reasons: tuple[str, ...] = ()
    """Why its pass configuration is what it is."""

    def as_json(self) -> dict[str, Any]:
        """All of it in one level, as `plan_made` shows it."""
        return {
            "examples": self.examples,
            "steps": self.steps,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            **self.pass_config.as_json(),
            "batching": self.batching,
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "schedule": self.schedule,
            "compute_dtype": self.compute_dtype,
            "deterministic": self.deterministic,
            "reasons": self.reasons,
        }

    def reproducibility_facts(self) -> dict[str, Any]:
        """What a run that continues bit for bit meets again: all but the reasons, on which nothing depends."""
        facts = self.as_json()
        del facts["reasons"]
        return facts

    def with_pass(self, pass_config: PassConfig) -> Plan:
        """The plan with another pass configuration."""
        return replace(self, pass_config=pass_config)

    def with_reasons(self, *reasons: str) -> Plan:
        """The plan with further reasons."""
        return replace(self, reasons=(*self.reasons, *reasons))


def make_plan(config: Config, device: Device, *, lengths: Sequence[int], learning_rate: float) -> Plan:
    """Decide what `auto` means for this run. On a GPU its pass configuration holds until it has been measured there.

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
        pass_config=PassConfig(
            micro_batch=rows,
            tokens_in_pass=tokens_of_longest(lengths, rows) if batching == "packed" else None,
            gradient_checkpointing=checkpointing if checkpointing != "auto" else "unsloth" if gpu else "off",
            cuda_graphs=False,
        ),
        batching=batching,
        optimizer=config.optimizer if gpu else CPU_OPTIMIZER,
        learning_rate=learning_rate if config.learning_rate == "auto" else config.learning_rate,
        warmup_steps=steps.warmup_steps,
        schedule=config.schedule,
        compute_dtype=str(device.dtype).removeprefix("torch."),
        deterministic=config.deterministic,
    )


def padded_plan(planned: Plan, *, requested: str, model_type: str) -> Plan:
    """The same plan for a model whose sequences Unsloth does not concatenate.

    Args:
        requested: TUNE_BATCHING.
        model_type: as transformers names it.

    Raises:
        ConfigError: the user asked for padding-free batches.
    """
    if requested != "auto":
        raise ConfigError(
            f"TUNE_BATCHING={requested}, but Unsloth does not train {model_type} models padding-free.",
            remedy="Set TUNE_BATCHING=padded.",
        )
    log.info("batching_padded", was=planned.batching, model_type=model_type)
    unpacked = planned.with_pass(replace(planned.pass_config, tokens_in_pass=None))
    reason = f"padded: Unsloth does not train {model_type} models padding-free"
    return replace(unpacked, batching="padded").with_reasons(reason)


def requested_pass(config: Config) -> dict[str, Any]:
    """What the settings say of the pass configuration, as an attempt records it."""
    return {"micro_batch": config.micro_batch, "gradient_checkpointing": config.gradient_checkpointing}


def auto_remedy(config: Config) -> str:
    """Which settings keep the pass configuration larger than it could be, as the beginning of a remedy; empty if none
    does."""
    smallest = {"micro_batch": 1, "gradient_checkpointing": "unsloth"}
    requested = requested_pass(config).items()
    fixed = [f"TUNE_{name.upper()}" for name, value in requested if value not in ("auto", smallest[name])]
    return f"Leave {' and '.join(fixed)} at auto. " if fixed else ""


def reusable_pass(earlier: Mapping[str, Any], planned: Plan, config: Config, device: Device) -> PassConfig | None:
    """The pass configuration of an earlier attempt: used again on a GPU of the same name, to round as it did, unless
    the settings ask for something else than it used and than they asked for then (memory may have run out since).

    Args:
        earlier: `Finetune.reproducibility_facts` that it recorded.
    """
    recorded = earlier.get("plan") or {}
    used = PassConfig.from_json(recorded)
    if used is None:
        return None
    if earlier.get("device") != device.name:
        log.warning("plan_recomputed", was=earlier.get("device"), now=device.name)
        return None
    requested_then = earlier.get("asked") or {}
    changed = any(
        value not in ("auto", used.as_json()[name], requested_then.get(name))
        for name, value in requested_pass(config).items()
    )
    return None if changed or recorded["batching"] != planned.batching else used


def completed_plan(planned: Plan, earlier: Mapping[str, Any]) -> Plan:
    """The plan of a run whose last step was made in an earlier attempt, on whatever GPU: its batches were that
    attempt's."""
    recorded = earlier.get("plan") or {}
    used = PassConfig.from_json(recorded)
    return planned if used is None else replace(planned, pass_config=used, batching=recorded["batching"])
