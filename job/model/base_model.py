"""A base model by its files, read without loading weights, and whether this job can train it correctly.

Rejects models that would be trained wrongly or run code: remote code, multimodal and mixture-of-experts models, files
that contradict each other. Which files are the model is decided in `job.inputs.model_files`. Knows nothing of GPUs and
training.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.inputs import model_files
from job.inputs.model_files import CONFIG, COPY_AGAIN, INDEX, LFS_BYTES
from job.model.config_values import check_values
from job.model.safetensors_header import Tensor, read_header
from job.runtime.errors import ConfigError, DataError

MULTIMODAL = ("vision_config", "audio_config", "vision_tower", "audio_token_id", "image_token_id", "image_token_index")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
IN_A_LAYER = re.compile(r"\.(?P<layer>\d+)\.(.*\.)?(?P<leaf>\w+)\.weight")
"""The name of a matrix inside the decoder's layers."""
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")
"""The name of the matrix with a row for each token."""
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
"""Types of weights that are numbers by themselves; of others they are parts, next to scales."""
WRAPPED = re.compile(
    r"^(base_model\.model|module|_orig_mod)\.|\.(_orig_mod|_fsdp_wrapped_module|base_layer|original_module|lora_[AB])\."
)
"""Parts of names that only what wraps a model gives its weights: peft, torch.compile, DDP, FSDP."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model in a local directory."""

    path: Path
    name: str
    weights: tuple[Path, ...]
    """The files with the weights."""
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
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    files = model_files.choose(name, sizes, lambda file: (path / file).read_bytes())
    for file in files:
        with (path / file).open("rb") as stream:
            model_files.check_no_pointer(stream.read(LFS_BYTES), f"{file} of {name}")
    config = model_files.read_object(path / CONFIG, name)
    _check_trainable(name, config)
    check_values(config, f"{CONFIG} of {name}")
    weights = tuple(path / file for file in files if file.endswith(model_files.SUFFIX))
    stored = {file.name: read_header(file, name) for file in weights}
    if INDEX in files:
        _check_index((path / INDEX).read_bytes(), stored, name)
    tensors = {key: tensor for header in stored.values() for key, tensor in header.items()}
    text = config.get("text_config") or config
    prequantised = _quantisation(name, config)
    if prequantised is None:
        _check_types(tensors, name)
    _check_whole(config, tensors, name)
    return BaseModel(
        path=path,
        name=name,
        weights=weights,
        architecture=config["architectures"][0],
        parameters=sum(_count(key, tensor) for key, tensor in tensors.items()),
        positions=text.get("max_position_embeddings"),
        prequantised=prequantised,
        config=config,
        shapes={key: tensor.shape for key, tensor in tensors.items()},
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


def _check_trainable(name: str, config: dict[str, Any]) -> None:
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise DataError(f"config.json of {name} has no architecture.", remedy="Use a complete transformers checkpoint.")
    if "auto_map" in config:
        raise DataError(
            f"{name} needs custom code (auto_map in config.json), and this job never runs code of a model.",
            remedy="Use a checkpoint whose architecture is part of transformers.",
        )
    if config.get("transformers_weights") is not None:
        raise DataError(
            f"config.json of {name} names a file of weights of its own (transformers_weights), which other programs do "
            "not load.",
            remedy=f"Set TUNE_MODEL to a copy with {model_files.WEIGHTS}, or with shards and their index, and without "
            "this key.",
        )
    architecture = architectures[0]
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


def _quantisation(name: str, config: dict[str, Any]) -> str | None:
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return None
    if not isinstance(quantisation, dict):
        raise DataError(f"quantization_config in config.json of {name} is not an object.", remedy=COPY_AGAIN)
    method = quantisation.get("quant_method", "bitsandbytes" if "load_in_4bit" in quantisation else "unknown")
    if method != "bitsandbytes":
        raise DataError(
            f"{name} is quantised with {method}; LoRA on it is not supported.", remedy="Use the 16-bit original."
        )
    return "4bit" if quantisation.get("load_in_4bit") else "8bit"


def _check_types(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise DataError for weights that are quantised without a word in config.json: their scales would be ignored."""
    for key, tensor in tensors.items():
        if key.endswith(".weight") and tensor.dtype not in FLOATS:
            raise DataError(
                f"{name} has {key!r} in {tensor.dtype}, which is quantised, and config.json has no quantization_config "
                "that says how.",
                remedy="Use the 16-bit original. MLX, among others, writes checkpoints that transformers cannot read.",
            )


def _check_index(index: bytes, stored: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    """Raise DataError if a tensor is not in the file that the index names for it: transformers would train on random
    numbers in its place."""
    for key, file in model_files.weight_map(index, f"{INDEX} of {name}").items():
        if key not in stored[file]:
            raise DataError(f"{INDEX} of {name} is damaged: {key!r} is not in {file}, as it says.", remedy=COPY_AGAIN)


def _check_whole(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise DataError if the tensors are not those that the configuration describes."""
    _check_names(tensors, name)
    text = config.get("text_config") or config
    layers = {int(found["layer"]) for key in tensors if (found := IN_A_LAYER.search(key))}
    wanted = text.get("num_hidden_layers")
    if layers and wanted is not None and len([layer for layer in layers if layer < wanted]) < wanted:
        raise DataError(
            f"{name} has weights for {len(layers)} layers, and config.json says num_hidden_layers={wanted}.",
            remedy=COPY_AGAIN,
        )
    rows = text.get("vocab_size")
    for key, tensor in tensors.items():
        if EMBEDDINGS.search(key) and rows is not None and tensor.dtype != "U8" and tensor.shape[:1] != (rows,):
            raise DataError(
                f"{name} has {key!r} of shape {list(tensor.shape)}, and config.json says vocab_size={rows}.",
                remedy=COPY_AGAIN,
            )
    tied = (config.get("tie_word_embeddings"), text.get("tie_word_embeddings"))
    untied = rows is not None and False in tied and True not in tied
    if untied and sum(_has_rows(key, tensor, rows) for key, tensor in tensors.items()) == 1:
        raise DataError(
            f"{name} has one matrix with a row for each of vocab_size={rows} tokens, and config.json says "
            "tie_word_embeddings=false: its embeddings or its head are missing, and would be random numbers.",
            remedy="Save the model again with both. If they are the same matrix, correct tie_word_embeddings to true.",
        )


def _has_rows(key: str, tensor: Tensor, rows: Any) -> bool:
    """Whether this may be embeddings or a head; of one that is packed into bytes the shape does not say it."""
    return tensor.shape[:1] == (rows,) or (tensor.dtype == "U8" and not IN_A_LAYER.search(key))


def _check_names(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise DataError for weights under names that transformers does not look for: it would only warn, and train on
    random numbers in their place."""
    if wrapped := next(filter(WRAPPED.search, tensors), None):
        raise DataError(
            f"{name} has {wrapped!r}, a name that weights get from what wraps a model (peft, torch.compile, DDP, FSDP)"
            ": transformers would not find them, and train on random numbers.",
            remedy="Save the model itself, without what wraps it; of an adapter and its base after merge_and_unload().",
        )


def _count(key: str, tensor: Tensor) -> int:
    """Weights in a tensor; bitsandbytes packs two 4-bit weights into a byte and adds tables, which do not count."""
    if any(part in key for part in (".absmax", ".quant_map", ".quant_state", ".nested_", ".SCB", ".weight_format")):
        return 0
    packed = 2 if tensor.dtype == "U8" else 1
    return packed * math.prod(tensor.shape)
