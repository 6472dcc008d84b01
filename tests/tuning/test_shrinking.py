"""Memory that runs out during the run: the step starts over in smaller micro-batches, and the run learns the same."""

import json
import subprocess
import sys

import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def found(tiny_model, rows):
    """What came of training without a limit, with limits of 2 rows and 1, and with none allowed at all."""
    command = [sys.executable, "-m", "tests.shrinking", str(tiny_model), str(rows), "-1", "3", "1", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"limit"')]
    assert len(lines) == 4, done.stderr[-3000:]
    return {line["limit"]: line for line in lines}


@pytest.mark.parametrize(("limit", "left"), [(3, 2), (1, 1)])
def test_the_run_continues_with_the_same_losses(found, limit, left):
    """The failed step is made again whole: a lost half of it would show in its loss and in all that follow."""
    assert found[limit]["ended"] == ""
    assert found[limit]["micro_batch"] == left
    assert len(found[-1]["losses"]) == 4
    assert found[limit]["losses"] == pytest.approx(found[-1]["losses"], rel=2e-3)


def test_it_says_so(found):
    """Each halving is an event with its step, what was and what is, and memory; the plan keeps the reason."""
    (first, second) = found[3]["out_of_memory"]
    assert first["step"] == second["step"] == 2
    assert ("8 sequences" in first["was"], "4 sequences" in first["now"], "2 sequences" in second["now"]) == (True,) * 3
    assert first["host_memory_rss_bytes"] > 0
    assert "artificial limit of 3 rows" in first["reason"]
    assert "memory ran out at step 2" in found[3]["reasons"][-1]
    sizes = [(line["plan"]["was"]["micro_batch"], line["plan"]["is"]["micro_batch"]) for line in found[3]["unequal"]]
    assert sizes == [(8, 4), (4, 2)]


def test_nothing_smaller_is_permanent(found):
    """With one row in a micro-batch and everything recomputed there is nothing left to try: 70, and what to change."""
    assert found[0]["ended"].startswith("70: The GPU ran out of memory with one sequence")
    assert len(found[0]["losses"]) == 1
    assert found[-1]["out_of_memory"] == []
