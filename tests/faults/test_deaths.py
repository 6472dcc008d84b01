"""Attempts that die without a word: only those count that ran out of memory."""

import random
import time

import pytest

from tests.faults.harness import KILLED, PERMANENT
from tests.groups import ControlGroup

EARLY = [["call_before", "job.tuning.model:load", 1, "SIGKILL"]]


@pytest.fixture
def full_container(tmp_path):
    """A container that has 0.99 of 1 GiB in use."""
    return ControlGroup(directory=tmp_path / "cgroup").show(0.99)


def dies_of_memory(bench, run_id, group) -> None:
    """An attempt whose memory runs out is killed, as soon as it has noted that."""
    job = bench.start(run_id, hooks=[["control_group", str(group.directory)], ["slow_steps", 20]])
    noted = job.until("memory_nearly_full")
    key, deadline = bench.key(run_id, f"attempts/{noted['attempt']:04d}.memory.json"), time.monotonic() + 30
    while key not in bench.place.names(key):
        assert time.monotonic() < deadline, job.tail()
        time.sleep(0.02)
    job.kill()


def test_kills_without_a_reason_never_count(bench):
    """Machines that are lost, three before the first checkpoint and then at random steps, end nothing, however often
    the same checkpoint is resumed: the run continues, and ends as one that was never disturbed."""
    run_id, chance = bench.name("lost"), random.Random(5)
    for _ in range(3):
        bench.start(run_id, hooks=EARLY).ends(KILLED)
    for _ in range(2):
        bench.start(run_id, hooks=[["kill_at_step", chance.randint(3, 8)]]).ends(KILLED)
    assert not [key for key in bench.place.names(bench.key(run_id, "")) if key.endswith(".memory.json")]
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)


def test_three_deaths_for_lack_of_memory(bench, full_container):
    """Attempts that run out of memory again and again without getting further end with 70, once, and the message has
    what was in use; a machine that is lost in between changes nothing. Then it is tried again."""
    run_id = bench.name("memory")
    dies_of_memory(bench, run_id, full_container)
    bench.start(run_id, hooks=EARLY).ends(KILLED)
    dies_of_memory(bench, run_id, full_container)
    bench.start(run_id, hooks=EARLY).ends(KILLED)  # two do not count as three
    dies_of_memory(bench, run_id, full_container)
    permanent = bench.start(run_id).ends(PERMANENT)
    assert not permanent.events("run_started")
    assert "0.99 of 1.00 GiB" in permanent.event("run_failed")["message"]
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)
