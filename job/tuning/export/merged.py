"""Base and adapter -> merged 16-bit weights that plain transformers loads.

Merging goes tensor by tensor from the base's own files, so it needs memory for one shard, not for a second model, and
rounds once. Source of the formula: LoRA (Hu et al. 2021), W' = W + scale * B A, with scale = alpha / r, or
alpha / sqrt(r) where rank-stabilised (Kalajdzievski 2023).
"""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from job.inputs.model_files import GENERATION_CONFIG, INDEX, read_object
from job.model.base_model import BaseModel
from job.runtime.errors import PermanentError
from job.tuning.export.adapter import ADAPTER_FILE, make_readable

PREFIX = "base_model.model."
TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")


def merge(
    adapter: Path,
    directory: Path,
    *,
    base: BaseModel,
    stop_ids: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write base + adapter as a plain transformers checkpoint, in the base's own shards.

    Args:
        adapter: what `save_adapter` wrote.
        stop_ids: the tokens that end an answer as it was learned; generation stops there, and where the base's did.
        dtype: of the merged weights where the base's are not 16-bit.

    Raises:
        PermanentError: a weight of the adapter has no counterpart in the base's files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    deltas = _Deltas(adapter)
    names: dict[str, str] = {}
    size = 0
    weights = _BaseWeights(base)
    for shard in base.weights:
        merged = {name: deltas.apply(name, weight, dtype) for name, weight in weights.of(shard)}
        save_file(merged, directory / shard.name, metadata={"format": "pt"})
        names |= dict.fromkeys(merged, shard.name)
        size += sum(tensor.nbytes for tensor in merged.values())
    deltas.check_all_used(base.name)
    if len(set(names.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    _copy_configuration(adapter, directory, base, dtype)
    _write_generation_config(directory, base, stop_ids)
    make_readable(directory)


class _Deltas:
    """The adapter's low-rank updates by the name of the weight they change."""

    def __init__(self, adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        rank = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
        self._scale = config["lora_alpha"] / rank
        self._state = load_file(adapter / ADAPTER_FILE)
        self._unused = {name.removesuffix(".lora_A.weight") for name in self._state if name.endswith(".lora_A.weight")}

    def apply(self, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight with its update, computed in fp32 and rounded once."""
        target = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else dtype
        module = PREFIX + name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in self._unused:
            return weight.to(target) if weight.is_floating_point() else weight
        self._unused.discard(module)
        update = self._state[f"{module}.lora_B.weight"].float() @ self._state[f"{module}.lora_A.weight"].float()
        return (weight.float() + self._scale * update).to(target).contiguous()

    def check_all_used(self, base: str) -> None:
        if self._unused:
            raise PermanentError(
                f"{len(self._unused)} adapter weights match no weight of {base}, for example {min(self._unused)}.",
                remedy="The adapter is safe under adapter/; set TUNE_EXPORT=adapter for this architecture.",
            )


class _BaseWeights:
    """The base's weights, 4-bit ones dequantised.

    bitsandbytes keeps their tables as tensors named after them, which may lie in another shard than the weight.
    """

    def __init__(self, base: BaseModel) -> None:
        self._place: dict[str, Path] = {}
        for shard in base.weights:
            with safe_open(shard, framework="pt") as file:
                self._place |= dict.fromkeys(file.keys(), shard)

    def of(self, shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's own tensors of one file, by name."""
        with safe_open(shard, framework="pt") as file:
            for name in sorted(file.keys()):
                tables = {key.removeprefix(f"{name}."): key for key in self._place if key.startswith(f"{name}.")}
                if tables:
                    state = {short: self._read(key) for short, key in tables.items()}
                    yield name, dequantize_4bit(file.get_tensor(name), QuantState.from_dict(state, device="cpu"))
                elif not self._is_table(name):
                    yield name, file.get_tensor(name)

    def _read(self, key: str) -> torch.Tensor:
        with safe_open(self._place[key], framework="pt") as file:
            return file.get_tensor(key)

    def _is_table(self, name: str) -> bool:
        owner, separator, last = name.rpartition(".weight.")
        return bool(separator) and f"{owner}.weight" in self._place and last.split(".")[0] in TABLES


def _write_generation_config(directory: Path, base: BaseModel, stop_ids: Sequence[int]) -> None:
    """The base's generation settings, with every token that ends an answer."""
    original = base.path / GENERATION_CONFIG
    settings = read_object(original, base.name) if original.exists() else {}
    given = settings.get("eos_token_id", base.config.get("eos_token_id"))
    ends = given if isinstance(given, list) else [given]
    settings["eos_token_id"] = list(dict.fromkeys([*stop_ids, *(end for end in ends if type(end) is int)]))
    (directory / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _copy_configuration(adapter: Path, directory: Path, base: BaseModel, dtype: torch.dtype) -> None:
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    config.pop("torch_dtype", None)
    with safe_open(next(iter(sorted(directory.glob("*.safetensors")))), framework="pt") as file:
        first = file.get_tensor(next(iter(file.keys())))
    config["dtype"] = str(first.dtype if first.is_floating_point() else dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copytree(
        adapter,
        directory,
        ignore=shutil.ignore_patterns(ADAPTER_FILE, "adapter_config.json", "README.md"),
        dirs_exist_ok=True,
    )
