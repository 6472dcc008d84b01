"""The training libraries, none of which it imports: the environment variables that they read at import, that of child
processes, and their versions."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from job.runtime import credentials, process

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
COMPILED = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
}
"""Where compiled code goes, and what each place is called below the directory for all of it."""
_CUDA_OF_TORCH = re.compile(r"^cuda\b.*=\s*'(\d+)\.(\d+)'", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class LibrarySettings:
    """What the training libraries have to know before they are imported."""

    scratch: Path
    """Their caches go under it unless the user placed them elsewhere."""
    compiled: Path | None = None
    """Where compiled code must go, wherever the user placed it; None leaves it with the other caches."""
    expect_gpu: bool
    """Whether a fall-back to the CPU is an error."""
    cpu_only: bool = False
    deterministic: bool = False
    linear_attention: bool = True
    """Whether the model has any; Unsloth has kernels for it, which take a second to import."""
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` changed and has to be known later."""

    compiled: Mapping[str, str]
    """The variables of `COMPILED`."""

    def restore_compiled(self) -> None:
        """Set again where compiled code goes, once the libraries are imported: on a GPU Unsloth removes Inductor's
        directory at its import (`patch_torch_compile`), which would then be one outside the scratch directory."""
        os.environ.update(self.compiled)


_given: Mapping[str, str | None] = {}
"""What the user had set for variables that `prepare` changed or removed; None for what was not set."""


def prepare(settings: LibrarySettings) -> Prepared:
    """Set what the training libraries read at import. Must run before any of them is imported.

    The process that trains is offline from its first import: hub downloads run in a child process (`job.inputs.hub`).
    Of credentials it keeps those of the store only, so that what libraries start, such as compilers, gets no others.
    """
    global _given  # noqa: PLW0603 - the environment, which it describes, is the process's too
    given = process.variables()
    removed = given.keys() - credentials.without(given, but=credentials.STORE).keys()
    # Before the environment changes: another thread may be starting a child.
    _given = {name: given.get(name) for name in (*OFFLINE, *removed)}
    for name in removed:
        os.environ.pop(name, None)
    compiled = _place_caches(settings.scratch, settings.compiled)
    os.environ.update(
        OFFLINE,
        HF_HUB_DISABLE_TELEMETRY="1",
        UNSLOTH_DISABLE_STATISTICS="1",
        UNSLOTH_AUTO_INSTALL="0",
        TOKENIZERS_PARALLELISM="true",
        WANDB_DISABLED="true",
    )
    _share_the_cpu()
    _choose_device(settings)
    if not settings.linear_attention:
        os.environ.setdefault("UNSLOTH_DISABLE_VENDORED_FLA", "1")
    if settings.quiet:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if settings.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS promises to repeat itself only with a fixed one
    return Prepared(compiled=compiled)


def _place_caches(scratch: Path, compiled: Path | None) -> dict[str, str]:
    """Returns the variables of `COMPILED`."""
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
    # Unsloth's own bundle of the same, under the home directory: one place is enough, and it is written at exit only.
    os.environ.setdefault("UNSLOTH_MEGA_CACHE", "0")
    if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111 - Path.home() raises for a uid without a passwd entry
        os.environ["HOME"] = str(scratch)
    return {name: os.environ[name] for name in COMPILED}


def _share_the_cpu() -> None:
    # Waiting threads spin shortly, then sleep: where others use the CPU too, libgomp's long spin made a training step
    # 10 times slower; on an idle CPU the difference is within the noise.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    quota = process.cpu_quota()  # no library asks for it
    threads = len(os.sched_getaffinity(0)) if quota is None else max(1, int(quota))
    if threads < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _choose_device(settings: LibrarySettings) -> None:
    if settings.expect_gpu:
        os.environ["UNSLOTH_DISABLE_CPU_FALLBACK"] = "1"
    # One card: with more in sight the trainer would spread the batch over them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if settings.cpu_only:
        os.environ.update(CUDA_VISIBLE_DEVICES="", UNSLOTH_FORCE_CPU="1")


def keep_modules(directory: Path) -> None:
    """From now on Python's modules are compiled into a directory, and loaded from there, by child processes too."""
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(directory)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def child_environment(**overrides: str | None) -> dict[str, str]:
    """The environment for a child process: what the user gave, which `prepare` may have changed for this process; for
    the rest that of this process.

    An override of None removes the name.
    """
    changed: dict[str, str | None] = {**process.variables(), **_given, **overrides}
    return {name: value for name, value in changed.items() if value is not None}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed, read without importing them."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed torch was built for, read without importing it; None for a build without."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = _CUDA_OF_TORCH.search(Path(spec.origin).with_name("version.py").read_text())
    return (int(found[1]), int(found[2])) if found else None
