"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NVML = ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1", "/usr/local/nvidia/lib/libnvidia-ml.so.1")


def describe(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, kernel, Python, the packages' versions (None: not installed), and the load that others make."""
    return {
        "cpu": cpu(),
        "cpu_count": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "load_average_at_end": os.getloadavg(),
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def utilisation() -> Callable[[], float] | None:
    """What reads the share of its last sampling period (a sixth of a second to one second) in which the graphics card
    ran at least one kernel, however small: NVML's `utilization.gpu`. None where there is no NVML."""
    for name in NVML:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return None
    handle, rates = ctypes.c_void_p(), (ctypes.c_uint * 2)()  # of the card's kernels, of its memory
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(_index(), ctypes.byref(handle)):
        return None

    def read() -> float:
        """Raises OSError."""
        if code := library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)):
            raise OSError(f"NVML says {code}")
        return rates[0] / 100

    return read


def card() -> str:
    """Name, driver and memory of the graphics card, or that there is none."""
    query = ["nvidia-smi", f"--id={_index()}", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.check_output(query, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _index() -> int:
    """The card that CUDA shows first."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    return int(first) if first.isdigit() else 0
