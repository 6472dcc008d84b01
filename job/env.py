"""The environment: the only reader and writer of `os.environ`.

It turns `TUNE_*` variables into a `Config`, tells what the process knows of itself (rank, pod), prepares the
variables that the training libraries read at import, and names the secrets that must never be printed.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from environs import EnvValidationError, FileAwareEnv
from marshmallow import ValidationError

from job import rules, secrecy
from job.config import SETTINGS, Config
from job.errors import ConfigError
from job.setting import PREFIX, Setting

FILE_SUFFIX = "_FILE"
NEAR = 0.75
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


@dataclass(frozen=True, kw_only=True)
class Process:
    """Where this process runs, as the platform tells it."""

    rank: int
    world_size: int
    host: str
    pod: str | None
    gpus: tuple[str, ...]
    """The cards' names, as the driver tells without any library."""


def load() -> Config:
    """Read every `TUNE_*` variable.

    Raises:
        ConfigError: with every problem at once, each naming the variable, its value, the rule and the remedy.
    """
    problems = _unknown_names() + _doubled_names() + _place_problems()
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        try:
            values[setting.name] = _read(setting)
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        config = Config(**values)
        problems = rules.problems(config)
    if problems:
        raise ConfigError(
            "The environment is not valid.",
            remedy="Correct what is named here; `python -m job variables` lists every variable and its rule.",
            problems=problems,
        )
    return config


def _read(setting: Setting) -> Any:
    """One variable's value.

    Raises:
        ValueError: with the whole problem in words.
    """
    environment = FileAwareEnv(eager=False, strip_whitespace=True)
    environment.add_parser("setting", lambda raw: raw if raw is setting.default else _parse(setting, raw))
    name = setting.variable
    if not os.environ.get(name, "").strip() and not os.environ.get(name + FILE_SUFFIX):
        # An empty variable is an unset one: charts and compose files pass empty strings for values left out.
        if setting.required:
            raise ValueError(f"{name} is not set. It is required: {setting.kind.rule} ({setting.meaning}).")
        return setting.default
    try:
        value = environment.setting(name, setting.default)
        environment.seal()
    except EnvValidationError:
        raise ValueError(
            f"{name}={_shown(name)!r} is not valid. Expected: {setting.kind.rule} (default: {setting.default_text})."
        ) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{name}{FILE_SUFFIX}={os.environ.get(name + FILE_SUFFIX)!r} cannot be read: {error}"
        ) from None
    return value


def _parse(setting: Setting, raw: str) -> Any:
    value = setting.kind.field.deserialize(raw.strip())
    if isinstance(value, str) and "\n" in value:
        raise ValidationError("The value has a line break.")
    return value


def _shown(name: str) -> str:
    return os.environ.get(name) or f"<content of {os.environ.get(name + FILE_SUFFIX)}>"


def _unknown_names() -> list[str]:
    known = {setting.variable for setting in SETTINGS}
    problems = []
    for name in sorted(os.environ):
        if not name.startswith(PREFIX) or name in known or name.removesuffix(FILE_SUFFIX) in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
        remedy = f"Did you mean {near[0]}?" if near else "`python -m job variables` lists them all."
        problems.append(f"{name} is not a variable of this job. {remedy}")
    return problems


def _doubled_names() -> list[str]:
    return [
        f"{s.variable} and {s.variable}{FILE_SUFFIX} are both set. Keep one of them."
        for s in SETTINGS
        if os.environ.get(s.variable) and os.environ.get(s.variable + FILE_SUFFIX)
    ]


def _place_problems() -> list[str]:
    """RANK and WORLD_SIZE come from torchrun, or from a platform that starts several processes."""
    return [
        f"{name}={value!r} is not a whole number. Unset it, or start the job as torchrun does."
        for name in ("RANK", "WORLD_SIZE")
        if (value := os.environ.get(name)) and not value.isdecimal()
    ]


def asked_log_format() -> Any:
    """`TUNE_LOG_FORMAT` before anything is validated, so that the error itself is shown in that format."""
    try:
        return _read(next(setting for setting in SETTINGS if setting.name == "log_format")) or "auto"
    except ValueError:
        return "auto"


def process() -> Process:
    """The facts that torchrun and Kubernetes pass along."""
    return Process(
        rank=int(os.environ.get("RANK") or "0"),
        world_size=int(os.environ.get("WORLD_SIZE") or "1"),
        host=socket.gethostname(),
        pod=os.environ.get("POD_NAME") or os.environ.get("HOSTNAME"),
        gpus=_gpus(),
    )


def seconds_since_start() -> float:
    """How long this process has been running."""
    return time.time() - psutil.Process().create_time()


def _gpus() -> tuple[str, ...]:
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
            found.append(lines.get("Model", "unknown").strip())
    return tuple(found)


def scratch() -> Path:
    """The one directory that a run needs to write besides its output: downloads, caches, staging.

    It lies under `TMPDIR` and is private to the user, since `/tmp` may be shared.
    """
    try:
        # gettempdir alone would take another directory in silence where TMPDIR cannot be written.
        parent = os.environ.get("TMPDIR") or tempfile.gettempdir()
        path = Path(parent) / f"finetune-job-{os.getuid()}"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"No directory to work in: {error}.", remedy="Set TMPDIR to a writable directory with room for the model."
        ) from None
    if path.stat().st_uid != os.getuid():
        raise ConfigError(
            f"The scratch directory {path} belongs to another user.", remedy="Set TMPDIR to a directory of your own."
        )
    return path


def gpu_present() -> bool:
    """Whether the machine shows a GPU device, told without importing torch (WSL shows /dev/dxg)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


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

    The process that trains is offline from its first import: hub downloads run in a child process (`job.hub`).
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


def secrets() -> frozenset[str]:
    """The values of all variables whose names say that they are secret, and passwords inside URLs."""
    return secrecy.values(os.environ)
