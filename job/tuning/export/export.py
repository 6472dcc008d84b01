"""Trained model -> files that plain peft and plain transformers load: the adapter, or merged 16-bit weights.

Merging goes tensor by tensor from the base's own files, so it needs memory for one shard, not for a second model,
and rounds once. Source of the formula: LoRA (Hu et al. 2021), W' = W + scale * B A, with scale = alpha / r, or
alpha / sqrt(r) where rank-stabilised (Kalajdzievski 2023).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from job.model.base_model import BaseModel
from job.runtime.errors import PermanentError

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")


def save_adapter(model: Any, hf_tokenizer: Any, directory: Path, *, base: BaseModel) -> None:
    """Write the adapter with its tokenizer.

    Args:
        directory: new or empty.
        base: named in the adapter's configuration as the user named it, not as a path of this machine.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, directory / ADAPTER_FILE, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    on_hub = "://" not in base.name and not base.name.startswith("/")
    name, _, revision = base.name.partition("@") if on_hub else (base.name, "", "")
    config |= {"base_model_name_or_path": name, "revision": revision or None, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    plain = {key: value for key, value in config.items() if _jsonable(value)}
    (directory / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
    save_tokenizer(hf_tokenizer, directory, base=base)
    readable(directory)


def save_tokenizer(hf_tokenizer: Any, directory: Path, *, base: BaseModel) -> None:
    """Write the tokenizer with the base's own maximum length, not the one that training cut examples to."""
    original = base.path / "tokenizer_config.json"
    hf_tokenizer.save_pretrained(directory)
    written = directory / "tokenizer_config.json"
    settings = json.loads(written.read_text())
    before = json.loads(original.read_text()) if original.exists() else {}
    for key in ("model_max_length", "padding_side"):
        if key in before:
            settings[key] = before[key]
        else:
            settings.pop(key, None)
    written.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


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
    tables = _Tables(base)
    for shard in base.weights:
        merged = {name: deltas.apply(name, weight, dtype) for name, weight in tables.weights(shard)}
        save_file(merged, directory / shard.name, metadata={"format": "pt"})
        names |= dict.fromkeys(merged, shard.name)
        size += sum(tensor.nbytes for tensor in merged.values())
    deltas.check_all_used(base.name)
    if len(set(names.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    _copy_configuration(adapter, directory, base, dtype)
    _write_generation_config(directory, base, stop_ids)
    readable(directory)


def readable(directory: Path) -> None:
    """Let every user read the files: safetensors writes them for the owner alone, and servers run as somebody else."""
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _jsonable(value: Any) -> bool:
    return not callable(value) and not hasattr(value, "__dataclass_fields__")


class _Deltas:
    """The adapter's low-rank updates by the name of the weight they change."""

    def __init__(self, adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        rank = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
        self._scale = config["lora_alpha"] / rank
        self._state = load_file(adapter / ADAPTER_FILE)
        self._left = {name.removesuffix(".lora_A.weight") for name in self._state if name.endswith(".lora_A.weight")}

    def apply(self, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight with its update, computed in fp32 and rounded once."""
        target = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else dtype
        module = PREFIX + name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in self._left:
            return weight.to(target) if weight.is_floating_point() else weight
        self._left.discard(module)
        update = self._state[f"{module}.lora_B.weight"].float() @ self._state[f"{module}.lora_A.weight"].float()
        return (weight.float() + self._scale * update).to(target).contiguous()

    def check_all_used(self, base: str) -> None:
        if self._left:
            raise PermanentError(
                f"{len(self._left)} adapter weights match no weight of {base}, for example {min(self._left)}.",
                remedy="The adapter is safe under adapter/; set TUNE_EXPORT=adapter for this architecture.",
            )


class _Tables:
    """The base's weights, 4-bit ones dequantised.

    bitsandbytes keeps their tables as tensors named after them, which may lie in another shard than the weight.
    """

    def __init__(self, base: BaseModel) -> None:
        self._place: dict[str, Path] = {}
        for shard in base.weights:
            with safe_open(shard, framework="pt") as file:
                self._place |= dict.fromkeys(file.keys(), shard)

    def weights(self, shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
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
        owner, found, last = name.rpartition(".weight.")
        return bool(found) and f"{owner}.weight" in self._place and last.split(".")[0] in TABLES


def _write_generation_config(directory: Path, base: BaseModel, stop_ids: Sequence[int]) -> None:
    """The base's generation settings, with every token that ends an answer."""
    original = base.path / "generation_config.json"
    settings = json.loads(original.read_text()) if original.exists() else {}
    given = settings.get("eos_token_id", base.config.get("eos_token_id"))
    ends = [] if given is None else given if isinstance(given, list) else [given]
    settings["eos_token_id"] = list(dict.fromkeys([*stop_ids, *ends]))
    (directory / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _copy_configuration(adapter: Path, directory: Path, base: BaseModel, dtype: torch.dtype) -> None:
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    config.pop("torch_dtype", None)
    with safe_open(next(iter(sorted(directory.glob("*.safetensors")))), framework="pt") as file:
        first = file.get_tensor(next(iter(file.keys())))
    config["dtype"] = str(first.dtype if first.is_floating_point() else dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in adapter.iterdir():
        if path.name not in {ADAPTER_FILE, "adapter_config.json", "README.md"} and path.is_file():
            shutil.copyfile(path, directory / path.name)
