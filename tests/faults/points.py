"""Faults at an exact place inside the job's process: installed in the fork, before the job begins."""

import os
import signal


def kill_in_save(name: str, step: int) -> None:
    """SIGKILL this process in the middle of writing one file of a checkpoint, with half of it on the disk."""
    import safetensors.torch
    import torch
    from transformers import TrainerState

    def broken(inner, place):
        def write(*arguments, **options):
            path = os.fspath(arguments[place])
            inner(*arguments, **options)
            if os.path.basename(path) == name and f"checkpoint-{step}{os.sep}" in path:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return write

    import job.tuning.checkpoint

    torch.save = broken(torch.save, 1)
    job.tuning.checkpoint.save_file = broken(safetensors.torch.save_file, 1)
    TrainerState.save_to_json = broken(TrainerState.save_to_json, 1)


def kill_at_step(step: int) -> None:
    """SIGKILL this process as a step ends, before anything is saved of it."""
    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_at_step(step: int) -> None:
    """An error of the program's own at a step."""

    def fail():
        raise RuntimeError(f"the test broke step {step}")

    _at_step(step, fail)


def stop_at_step(step: int) -> None:
    """SIGSTOP this process as a step ends; somebody else may wake it."""
    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def signal_at_step(step: int, number: int) -> None:
    """A signal to this process as a step ends."""
    _at_step(step, lambda: os.kill(os.getpid(), number))


def slow_steps(seconds: float) -> None:
    """Every step takes this much longer."""
    import time

    from job.tuning.callbacks import Progress

    def on_step_begin(self, *_, inner=Progress.on_step_begin, **__):
        time.sleep(seconds)
        return inner(self, *_, **__)

    Progress.on_step_begin = on_step_begin


def _at_step(step: int, act) -> None:
    from job.tuning.callbacks import Progress

    inner = Progress.on_log

    def on_log(self, args, state, control, logs, **events):
        if "loss" in logs and state.global_step == step:
            act()
        return inner(self, args, state, control, logs, **events)

    Progress.on_log = on_log


def call_before(target: str, number: int, how: str) -> None:
    """SIGKILL, SIGSTOP or SIGTERM this process before the n-th call of a function, e.g. `job.record:Record.finish`."""
    import importlib

    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    inner, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), getattr(signal, how))
        return inner(*arguments, **options)

    setattr(owner, name, call)
