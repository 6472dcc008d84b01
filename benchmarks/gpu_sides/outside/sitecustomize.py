"""Changes a Python process from outside when this directory is on PYTHONPATH, so that no program needs a switch for it.

BENCH_GPU_LIMIT_GIB: the process gets that much of the card, and what it asks torch about memory says so.
BENCH_GPU_SQUEEZE=<step>:<GiB>: from that optimizer step on, the process gets that much of the card.
BENCH_GPU_PROFILE=<file>:<first>:<last>: the kernels of these optimizer steps are timed by torch's profiler, through a
callback of whatever Trainer is built; their seconds go to the file as JSON.

Python imports this module by itself at start. It imports nothing heavy: it waits until the program does.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from typing import Any


def limit_memory(cuda: Any) -> None:
    """On torch.cuda, right after its import: before the first use of the card, which is when queued calls run."""
    most = int(float(os.environ["BENCH_GPU_LIMIT_GIB"]) * 2**30)
    real_info, real_properties = cuda.memory.mem_get_info, cuda.get_device_properties

    class Properties:
        """The device's, with less memory."""

        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def __repr__(self) -> str:
            return repr(self._real)

        @property
        def total_memory(self) -> int:
            return min(most, self._real.total_memory)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        free, total = real_info(device)
        left = most - cuda.memory_reserved(device)
        return max(0, min(free, left)), min(total, most)

    def set_fraction() -> None:
        cuda.set_per_process_memory_fraction(min(1.0, most / real_properties(0).total_memory), 0)

    cuda.mem_get_info = cuda.memory.mem_get_info = mem_get_info
    cuda.get_device_properties = lambda device=None: Properties(real_properties(device))
    cuda.get_per_process_memory_fraction = lambda _device=None: 1.0  # all of what the others say there is
    cuda._lazy_call(set_fraction)  # noqa: SLF001 - what torch's own seeds use


def time_kernels(module: Any) -> None:
    """On transformers.trainer_callback: every trainer gets one callback more."""
    path, first, last = os.environ["BENCH_GPU_PROFILE"].rsplit(":", 2)

    class Kernels(module.TrainerCallback):
        """Profiles steps first..last, counted from 1."""

        profiler = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            import torch  # noqa: PLC0415

            if state.global_step + 1 == int(first) and torch.cuda.is_available():
                torch.cuda.synchronize()
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            import torch  # noqa: PLC0415

            if self.profiler is not None and state.global_step == int(last):
                torch.cuda.synchronize()
                self.profiler.stop()
                write_kernels(self.profiler, path, steps=int(last) - int(first) + 1)
                self.profiler = None

    add_callback(module, Kernels)


def squeeze(module: Any) -> None:
    """On transformers.trainer_callback: every trainer gets one callback more."""
    step, _, gib = os.environ["BENCH_GPU_SQUEEZE"].partition(":")

    class Squeeze(module.TrainerCallback):
        """Gives what is not in use back to the card, and takes no more than the limit from then on."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            import torch  # noqa: PLC0415

            if state.global_step + 1 == int(step):
                torch.cuda.empty_cache()
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(float(gib) * 2**30 / total, 0)

    add_callback(module, Squeeze)


def add_callback(module: Any, kind: Any) -> None:
    """Give one to every trainer that will be built."""
    handler = module.CallbackHandler
    real = handler.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.add_callback(kind())

    handler.__init__ = init


def write_kernels(profiler: Any, path: str, *, steps: int) -> None:
    """Seconds in which at least one kernel ran."""
    import json  # noqa: PLC0415

    trace = path + ".trace"
    profiler.export_chrome_trace(trace)
    with open(trace) as file:  # noqa: PTH123
        events = json.load(file)["traceEvents"]
    os.unlink(trace)  # noqa: PTH108
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel")
    with open(path, "w") as file:  # noqa: PTH123
        json.dump({"steps": steps, "kernels": len(spans), "kernel_seconds": covered(spans) / 1e6}, file)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of (begin, end) spans, sorted by begin."""
    total, reached = 0, float("-inf")
    for begin, end in spans:
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


CHANGES = {
    "torch.cuda": {"BENCH_GPU_LIMIT_GIB": limit_memory},
    "transformers.trainer_callback": {"BENCH_GPU_PROFILE": time_kernels, "BENCH_GPU_SQUEEZE": squeeze},
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds a module as ever, and has it changed after it was executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002
        changes = [change for variable, change in CHANGES.get(name, {}).items() if os.environ.get(variable)]
        if not changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for change in changes:
                change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
