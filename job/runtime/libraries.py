"""The training libraries: the environment variables that they read at import, that of child processes, versions."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
COMPILED = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
}
"""Where what is compiled goes, and what each place is called below the directory for all of it."""
_compiled: dict[str, str] = {}  # the same, as the libraries were told
_given: dict[str, str | None] = {}  # what the user had set for the names in OFFLINE, before this process went offline


def prepare_libraries(
    scratch: Path,
    *,
    compiled: Path | None = None,
    expect_gpu: bool,
    cpu_only: bool = False,
    deterministic: bool = False,
    linear_attention: bool = True,
    quiet: bool = False,
) -> None:
    """Set what the training libraries read at import. Must run before any of them is imported.

    The process that trains is offline from its first import: hub downloads run in a child process (`job.inputs.hub`).
    Caches go under the scratch directory unless the user placed them elsewhere.

    Args:
        compiled: where what is compiled must go, wherever the user placed it; None leaves it with the other caches.
        linear_attention: whether the model has any; Unsloth brings kernels for it, which take a second to import.
    """
    caches = {
        "HF_HOME": scratch / "huggingface",
        **{name: (compiled or scratch) / leaf for name, leaf in COMPILED.items()},
        "XDG_CACHE_HOME": scratch / "cache",
        "MPLCONFIGDIR": scratch / "matplotlib",
    }
    for name, path in caches.items():
        if compiled is not None and name in COMPILED:
            os.environ[name] = str(path)
        os.environ.setdefault(name, str(path))
        path.mkdir(parents=True, exist_ok=True)
    _compiled.update({name: os.environ[name] for name in COMPILED})
    # Unsloth's own bundle of the same, under the home directory: one place is enough, and it is written at exit only.
    os.environ.setdefault("UNSLOTH_MEGA_CACHE", "0")
    if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111 - Path.home() raises for a uid without a passwd entry
        os.environ["HOME"] = str(scratch)
    _given.update({name: os.environ.get(name) for name in OFFLINE})
    os.environ.update(OFFLINE)
    os.environ.update(
        HF_HUB_DISABLE_TELEMETRY="1",
        UNSLOTH_DISABLE_STATISTICS="1",
        UNSLOTH_AUTO_INSTALL="0",
        TOKENIZERS_PARALLELISM="true",
        WANDB_DISABLED="true",
    )
    _share_the_cpu()
    if expect_gpu:
        os.environ["UNSLOTH_DISABLE_CPU_FALLBACK"] = "1"
    # One card: with more in sight the trainer would spread the batch over them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if not linear_attention:
        os.environ.setdefault("UNSLOTH_DISABLE_VENDORED_FLA", "1")
    if quiet:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS promises to repeat itself only with a fixed one
    if cpu_only:
        os.environ.update(CUDA_VISIBLE_DEVICES="", UNSLOTH_FORCE_CPU="1")


def _share_the_cpu() -> None:
    # Waiting threads spin shortly, then sleep: where others use the CPU too, libgomp's long spin made a training step
    # 10 times slower; on an idle CPU the difference is within the noise.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    quota = _cpu_quota(CGROUP_QUOTA)
    if quota is not None and quota < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))


def keep_compiled() -> None:
    """Say again where what is compiled goes. To be called once the libraries are imported: on a GPU Unsloth takes
    Inductor's place away at its import (`patch_torch_compile`), which would then be one beside the scratch directory.
    """
    os.environ.update(_compiled)


def keep_modules(directory: Path) -> None:
    """From now on Python's modules are compiled into a directory, and loaded from there, by child processes too."""
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(directory)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def _cpu_quota(path: Path) -> int | None:
    """Whole CPUs that the container may use, which no library asks for (cgroup v2: `<quota> <period>` or `max ...`)."""
    try:
        quota, period = path.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def child_environment(**overrides: str | None) -> dict[str, str]:
    """The environment for a child process: as the user gave it, so that a child may go online where the user may.

    An override of None removes the name.
    """
    # One by one: another thread may be taking names away, as libraries do when they are imported.
    changed: dict[str, str | None] = {name: os.environ.get(name) for name in list(os.environ)} | _given | overrides
    return {name: value for name, value in changed.items() if value is not None}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed, read without importing them."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
