"""What compiled code may depend on -> the key under which its caches are kept.

All of it is known before the training stack is imported. The plan is in it as far as settings decide it; what is
measured later (a micro-batch) is left out, since Triton's and Inductor's entries are themselves named by what they were
compiled from: a superfluous entry is never used, a missing one is compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.runtime import libraries
from job.runtime.gpus import Gpus

FORMAT = 1
"""Of the archives."""
PACKAGES = (
    *("torch", "triton", "unsloth", "unsloth_zoo", "transformers", "trl", "peft", "bitsandbytes", "accelerate"),
    *("xformers", "torchao"),
)
COMPILED = frozenset(
    "TUNE_" + name
    for name in (
        *("PRECISION", "MAX_LENGTH", "LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS", "LORA_RSLORA"),
        *("BATCH_SIZE", "MICRO_BATCH", "BATCHING", "GRADIENT_CHECKPOINTING", "DETERMINISTIC", "ROLE_WEIGHTS"),
        *("OPTIMIZER", "DOUBLE_QUANT"),
    )
)
"""Variables that enter compiled code or decide its shapes; names that a version does not have are ignored."""
NAMES = frozenset(("_name_or_path", "name_or_path", "transformers_version", "_commit_hash"))
CPU_INFO = Path("/proc/cpuinfo")


def facts(settings: Mapping[str, Any], shape: Mapping[str, Any], *, gpus: Gpus, scratch: Path) -> dict[str, Any]:
    """Everything that the caches depend on.

    Args:
        settings: the run's settings by variable name.
        shape: the model's config.json.
        gpus: the GPUs and their driver.
        scratch: the directory above the caches. Triton's entries hold absolute paths, so they are valid only there.
    """
    return {
        "format": FORMAT,
        "cards": list(gpus.kinds),
        "driver": gpus.driver,
        "cpu": f"{platform.machine()} {_digest(_cpu_features())[:16]}",
        "python": platform.python_version(),
        "packages": libraries.installed_versions(PACKAGES),
        "model": _digest(_without_names(shape)),
        "settings": {name: value for name, value in settings.items() if name in COMPILED},
        "path": str(scratch),
    }


def key(found: Mapping[str, Any]) -> str:
    """The name for these facts: 32 hexadecimal digits."""
    return _digest(found)[:32]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _without_names(value: Any) -> Any:
    """A model's configuration without the names of the model and of the version that wrote it, at any depth."""
    if isinstance(value, Mapping):
        return {name: _without_names(inner) for name, inner in value.items() if name not in NAMES}
    return value


def _cpu_features() -> list[str]:
    """The CPU's instruction sets: Inductor compiles for all of them (`-march=native`)."""
    with contextlib.suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:
                return sorted(value.split())
    return []
