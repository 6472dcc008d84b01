"""The termination message: whatever ends a run, the kubelet finds one line of JSON with kind, code and remedy."""

import json
import signal

import pytest

from tests.faults.harness import CONFIG, INTERRUPTED, PERMANENT

BREAK = ["fail_at_step", 2]
BLOCK = ["block", "job.tuning.model:load", 20]


@pytest.fixture
def message(tmp_path):
    """The file, empty, as the kubelet makes it."""
    path = tmp_path / "termination-log"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("code", "kind", "variables", "hooks"),
    [
        (CONFIG, "config", {"batch_size": 0}, []),
        (CONFIG, "config", {"resume": "require"}, []),
        (65, "data", {"max_length": 8}, []),
        (1, "unknown", {}, [BREAK]),
        (INTERRUPTED, "interrupted", {}, [["signal_at_step", 2, signal.SIGTERM]]),
    ],
)
def test_every_end_leaves_its_message(bench, message, code, kind, variables, hooks):
    """Kind, exit code, message and remedy, in less than 4096 bytes."""
    bench.start(bench.name("message"), hooks=[["termination_log", str(message)], *hooks], **variables).ends(code)
    data = message.read_bytes()
    assert len(data) < 4096
    written = json.loads(data)
    assert (written["kind"], written["exit_code"]) == (kind, code)
    assert written["message"]
    assert written["remedy"]


def test_the_third_failure_says_that_it_is_permanent(bench, message):
    """The message is of the end that is reported, not of the error beneath."""
    run_id, hooks = bench.name("message"), [["termination_log", str(message)], BREAK]
    assert [bench.start(run_id, hooks=hooks).wait() for _ in range(3)][-1] == PERMANENT
    assert json.loads(message.read_bytes())["exit_code"] == PERMANENT


def test_the_end_of_the_grace_leaves_its_message(bench, message):
    """Also when the main thread never got to say anything."""
    job = bench.start(bench.name("message"), hooks=[["termination_log", str(message)], BLOCK], grace_seconds=3)
    job.until("library_output", message="the test blocks")
    job.send(signal.SIGTERM)
    job.ends(INTERRUPTED)
    assert json.loads(message.read_bytes())["exit_code"] == INTERRUPTED


def test_sagemaker_finds_the_reason(bench, tmp_path):
    """Where SageMaker's directory exists, the reason of a failure is in its file; where it does not, none is made."""
    there, missing = tmp_path / "failure", tmp_path / "missing" / "failure"
    for path in (there, missing):
        bench.start(bench.name("message"), hooks=[["sagemaker", str(path)]], batch_size=0).ends(CONFIG)
    assert json.loads(there.read_bytes())["exit_code"] == CONFIG
    assert not missing.parent.exists()


def test_a_success_leaves_none(bench, message):
    """An empty message is a run that is whole."""
    bench.start(bench.name("message"), hooks=[["termination_log", str(message)]]).ends(0)
    assert message.read_bytes() == b""
