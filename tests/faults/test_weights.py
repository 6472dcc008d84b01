"""TUNE_ROLE_WEIGHTS through whole runs: masks written as weights, and a run with weights that is killed."""

import pytest

from tests.faults.harness import killed_run

WEIGHTED = {"role_weights": "assistant=1,user=0.1"}


@pytest.mark.parametrize("weights", ["assistant=1,user=0,tool=0", "assistant=0.3"])
def test_weights_that_are_a_mask(bench, weights):
    """Weights of 0 and one other number train the very adapter, with the very losses, of a run without weights."""
    run_id = bench.name("mask")
    bench.start(run_id, role_weights=weights).ends(0)
    assert bench.result(run_id) == bench.baseline()


def test_kill_with_weights(bench):
    """A run with weights that was killed ends with the adapter and losses of an undisturbed one, and not of one without
    weights; what is evaluated is the same tokens as without."""
    run_id = killed_run(bench, "weights", **WEIGHTED)
    job = bench.start(run_id, **WEIGHTED).ends(0)
    assert job.event("resumed")["resumed_step"] == 8
    bench.check_whole(run_id, against=WEIGHTED)
    assert bench.result(run_id) != bench.baseline()
    ready = job.event("dataset_ready")
    assert ready["weight_by_role"].keys() == {"assistant", "user"}
    assert ready["evaluation"]["labelled_tokens"] == ready["evaluation"]["weight_by_role"]["assistant"]
