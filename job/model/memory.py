"""An estimate, not a measurement, of what a run needs: steps, tokens, and GPU memory.

Memory is the sum of the following, in bytes; `tests/model/test_memory.py` compares it with the runs measured under
`benchmarks/results/`, and `docs/sizing.md` shows it for common models.

- weights: a linear layer of the decoder takes 0.516 bytes per parameter in NF4 with double quantisation (half a byte,
  one byte of absmax for each block of 64, and four bytes for each 256 of those: Dettmers et al. 2023, "QLoRA", section
  3), 1 in 8 bit, 2 in 16 bit. Embeddings, head and norms always take 2.
- adapter: rank x (inputs + outputs) for each layer (Hu et al. 2021, "LoRA", section 4.1), kept in 32 bit; as much again
  for its gradients; 2 bytes for the two states of 8-bit Adam, 8 for those of 32-bit Adam.
- activations: for a layer, the backward pass needs the outputs of its linear layers, and inputs and outputs of its two
  norms, in 16 bit (counted as in Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
  Models", section 4.1, with flash attention). Without checkpointing, those of all layers are in memory; with it, those
  of one layer at a time, plus the inputs of all layers, which `unsloth` moves to the host.
- logits: one of at least four chunks of the tokens, in 32 bit, and never more than 4 GiB (Unsloth's fused
  cross-entropy, unsloth_zoo/fused_losses/cross_entropy_loss.py).
- workspace: the largest layer, dequantised to 16 bit.
- context: what CUDA and its libraries take on a GPU; an assumption.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from job.config.schema import Config
from job.model.base_model import BaseModel
from job.model.schedule import schedule
from job.model.shape import Shape
from job.model.shape import of as shape_of

NF4 = 0.5 + 1 / 64 + 4 / 64 / 256
WIDTHS = {"4bit": NF4, "8bit": 1.0, "16bit": 2.0}
ADAPTER_BYTES = GRADIENT_BYTES = 4
STATE_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2}
STATE_BYTES_OTHERS = 8
LOGIT_CHUNKS = 4
LOGIT_BYTES = 4
MAX_LOGIT_BYTES = 4 << 30
CONTEXT = 600_000_000
TIGHT = 0.85
"""Above this share of a GPU's memory, batches that are longer than expected may not fit."""
MIB = 1 << 20
CARDS = {
    "T4 16 GB": 15_360,
    "A10G 24 GB": 23_028,
    "L4 24 GB": 23_034,
    "RTX 4090 24 GB": 24_564,
    "A100 40 GB": 40_960,
    "L40S 48 GB": 46_068,
    "H100 80 GB": 81_559,
    "A100 80 GB": 81_920,
    "H200 141 GB": 143_771,
}
"""Memory in MiB, as nvidia-smi shows it."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the GPU at the peak of a training step."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum, without CUDA's own memory."""
        return sum(dataclasses.asdict(self).values())

    @property
    def loaded(self) -> int:
        """The part that is in memory before the first step."""
        return self.weights + self.adapter + self.workspace


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether the run fits one kind of GPU."""

    card: str
    bytes: int
    verdict: str
    """`fits`, `tight` or `does not fit`."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The size of a training set."""

    sequences: int
    tokens: int
    """In one epoch, without padding."""
    labelled_tokens: int
    """Of these, learned."""
    longest: int
    """Tokens of the longest sequence."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the run will need."""

    steps: int
    epochs: float
    micro_batch: int
    gradient_accumulation: int
    tokens_per_epoch: int
    tokens: int
    """Over the whole run, without padding."""
    labelled_tokens: int
    """Of these, learned."""
    parameters: int
    adapter_parameters: int
    checkpointing: str
    """TUNE_GRADIENT_CHECKPOINTING, with `auto` as `unsloth`: `auto` keeps activations in memory only if they fit."""
    micro_batch_tokens: int
    """In a micro-batch as small as possible: with TUNE_MICRO_BATCH=auto one sequence of the greatest length, else as
    many of them as set."""
    memory: Memory | None
    """None if the model's shape is unknown, as for the next three."""
    host_bytes: int | None
    """Activations that `unsloth` moves to the host."""
    alternatives: dict[str, int]
    """The peak in bytes by TUNE_GRADIENT_CHECKPOINTING."""
    fits: tuple[Fit, ...]


def weight_bytes(shape: Shape, precision: str) -> int:
    """The base model on the GPU."""
    return round(shape.linear * WIDTHS[precision] + 2 * shape.rest)


def layer_bytes(shape: Shape) -> int:
    """The activations of one layer that the backward pass needs, for each token."""
    outputs = sum(out for sides in shape.linears.values() for out, _ in sides) // max(shape.layers, 1)
    return 2 * (outputs + 3 * shape.hidden)


def moved_bytes(shape: Shape, tokens: int) -> int:
    """The inputs of all layers."""
    return 2 * tokens * shape.hidden * shape.layers


def peak_memory(shape: Shape, config: Config, *, tokens: int, checkpointing: str) -> Memory:
    """The peak of a step with micro-batches of this many tokens."""
    adapter = shape.adapter(config.lora_r, config.lora_targets)
    one_layer = tokens * layer_bytes(shape)
    activations = {
        "off": one_layer * shape.layers,
        "on": one_layer + moved_bytes(shape, tokens),
        "unsloth": one_layer,
    }
    return Memory(
        weights=weight_bytes(shape, config.precision),
        adapter=ADAPTER_BYTES * adapter,
        gradients=GRADIENT_BYTES * adapter,
        optimizer=adapter * STATE_BYTES.get(config.optimizer, STATE_BYTES_OTHERS),
        activations=activations[checkpointing],
        logits=min(LOGIT_BYTES * shape.vocabulary * -(-tokens // LOGIT_CHUNKS), MAX_LOGIT_BYTES),
        workspace=0 if config.precision == "16bit" else 2 * shape.largest,
    )


def fits(needed: int) -> tuple[Fit, ...]:
    """Which GPUs have enough memory for this many bytes and CUDA's own."""
    found = []
    for card, size in CARDS.items():
        share = (needed + CONTEXT) / (size * MIB)
        verdict = "fits" if share <= TIGHT else "tight" if share <= 1 else "does not fit"
        found.append(Fit(card=card, bytes=size * MIB, verdict=verdict))
    return tuple(found)


def estimate(config: Config, base: BaseModel, training_set: TrainingSet) -> Estimate:
    """What a run needs. Raises ConfigError if the warm-up is as long as the run."""
    planned = schedule(config, examples=training_set.sequences)
    shape = shape_of(base)
    checkpointing = "unsloth" if config.gradient_checkpointing == "auto" else config.gradient_checkpointing
    tokens = training_set.longest * (1 if config.micro_batch == "auto" else planned.micro_batch)
    peaks = {
        name: peak_memory(shape, config, tokens=tokens, checkpointing=name)
        for name in ("unsloth", "on", "off")
        if shape is not None
    }
    return Estimate(
        steps=planned.steps,
        epochs=planned.epochs,
        micro_batch=planned.micro_batch,
        gradient_accumulation=planned.gradient_accumulation,
        tokens_per_epoch=training_set.tokens,
        tokens=round(training_set.tokens * planned.epochs),
        labelled_tokens=round(training_set.labelled_tokens * planned.epochs),
        parameters=base.parameters,
        adapter_parameters=shape.adapter(config.lora_r, config.lora_targets) if shape else 0,
        checkpointing=checkpointing,
        micro_batch_tokens=tokens,
        memory=peaks.get(checkpointing),
        host_bytes=moved_bytes(shape, tokens) if shape and checkpointing == "unsloth" else None,
        alternatives={name: peak.total for name, peak in peaks.items()},
        fits=fits(peaks[checkpointing].total) if peaks else (),
    )
