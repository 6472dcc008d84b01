"""Faults at an exact place inside the job's process: installed in the fork, before the job begins."""

import os
import signal
from pathlib import Path


def kill_in_save(name: str, step: int) -> None:
    """SIGKILL this process in the middle of writing one file of a checkpoint, with half of it on the disk."""
    import safetensors.torch
    import torch
    from transformers import TrainerState

    def broken(inner, place):
        def write(*arguments, **options):
            path = Path(arguments[place])
            inner(*arguments, **options)
            if path.name == name and path.parent.name == f"checkpoint-{step}":
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return write

    import job.tuning.checkpoint_files

    torch.save = broken(torch.save, 1)
    job.tuning.checkpoint_files.save_file = broken(safetensors.torch.save_file, 1)
    TrainerState.save_to_json = broken(TrainerState.save_to_json, 1)


def kill_at_step(step: int) -> None:
    """SIGKILL this process as a step ends, before anything is saved of it."""
    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_at_step(step: int) -> None:
    """An error of the program's own at a step."""

    fail_with(step, f"the test broke step {step}")


def fail_with(step: int, text: str) -> None:
    """The same, with other words."""

    def fail():
        raise RuntimeError(text)

    _at_step(step, fail)


def unrepeatable_kernel(step: int) -> None:
    """At a step, an operation for which torch has no deterministic kernel."""
    import torch

    _at_step(step, lambda: torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0])))


def stop_at_step(step: int) -> None:
    """SIGSTOP this process as a step ends; somebody else may wake it."""
    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def signal_at_step(step: int, number: int) -> None:
    """A signal to this process as a step ends."""
    _at_step(step, lambda: os.kill(os.getpid(), number))


def slow_steps(seconds: float) -> None:
    """Every step takes this much longer."""
    import time

    from job.tuning.callbacks.progress import Progress

    def on_step_begin(self, *_, inner=Progress.on_step_begin, **__):
        time.sleep(seconds)
        return inner(self, *_, **__)

    Progress.on_step_begin = on_step_begin


def say_lengths() -> None:
    """Print the lengths of the rows of every micro-batch, as the trainer gets them."""
    from job.tuning.trainer.collator import CountingCollator

    def call(self, rows, inner=CountingCollator.__call__):
        print("the test saw", [len(row["input_ids"]) for row in rows])  # noqa: T201 - the test reads it
        return inner(self, rows)

    CountingCollator.__call__ = call


def _at_step(step: int, act) -> None:
    from job.tuning.callbacks.progress import Progress

    inner = Progress.on_log

    def on_log(self, args, state, control, logs, **events):
        if "loss" in logs and state.global_step == step:
            act()
        return inner(self, args, state, control, logs, **events)

    Progress.on_log = on_log


def call_before(target: str, number: int, how: str) -> None:
    """SIGKILL, SIGSTOP or SIGTERM this process before the n-th call of a function, e.g.
    `job.state.publication:Publication.publish`."""
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


def commit_every_save() -> None:
    """Training waits for each checkpoint until it is committed and tidied up, so that none is superseded."""
    from job.state.uploader import Uploader

    def submit(self, saved, inner=Uploader.submit):
        inner(self, saved)
        self.drain()

    Uploader.submit = submit


def today(date: str) -> None:
    """What this process takes for the day on which the run begins, e.g. `2024-02-29`."""
    import datetime
    from types import SimpleNamespace

    import job.inputs.pull

    clock = SimpleNamespace(now=lambda _: datetime.datetime.fromisoformat(date))
    job.inputs.pull.datetime = SimpleNamespace(date=datetime.date, datetime=clock, UTC=datetime.UTC)


def may_mount() -> bool:
    """Whether this user may give a process file systems of its own."""
    import shutil
    import subprocess

    return bool(shutil.which("unshare")) and subprocess.call(["unshare", "-m", "true"], stderr=subprocess.DEVNULL) == 0


def full_disk(from_step: int, to_step: int, left_bytes: int = 0) -> None:
    """Work on a small disk that nobody else sees; between the ends of two steps only some bytes are left on it."""
    import contextlib
    import ctypes
    from pathlib import Path

    new_namespace, recursive, private = 0x20000, 1 << 14, 1 << 18
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.environ["TMPDIR"].encode()
    assert not libc.unshare(new_namespace), os.strerror(ctypes.get_errno())
    assert not libc.mount(b"none", b"/", None, recursive | private, None), os.strerror(ctypes.get_errno())
    assert not libc.mount(b"tmpfs", place, b"tmpfs", 0, b"size=16m"), os.strerror(ctypes.get_errno())
    ballast = Path(os.environ["TMPDIR"], "ballast")

    def fill():
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, ballast.stat().st_size - left_bytes)

    for step in range(from_step, to_step):  # again and again: an upload that ends gives room back
        _at_step(step, fill)
    _at_step(to_step, ballast.unlink)


def block(target: str, seconds: float) -> None:
    """Before the first call of a function, stay in C code that no signal interrupts."""
    import hashlib
    import time

    def act():
        print("the test blocks")  # noqa: T201 - the test waits for it
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # In one call, so that Python's signal handlers wait: about half a second for each million rounds.
            hashlib.pbkdf2_hmac("sha256", b"", b"", int(seconds * 2_000_000))

    _before(target, act)


def swallow(target: str) -> None:
    """Before the first call of a function, a SIGTERM whose exception somebody swallows."""
    import time

    def act():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException:  # noqa: BLE001 - what libraries do
            pass
        time.sleep(30)

    _before(target, act)


def _before(target: str, act) -> None:
    import importlib

    module, _, name = target.partition(":")
    owner = importlib.import_module(module)
    inner = getattr(owner, name)

    def call(*arguments, **options):
        act()
        return inner(*arguments, **options)

    setattr(owner, name, call)


def termination_log(path: str) -> None:
    """Kubernetes' message goes to this file."""
    import job.observability.termination

    job.observability.termination.PLACE = Path(path)


def sagemaker(path: str) -> None:
    """The place where SageMaker looks for the reason of a failure, elsewhere."""
    import job.observability.termination

    job.observability.termination.SAGEMAKER = Path(path)


def control_group(path: str) -> None:
    """What the kernel shows of this container's memory lies in this directory."""
    import job.observability.memory

    job.observability.memory.CGROUP = Path(path)


def break_the_log(step: int) -> None:
    """At a step, everything about logging fails: its process is killed, an observer raises, a value has no text; then
    a library prints."""

    class WithoutText:
        def __str__(self):
            raise RuntimeError("no text")

        __repr__ = __str__

    def observe(_):
        raise RuntimeError("the test's observer")

    def act():
        import structlog

        from job.observability import logs

        for pid in logs.processes():
            os.kill(pid, signal.SIGKILL)
        logs.observe(observe)
        structlog.get_logger().info("value_without_text", value=WithoutText())
        print("x" * 200_000, flush=True)  # noqa: T201 - as a library does

    _at_step(step, act)


def close_streams() -> None:
    """The job starts without standard input, output and error."""
    for descriptor in (0, 1, 2):
        os.close(descriptor)
