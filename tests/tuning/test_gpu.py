"""The same job on a card. CI has none: run with `pytest -m gpu` on a machine that has one."""

import json
import subprocess
import sys

import pytest

from tests.jobs import ROOT, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SHORT = {"max_steps": 6, "max_length": 128, "samples": 2, "batch_size": 4, "lora_r": 8, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A small Llama whose head size the GPU kernels like."""
    directory = tmp_path_factory.mktemp("small") / "model"
    sizes = ["hidden_size=256", "intermediate_size=512", "num_hidden_layers=4"]
    subprocess.run([sys.executable, "-m", "tests.tiny", str(directory), *sizes], cwd=ROOT, check=True)
    return directory


def losses(ended) -> list[float]:
    """The loss of each step."""
    assert ended.code == 0, ended.lines[-1]
    return [line["loss"] for line in ended.events("train_progress")]


@pytest.fixture(scope="module")
def train(small_model, rows, tmp_path_factory):
    """Run a job, on the card by default, and return how it ended."""

    def _train(**variables):
        place = tmp_path_factory.mktemp("run")
        settings = {**SHORT, "model": small_model, "dataset": rows, "output": place / "out", "run_id": "gpu"}
        return run(place, fresh=True, **{**settings, "device": "cuda", **variables})

    return _train


@pytest.fixture(scope="module")
def in_4bit(train):
    """The default precision on the card."""
    return train()


def test_card_and_cpu_agree(in_4bit, train):
    """The losses on the card, padding-free, are those of the CPU, padded, within the noise of bf16."""
    assert losses(in_4bit) == pytest.approx(losses(train(device="cpu")), rel=0.02)


def test_memory_comes_from_the_card(in_4bit):
    """Memory fields are filled, and the report's share is the peak's share of the card."""
    progress, complete = in_4bit.event("train_progress"), in_4bit.event("run_complete")
    assert 0 < progress["gpu_memory_allocated_bytes"] <= progress["gpu_memory_reserved_bytes"]
    assert progress["gpu_memory_reserved_bytes"] <= progress["gpu_memory_peak_bytes"]
    assert progress["gpu_memory_peak_bytes"] < progress["gpu_memory_total_bytes"]
    share = complete["gpu_memory_peak_bytes"] / complete["gpu_memory_total_bytes"]
    assert complete["gpu_memory_peak_share"] == pytest.approx(share, abs=1e-4)


def test_the_plan_on_a_card(in_4bit):
    """On a card that has room, batches are packed, nothing is recomputed, and CUDA graphs are used."""
    plan = in_4bit.event("plan_made")["plan"]
    assert (plan["batching"], plan["gradient_checkpointing"], plan["cuda_graphs"]) == ("packed", "off", True)


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"precision": "8bit"}, id="8 bit"),
        pytest.param(
            {"precision": "16bit", "lora_dropout": 0.1, "gradient_checkpointing": "off"}, id="16 bit, dropout"
        ),
        pytest.param({"micro_batch": 1, "gradient_checkpointing": "on", "optimizer": "paged_adamw_32bit"}, id="1 x 4"),
    ],
)
def test_settings_train(in_4bit, train, variables):
    """Every precision, checkpointing and optimizer trains, with losses near the default's."""
    assert losses(train(**variables)) == pytest.approx(losses(in_4bit), rel=0.05)


def test_the_adapter_loads_in_plain_peft(train):
    """Adapter on base and merged weights load in plain libraries and agree."""
    ended = train(export="adapter,merged_16bit")
    assert ended.code == 0
    started = ended.event("run_started")
    command = [sys.executable, "benchmarks/compare_adapter.py", started["config"]["TUNE_MODEL"], started["uri"]]
    shown = subprocess.check_output(command, cwd=ROOT, text=True)
    assert json.loads(shown.splitlines()[-1])["top1_agreement"] > 0.97
