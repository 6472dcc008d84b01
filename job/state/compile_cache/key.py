"""What compiled code may depend on -> the key under which its caches are kept.

All of it is known before the training stack is imported. The plan is in it as far as settings decide it; what only
shows later (a micro-batch that was measured) is left out, since Triton's and Inductor's entries are themselves named
by what they were compiled from: an entry too many is never used, one that is missing is compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.config.schema import SETTINGS, Config
from job.runtime import libraries
from job.runtime.gpus import Gpus

FORMAT = 1
"""Of the archives."""
PACKAGES = (
    *("torch", "triton", "unsloth", "unsloth_zoo", "transformers", "trl", "peft", "bitsandbytes", "accelerate"),
    *("xformers", "torchao"),
)
COMPILED = frozenset(
    (
        *("precision", "max_length", "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_rslora"),
        *("batch_size", "micro_batch", "batching", "gradient_checkpointing", "deterministic", "role_weights"),
        *("optimizer", "double_quant"),
    )
)
"""Settings that enter compiled code or decide its shapes; names that a version does not have do no harm."""
NAMES = frozenset(("_name_or_path", "name_or_path", "transformers_version", "_commit_hash"))
CPU_INFO = Path("/proc/cpuinfo")


def facts(config: Config, shape: Mapping[str, Any], *, gpus: Gpus, scratch: Path) -> dict[str, Any]:
    """Everything that the caches depend on.

    Args:
        shape: the model's config.json.
        scratch: under which the caches lie. Triton's entries hold absolute paths, so that they are of use there only.
    """
    return {
        "format": FORMAT,
        "cards": list(gpus.kinds),
        "driver": gpus.driver,
        "cpu": f"{platform.machine()} {_digest(_cpu_features())[:16]}",
        "python": platform.python_version(),
        "packages": libraries.installed(PACKAGES),
        "model": _digest(_without_names(shape)),
        "settings": {s.variable: getattr(config, s.name) for s in SETTINGS if s.name in COMPILED},
        "path": str(scratch),
    }


def key(found: Mapping[str, Any]) -> str:
    """The name for these facts: 32 hexadecimal digits."""
    return _digest(found)[:32]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _without_names(value: Any) -> Any:
    """A configuration without what names the model or the version that wrote it, at any depth."""
    if isinstance(value, Mapping):
        return {name: _without_names(inner) for name, inner in value.items() if name not in NAMES}
    return value


def _cpu_features() -> list[str]:
    """The instructions that the CPU has: Inductor compiles for all of them (`-march=native`)."""
    with contextlib.suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:
                return sorted(value.split())
    return []
