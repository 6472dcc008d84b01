"""The device that trains: which one it is, how fast, and how much of its memory is in use."""

from __future__ import annotations

import job.tuning.unsloth_import  # before torch, transformers, trl and peft, which it patches

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from job.observability.memory import peak_bytes

AMPERE = 8
"""The first number of its compute capability."""
MATRIX = 4096
FASTEST, SLOWEST = 2e15, 1e12
"""Operations a second: the bounds within which a measurement is believed."""
MORE_ROOM = "Lower TUNE_MAX_LENGTH or TUNE_LORA_R, set TUNE_PRECISION=4bit, or take a GPU with more memory."
"""What to do where a GPU's memory is not enough."""
NO_MEMORY = (
    *("CUDA error: out of memory", "Triton Error [CUDA]: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
"""The words of CUDA and its callers where they allocate outside torch: for a handle, a kernel's code, a stream."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device, as records and logs show it."""

    kind: str
    """`cuda` or `cpu`."""
    name: str
    memory_bytes: int
    """Of the GPU, or of the machine."""
    capability: str | None
    dtype: torch.dtype
    """What 16-bit means here: bfloat16 where the hardware has it; float32 on a CPU without it."""

    @property
    def flash(self) -> bool:
        """Whether torch's FlashAttention-2 runs on it: it needs a GPU of NVIDIA's Ampere generation or later."""
        return self.capability is not None and int(self.capability.partition(".")[0]) >= AMPERE


def choose(*, requested: str) -> Device:
    """The device to train on: the GPU that torch sees, unless the CPU is asked for.

    Unsloth's import has made sure that there is a GPU where one is expected (`UNSLOTH_DISABLE_CPU_FALLBACK`).
    """
    if requested != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(
            kind="cuda",
            name=properties.name,
            memory_bytes=properties.total_memory,
            capability=f"{properties.major}.{properties.minor}",
            dtype=torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16,
        )
    from unsloth_zoo.cpu import cpu_bf16_supported  # noqa: PLC0415 - exists only where there is no GPU

    return Device(
        kind="cpu",
        name=f"CPU, {torch.get_num_threads()} threads",
        memory_bytes=psutil.virtual_memory().total,
        capability=None,
        dtype=torch.bfloat16 if cpu_bf16_supported() else torch.float32,
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory ran out, whoever noticed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def memory(device: Device) -> dict[str, Any]:
    """Memory in use now, in bytes, under the names that `train_progress` events carry. GPU fields are 0 on a CPU."""
    gpu = device.kind == "cuda"
    return {
        "gpu_memory_allocated_bytes": torch.cuda.memory_allocated() if gpu else 0,
        "gpu_memory_reserved_bytes": torch.cuda.memory_reserved() if gpu else 0,
        "gpu_memory_peak_bytes": torch.cuda.max_memory_reserved() if gpu else 0,
        "gpu_memory_total_bytes": device.memory_bytes if gpu else 0,
        "host_memory_rss_bytes": psutil.Process().memory_info().rss,
        "host_memory_peak_bytes": peak_bytes(),
    }


def matrix_rate() -> float:
    """Operations a second of a large 16-bit matrix product on this GPU, measured."""
    a = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.float16)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        a @ a
    start.record()
    for _ in range(5):
        a @ a
    end.record()
    end.synchronize()
    return min(max(5 * 2 * MATRIX**3 / (start.elapsed_time(end) / 1e3), SLOWEST), FASTEST)
