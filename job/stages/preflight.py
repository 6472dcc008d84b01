"""Whether this machine is fit for a run, checked before anything is downloaded or loaded.

It knows devices, drivers and mounts as the system describes them, and imports no training library.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import structlog

from job.config import rules
from job.config.schema import Config
from job.observability import logs
from job.runtime import gpus, libraries, process
from job.runtime.errors import AccessDeniedError, ConfigError, JobError, StorageError, known
from job.runtime.process import Process
from job.storage.open import open_store

log = structlog.get_logger()
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the mount itself
SHARED_MEMORY_BYTES = 64 << 20  # what Docker gives by default
PATIENCE_SECONDS = 10.0


def machine(config: Config) -> bool:
    """Check that this process is alone, and its GPU, driver, scratch, shared memory and the disk of its output.

    Returns:
        whether the run will be on a GPU.

    Raises:
        ConfigError: with everything that is wrong with this machine.
    """
    gpu = config.device == "cuda" or (config.device == "auto" and gpus.present())
    problems: list[JobError] = []
    if (processes := Process.current().world_size) > 1:
        problems.append(
            ConfigError(
                f"WORLD_SIZE={processes}, but this job trains on one GPU.", remedy="Start one process without it."
            )
        )
    if gpu:
        with _collected(problems):
            check_gpu(config.device)
    elif config.batching in rules.FLAT:
        problems.append(
            ConfigError(
                f"TUNE_BATCHING={config.batching} needs a GPU, and this machine shows none.",
                remedy="Request a GPU for the container, or set TUNE_BATCHING=auto or padded.",
            )
        )
    with _collected(problems):
        check_scratch(process.scratch(), compiles=gpu)
    if not config.output.startswith("s3://"):
        with _collected(problems):
            probe_output(config.output)
    check_shared_memory(SHARED_MEMORY)
    if len(problems) > 1:
        raise ConfigError(
            "This machine is not fit for the run.",
            remedy="Fix the problems listed here.",
            problems=[str(problem) for problem in problems],
        )
    if problems:
        raise problems[0]
    return gpu


def everything(config: Config) -> None:
    """`python -m job preflight`: the machine, and what the credentials permit at the output; one line for each.

    Raises:
        JobError: as a run would end.
    """
    logs.bind(run_id=config.identity())
    log.info("preflight_passed", check="configuration")
    gpu = machine(config)
    if gpu and (driver := gpus.cuda_version()):
        log.info("preflight_passed", check="gpu", gpus=gpus.find().names, driver_cuda=".".join(map(str, driver)))
    scratch = process.scratch()
    log.info("preflight_passed", check="scratch", path=str(scratch), free_bytes=shutil.disk_usage(scratch).free)
    log.info("preflight_passed", check="output", uri=config.output, conditional_writes=probe_output(config.output))
    log.info("preflight_complete", gpu=gpu)


@contextlib.contextmanager
def _collected(problems: list[JobError]) -> Iterator[None]:
    try:
        yield
    except JobError as error:
        problems.append(error)


def no_gpu(asked: str, why: str) -> ConfigError:
    """The error for a GPU that was expected and is missing: training on the CPU instead would take days."""
    return ConfigError(
        f"TUNE_DEVICE={asked}, but {why}.",
        remedy="Request a GPU for the container (--gpus all, or nvidia.com/gpu) and check its driver with nvidia-smi, "
        "or set TUNE_DEVICE=cpu to train on the CPU on purpose.",
    )


def check_gpu(asked: str) -> None:
    """Check that there is a GPU, and that its driver is new enough for the CUDA that torch was built for.

    Raises:
        ConfigError: it is not.
    """
    if not gpus.present():
        raise no_gpu(asked, "this machine shows no GPU device")
    driver, built = gpus.cuda_version(), libraries.torch_cuda()
    if driver is None:
        raise ConfigError(
            f"There is a GPU, but its driver's library {gpus.CUDA_LIBRARY} is not in this container.",
            remedy="Run it with NVIDIA's container runtime and NVIDIA_DRIVER_CAPABILITIES=compute,utility.",
        )
    check_driver(driver, built)


def check_driver(driver: tuple[int, int], built: tuple[int, int] | None) -> None:
    """Check that a driver is new enough: it runs what was built for its own major version of CUDA or an older one
    (NVIDIA's "minor version compatibility").

    Raises:
        ConfigError: it is too old.
    """
    if built is not None and driver[0] < built[0]:
        raise ConfigError(
            f"The GPU's driver is for CUDA {driver[0]}.{driver[1]}, and this image needs CUDA {built[0]}.",
            remedy="Update the driver of the node (nvidia-smi shows its version), or choose nodes with a newer one.",
        )


def check_scratch(directory: Path, *, compiles: bool) -> None:
    """Check that files can be written in `directory`, and that code which is compiled there can be loaded.

    Raises:
        ConfigError: they cannot.
        StorageError: it is full.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        if isinstance(full := known(error), StorageError):
            raise full from None
        raise ConfigError(
            f"The scratch directory {directory} cannot be written: {error.strerror}.",
            remedy="Mount a writable volume there, or point TMPDIR to a directory that this user can write to.",
        ) from None
    if compiles and os.statvfs(directory).f_flag & os.ST_NOEXEC:
        raise ConfigError(
            f"The scratch directory {directory} is mounted noexec, and a GPU's kernels are compiled and loaded there.",
            remedy="Mount it with exec (--tmpfs /scratch:exec, or a volume), or point TMPDIR to another volume.",
        )


def check_shared_memory(mount: Path) -> None:
    """Warn of less than Docker's own default: a run of one process does not need it, but a container with less was
    probably set up wrong."""
    total = shutil.disk_usage(mount).total if mount.is_dir() else 0
    if total < SHARED_MEMORY_BYTES:
        log.warning(
            "shared_memory_small",
            path=str(mount),
            total_bytes=total,
            remedy="Mount a memory-backed volume there (--shm-size=1g, or an emptyDir with medium: Memory).",
        )


def probe_output(uri: str) -> bool:
    """Do at the output once what a run does there: create an object, read it, replace it, list it, delete it.

    Returns:
        whether the store honours conditional writes.

    Raises:
        AccessDeniedError: one of them is denied.
        ConfigError: the store, or the file system of a directory, cannot do one of them.
        StorageError: the store is unreachable, or returns something else.
    """
    store = open_store(uri, patience_seconds=PATIENCE_SECONDS, denied_patience_seconds=PATIENCE_SECONDS)
    key, content = f"preflight-{uuid.uuid4().hex}", b"written by a pre-flight check; may be deleted\n"
    with _doing(uri, "create"):
        store.create(key, content)
    try:
        _require(store.read(key) == content, uri)
        conditional = not store.create(key, content)
        with _doing(uri, "replace"):
            store.write(key, content * 2)
        _require(store.read(key) == content * 2, uri)
        listed = [(entry.key, entry.size) for entry in store.list_objects(key)]
        _require(listed == [(key, len(content) * 2)], uri)
    finally:
        try:
            store.delete(key)
        except AccessDeniedError as error:  # a run only warns, too, and then keeps every checkpoint
            log.warning(
                "preflight_object_not_deleted", key=key, reason=error.message, remedy="Delete it by other means."
            )
    return conditional


@contextlib.contextmanager
def _doing(uri: str, what: str) -> Iterator[None]:
    """Say of a file system what it cannot do. Some say that it is not permitted: mounts of buckets (FUSE)."""
    try:
        yield
    except AccessDeniedError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EPERM:
            raise ConfigError(
                f"The file system of {uri} does not let a file be {what}d: {error.message}",
                remedy="A run creates, renames and replaces files. Use a local disk or a network file system; for a "
                "bucket, write its address (s3://...) instead of a mount.",
            ) from error
        raise


def _require(same: bool, uri: str) -> None:
    if not same:
        raise StorageError(
            f"{uri} does not return what was written to it.",
            remedy="Check the proxies between this machine and the store.",
        )
