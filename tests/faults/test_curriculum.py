"""TUNE_CURRICULUM=short_first: the order of the rows, and that a run which resumes keeps it."""

import json
import random

import pytest

from tests.faults.harness import CONFIG, KILLED

ROWS = 40
STEPS = 16  # of four rows each: one epoch and a half


@pytest.fixture(scope="module")
def curriculum(bench):
    """Settings, with rows of many lengths of which several are equal."""
    chance = random.Random(3)
    lines = [{"prompt": f"Say {number:02}.", "completion": "x" * chance.randrange(1, 30)} for number in range(ROWS)]
    bench.place.put("lengths/rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return {
        "dataset": "s3://faults/lengths/",
        "curriculum": "short_first",
        "eval_fraction": 0,
        "max_steps": STEPS,
    }


@pytest.fixture(scope="module")
def undisturbed(bench, curriculum):
    """A run that nothing disturbed, which says what it was given."""
    run_id = bench.name("order")
    return run_id, _seen(bench.start(run_id, hooks=[["say_lengths"]], **curriculum).ends(0))


def _seen(job):
    """The lengths of the rows that the trainer was given, in order."""
    said = [line["message"] for line in job.events("library_output") if "the test saw" in line.get("message", "")]
    return [length for text in said for length in json.loads(text.partition("saw ")[2])]


@pytest.mark.parametrize(("killed", "resumed"), [(5, 4), (11, 10), (15, 14)], ids=["first", "border", "later"])
def test_a_killed_run_keeps_the_order(bench, curriculum, undisturbed, killed, resumed):
    """Killed in the first epoch, at its end or in a later one: the next attempt is given the rows that were due, and
    ends with the adapter and the losses of a run that was never disturbed."""
    run_id = bench.name("order")
    hooks = [["commit_every_save"], ["kill_at_step", killed]]
    bench.start(run_id, hooks=hooks, **curriculum).ends(KILLED)
    second = bench.start(run_id, hooks=[["say_lengths"]], **curriculum).ends(0)
    assert second.event("resumed")["resumed_step"] == resumed
    bench.check_whole(run_id, against=curriculum)
    assert _seen(second) == undisturbed[1][-len(_seen(second)) :] != []


def test_short_rows_come_first(bench, curriculum, undisturbed):
    """The first epoch goes by length, the second is shuffled; without the variable no epoch goes by length; and a run
    cannot change from one to the other."""
    run_id, seen = undisturbed
    assert len(seen) >= STEPS * 4 > ROWS
    assert seen[:ROWS] == sorted(seen[:ROWS])
    assert seen[ROWS:] != sorted(seen[ROWS:])
    plain = _seen(
        bench.start(bench.name("plain"), hooks=[["say_lengths"]], **curriculum | {"curriculum": "none"}).ends(0)
    )
    assert sorted(plain[:ROWS]) == seen[:ROWS] != plain[:ROWS]
    refused = bench.start(run_id, **curriculum | {"curriculum": "none"}).ends(CONFIG).event("run_failed")
    assert any("TUNE_CURRICULUM" in problem for problem in refused["problems"])
