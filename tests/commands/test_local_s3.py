"""The demo's S3 server as a command; that it serves is seen wherever it is used."""

import subprocess
import sys

import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("argument", "status", "expected"),
    [
        pytest.param("--help", 0, "show this help", id="help"),
        pytest.param("--port=9000", 2, "unrecognized arguments: --port=9000", id="unknown"),
    ],
)
def test_it_says_how_it_is_called(argument, status, expected):
    """Help ends well and an argument that it does not know ends badly, each with the usage and without a server."""
    command = [sys.executable, "-m", "job.commands.demo.local_s3", argument]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status
    said = ended.stderr if status else ended.stdout
    assert said.startswith("usage: python -m job.commands.demo.local_s3 [-h]")
    assert expected in said
