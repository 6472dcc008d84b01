"""`python -m job env`: what a bug report needs, in a second and without a valid environment.

It imports no training library, asks no network and reads no data. It shows the `TUNE_*` variables and a few others,
each without secrets, and of credentials only which are set.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from job.config import environment
from job.config.field import PREFIX
from job.observability import memory
from job.observability.json_text import dumps
from job.observability.masking import masked
from job.observability.redaction import Redactor, secret_values
from job.runtime import gpus, libraries, process
from job.runtime.credentials import REPLACEMENT, is_credential
from job.runtime.errors import ConfigError, JobError

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
PACKAGES = (
    *("torch", "triton", "unsloth", "unsloth_zoo", "transformers", "tokenizers", "trl", "peft", "bitsandbytes"),
    *("accelerate", "datasets", "safetensors", "huggingface_hub", "boto3"),
)
SHOWN = (
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_CA_BUNDLE", "HF_HOME", "HF_HUB_OFFLINE", "TMPDIR"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "LD_LIBRARY_PATH"),
    *("OMP_NUM_THREADS", "RANK", "WORLD_SIZE"),
)
"""Variables besides `TUNE_*` whose values often explain what went wrong."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY")
"""Variables of which the host is shown, in either case of letters."""
PLATFORMS = {
    "Kubernetes": "KUBERNETES_SERVICE_HOST",
    "AWS Batch": "AWS_BATCH_JOB_ID",
    "Azure ML": "AZUREML_RUN_ID",
    "Google Batch": "BATCH_JOB_UID",
    "RunPod": "RUNPOD_POD_ID",
    "SageMaker": "TRAINING_JOB_NAME",
    "SkyPilot": "SKYPILOT_TASK_ID",
    "Slurm": "SLURM_JOB_ID",
    "Vertex AI": "CLOUD_ML_JOB_ID",
}
"""Platforms by a variable that each sets."""
MARKERS = {"Docker": Path("/.dockerenv"), "Podman": Path("/run/.containerenv"), "WSL": Path("/dev/dxg")}


def render(*, as_json: bool) -> str:
    """The report, as text or as one line of JSON."""
    found = facts()
    return dumps(found) + "\n" if as_json else "\n".join(_lines(found)) + "\n"


def facts() -> dict[str, Any]:
    """Everything that is known of this installation, this machine and this environment."""
    given = process.variables()
    return {
        "job": _job(given),
        "python": f"{platform.python_version()} {sys.executable}",
        "packages": libraries.installed_versions(PACKAGES),
        "system": _system(given),
        "gpu": _gpu(),
        "scratch": _scratch(),
        **_environment(given),
    }


def _job(given: Mapping[str, str]) -> dict[str, str]:
    """Version and revision: the image has them in variables, a checkout its version in a file."""
    version = given.get("FINETUNE_JOB_VERSION", "")
    if not version and PROJECT.is_file():
        version = tomllib.loads(PROJECT.read_text())["project"]["version"]
    return {"version": version or "unknown", "revision": given.get("FINETUNE_JOB_REVISION", "unknown")}


def _system(given: Mapping[str, str]) -> dict[str, Any]:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    platforms = [name for name, variable in PLATFORMS.items() if variable in given]
    return {
        "os": name,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "user_id": os.getuid(),
        "platform": platforms + [name for name, path in MARKERS.items() if path.exists()],
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_quota": process.cpu_quota(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_limit_bytes": memory.container_limit(),
    }


def _gpu() -> dict[str, Any]:
    found = gpus.find()
    cards = [
        {"name": card.name, "capability": card.capability, "memory_bytes": card.memory_bytes} for card in found.cards
    ]
    return {
        "device": gpus.present(),
        "driver": found.driver or None,
        "driver_cuda": _dotted(gpus.cuda_version()),
        "torch_cuda": _dotted(libraries.torch_cuda()),
        "cards": cards,
    }


def _dotted(version: tuple[int, int] | None) -> str | None:
    return None if version is None else f"{version[0]}.{version[1]}"


def _scratch() -> dict[str, Any]:
    try:
        path = process.scratch()
        return {"path": str(path), "free_bytes": shutil.disk_usage(path).free}
    except (JobError, OSError) as error:
        return {"problem": str(error)}


def _environment(given: Mapping[str, str]) -> dict[str, Any]:
    """The variables, without the environment's credentials and without what looks like a secret."""
    redactor = Redactor(secret_values(given))

    def shown(name: str) -> str:
        return REPLACEMENT if is_credential(name) else masked(redactor.text(given[name]))

    hosts = {name: _host(given[name]) for name in given if name.upper() in ENDPOINTS}
    problems: list[str] = []
    try:
        environment.load()
    except ConfigError as error:
        problems = [masked(redactor.text(problem)) for problem in error.problems]
    return {
        "variables": {name: shown(name) for name in sorted(given) if name.startswith(PREFIX) or name in SHOWN},
        "endpoints": hosts,
        "credentials_set": sorted(name for name, value in given.items() if value and is_credential(name)),
        "problems": problems,
    }


def _host(url: str) -> str:
    """Host and port, without path or password."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, port = urlsplit(""), ""
    return f"{parts.hostname}{port}" if parts.hostname else "not a URL"


def _lines(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """The facts for people: one line a value, what belongs together indented."""
    for key, value in found.items():
        name = key.removesuffix("_bytes")
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and value:
            yield f"{indent}{name}:"
            yield from (f"{indent}  - {_word(one)}" for one in value)
        else:
            yield f"{indent}{name}: {_size(value) if key.endswith('_bytes') else _word(value)}"


def _word(value: Any) -> str:
    if value in (None, "", [], {}):
        return "none"
    if isinstance(value, dict):
        return ", ".join(line.replace(": ", " ") for line in _lines(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _size(count: float | None) -> str:
    return "none" if count is None else f"{count / (1 << 30):.1f} GiB"
