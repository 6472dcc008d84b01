"""Which pass configuration comes first on which card, what follows it, and what a later attempt uses again."""

import json
from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs

from job.config.schema import Config
from job.model.shape import llama
from job.runtime.errors import ConfigError
from job.tuning.device import Device, out_of_memory
from job.tuning.fit.candidates import Workload, candidates, smaller
from job.tuning.fit.plan import (
    PassConfig,
    auto_remedy,
    completed_plan,
    make_plan,
    padded_plan,
    requested_pass,
    reusable_pass,
)
from job.tuning.fit.search import graphs_possible

ONE_B = llama(hidden=2048, inner=8192, layers=16, keys=512, vocabulary=128_256)
EIGHT_B = llama(hidden=4096, inner=14_336, layers=32, keys=1024, vocabulary=128_256)
LENGTHS = [200, 300, 400, 500, 600, 700, 1000, 2048] * 40
FAST, SLOW = 6e14, 2e13
"""Operations a second of an H100, and of a card thirty times slower."""


def settings(**changed) -> Config:
    """A configuration that needs nothing else."""
    return Config(**{"model": "/m", "dataset": ("/d.jsonl",), "output": "/o", "device": "cuda", **changed})


def card(gib: float = 80) -> Device:
    """A card of so much memory."""
    return Device(kind="cuda", name="card", memory_bytes=round(gib * 2**30), capability="9.0", dtype=torch.bfloat16)


def workload(shape=ONE_B) -> Workload:
    """The rows of these tests, on a model of some shape."""
    return Workload(lengths=LENGTHS, shape=shape, state_bytes=0)


def ordered(config=None, shape=ONE_B, *, rate=FAST, graphs=True, device=None):
    """The candidates in the order in which they are tried."""
    config = config or settings()
    planned = make_plan(config, device or card(), lengths=LENGTHS, learning_rate=2e-4)
    return candidates(planned, config, workload(shape), rate=rate, graphs=graphs)


def kind(candidate) -> tuple[int, str]:
    """What distinguishes candidates where there are no graphs."""
    return candidate.pass_config.micro_batch, candidate.pass_config.gradient_checkpointing


def test_the_whole_batch_at_once_comes_first():
    """Where launches cost more than arithmetic, everything in one recorded micro-batch is quickest."""
    first = ordered()[0].pass_config
    assert first == PassConfig(micro_batch=8, tokens_in_pass=8 * 2048, gradient_checkpointing="off", cuda_graphs=True)


@pytest.mark.parametrize("shape", [ONE_B, EIGHT_B])
@pytest.mark.parametrize("rate", [FAST, SLOW])
def test_recomputing_is_never_quicker_than_the_same_without(shape, rate):
    """Neither where the card is the bottleneck nor where Python is."""
    seconds = {one.pass_config: one.seconds for one in ordered(shape=shape, rate=rate)}
    for pass_config, expected in seconds.items():
        if pass_config.gradient_checkpointing == "off" and not pass_config.cuda_graphs:
            assert expected < seconds[replace(pass_config, gradient_checkpointing="unsloth")]


def test_many_small_micro_batches_against_recomputing():
    """Without graphs, eight launches of everything take longer than recomputing it once."""
    names = [kind(one) for one in ordered(graphs=False)]
    assert names.index((8, "unsloth")) < names.index((1, "off"))


def test_the_estimate_of_memory_follows_the_pass_configuration():
    """Smaller micro-batches and recomputing need less."""
    needed = {kind(one): one.bytes for one in ordered(graphs=False)}
    assert needed[8, "off"] > needed[4, "off"] > needed[1, "off"] > needed[1, "unsloth"]
    assert needed[8, "unsloth"] < needed[8, "off"] / 3


def test_settings_of_the_user_stand():
    """What the user set is no longer a choice."""
    config = settings(micro_batch=2, gradient_checkpointing="on")
    assert {kind(one) for one in ordered(config)} == {(2, "on")}
    assert all(one.pass_config.tokens_in_pass is None for one in ordered(settings(batching="padding_free")))


def test_a_model_of_unknown_shape():
    """The plainest order: few micro-batches first, and of those without recomputing."""
    names = [kind(one) for one in ordered(shape=None, graphs=False)]
    assert names[0] == (8, "off")
    assert names.index((8, "unsloth")) < names.index((1, "off"))


def test_what_comes_when_memory_runs_out():
    """Half the micro-batch, again and again; then no graphs; then recomputing; then nothing."""
    left = ordered()[0].pass_config
    chain = []
    while left is not None:
        chain.append((left.micro_batch, left.cuda_graphs, left.gradient_checkpointing))
        left = smaller(left, LENGTHS)
    assert chain == [
        (8, True, "off"),
        (4, True, "off"),
        (2, True, "off"),
        (1, True, "off"),
        (1, False, "off"),
        (1, False, "unsloth"),
    ]
    plain = replace(ordered(settings(gradient_checkpointing="on"))[-1].pass_config, micro_batch=1)
    assert smaller(plain, LENGTHS) == replace(plain, gradient_checkpointing="unsloth")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ""),
        ({"micro_batch": 1, "gradient_checkpointing": "unsloth"}, ""),
        ({"micro_batch": 4}, "Leave TUNE_MICRO_BATCH at auto. "),
        (
            {"micro_batch": 4, "gradient_checkpointing": "off"},
            "Leave TUNE_MICRO_BATCH and TUNE_GRADIENT_CHECKPOINTING at auto. ",
        ),
    ],
)
def test_what_the_settings_left_no_room_for(changed, expected):
    """Where nothing fits, the first remedy is what the user had decided, if it is not the least already."""
    assert auto_remedy(settings(**changed)) == expected


def test_a_batch_of_six_is_split_in_halves_rounded_up():
    """A micro-batch need not divide the batch."""
    rows = {one.pass_config.micro_batch for one in ordered(settings(batch_size=6))}
    assert rows == {6, 3, 2, 1}


def test_a_recorded_plan_is_read_back():
    """From the one level that JSON has; a plan of an older layout is not."""
    planned = make_plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    assert PassConfig.from_json(json.loads(json.dumps(planned.as_json()))) == planned.pass_config
    assert PassConfig.from_json({"micro_batch": 2, "accumulation": 4}) is None


def test_the_record_of_a_plan():
    """Its fields and their order are those of all earlier versions, in one level: old records still compare."""
    planned = make_plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4).with_reasons("why")
    assert list(planned.as_json().items()) == [
        ("examples", 320),
        ("steps", 120),
        ("epochs", 3.0),
        ("batch_size", 8),
        ("micro_batch", 8),
        ("tokens_in_pass", 8 * 2048),
        ("gradient_checkpointing", "unsloth"),
        ("cuda_graphs", False),
        ("batching", "packed"),
        ("optimizer", "adamw_8bit"),
        ("learning_rate", 2e-4),
        ("warmup_steps", 4),
        ("schedule", "linear"),
        ("compute_dtype", "bfloat16"),
        ("deterministic", False),
        ("reasons", ("why",)),
    ]
    assert planned.reproducibility_facts().keys() == planned.as_json().keys() - {"reasons"}


def test_a_cpu_pads():
    """There is nothing to choose on a CPU."""
    device = Device(kind="cpu", name="CPU", memory_bytes=2**34, capability=None, dtype=torch.bfloat16)
    planned = make_plan(settings(device="cpu"), device, lengths=LENGTHS, learning_rate=2e-4)
    assert (planned.batching, planned.pass_config.micro_batch, planned.pass_config.gradient_checkpointing) == (
        "padded",
        8,
        "off",
    )
    assert (planned.optimizer, planned.pass_config.cuda_graphs) == ("adamw_torch_fused", False)


@pytest.mark.parametrize(
    ("changed", "capability", "batching", "expected"),
    [
        pytest.param({}, "8.0", "packed", True, id="ampere"),
        pytest.param({}, "12.1", "padding_free", True, id="blackwell"),
        pytest.param({}, "7.5", "packed", False, id="turing has no kernel for all lengths"),
        pytest.param({}, "9.0", "padded", False, id="padded, whatever was asked for"),
        pytest.param({"lora_dropout": 0.1}, "9.0", "packed", False, id="dropout"),
        pytest.param({"precision": "8bit"}, "9.0", "packed", False, id="8 bit"),
    ],
)
def test_what_may_be_recorded(changed, capability, batching, expected):
    """The card, the plan's own batching and the settings each have a say."""
    device = replace(card(), capability=capability)
    planned = replace(make_plan(settings(), device, lengths=LENGTHS, learning_rate=2e-4), batching=batching)
    assert graphs_possible(planned, settings(**changed), device) is expected


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        pytest.param({"micro_batch": 8}, {"micro_batch": 8}, 4, id="it shrank from what is still asked for"),
        pytest.param({"micro_batch": 8}, {"micro_batch": 4}, 4, id="what it came to is asked for now"),
        pytest.param({"micro_batch": 8}, {}, 4, id="nothing is asked for now"),
        pytest.param({"micro_batch": 8}, {"micro_batch": 2}, None, id="something else is asked for now"),
        pytest.param({}, {"micro_batch": 8}, None, id="nothing was asked for then"),
        pytest.param(None, {"micro_batch": 8}, None, id="a record of an older version"),
        pytest.param(None, {"micro_batch": 4}, 4, id="the same, as asked for"),
        pytest.param({"gradient_checkpointing": "off"}, {"gradient_checkpointing": "off"}, 4, id="checkpointing too"),
        pytest.param({}, {"gradient_checkpointing": "on"}, None, id="other checkpointing"),
        pytest.param({}, {"batching": "padding_free"}, None, id="other batching"),
    ],
)
def test_what_a_later_attempt_uses_again(then, now, expected):
    """The recorded pass configuration, also one that memory forced, unless the settings newly ask for another."""
    planned = make_plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    shrunk = PassConfig(micro_batch=4, tokens_in_pass=4 * 2048, gradient_checkpointing="unsloth", cuda_graphs=False)
    earlier = {"plan": planned.with_pass(shrunk).reproducibility_facts(), "device": "card"}
    earlier |= {} if then is None else {"asked": requested_pass(settings(**then))}
    config = settings(**now)
    reused = reusable_pass(earlier, make_plan(config, card(), lengths=LENGTHS, learning_rate=2e-4), config, card())
    assert reused == (shrunk if expected else None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_how_memory_runs_out(error, expected):
    """Torch, CUDA, its libraries and Triton each say in their own way that the card's memory ran out."""
    assert out_of_memory(error) is expected


def test_another_card_plans_again():
    """And says so."""
    planned = make_plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    earlier = {"plan": planned.reproducibility_facts(), "device": "another card"}
    with capture_logs() as logs:
        assert reusable_pass(earlier, planned, settings(), card()) is None
    assert [(line["event"], line["was"], line["now"]) for line in logs] == [("plan_recomputed", "another card", "card")]
    with capture_logs() as logs:
        assert reusable_pass({}, planned, settings(), card()) is None
    assert logs == []


def test_a_run_that_has_trained_keeps_the_plan_that_it_trained_by():
    """Where nothing is left to train, the plan on record is the one of the last step, whatever would be chosen now."""
    planned = make_plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    used = PassConfig(micro_batch=2, tokens_in_pass=None, gradient_checkpointing="on", cuda_graphs=False)
    trained = replace(planned, batching="padded", pass_config=used)
    assert completed_plan(planned, {"plan": trained.reproducibility_facts(), "device": "another card"}) == trained
    assert completed_plan(planned, {"plan": {"micro_batch": 2, "accumulation": 4}}) == planned
    assert completed_plan(planned, {}) == planned


def test_a_model_that_unsloth_only_pads():
    """`auto` pads, says so, keeps the reason, and tries no CUDA graphs; asked for, other batches are an error."""
    planned = make_plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    with capture_logs() as logs:
        padded = padded_plan(planned, requested="auto", model_type="gemma2")
    assert (padded.batching, padded.pass_config.tokens_in_pass) == ("padded", None)
    assert "gemma2" in padded.reasons[-1]
    assert [(line["event"], line["was"], line["model_type"]) for line in logs] == [
        ("batching_padded", "packed", "gemma2")
    ]
    graphs = graphs_possible(padded, settings(), card())
    tried = candidates(padded, settings(), workload(), rate=FAST, graphs=graphs)
    assert {(one.pass_config.tokens_in_pass, one.pass_config.cuda_graphs) for one in tried} == {(None, False)}
    for batching in ("packed", "padding_free"):
        with pytest.raises(ConfigError, match=f"TUNE_BATCHING={batching}, but .* gemma2") as caught:
            padded_plan(planned, requested=batching, model_type="gemma2")
        assert "TUNE_BATCHING=padded" in caught.value.remedy
