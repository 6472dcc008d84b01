"""The estimate follows from its formulas, and the formulas from what was measured on a card."""

import dataclasses
import json
from pathlib import Path

import pytest

from job.config.schema import Config
from job.model import memory, shape
from job.model.base_model import BaseModel, inspect
from job.model.schedule import schedule
from tests.jobs import ROOT

RESULTS = ROOT / "benchmarks/results"
RUNS = ("gpu-run-2026-11-22-h100.jsonl", "gpu-resume-2026-11-22-h100-dropout-0.1.jsonl")
LLAMA_1B = shape.llama(hidden=2048, inner=8192, layers=16, keys=512, vocabulary=128_256)
BASE_1B = BaseModel(
    path=Path("/m"),
    name="m",
    weights=(),
    architecture="LlamaForCausalLM",
    parameters=LLAMA_1B.parameters,
    positions=None,
    prequantised=None,
    config={
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
)
"""A model of that shape, known by its configuration alone."""
TOTAL, TRAINING = 0.10, 0.35
"""How far the estimate may be from the peak that was measured: in all, and for what training adds to the model."""


def settings(**changed):
    return Config(model="org/m", dataset=("/d",), output="/o", **changed)


def measured(name):
    """Events of a run on a GPU, by name; the last of each kind."""
    lines = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
    return {line["event"]: line for line in lines}


@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_near_what_was_measured(name):
    """For each measured run: loaded weights within 1 %, the peak within 10 %, and training's part of it is not
    underestimated nor overestimated by more than a third."""
    events = measured(name)
    loaded, plan, data = events["model_loaded"], events["model_loaded"]["plan"], events["dataset_ready"]
    tokens = plan["micro_batch"] * data["length_max"]
    peak = memory.peak_memory(
        LLAMA_1B, settings(optimizer=plan["optimizer"]), tokens=tokens, checkpointing=plan["gradient_checkpointing"]
    )
    assert LLAMA_1B.adapter(16) == loaded["trainable_parameters"]
    assert LLAMA_1B.parameters == pytest.approx(loaded["parameters"], rel=0.001)
    assert peak.loaded == pytest.approx(loaded["gpu_memory_allocated_bytes"], rel=0.01)
    complete = events["run_complete"]
    assert peak.total == pytest.approx(complete["gpu_memory_peak_bytes"], rel=TOTAL)
    assert 1 <= (peak.total - peak.loaded) / complete["gpu_memory_training_bytes"] <= 1 + TRAINING


@pytest.mark.parametrize("name", RUNS)
def test_steps_and_micro_batch_are_those_of_the_run(name):
    """Steps, epochs and how a step is cut are what training planned for the same settings and data."""
    events = measured(name)
    plan, config = events["model_loaded"]["plan"], events["run_started"]["config"]
    cut = schedule(settings(max_steps=config["TUNE_MAX_STEPS"]), examples=plan["examples"])
    assert (cut.steps, cut.epochs) == (plan["steps"], plan["epochs"])
    assert cut.micro_batch == plan["micro_batch"]
    assert cut.warmup_steps == plan["warmup_steps"]


def test_steps():
    """The last step of an epoch may be smaller; part of an epoch is rounded up."""
    assert schedule(settings(epochs=3.0, batch_size=8), examples=17).steps == 9
    assert schedule(settings(epochs=0.5, batch_size=8), examples=24).steps == 2
    assert schedule(settings(batch_size=12, micro_batch="auto"), examples=24).micro_batch == 8


def test_the_shape_by_tensors_and_by_configuration_is_the_same(tiny_model):
    """Of a Llama, the headers of the weights and config.json give the same linear layers."""
    base = inspect(tiny_model, name="m")
    by_tensors, by_config = shape.of(base), shape._of_config(base.config, base)
    assert by_tensors == by_config
    assert set(by_tensors.linears) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert by_tensors.parameters == base.parameters
    assert (by_tensors.layers, by_tensors.hidden) == (2, 64)


def test_more_memory_for_more_of_anything():
    """The peak grows with tokens, rank and width of the weights, and shrinks with checkpointing."""

    def peak(tokens=4096, checkpointing="unsloth", **changed):
        return memory.peak_memory(LLAMA_1B, settings(**changed), tokens=tokens, checkpointing=checkpointing).total

    assert peak() < peak(tokens=8192)
    assert peak() < peak(lora_r=64)
    assert peak() < peak(optimizer="adamw_torch")
    assert peak() < peak(precision="8bit") < peak(precision="16bit")
    assert peak() < peak(checkpointing="on") < peak(checkpointing="off")
    assert peak(lora_targets=("q_proj",)) < peak()


def test_an_estimate_follows_from_model_settings_and_data():
    """Steps, tokens and memory of a run come from its schedule, its training set and the model's shape."""
    data = memory.TrainingSet(sequences=17, tokens=1700, labelled_tokens=600, longest=200)
    found = memory.estimate(settings(batch_size=8, micro_batch=4, epochs=2.0), BASE_1B, data)
    assert (found.steps, found.epochs, found.micro_batch, found.gradient_accumulation) == (6, 2.0, 4, 2)
    assert (found.tokens_per_epoch, found.tokens, found.labelled_tokens) == (1700, 3400, 1200)
    assert (found.checkpointing, found.micro_batch_tokens) == ("unsloth", 4 * 200)
    assert found.adapter_parameters == LLAMA_1B.adapter(16)
    assert found.memory.total == found.alternatives["unsloth"] < found.alternatives["on"] < found.alternatives["off"]
    unknown = memory.estimate(settings(), dataclasses.replace(BASE_1B, config={}), data)
    assert (unknown.memory, unknown.fits, unknown.micro_batch_tokens) == (None, (), 200)


def test_verdicts():
    """A card fits up to 85 % of its memory, is tight up to all of it, and CUDA's own share counts."""
    size = memory.CARDS["T4 16 GB"] * memory.MIB

    def verdict(needed):
        return memory.fits(needed)[0].verdict

    assert verdict(int(0.84 * size) - memory.CONTEXT) == "fits"
    assert verdict(int(0.86 * size) - memory.CONTEXT) == "tight"
    assert verdict(int(0.99 * size)) == "does not fit"
