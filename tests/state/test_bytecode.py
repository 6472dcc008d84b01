"""Python's compiled modules, where packages came without them: kept, and good for what they were compiled from."""

import json
import os
import py_compile
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from job.state.compile_cache import bytecode
from tests.jobs import ROOT, run

pytestmark = pytest.mark.process

SHORT = {"max_steps": 1, "max_length": 128, "samples": 0, "batch_size": 4, "lora_r": 4, "precision": "16bit"}
IMPORTS = """
import json, subprocess, sys
from pathlib import Path
from job.runtime import libraries
from job.state.compile_cache import bytecode
kept = Path(sys.argv[1])
missing = bytecode.missing()
libraries.keep_modules(kept)
import torch
files = [path for path in kept.rglob("*.pyc") if "torch" in path.parts]
there = [path.stat().st_ino for path in files]
lasting = all([bytecode.bind_to_source(path) for path in files])
subprocess.run([sys.executable, "-c", "import torch.child"], check=True)
children = len(list(Path(torch.__cached__).parent.glob("child.*")))
print(json.dumps([missing, torch.VALUE, torch.__cached__, there, lasting, children]))
"""


@pytest.fixture
def package(tmp_path):
    """A package of the stack's without compiled modules."""
    source = tmp_path / "site/torch/__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("VALUE = 1\n")
    source.with_name("child.py").touch()
    return source


def imported(package: Path, kept: Path) -> tuple[bool, int, Path, list[int]]:
    """Import the package in a process of its own, with compiled modules kept: whether they were missing before, what
    it says, where its module is, and which files were there after the import."""
    path = os.pathsep.join([str(package.parent.parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(kept)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=kept.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    missing, value, cached, files, lasting, children = json.loads(done.stdout)
    assert (lasting, children) == (True, 1)
    return missing, value, Path(cached), files


def test_modules_are_compiled_once(package, tmp_path):
    """What was compiled is loaded again, also if the same source was installed again since; nothing is written beside
    the source, and child processes go by it."""
    kept = tmp_path / "kept"
    missing, value, module, _ = imported(package, kept)
    assert (missing, value) == (True, 1)
    assert module.is_relative_to(kept)
    left = module.stat().st_ino
    os.utime(package, (1e9, 1e9))
    missing, value, again, files = imported(package, kept)
    assert (missing, value, again) == (True, 1, module)
    assert left in files
    assert sorted(package.parent.iterdir()) == [package, package.with_name("child.py")]


def test_another_source_is_compiled_anew(package, tmp_path):
    """A module that was compiled from something else is not loaded, whatever the time and the size of the source."""
    kept = tmp_path / "kept"
    _, _, module, _ = imported(package, kept)
    was = package.stat()
    package.write_text("VALUE = 2\n")
    os.utime(package, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert imported(package, kept)[1:3] == (2, module)
    assert imported(package, kept)[1] == 2


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda source, _: source.write_text("VALUE = 22\n"), id="another source"),
        pytest.param(lambda source, _: os.utime(source, (1e9, 1e9)), id="a newer source"),
        pytest.param(lambda source, _: source.unlink(), id="no source"),
        pytest.param(lambda _, module: module.unlink(), id="no module"),
        pytest.param(lambda _, module: module.write_bytes(b"short"), id="no header"),
        pytest.param(lambda _, module: os.truncate(module, 40), id="torn"),
        pytest.param(lambda _, module: module.write_bytes(b"none" + module.read_bytes()[4:]), id="another Python"),
    ],
)
def test_what_is_no_good_is_not_bind_to_source(package, tmp_path, monkeypatch, spoil):
    """A module whose source is another by now, or that is torn, stays as it is: Python alone decides what to do."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "kept"))
    module = Path(py_compile.compile(str(package)))
    spoil(package, module)
    before = module.read_bytes() if module.exists() else None
    assert not bytecode.bind_to_source(module)
    assert before == (module.read_bytes() if module.exists() else None)


def test_what_is_there_is_used(tmp_path, monkeypatch):
    """Modules are missing if one of the packages that are there has none compiled, and nobody said where they are."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bytecode, "STACK", ("first_of_it", "second_of_it", "none_of_it"))
    assert not bytecode.missing()
    for name in ("first_of_it", "second_of_it"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        assert bytecode.missing()
        py_compile.compile(str(tmp_path / name / "__init__.py"))
        assert not bytecode.missing()
    shutil.rmtree(tmp_path / "first_of_it/__pycache__")
    assert bytecode.missing()
    monkeypatch.setattr(sys, "pycache_prefix", "/somewhere")
    assert not bytecode.missing()


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_stack_without_compiled_modules_starts_faster_from_the_cache(tiny_model, rows, tmp_path):
    """The first run compiles the whole training stack, since one package of it came without; the next at most what
    a child process had not finished when the first was over."""
    package = Path(find_spec("peft").origin).parent
    shutil.copytree(package, tmp_path / "site/peft", ignore=shutil.ignore_patterns("__pycache__"))
    place = {"model": tiny_model, "dataset": rows, "cache": tmp_path / "kept", "PYTHONPATH": tmp_path / "site"}
    seconds = []
    for output in ("first", "second"):
        ended = run(tmp_path, fresh=True, **SHORT, **place, output=tmp_path / output)
        assert ended.code == 0, ended.lines[-1]
        seconds.append(ended.event("run_complete")["timeline_seconds"]["import"])
        shutil.rmtree(tmp_path / "scratch")
    assert ended.event("compile_cache_restored")["files"] > 3000
    assert sum(line["files"] for line in ended.events("compile_cache_saved")) < 100
    assert seconds[1] < seconds[0]
