"""SIGKILL: anywhere, at any time."""

import random
import signal
import time

import pytest

from tests.faults.harness import KILLED

SEEDS = range(20)
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("seed", SEEDS)
def test_kill_at_a_random_step(bench, seed):
    """A machine lost at any step: the next attempt ends with the adapter of a run that was never disturbed, and
    continues from the last commit at least."""
    chance = random.Random(seed)
    run_id, step = bench.name(f"kill-{seed}"), chance.randrange(1, 12)
    first = bench.start(run_id, hooks=[["slow_steps", 0.1], ["stop_at_step", step]])
    first.until("train_progress", step=step - 1) if step > 1 else first.until("model_loaded")
    time.sleep(chance.random() * 0.3)
    committed = [line["step"] for line in first.events("checkpoint_committed")]
    first.kill()
    second = bench.start(run_id).ends(0)
    resumed = second.events("resumed")
    from_step = resumed[-1]["resumed_step"] if resumed else 0
    assert from_step >= max(committed, default=0)
    assert not resumed or 0 < resumed[-1]["seconds_to_first_step"] < 60
    bench.check_whole(run_id)


@pytest.mark.parametrize("name", FILES)
def test_kill_inside_a_save(bench, name):
    """A machine lost while a file of a checkpoint was being written: what was half written is never used."""
    run_id = bench.name("save")
    bench.start(run_id, hooks=[["kill_in_save", name, 6]]).ends(KILLED)
    bench.start(run_id).ends(0)
    bench.check_whole(run_id)


def test_kill_of_the_uploader_alone(bench):
    """The uploading process dies: another one takes its place, and the run continues."""
    run_id = bench.name("uploader")
    job = bench.start(run_id, hooks=[["slow_steps", 0.2]])
    job.until("checkpoint_committed")
    job.uploader().kill()
    job.ends(0)
    assert job.event("uploader_died")["status"] == -signal.SIGKILL
    bench.check_whole(run_id)


@pytest.mark.parametrize(
    "place",
    [
        "job.state.ledger:Ledger.append",
        "job.state.record:Record.remove_unfinished_uploads",
        "job.state.publication:Publication.publish",
        "job.state.publication:Publication._check_uploads",
    ],
)
def test_kill_after_the_last_commit(bench, place):
    """A machine lost between the last checkpoint and the `published` record: the next attempt trains no step and
    publishes, with the plan by which the run was trained, whatever it would have planned itself."""
    run_id, number = bench.name("last"), {"job.state.ledger:Ledger.append": 2}.get(place, 1)
    bench.start(run_id, hooks=[["call_before", place, number, "SIGKILL"]]).ends(KILLED)
    second = bench.start(run_id, micro_batch=4).ends(0)
    assert second.events("train_progress") == []
    assert bench.place.json(bench.key(run_id, "done.json"))["plan"]["micro_batch"] == 2
    bench.check_whole(run_id)
    results = {name.split("/")[3] for name in bench.place.names(bench.key(run_id, "results/"))}
    assert len(results) == 1  # what the lost attempt had uploaded is deleted


PROCLAIMED = [
    "copies:write_done",
    "copies:write_latest",
    "copies:copy",
    "copies:remove_unpublished",
]


@pytest.mark.parametrize("place", PROCLAIMED)
def test_kill_after_the_published_record(bench, place):
    """From the `published` record on the run is finished: the next start writes what is missing, and neither trains nor
    loads anything."""
    run_id = bench.name("published")
    bench.place.delete("out/latest.json")
    bench.start(run_id, hooks=[["call_before", f"job.state.{place}", 1, "SIGKILL"]]).ends(KILLED)
    second = bench.start(run_id).ends(0)
    assert second.event("already_complete")
    assert not second.events("run_started")
    assert bench.place.json("out/latest.json")["run_id"] == run_id
    bench.check_whole(run_id)
