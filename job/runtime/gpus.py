"""The GPUs of this machine and their driver, without touching CUDA.

CUDA reads which cards it may use when it is first asked anything, and never again. So NVML is asked, the driver's
management library; where a container was given no more than `compute`, the files that the driver itself shows; and
CUDA's own library for nothing but its version.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

DEVICES = Path("/dev")
SHOWN = Path("/proc/driver/nvidia")
CUDA_LIBRARY = "libcuda.so.1"
_VERSION = re.compile(r"\d+\.\d+[\d.]*")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU."""

    name: str
    capability: str = ""
    """Its compute capability, such as `9.0`; empty where only the driver's files could be read."""
    memory_bytes: int | None = None
    """All of its memory; None where the driver does not report it."""

    @property
    def kind(self) -> str:
        """What compiled code depends on: the name and the compute capability."""
        return f"{self.name} sm_{self.capability.replace('.', '')}" if self.capability else self.name


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The cards in the order of the bus, and their driver."""

    driver: str = ""
    """Its version; empty without one."""
    cards: tuple[Card, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each card."""
        return tuple(card.name for card in self.cards)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Each kind of card once, in alphabetical order."""
        return tuple(sorted({card.kind for card in self.cards}))


def present() -> bool:
    """Whether this machine shows a GPU device (WSL shows /dev/dxg)."""
    return any(DEVICES.glob("nvidia[0-9]*")) or (DEVICES / "dxg").exists()


def find() -> Gpus:
    """The GPUs of this machine; empty without a driver. The time that it takes is NVML's: up to a second a card."""
    return _asked_of_nvml() or _shown_by_the_driver()


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports; None without the driver's CUDA library.

    NVML may be there without that library, and a run needs the library.
    """
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL(CUDA_LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    # 13020 is 13.2
    return None if failed or not version.value else (version.value // 1000, version.value % 1000 // 10)


def _asked_of_nvml() -> Gpus | None:
    import pynvml  # noqa: PLC0415 - a large module, of use only here

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return Gpus(driver=pynvml.nvmlSystemGetDriverVersion(), cards=tuple(map(_card, handles)))
    except pynvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _card(handle: object) -> Card:
    import pynvml  # noqa: PLC0415 - a large module, of use only here

    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = None
    with contextlib.suppress(pynvml.NVMLError):  # not permitted for a card that is partitioned (MIG)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    return Card(name=pynvml.nvmlDeviceGetName(handle), capability=f"{major}.{minor}", memory_bytes=memory)


def _shown_by_the_driver() -> Gpus:
    version = _VERSION.search(_text(SHOWN / "version"))
    cards = []
    for path in sorted(SHOWN.glob("gpus/*/information")):
        lines = dict(line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
        cards.append(Card(name=lines.get("Model", "unknown").strip()))
    return Gpus(driver=version[0] if version else "", cards=tuple(cards))


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""
