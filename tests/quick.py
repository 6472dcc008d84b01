"""`pytest --quick`: the tests that start no process and import no training library.

A file that imports the training stack at its top is not even collected; a test whose fixtures start servers, models or
jobs is left out, and so is one marked `process`. What is left is watched: a test that starts a process or imports torch
all the same fails and says which mark it lacks.
"""

import ast
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STACK = {"torch", "unsloth", "unsloth_zoo", "trl", "peft", "bitsandbytes", "accelerate"}
TORCH_FREE = {"job.tuning.hooks", "job.tuning.fit.plan"}
STARTING = {"moto", "rclone", "tiny_model", "zygote"}
"""Fixtures that start a process; all others that do ask for one of these."""
MARK = "mark it with @pytest.mark.process"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests that start no process and import no torch")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.getoption("quick"):
        return None
    if collection_path.is_dir():
        return True if collection_path.name == "faults" else None
    if collection_path.suffix == ".py" and collection_path.name.startswith("test_"):
        return True if _imports_stack(collection_path) else None
    return None


def _imports_stack(path: Path) -> bool:
    """Whether a file imports the training stack at its top level."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    tuning = {name for name in names if name.startswith("job.tuning.")}
    return any(name.partition(".")[0] in STACK for name in names) or any(
        not any(name.startswith(free) for free in TORCH_FREE) for name in tuning
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("quick"):
        return
    slow = [item for item in items if item.get_closest_marker("process") or STARTING & set(item.fixturenames)]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in set(slow)]


@pytest.fixture(autouse=True)
def stays_quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In quick mode a test that starts a process or imports torch fails."""
    if not request.config.getoption("quick"):
        yield
        return

    def refuse(*_: object, **__: object) -> None:
        pytest.fail(f"the test starts a process: {MARK}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    for name in ("fork", "posix_spawn", "system"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(sys, "meta_path", [_NoStack(), *sys.meta_path])
    yield


class _NoStack(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the training libraries, so that others see that they are there, and does not load them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in STACK else None

    def exec_module(self, module: object) -> None:
        pytest.fail(f"the test imports {module.__name__}: {MARK}")
