"""Base model + LoRA: loads the weights through Unsloth and checks that they are what the settings ask for."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import structlog
import torch
from transformers import PreTrainedModel
from unsloth import FastLanguageModel

from job.config.schema import Config
from job.model import shape
from job.model.base_model import BaseModel
from job.runtime.errors import ConfigError, DataError, PermanentError, known
from job.tuning.device import MORE_ROOM, Device, out_of_memory

log = structlog.get_logger()
QUANTISED = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}
SPILLED = "dispatched on the CPU or the disk"
"""Transformers' words where weights do not fit on the GPU."""
QUANTISED_SHARE = 0.9  # of the decoder's linear layers
LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to train, and its trainable part."""

    model: Any
    targets: tuple[str, ...]
    trainable_parameters: int


def load(base: BaseModel, config: Config, device: Device, *, directory: Path) -> Loaded:
    """Load the base in the requested precision and put a fresh adapter on it.

    Args:
        base: the inspected model.
        directory: where the files are under a neutral name, since Unsloth decides by parts of the path.

    Raises:
        ConfigError: a target matches nothing, or this machine cannot load the requested precision.
        DataError: the library does not know the architecture, or weights are missing or damaged.
        PermanentError: they do not fit into the GPU's memory.
    """
    model = _load_base(base, config, device, directory)
    _check_precision(model, base.name, config.precision)
    targets = _targets(model, config.lora_targets)
    # On a GPU it is always set up; the plan turns it off and on.
    checkpointing = "on" if config.gradient_checkpointing == "on" else "unsloth" if device.kind == "cuda" else "off"
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        bias="none",
        use_rslora=config.lora_rslora,
        init_lora_weights=True,
        use_gradient_checkpointing={"unsloth": "unsloth", "on": True, "off": False}[checkpointing],
        random_state=config.seed,
    )
    loaded = Loaded(model=model, targets=targets, trainable_parameters=_check_trainable(model))
    _fix_generation(model)
    return loaded


def _load_base(base: BaseModel, config: Config, device: Device, directory: Path) -> Any:
    try:
        with _noting_missing() as missing:
            model, _ = FastLanguageModel.from_pretrained(
                model_name=str(directory),
                max_seq_length=config.max_length,
                dtype=device.dtype,
                load_in_4bit=config.precision == "4bit",
                load_in_8bit=config.precision == "8bit",
                load_in_16bit=config.precision == "16bit",
                full_finetuning=False,
                use_exact_model_name=True,
                local_files_only=True,
                trust_remote_code=False,
                random_state=config.seed,
                # By default, weights that do not fit would be placed on the host, where they cannot be trained.
                device_map={"": 0} if device.kind == "cuda" else None,
            )
    except Exception as error:  # the model's files are the only thing here that varies
        if out_of_memory(error) or known(error):
            raise
        # Transformers raises an error of its own where memory runs out while weights are quantised.
        if SPILLED in str(error) or torch.cuda.memory_stats().get("num_ooms"):
            raise PermanentError(
                f"{base.name} does not fit into the GPU's memory: {str(error).partition('. ')[0]}.", remedy=MORE_ROOM
            ) from error
        raise DataError(
            f"{base.name} ({base.architecture}) cannot be loaded: {type(error).__name__}: {error}",
            remedy="Check that the checkpoint is whole and that Unsloth supports its architecture.",
        ) from error
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise DataError(
            f"{base.name} has no weights for {', '.join(sorted(missing)[:LISTED])}{more}, which a {base.architecture} "
            "needs: transformers would put random numbers in their place.",
            remedy="Save the model again with save_pretrained, of the model itself rather than of what wraps it (first "
            "merge_and_unload() of an adapter), and copy it whole.",
        )
    return model


@contextlib.contextmanager
def _noting_missing() -> Iterator[set[str]]:
    """The names of the weights that no file has, once a model is loaded inside. Transformers makes them up and prints a
    table; with `output_loading_info` it returns them, but Unsloth has no place for that."""
    missing: set[str] = set()
    finalize = PreTrainedModel._finalize_model_loading  # noqa: SLF001 - the only place where they are known

    def noting(*arguments: Any, **more: Any) -> Any:
        found = finalize(*arguments, **more)
        missing.update(found.missing_keys)
        return found

    PreTrainedModel._finalize_model_loading = staticmethod(noting)  # noqa: SLF001 - see above
    try:
        yield missing
    finally:
        PreTrainedModel._finalize_model_loading = staticmethod(finalize)  # noqa: SLF001 - see above


def _linears(model: Any) -> dict[str, torch.nn.Module]:
    """The linear layers inside the decoder, by full name: what an adapter can be put on."""
    heads = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    kinds = (torch.nn.Linear, *QUANTISED.values())
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and id(m) not in heads}


def _targets(model: Any, requested: tuple[str, ...]) -> tuple[str, ...]:
    """The leaf names to adapt. Raises ConfigError for one that matches nothing."""
    available = tuple(dict.fromkeys(name.rpartition(".")[2] for name in _linears(model)))
    shape.check_targets(requested, available)
    return available if requested == shape.ALL_LINEAR else requested


def _check_precision(model: Any, name: str, precision: str) -> None:
    """Loaders fall back to 16 bit with a printed line where 4 or 8 bit do not work: count the layers."""
    wanted = QUANTISED.get(precision)
    linears = _linears(model)
    counts = {kind: sum(isinstance(m, cls) for m in linears.values()) for kind, cls in QUANTISED.items()}
    log.debug("layers_counted", linear=len(linears), **{f"linear_{kind}": n for kind, n in counts.items()})
    # Small layers that bitsandbytes skips are fine; a model that stayed in 16 bit is not.
    enough = 0 if wanted is None else len(linears) * QUANTISED_SHARE
    if counts.get(precision, -sum(counts.values())) < enough:
        raise ConfigError(
            f"TUNE_PRECISION={precision}, but {name} was loaded with {counts['4bit']} 4-bit and "
            f"{counts['8bit']} 8-bit layers of {len(linears)}: this machine or model does not support it.",
            remedy="Set another TUNE_PRECISION (8bit needs a GPU, 4bit needs layers at least 64 wide).",
        )


def _check_trainable(model: Any) -> int:
    """Number of trainable parameters; all must belong to the adapter, or the base would silently be trained."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name in trainable if "lora_" not in name]
    if others or not trainable:
        raise ConfigError(
            f"The adapter was not set up right: {others[0] if others else 'nothing'} would be trained.",
            remedy="Check TUNE_LORA_TARGETS.",
        )
    return sum(trainable.values())


def _fix_generation(model: Any) -> None:
    """Make generation greedy and drop all its other settings: answers before and after training are compared."""
    generation = model.generation_config
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"):
        if hasattr(generation, name):
            setattr(generation, name, None)
    generation.do_sample = False
    generation.max_length = None


def cast_trainable(model: Any) -> None:
    """Make the adapter fp32. TRL casts QLoRA adapters to bf16, and PEFT reloads them as fp32, so that a resumed run
    would differ; in fp32 it is exact."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
