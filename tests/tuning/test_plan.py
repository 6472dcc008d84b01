"""Which cut comes first on which card, what comes after it, and what a later attempt takes over."""

from dataclasses import asdict, replace

import pytest
import torch
from structlog.testing import capture_logs

from job.config.schema import Config
from job.model.shape import llama
from job.runtime.errors import ConfigError
from job.tuning.device import Device, out_of_memory
from job.tuning.fit.plan import (
    PassConfig,
    as_recorded,
    as_trained,
    asked,
    candidates,
    freed,
    padded,
    plan,
    smaller,
    taken_over,
)
from job.tuning.fit.search import recordable

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


def ordered(config=None, shape=ONE_B, *, rate=FAST, graphs=True, device=None):
    """The cuts in the order in which they are tried."""
    config = config or settings()
    planned = plan(config, device or card(), lengths=LENGTHS, learning_rate=2e-4)
    return candidates(planned, config, shape, lengths=LENGTHS, rate=rate, graphs=graphs)


def test_the_whole_batch_at_once_comes_first():
    """Where launches cost more than arithmetic, everything in one recorded pass is quickest."""
    first = ordered()[0].cut
    assert first == PassConfig(micro_batch=8, tokens_in_pass=8 * 2048, gradient_checkpointing="off", cuda_graphs=True)


@pytest.mark.parametrize("shape", [ONE_B, EIGHT_B])
@pytest.mark.parametrize("rate", [FAST, SLOW])
def test_recomputing_is_never_quicker_than_the_same_without(shape, rate):
    """Neither where the card is the bottleneck nor where Python is."""
    seconds = {one.cut: one.seconds for one in ordered(shape=shape, rate=rate)}
    for cut, expected in seconds.items():
        if cut.gradient_checkpointing == "off" and not cut.cuda_graphs:
            assert expected < seconds[replace(cut, gradient_checkpointing="unsloth")]


def test_many_small_passes_against_recomputing():
    """Without graphs, eight launches of everything take longer than recomputing it once."""
    names = [(one.cut.micro_batch, one.cut.gradient_checkpointing) for one in ordered(graphs=False)]
    assert names.index((8, "unsloth")) < names.index((1, "off"))


def test_the_estimate_of_memory_goes_with_the_cut():
    """Smaller passes and recomputing need less."""
    needed = {(one.cut.micro_batch, one.cut.gradient_checkpointing): one.bytes for one in ordered(graphs=False)}
    assert needed[8, "off"] > needed[4, "off"] > needed[1, "off"] > needed[1, "unsloth"]
    assert needed[8, "unsloth"] < needed[8, "off"] / 3


def test_settings_of_the_user_stand():
    """What the user set is no longer a choice."""
    config = settings(micro_batch=2, gradient_checkpointing="on")
    assert {(one.cut.micro_batch, one.cut.gradient_checkpointing) for one in ordered(config)} == {(2, "on")}
    assert all(one.cut.tokens_in_pass is None for one in ordered(settings(batching="padding_free")))


def test_a_model_of_unknown_shape():
    """The plainest order: few passes first, and of those without recomputing."""
    names = [(one.cut.micro_batch, one.cut.gradient_checkpointing) for one in ordered(shape=None, graphs=False)]
    assert names[0] == (8, "off")
    assert names.index((8, "unsloth")) < names.index((1, "off"))


def test_what_comes_when_memory_runs_out():
    """Half the pass, again and again; then no graphs; then recomputing; then nothing."""
    cut = ordered()[0].cut
    chain = []
    while cut is not None:
        chain.append((cut.micro_batch, cut.cuda_graphs, cut.gradient_checkpointing))
        cut = smaller(cut, LENGTHS)
    assert chain == [
        (8, True, "off"),
        (4, True, "off"),
        (2, True, "off"),
        (1, True, "off"),
        (1, False, "off"),
        (1, False, "unsloth"),
    ]
    plain = replace(ordered(settings(gradient_checkpointing="on"))[-1].cut, micro_batch=1)
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
    assert freed(settings(**changed)) == expected


def test_a_batch_of_six_is_cut_in_halves_rounded_up():
    """A pass need not divide the batch."""
    rows = {one.cut.micro_batch for one in ordered(settings(batch_size=6))}
    assert rows == {6, 3, 2, 1}


def test_a_recorded_plan_is_read_back():
    """As JSON has it; a plan of an older layout is none."""
    planned = plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    assert as_recorded(asdict(planned)) == planned.cut
    assert as_recorded({"micro_batch": 2, "accumulation": 4}) is None


def test_a_cpu_pads():
    """There is nothing to choose on a CPU."""
    device = Device(kind="cpu", name="CPU", memory_bytes=2**34, capability=None, dtype=torch.bfloat16)
    planned = plan(settings(device="cpu"), device, lengths=LENGTHS, learning_rate=2e-4)
    assert (planned.batching, planned.micro_batch, planned.gradient_checkpointing) == ("padded", 8, "off")
    assert (planned.optimizer, planned.cuda_graphs) == ("adamw_torch_fused", False)


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
    planned = replace(plan(settings(), device, lengths=LENGTHS, learning_rate=2e-4), batching=batching)
    assert recordable(planned, settings(**changed), device) is expected


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
def test_what_a_later_attempt_takes_over(then, now, expected):
    """The recorded cut, also one that memory forced, unless the wish for another one is new."""
    planned = plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    shrunk = PassConfig(micro_batch=4, tokens_in_pass=4 * 2048, gradient_checkpointing="unsloth", cuda_graphs=False)
    earlier = {"plan": planned.with_pass(shrunk).reproducibility_facts(), "device": "card"}
    earlier |= {} if then is None else {"asked": asked(settings(**then))}
    config = settings(**now)
    found = taken_over(earlier, plan(config, card(), lengths=LENGTHS, learning_rate=2e-4), config, card())
    assert found == (shrunk if expected else None)


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


def test_another_card_plans_anew():
    """And says so."""
    planned = plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    earlier = {"plan": planned.reproducibility_facts(), "device": "another card"}
    with capture_logs() as logs:
        assert taken_over(earlier, planned, settings(), card()) is None
    assert [(line["event"], line["was"], line["now"]) for line in logs] == [("plan_recomputed", "another card", "card")]
    with capture_logs() as logs:
        assert taken_over({}, planned, settings(), card()) is None
    assert logs == []


def test_a_run_that_has_trained_keeps_the_plan_that_it_trained_by():
    """Where nothing is left to train, the plan on record is the one of the last step, whatever would be chosen now."""
    planned = plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    trained = replace(planned, batching="padded", micro_batch=2, tokens_in_pass=None, gradient_checkpointing="on")
    assert as_trained(planned, {"plan": trained.reproducibility_facts(), "device": "another card"}) == trained
    assert as_trained(planned, {"plan": {"micro_batch": 2, "accumulation": 4}}) == planned
    assert as_trained(planned, {}) == planned


def test_a_model_that_unsloth_only_pads():
    """`auto` pads, says so, keeps the reason, and tries no CUDA graphs; asked for, other batches are refused."""
    planned = plan(settings(), card(), lengths=LENGTHS, learning_rate=2e-4)
    with capture_logs() as logs:
        found = padded(planned, settings(), model="gemma2")
    assert (found.batching, found.tokens_in_pass, found.cut.tokens_in_pass) == ("padded", None, None)
    assert "gemma2" in found.reasons[-1]
    assert [(line["event"], line["was"], line["model_type"]) for line in logs] == [
        ("batching_padded", "packed", "gemma2")
    ]
    cuts = candidates(
        found, settings(), ONE_B, lengths=LENGTHS, rate=FAST, graphs=recordable(found, settings(), card())
    )
    assert {(one.cut.tokens_in_pass, one.cut.cuda_graphs) for one in cuts} == {(None, False)}
    for batching in ("packed", "padding_free"):
        with pytest.raises(ConfigError, match=f"TUNE_BATCHING={batching}, but .* gemma2") as caught:
            padded(planned, settings(batching=batching), model="gemma2")
        assert "TUNE_BATCHING=padded" in caught.value.remedy
