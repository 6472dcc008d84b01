"""The GPUs in sight and their driver, as the driver's own library tells (NVML), without touching CUDA.

CUDA would be told which cards to see when it is first asked anything, and never again.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
SHOWN = Path("/proc/driver/nvidia")
LONGEST = 96  # characters of a name: NVML_DEVICE_NAME_V2_BUFFER_SIZE in nvml.h


@dataclass(frozen=True, kw_only=True)
class Cards:
    """What compiled code for the GPUs of this machine depends on."""

    driver: str
    """Its version; empty without one."""
    kinds: tuple[str, ...]
    """Each kind of card that is there, by name and compute capability, in alphabetical order."""


def cards() -> Cards:
    """What is there; nothing without a driver. Without the library (a container that was given `compute` only) it is
    what the driver itself shows, which has no capabilities."""
    with contextlib.suppress(OSError, AttributeError), _nvml() as nvml:
        return Cards(driver=_driver(nvml), kinds=tuple(sorted({_kind(nvml, at) for at in range(_count(nvml))})))
    models = {line for path in SHOWN.glob("gpus/*/information") for line in _lines(path) if line.startswith("Model:")}
    return Cards(driver=next(iter(_lines(SHOWN / "version")), ""), kinds=tuple(sorted(models)))


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []


@contextlib.contextmanager
def _nvml() -> Iterator[ctypes.CDLL]:
    nvml = ctypes.CDLL(LIBRARY)
    _ask(nvml.nvmlInit_v2)
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _ask(function: Any, *arguments: Any) -> None:
    if (failed := function(*arguments)) != 0:
        raise OSError(f"NVML says {failed}")


def _driver(nvml: ctypes.CDLL) -> str:
    text = ctypes.create_string_buffer(LONGEST)
    _ask(nvml.nvmlSystemGetDriverVersion, text, ctypes.c_uint(LONGEST))
    return text.value.decode()


def _count(nvml: ctypes.CDLL) -> int:
    count = ctypes.c_uint()
    _ask(nvml.nvmlDeviceGetCount_v2, ctypes.byref(count))
    return count.value


def _kind(nvml: ctypes.CDLL, index: int) -> str:
    card, name, major, minor = ctypes.c_void_p(), ctypes.create_string_buffer(LONGEST), ctypes.c_int(), ctypes.c_int()
    _ask(nvml.nvmlDeviceGetHandleByIndex_v2, ctypes.c_uint(index), ctypes.byref(card))
    _ask(nvml.nvmlDeviceGetName, card, name, ctypes.c_uint(LONGEST))
    _ask(nvml.nvmlDeviceGetCudaComputeCapability, card, ctypes.byref(major), ctypes.byref(minor))
    return f"{name.value.decode()} sm_{major.value}{minor.value}"
