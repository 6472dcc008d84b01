"""Python's compiled modules, where packages came without them: kept, and good for what they were compiled from."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from job import bytecode
from tests.jobs import ROOT, run

SHORT = {"max_steps": 1, "max_length": 128, "samples": 0, "batch_size": 4, "lora_r": 4, "precision": "16bit"}
IMPORTS = """
import json, sys
from pathlib import Path
from job import bytecode
kept = Path(sys.argv[1])
sys.dont_write_bytecode = True
missing = bytecode.missing()
bytecode.keep_in(kept)
import torch
files = [path for path in kept.rglob("*.pyc") if "torch" in path.parts]
before = [path.stat().st_ino for path in files]
bytecode.outlast(files)
print(json.dumps([missing, torch.VALUE, torch.__cached__, before]))
"""


@pytest.fixture
def package(tmp_path):
    """A package of the stack's without compiled modules."""
    source = tmp_path / "site/torch/__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("VALUE = 1\n")
    return source


def imported(package: Path, kept: Path) -> tuple[bool, int, Path, list[int]]:
    """Import the package in a process of its own, with compiled modules kept: whether they were missing before, what
    it says, where its module is, and which files were there after the import."""
    path = os.pathsep.join([str(package.parent.parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(kept)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=kept.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    missing, value, cached, files = json.loads(done.stdout)
    return missing, value, Path(cached), files


def test_modules_are_compiled_once(package, tmp_path):
    """What was compiled is loaded again, also if the same source was installed anew since; nothing is written beside
    the source."""
    kept = tmp_path / "kept"
    missing, value, module, _ = imported(package, kept)
    assert (missing, value) == (True, 1)
    assert module.is_relative_to(kept)
    left = module.stat().st_ino
    os.utime(package, (1e9, 1e9))
    assert imported(package, kept) == (True, 1, module, [left])
    assert list(package.parent.iterdir()) == [package]


def test_another_source_is_compiled_anew(package, tmp_path):
    """A module that was compiled from something else is not loaded, whatever the time and the size of the source."""
    kept = tmp_path / "kept"
    _, _, module, _ = imported(package, kept)
    was = package.stat()
    package.write_text("VALUE = 2\n")
    os.utime(package, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert imported(package, kept)[1:3] == (2, module)
    assert imported(package, kept)[1] == 2


def test_only_what_was_compiled_from_the_source_is_made_to_last(package, tmp_path, monkeypatch):
    """The source changed since, is gone, or the module is none: it stays as it is."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "kept"))
    for spoil in (
        lambda module: package.write_text("VALUE = 22\n"),
        lambda module: os.utime(package, (1e9, 1e9)),
        lambda module: package.unlink(),
        lambda module: module.write_bytes(b"short"),
        lambda module: module.write_bytes(b"none" + module.read_bytes()[4:]),
    ):
        package.write_text("VALUE = 1\n")
        module = Path(bytecode.importlib.util.cache_from_source(str(package)))
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        subprocess.run(
            [sys.executable, "-c", "import torch"],
            env={"PYTHONPATH": str(package.parent.parent), "PYTHONPYCACHEPREFIX": str(tmp_path / "kept")},
            check=True,
        )
        spoil(module)
        before = module.read_bytes()
        bytecode.outlast([module, module.with_name("gone.pyc")])
        assert module.read_bytes() == before


def test_what_is_there_is_used(monkeypatch):
    """Where packages have compiled modules, or a place for them was set, nothing is kept."""
    assert not bytecode.missing()
    monkeypatch.setattr(bytecode, "STACK", ("no_such_package",))
    assert not bytecode.missing()
    monkeypatch.setattr(bytecode, "STACK", ("tests.no_module",))
    assert not bytecode.missing()


def test_a_place_that_was_set_is_respected(package, monkeypatch):
    monkeypatch.syspath_prepend(str(package.parent.parent))
    assert bytecode.missing()
    monkeypatch.setattr(sys, "pycache_prefix", "/somewhere")
    assert not bytecode.missing()


@pytest.mark.timeout(300)
def test_a_stack_without_compiled_modules_starts_faster_from_the_cache(tiny_model, rows, tmp_path):
    """The first run compiles the whole training stack, since one package of it came without; the next does not."""
    package = Path(find_spec("peft").origin).parent
    shutil.copytree(package, tmp_path / "site/peft", ignore=shutil.ignore_patterns("__pycache__"))
    place = {"model": tiny_model, "dataset": rows, "cache": tmp_path / "kept", "PYTHONPATH": tmp_path / "site"}
    seconds = []
    for output in ("first", "second"):
        ended = run(tmp_path, **SHORT, **place, output=tmp_path / output)
        assert ended.code == 0, ended.lines[-1]
        seconds.append(ended.event("run_complete")["timeline_seconds"]["import"])
        shutil.rmtree(tmp_path / "scratch")
    assert ended.event("compile_cache_restored")["files"] > 3000
    assert not ended.events("compile_cache_saved")
    assert seconds[1] < seconds[0] / 2
