"""One full pass with a real model: SmolLM2 on the demo's data."""

import subprocess
import sys

import pytest

from tests.faults.harness import INTERRUPTED
from tests.jobs import ROOT


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as safetensors, the model of the demo."""
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run([sys.executable, str(ROOT / "examples/smollm2.py"), str(directory)], check=True, capture_output=True)
    return directory


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_kill_and_stop_with_a_real_model(bench, smollm2):
    """SmolLM2, 4-bit with dropout, killed, then asked to stop, then left alone, ends with the adapter and losses of an
    undisturbed run; no checkpoint makes training wait for a second."""
    orders = ROOT / "examples/orders"
    variables = {
        "model": smollm2,
        "dataset": orders / "train.jsonl",
        "eval_dataset": orders / "eval.jsonl",
        "max_steps": 8,
        "max_length": 256,
        "lora_r": 8,
        "learning_rate": 1e-3,
        "eval_steps": 100,
        "grace_seconds": 60,
    }
    run_id = bench.name("smollm2")
    first = bench.start(run_id, **variables)
    first.until("checkpoint_committed", step=2, seconds=400)
    first.kill()
    second = bench.start(run_id, hooks=[["signal_at_step", 5, 15]], **variables).ends(INTERRUPTED, 400)
    assert second.event("resumed")["resumed_step"] >= 2
    third = bench.start(run_id, **variables).ends(0, 400)
    assert third.event("resumed")["resumed_step"] == 5
    assert all(line["stall_seconds"] < 1 for line in third.events("checkpoint_committed"))
    bench.check_whole(run_id, against=variables)
