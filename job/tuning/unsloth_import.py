"""Importing this module imports Unsloth, without the trainers that this program has no use for.

Unsloth patches torch, transformers, trl and peft, so every module of `job.tuning` that imports one of them imports this
one first. On a GPU Unsloth rewrites the source of every trainer of TRL when it is imported, those for preferences,
rewards and distillation as well: half of its import's time. Here it rewrites `SFTTrainer` alone.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

REWRITES = "unsloth.models.rl"
OURS, SUFFIX = "sft_trainer", "_trainer"


class _Loader(SourceFileLoader):
    """Loads the module that rewrites trainers, and narrows what it will find."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        # It goes by the names of `dir(trl.trainer)`, and by a list of those under `trl.experimental`.
        module.dir = _narrowed  # type: ignore[attr-defined]
        module._TRL_EXPERIMENTAL_TRAINERS = ()  # type: ignore[attr-defined]  # noqa: SLF001


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REWRITES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


def _narrowed(*of: Any) -> list[str]:
    """`dir`, which leaves the other trainers out of the list of all trainers."""
    names = builtins.dir(*of)
    if of != (sys.modules.get("trl.trainer"),):
        return names
    return [name for name in names if name == OURS or not name.endswith(SUFFIX)]


def install() -> None:
    """Install the finder, unless it is there already or has done its work. It must precede `import unsloth`."""
    if REWRITES not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
import unsloth  # noqa: E402, F401 - imported for what it patches
