"""The dimensions of a decoder that sizes follow from: its linear layers, and its other parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.model.base_model import IN_A_LAYER, BaseModel
from job.runtime.errors import ConfigError

Sides = tuple[int, int]
"""Outputs and inputs of a linear layer, as its weight is stored."""

ALL_LINEAR = ("all-linear",)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder."""

    hidden: int
    layers: int
    vocabulary: int
    linears: Mapping[str, tuple[Sides, ...]]
    """The linear layers of the decoder by leaf name, e.g. `q_proj`, one entry for each layer."""
    rest: int
    """Other parameters: embeddings, head, norms."""

    @property
    def linear(self) -> int:
        """Parameters in the linear layers of the decoder."""
        return sum(out * into for sides in self.linears.values() for out, into in sides)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear + self.rest

    @property
    def largest(self) -> int:
        """Parameters of the largest linear layer."""
        return max((out * into for sides in self.linears.values() for out, into in sides), default=0)

    def adapter(self, rank: int, targets: Sequence[str] = ALL_LINEAR) -> int:
        """Parameters of a LoRA adapter: rank x (inputs + outputs) for each layer that has one (Hu et al. 2021,
        section 4.1)."""
        chosen = self.linears if tuple(targets) == ALL_LINEAR else targets
        return sum(rank * (out + into) for name in chosen for out, into in self.linears.get(name, ()))


def check_targets(asked: Sequence[str], available: Collection[str]) -> None:
    """Raise ConfigError if TUNE_LORA_TARGETS contains a name that is not among a model's linear layers (leaf names).

    PEFT would silently skip such a name if another one matches.
    """
    unknown = [name for name in asked if name not in available]
    if tuple(asked) != ALL_LINEAR and unknown:
        raise ConfigError(
            f"TUNE_LORA_TARGETS contains {', '.join(unknown)}, which match no linear layer of this model.",
            remedy=f"Use some of: {', '.join(available)}.",
        )


def check_targets_of(base: BaseModel, asked: Sequence[str]) -> None:
    """The same before anything is loaded, if the weight files name the layers. Raises ConfigError."""
    if stored := _linears(base):
        check_targets(asked, stored)


def _linears(base: BaseModel) -> dict[str, tuple[Sides, ...]]:
    """The matrices inside the layers by leaf name, as stored; the dimensions of packed ones have no meaning."""
    linears: dict[str, tuple[Sides, ...]] = {}
    for name, sides in base.shapes.items():
        if len(sides) == 2 and (found := IN_A_LAYER.search(name)):  # noqa: PLR2004 - a matrix
            linears[found["leaf"]] = (*linears.get(found["leaf"], ()), (sides[0], sides[1]))
    return linears


def of(base: BaseModel) -> Shape | None:
    """The shape of a model by its tensors, or by its configuration if these are packed; None if neither shows it."""
    text = base.config.get("text_config") or base.config
    if base.prequantised == "4bit":
        return _of_config(text, base)
    linears = _linears(base)
    if not linears:
        return _of_config(text, base)
    bare = Shape(hidden=0, layers=0, vocabulary=0, linears=linears, rest=0)
    layers = {found["layer"] for name in base.shapes if (found := IN_A_LAYER.search(name))}
    return Shape(
        hidden=text.get("hidden_size") or max(sides[0][1] for sides in linears.values()),
        layers=len(layers),
        vocabulary=text.get("vocab_size") or 0,
        linears=linears,
        rest=base.parameters - bare.linear,
    )


def llama(*, hidden: int, inner: int, layers: int, keys: int, vocabulary: int, queries: int = 0) -> Shape:
    """A Llama with separate embeddings and head, without its norms.

    Args:
        inner: width of the feed-forward layers.
        keys: width of all keys together.
        queries: width of all queries together, if it is not the hidden size.
    """
    wide = queries or hidden
    sides = {
        "q_proj": (wide, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, wide),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    linears = {name: (pair,) * layers for name, pair in sides.items()}
    return Shape(hidden=hidden, layers=layers, vocabulary=vocabulary, linears=linears, rest=2 * vocabulary * hidden)


def _of_config(text: Mapping[str, Any], base: BaseModel) -> Shape | None:
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if any(not isinstance(text.get(name), int) for name in needed) or any(
        isinstance(text.get(name), list) for name in ("head_dim", "num_key_value_heads")
    ):
        return None
    heads = text["num_attention_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    made = llama(
        hidden=text["hidden_size"],
        inner=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        keys=width * (text.get("num_key_value_heads") or heads),
        vocabulary=text["vocab_size"],
        queries=width * heads,
    )
    rest = base.parameters - made.linear
    return Shape(
        hidden=made.hidden,
        layers=made.layers,
        vocabulary=made.vocabulary,
        linears=made.linears,
        rest=rest if rest > 0 else made.rest,
    )
