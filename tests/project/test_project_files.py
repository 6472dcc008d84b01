"""The files that a stranger meets first: licence, security policy, issue forms, CI, contributing, architecture."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import documents, tree
from tests.jobs import ROOT

APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""SHA-256 of the licence's text as the Apache Software Foundation publishes it."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GITHUB = ROOT / ".github"
CONTRIBUTING, ARCHITECTURE = ROOT / "CONTRIBUTING.md", ROOT / "docs/architecture.md"
SCHEMAS = {
    "ISSUE_TEMPLATE/bug_report.yml": "vendor.github-issue-forms",
    "ISSUE_TEMPLATE/feature_request.yml": "vendor.github-issue-forms",
    "ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
    "workflows/ci.yml": "vendor.github-workflows",
}
PUBLIC = sorted(
    {
        *documents.DOCUMENTS,
        *ROOT.glob("*.md"),
        *(path for folder in ("helm", "k8s", "benchmarks", ".github") for path in (ROOT / folder).rglob("*.md")),
        *GITHUB.rglob("*.yml"),
    }
    - {ROOT / "CHANGELOG.md"}  # which also names what was
)
SOURCE = "\n".join(
    path.read_text() for path in [*(ROOT / "job").rglob("*.py"), ROOT / "pyproject.toml", ROOT / "Dockerfile"]
)


def test_the_licence_is_the_whole_apache_licence():
    """LICENSE is the verbatim text; package metadata and image name it and carry it."""
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "COPY LICENSE /app/LICENSE\n" in (ROOT / "Dockerfile").read_text()
    assert "!LICENSE" in (ROOT / ".dockerignore").read_text().splitlines()


def test_there_is_one_version():
    """Package, image, chart, and whatever names an image of this project have the same version."""
    version, chart = PROJECT["version"], yaml.safe_load((ROOT / "helm/finetune-job/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    assert f"ARG VERSION={version}\n" in (ROOT / "Dockerfile").read_text()
    paths = [
        path for folder in ("cloud", "docs", "helm", "k8s") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    texts = [path.read_text(errors="replace") for path in (*paths, *ROOT.glob("*.md"))]
    assert {found for text in texts for found in re.findall(r"finetune-job:(\d+\.\d+\.\d+)", text)} == {version}


@pytest.mark.process
@pytest.mark.parametrize("name", [path.relative_to(GITHUB).as_posix() for path in GITHUB.rglob("*.yml")])
def test_github_understands_its_files(name):
    """Issue forms and workflows follow the schemas for them."""
    program = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run([program, "--builtin-schema", SCHEMAS[name], GITHUB / name], check=True, capture_output=True)


def test_the_workflow_runs_what_a_contributor_runs():
    """The workflow's commands are those of `.ci/run`, on the oldest Python that the package supports."""
    workflow = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in script if line.startswith("make ")] == [s["run"] for s in job["steps"] if "run" in s]
    (python,) = (step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {}))
    assert PROJECT["requires-python"].startswith(f">={python},")
    assert workflow["permissions"] == {"contents": "read"}


def test_a_bug_report_has_what_is_needed():
    """The form asks for how to reproduce it, the exit code, the last log line, and what the program says of itself."""
    body = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE/bug_report.yml").read_text())["body"]
    required = {part["id"] for part in body if part.get("validations", {}).get("required")}
    assert {"what-happened", "reproduce", "exit-code", "last-line", "env"} == required
    labels = " ".join(part["attributes"].get("label", "") for part in body)
    assert "python -m job env" in labels
    assert "check --json" in labels


def test_the_tree_of_packages_is_current():
    """CONTRIBUTING.md has a line for each package, from its docstring; `make readme` writes them."""
    text = CONTRIBUTING.read_text()
    assert tree.rendered(text) == text
    assert tree.tree() in text
    packages = {path.parent.name for path in (ROOT / "job").rglob("__init__.py")}
    assert {f"{name}/" for name in packages} == {
        line.split()[0] for line in tree.tree().splitlines() if "/ " in line + " "
    }


def test_the_drawing_is_the_contract():
    """The boxes of docs/architecture.md are the floors of the import contract, from top to bottom."""
    section = documents.section(ARCHITECTURE.read_text(), "The packages")
    rows = re.findall(r"^\|(.+)\|$", section, re.MULTILINE)
    assert tree.floors() == [[cell.split()[0] for cell in row.split("|")] for row in rows]


@pytest.mark.parametrize("path", PUBLIC, ids=[path.relative_to(ROOT).as_posix() for path in PUBLIC])
def test_paths_in_the_source_exist(path):
    """Every `job/...` path and every `job.module` that a public document names, also in blocks, is there."""
    text = path.read_text()
    files = re.findall(r"(?<![\w/.-])job/(?:[\w-]+/)*(?:[\w-]+\.\w+)?", text)  # a Kubernetes Job is `job/name`
    modules = {name.replace(".", "/") for name in re.findall(r"(?<![\w/.-])job(?:\.[a-z_0-9]+)+(?!\w)", text)}
    modules -= {"job/env", "job/json", "job/yaml"}  # files called so
    assert {name for name in files if not (ROOT / name).exists()} == set()
    assert {name for name in modules if not ((ROOT / name).is_dir() or (ROOT / f"{name}.py").exists())} == set()


@pytest.mark.parametrize("path", PUBLIC, ids=[path.relative_to(ROOT).as_posix() for path in PUBLIC])
def test_subcommands_exist(path):
    """Every `python -m job ...` in a public document, form or workflow names a subcommand."""
    known = set(re.findall(r'add_parser\(\s*"(\w+)"', (ROOT / "job/__main__.py").read_text()))
    assert set(re.findall(r"python -m job ([a-z]+)", path.read_text())) - known == set()


@pytest.mark.parametrize("path", [CONTRIBUTING, ARCHITECTURE], ids=lambda path: path.name)
def test_names_in_the_source_exist(path):
    """Every single name in code, such as a class, a function, an event or a field, is a word of the source."""
    named = {span for span in documents.spans(documents.prose(path)) if re.fullmatch(r"(?!TUNE_)[A-Za-z_]\w+", span)}
    assert {name for name in named if not re.search(rf"\b{name}\b", SOURCE)} == set()


@pytest.mark.process
def test_the_first_run_of_a_contributor_works(tmp_path):
    """The commands of "Your first change" make a model, check it and train it; only the folder differs here."""
    section = documents.section(CONTRIBUTING.read_text(), "Your first change in ten minutes")
    (block,) = re.findall(r"^```sh\n(.+?-m tests\.tiny.+?)^```", section, re.MULTILINE | re.DOTALL)
    place = shlex.quote(str(tmp_path))
    script = block.replace("/tmp/tiny", place).replace(".venv/bin/python", shlex.quote(sys.executable))
    (scratch := tmp_path / "scratch").mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "A run would begin" in done.stdout
    assert len(list((tmp_path / "runs").glob("*/done.json"))) == 1


def test_the_quick_tests_of_a_contributor_exist():
    """What "Your first change" runs with pytest is there."""
    section = documents.section(CONTRIBUTING.read_text(), "Your first change in ten minutes")
    (command,) = re.findall(r"^\.venv/bin/python -m pytest (.+)$", section, re.MULTILINE)
    assert [name for name in command.split() if not (ROOT / name).exists()] == []
