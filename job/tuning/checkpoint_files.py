"""A checkpoint's files as the trainer writes and reads them: complete, readable, and all of the same step."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_pt_utils import safe_globals

from job.storage.faults import DamagedError

ADAPTER = "adapter_model.safetensors"
FILES = (ADAPTER, "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SCALER = "scaler.pt"
"""Of the gradients, in fp16: it skips a step whose gradients overflow, which the trainer still counts."""
GENERATORS = ("python", "numpy", "cpu")


def write_adapter(model: Any, directory: Path, *, step: int) -> None:
    """Write the adapter's weights as they are in memory, after `step` optimizer steps."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / ADAPTER, metadata={"format": "pt", "step": str(step)})


def load_adapter(model: Any, directory: Path) -> None:
    """Put the weights of a checkpoint's adapter into the model."""
    set_peft_model_state_dict(model, load_file(directory / ADAPTER))


def check(directory: Path, record: Mapping[str, Any]) -> None:
    """Read every file as the trainer will, and compare their steps.

    The trainer would silently skip a missing file, and training would continue as a different run.

    Args:
        directory: with the checkpoint's files.
        record: what was recorded with them: their `step`, and the `plan` in force then.

    Raises:
        DamagedError: a file is missing or cannot be read, or the parts are of different steps.
    """
    step, fp16 = record["step"], (record.get("plan") or {}).get("compute_dtype") == "float16"
    needed = (*FILES, SCALER) if fp16 else FILES
    missing = [name for name in needed if not (directory / name).is_file()]
    if missing:
        raise DamagedError(f"it lacks {', '.join(missing)}")
    try:
        with safe_open(directory / ADAPTER, framework="pt") as file:
            adapter = int(file.metadata()["step"])
        state = json.loads((directory / "trainer_state.json").read_text())
        with safe_globals():
            optimizer, scheduler, generators = (
                torch.load(directory / name, weights_only=True, map_location="cpu")
                for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
            )
            if scaled := (directory / SCALER).is_file():
                torch.load(directory / SCALER, weights_only=True)
        steps = {"adapter": adapter, "trainer": state["global_step"], "scheduler": scheduler["last_epoch"]}
        counted = [int(one["step"]) for one in optimizer["state"].values() if "step" in one]
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedError(f"it cannot be read: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
    lacking = [name for name in GENERATORS if name not in generators]
    if lacking:
        raise DamagedError(f"rng_state.pth lacks the generator {lacking[0]}")
    steps |= {"optimizer": max(counted)} if counted else {}
    # A fused optimizer skips a step by itself, without the scheduler.
    taken = max(counted, default=0) if scaled else step
    right = {"adapter": {step}, "trainer": {step}, "scheduler": {taken, step}, "optimizer": {taken}}
    wrong = [f"{part} {number}" for part, number in steps.items() if number not in right[part] or number > step]
    if wrong:
        raise DamagedError(f"its parts are of different steps: record {step}, {', '.join(wrong)}")
