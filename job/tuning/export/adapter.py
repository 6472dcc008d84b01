"""The trained adapter -> files that plain peft loads, with its tokenizer."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import json
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from job.data.tokenizer.load import Tokenizer
from job.model.base_model import BaseModel
from job.tuning.export.tokenizer import write_tokenizer

ADAPTER_FILE = "adapter_model.safetensors"


def save_adapter(model: Any, tokenizer: Tokenizer, directory: Path, *, base: BaseModel) -> None:
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
    write_tokenizer(tokenizer, directory, base=base.path)
    make_readable(directory)


def _jsonable(value: Any) -> bool:
    return not callable(value) and not hasattr(value, "__dataclass_fields__")


def make_readable(directory: Path) -> None:
    """Let every user read the files: safetensors writes them for the owner alone, and servers run as somebody else."""
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
