"""A few seconds of fuzzing, always the same; `make fuzz` looks for hours."""

import json
import os
import subprocess
import sys

import pytest

from tests.fuzz import harness
from tests.fuzz.__main__ import FINDINGS
from tests.fuzz.child import DEADLY
from tests.jobs import ROOT

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def said(tiny_model, tmp_path_factory):
    """What the process said that tries the kept findings, and a few inputs for each target."""
    command = [sys.executable, "-m", "tests.fuzz.child", str(tmp_path_factory.mktemp("fuzz")), str(FINDINGS)]
    environment = {**os.environ, "FUZZ_MODEL": str(tiny_model)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_was_found_once(said):
    """No input that has once shown a fault shows one."""
    kept = {path.name for path, _, origin, _ in harness.kept(FINDINGS) if not origin.startswith(DEADLY)}
    again = {line["again"]: line["origin"] for line in said if "again" in line}
    assert {name: again[name] for name in kept if again[name]} == {}


def test_what_is_open_is_not_mended(said):
    """A finding that shows its fault no more moves from `findings/open/` to `findings/`, where it is tried for good."""
    mended = [line["again"] for line in said if line.get("again", "").startswith("open/") and not line["origin"]]
    assert mended == []


def test_nothing_else_is_found(said):
    """Every target answers the same few inputs as it should."""
    assert [line["found"] for line in said if "found" in line] == []
    assert len([line["tried"] for line in said if "tried" in line]) >= 20
