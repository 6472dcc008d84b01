"""The rules of the code base, as tests."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from job.runtime.errors import KINDS
from tests import readme
from tests.jobs import ROOT

MODULES = sorted((ROOT / "job").rglob("*.py"))


@pytest.mark.process
def test_import_contracts():
    """Imports point down, heavy libraries stay in job.tuning, boto3 in job.storage."""
    subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("path", readme.GENERATED, ids=lambda path: path.name)
def test_documents_are_generated_from_the_code(path):
    """The tables of the documents and the index of messages are what the code says; `make readme` writes them."""
    assert readme.rendered(path) == path.read_text()


def test_exit_codes_are_distinct():
    """No two kinds of failure share an exit code."""
    assert len({kind.exit_code for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_modules_are_one_idea(path):
    """A module has a docstring, at most 320 lines, and no function over 60."""
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert text.count("\n") <= 320
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno <= 60, node.name


def test_locks_are_complete():
    """Every requirement of both locks is pinned and hashed, and no file of the project names an index."""
    for name in ("requirements.lock", "requirements-dev.lock"):
        blocks = re.split(r"\n(?=\S)", (ROOT / name).read_text().strip())
        pinned = [block for block in blocks if not block.startswith("#")]
        assert pinned
        assert all(re.match(r"[\w.-]+==\S+", block) and "--hash=sha256:" in block for block in pinned)


def test_the_environment_has_three_doors():
    """Only TUNE_* parsing, the process's own facts and the libraries' settings touch os.environ."""
    users = {
        str(path.relative_to(ROOT)) for path in MODULES if "os.environ" in path.read_text().replace("`os.environ`", "")
    }
    assert users == {"job/config/environment.py", "job/runtime/process.py", "job/runtime/libraries.py"}


PACKAGES = sorted({path.parent for path in MODULES} - {ROOT / "job"})


@pytest.mark.parametrize("package", PACKAGES, ids=[str(path.relative_to(ROOT)) for path in PACKAGES])
def test_packages_are_small_and_say_what_they_know(package):
    """At most 12 entries besides `__init__.py`, which is a docstring."""
    entries = [path for path in package.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    assert len(entries) <= 12
    tree = ast.parse((package / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


UNSLOTH = "job.tuning.unsloth_import"
PATCHED = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "unsloth",
    "unsloth_zoo",
    "bitsandbytes",
    "accelerate",
    "safetensors",
}
"""What Unsloth patches, or what imports it."""
TUNING = [path for path in MODULES if path.is_relative_to(ROOT / "job/tuning") and path.stem != "unsloth_import"]


def imported(body: list[ast.stmt]) -> list[str]:
    """The modules that statements import when they run, in functions too; not what is there for type checkers only."""
    names = []
    for node in body:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
        else:
            names += imported([child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)])
    return [name for name in names if name != "__future__"]


@pytest.mark.parametrize("path", TUNING, ids=[str(path.relative_to(ROOT)) for path in TUNING])
def test_unsloth_comes_before_what_it_patches(path):
    """A module of job.tuning that imports the training stack anywhere imports `unsloth_import` before all else; one
    that does not has no need of it."""
    names = imported(ast.parse(path.read_text()).body)
    patched = any(name.partition(".")[0] in PATCHED for name in names)
    assert (names[:1] == [UNSLOTH]) is patched
    assert names.count(UNSLOTH) == patched


@pytest.mark.process
def test_parts_of_tuning_need_no_torch():
    """The seam to the stages and the arithmetic of a plan load without the training stack."""
    modules = ("hooks", "fit.plan", "fit.candidates", "fit.micro_batches")
    code = (
        f"import sys\nfor name in {modules}: __import__('job.tuning.' + name)\nassert not {PATCHED} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
