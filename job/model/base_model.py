"""A base model by its files, read without loading weights, and whether this job can train it correctly.

Rejects models that would be trained wrongly or run code: pickled weights, remote code, multimodal and
mixture-of-experts models, adapters given as models. Knows nothing of GPUs or of training.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.inputs.safetensors_stub import LONGEST_HEADER
from job.runtime.errors import ConfigError, DataError

MULTIMODAL = ("vision_config", "audio_config", "vision_tower", "audio_token_id", "image_token_id", "image_token_index")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
COPY_AGAIN = "Copy the model to TUNE_MODEL again."


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model in a local directory."""

    path: Path
    name: str
    weights: tuple[Path, ...]
    """The files with the weights: those in the index, or all if there is no index."""
    architecture: str
    parameters: int
    """Number of weights, counted unpacked if they are stored quantised."""
    positions: int | None
    """The longest input of the model, in tokens; None if its configuration does not state it."""
    prequantised: str | None
    """`4bit` or `8bit` if the checkpoint itself is quantised with bitsandbytes."""
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shape of each tensor as stored, by name."""

    @property
    def linear_attention(self) -> bool:
        """Whether it may have layers with linear attention, by the names in its configuration
        (`linear_num_key_heads`, or `linear_attention` among the `layer_types`)."""
        return "linear_" in json.dumps(self.config)


def inspect(path: Path, *, name: str) -> BaseModel:
    """Read a model directory.

    Args:
        path: directory with `config.json` and safetensors.
        name: the user's name of the model, for messages.

    Raises:
        DataError: files are missing or damaged, or this job does not train this kind of model.
    """
    config = _config(path, name)
    _check_trainable(path, name, config)
    weights = _weights(path, name)
    tensors = {key: tensor for file in weights for key, tensor in _header(file, name).items()}
    text = config.get("text_config") or config
    return BaseModel(
        path=path,
        name=name,
        weights=weights,
        architecture=config["architectures"][0],
        parameters=sum(_count(key, tensor) for key, tensor in tensors.items()),
        positions=text.get("max_position_embeddings"),
        prequantised=_quantisation(name, config),
        config=config,
        shapes={key: tuple(tensor["shape"]) for key, tensor in tensors.items()},
    )


def check_fits(model: BaseModel, *, precision: str, max_length: int, export: Sequence[str]) -> None:
    """Reject settings that are not possible with this model.

    Raises:
        ConfigError: the precision contradicts the checkpoint, examples may be longer than the model's positions, or
            merged weights are requested that cannot be made.
    """
    if model.prequantised == "8bit" and "merged_16bit" in export:
        raise ConfigError(
            f"TUNE_EXPORT contains merged_16bit, but {model.name} is stored in 8bit, which cannot be merged exactly.",
            remedy="Set TUNE_EXPORT=adapter, or TUNE_MODEL to the model's 16-bit original.",
        )
    if model.prequantised and model.prequantised != precision:
        raise ConfigError(
            f"TUNE_PRECISION={precision}, but {model.name} is stored in {model.prequantised}.",
            remedy=f"Set TUNE_PRECISION={model.prequantised}, or TUNE_MODEL to the model's 16-bit original.",
        )
    if model.positions is not None and max_length > model.positions:
        raise ConfigError(
            f"TUNE_MAX_LENGTH={max_length}, but {model.name} has positions for {model.positions} tokens.",
            remedy=f"Set TUNE_MAX_LENGTH to {model.positions} or less.",
        )


def _config(path: Path, name: str) -> dict[str, Any]:
    file = path / "config.json"
    if (path / "adapter_config.json").exists() and not file.exists():
        raise DataError(
            f"{name} is an adapter, not a base model.", remedy="Set TUNE_MODEL to the base it was made for."
        )
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{name} has no config.json; it contains: {found}.",
            remedy="TUNE_MODEL must be the directory or prefix with config.json and *.safetensors.",
        ) from None
    except ValueError as error:
        raise DataError(f"config.json of {name} is not valid JSON: {error}.") from None
    if not isinstance(config, dict) or not config.get("architectures"):
        raise DataError(f"config.json of {name} has no architecture.", remedy="Use a complete transformers checkpoint.")
    return config


def _check_trainable(path: Path, name: str, config: dict[str, Any]) -> None:
    if "auto_map" in config:
        raise DataError(
            f"{name} needs custom code (auto_map in config.json), and this job never runs code of a model.",
            remedy="Use a checkpoint whose architecture is part of transformers.",
        )
    architecture = config["architectures"][0]
    multimodal = [key for key in MULTIMODAL if config.get(key) is not None]
    if multimodal or not architecture.endswith("ForCausalLM"):
        why = f"{multimodal[0]} in config.json" if multimodal else "not a ...ForCausalLM"
        raise DataError(
            f"{name} is a {architecture} ({why}). This job trains text-only causal language models.",
            remedy="Use the text-only variant of the model.",
        )
    experts = [key for key in EXPERTS if config.get(key) not in (None, 0, 1)]
    if experts:
        raise DataError(
            f"{name} is a mixture of experts ({experts[0]}={config[experts[0]]}): 4-bit LoRA would leave its experts "
            "untrained.",
            remedy="Use a dense model.",
        )
    if not list(path.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
        what = f"only pickled weights ({pickles[0]}), which can run code when read" if pickles else "no weights"
        raise DataError(f"{name} has {what}.", remedy="Use a checkpoint with *.safetensors.")


def _quantisation(name: str, config: dict[str, Any]) -> str | None:
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return None
    method = quantisation.get("quant_method", "bitsandbytes" if "load_in_4bit" in quantisation else "unknown")
    if method != "bitsandbytes":
        raise DataError(
            f"{name} is quantised with {method}; LoRA on it is not supported.", remedy="Use the 16-bit original."
        )
    return "4bit" if quantisation.get("load_in_4bit") else "8bit"


def _weights(path: Path, name: str) -> tuple[Path, ...]:
    """The weight files. Raises DataError if one is missing. Files that are not in the index (an original in another
    layout) are not part of the model."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        whole = path / "model.safetensors"
        return (whole,) if whole.exists() else tuple(sorted(path.glob("*.safetensors")))
    try:
        wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"{index.name} of {name} is damaged: {type(error).__name__}: {error}.", remedy=COPY_AGAIN
        ) from None
    missing = [file for file in wanted if not (path / file).exists()]
    if missing:
        raise DataError(
            f"{name} is incomplete: {missing[0]} is missing ({len(missing)} of {len(wanted)} files).", remedy=COPY_AGAIN
        )
    return tuple(path / file for file in wanted)


def _header(file: Path, name: str) -> dict[str, Any]:
    """The header of a safetensors file (format: 8 bytes of little-endian length, JSON, data)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        if length > min(size, LONGEST_HEADER):
            raise DataError(f"{file.name} of {name} is damaged: its header does not fit the file.", remedy=COPY_AGAIN)
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DataError(
                f"{file.name} of {name} is damaged: its header is not one of safetensors.", remedy=COPY_AGAIN
            ) from None
    if 8 + length + end != size:
        raise DataError(
            f"{file.name} of {name} is damaged: {size} bytes, {8 + length + end} expected.", remedy=COPY_AGAIN
        )
    return header


def _count(key: str, tensor: dict[str, Any]) -> int:
    """Weights in a tensor; bitsandbytes packs two 4-bit weights into a byte and adds tables, which do not count."""
    if any(part in key for part in (".absmax", ".quant_map", ".quant_state", ".nested_", ".SCB", ".weight_format")):
        return 0
    packed = 2 if tensor["dtype"] == "U8" else 1
    shape: list[int] = tensor["shape"]
    return packed * math.prod(shape)
