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
    """At most 12 entries besides `__init__.py`, a docstring; that of `job.tuning` also imports unsloth first."""
    entries = [path for path in package.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    assert len(entries) <= 12
    tree = ast.parse((package / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1 or package.name == "tuning"
