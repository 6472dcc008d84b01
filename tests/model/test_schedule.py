"""Steps, warm-up and learning rates: laws for all settings, and the cases that they were found by."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.config.schema import Config
from job.model.schedule import MOST_STEPS, rate_factor, schedule, share_of, usual_rate
from job.runtime.errors import ConfigError

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
DECIMALS = st.decimals(min_value="0.0001", max_value="1000", places=4).map(str)
"""As people write shares and epochs."""
SOLD = {
    "SmolLM2-135M": (134_515_008, 2e-4),
    "Llama-3.2-1B": (1_235_814_400, 2e-4),
    "Phi-3-mini": (3_821_079_552, 2e-4),
    "Yi-6B": (6_061_035_520, 2e-4),
    "Llama-2-7B": (6_738_415_616, 2e-4),
    "Falcon-7B": (7_217_189_760, 2e-4),
    "Mistral-7B": (7_241_732_096, 2e-4),
    "OLMo-2-7B": (7_298_617_344, 2e-4),
    "Baichuan2-7B": (7_505_973_248, 2e-4),
    "Qwen2.5-7B": (7_615_616_512, 2e-4),
    "Qwen1.5-7B": (7_721_324_544, 2e-4),
    "InternLM2.5-7B": (7_737_708_544, 2e-4),
    "Llama-3.1-8B": (8_030_261_248, 1e-4),
    "Qwen3-8B": (8_190_735_360, 1e-4),
    "Yi-1.5-9B": (8_829_407_232, 1e-4),
    "Gemma-2-9B": (9_241_705_984, 1e-4),
    "Mistral-Nemo-12B": (12_247_782_400, 1e-4),
    "Llama-2-13B": (13_015_864_320, 1e-4),
    "OLMo-2-13B": (13_716_198_400, 1e-4),
    "Baichuan2-13B": (13_896_668_160, 1e-4),
    "Qwen1.5-14B": (14_167_290_880, 5e-5),
    "Phi-4-14B": (14_659_507_200, 5e-5),
    "Qwen2.5-14B": (14_770_033_664, 5e-5),
    "Qwen3-32B": (32_762_123_264, 5e-5),
    "Llama-3.1-70B": (70_553_706_496, 5e-5),
}
"""Published models: their parameters, and the rate of the size that they are sold under."""


def settings(**changed) -> Config:
    return Config(**{"model": "org/m", "dataset": ("/d",), "output": "/o", **changed})


@pytest.mark.parametrize("name", SOLD)
def test_rates_by_the_sizes_that_models_are_sold_under(name):
    """A model named 7B has the rate of 7B, though it has more than seven billion parameters."""
    parameters, rate = SOLD[name]
    assert usual_rate(parameters) == rate


@given(st.integers(0, 10**13), st.integers(0, 10**13))
def test_rates_fall_with_the_size(one, other):
    """A larger model never has a larger rate, and each is one of three."""
    small, large = sorted((one, other))
    assert usual_rate(small) >= usual_rate(large)
    assert {usual_rate(small), usual_rate(large)} <= {2e-4, 1e-4, 5e-5}


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "steps"),
    [(1.1, 100, 110), (1.1, 10, 11), (0.07, 100, 7), (0.29, 100, 29), (1.15, 100, 115), (2.3, 10, 23), (0.001, 5, 1)],
)
def test_steps_of_a_part_of_an_epoch(epochs, per_epoch, steps):
    """Epochs count as the decimal that was written: 1.1 of 100 steps are 110."""
    assert schedule(settings(epochs=epochs, batch_size=8), examples=8 * per_epoch).steps == steps


@given(st.integers(1, 10**7), DECIMALS)
def test_shares_are_exact(whole, written):
    """A share of any whole, as anyone would work it out on paper, rounded up."""
    assert share_of(whole, float(written)) == math.ceil(whole * Fraction(written))


@given(st.integers(1, 10**12), st.floats(min_value=5e-324, max_value=1e6, allow_nan=False))
def test_shares_of_any_number(whole, share):
    """Also numbers of seventeen digits, and tiny ones, give what their shortest decimal says."""
    assert share_of(whole, share) == math.ceil(whole * Fraction(repr(share)))


@given(
    examples=st.integers(1, 10**6),
    batch=st.integers(1, 512),
    micro=st.none() | st.integers(1, 512),
    epochs=DECIMALS,
    warmup=st.decimals(min_value=0, max_value="0.9999", places=4).map(str),
    kind=st.sampled_from(SCHEDULES),
)
def test_every_run_has_steps_and_reaches_its_rate(examples, batch, micro, epochs, warmup, kind):
    """Whatever the settings: at least one step, the batch covered by micro-batches and none of them superfluous, and a
    warm-up that leaves a step."""
    changed = {"micro_batch": min(micro, batch)} if micro else {}
    found = schedule(
        settings(batch_size=batch, epochs=float(epochs), warmup=float(warmup), schedule=kind, **changed),
        examples=examples,
    )
    assert found.per_epoch * batch >= examples > (found.per_epoch - 1) * batch
    assert found.steps == max(1, math.ceil(found.per_epoch * Fraction(epochs)))
    assert (
        found.gradient_accumulation * found.micro_batch >= batch > (found.gradient_accumulation - 1) * found.micro_batch
    )
    assert 0 <= found.warmup_steps < found.steps
    assert (found.warmup_steps > 0) == (kind != "constant" and float(warmup) > 0 and found.steps > 1)


@given(st.integers(1, 3000), st.floats(0, 0.9999), st.sampled_from(SCHEDULES))
def test_every_step_trains(steps, share, kind):
    """The rate is above 0 and at most the whole one at each step, rises during the warm-up, is whole right after it,
    and never rises again."""
    warmup = schedule(settings(max_steps=steps, warmup=share, schedule=kind), examples=8).warmup_steps
    factors = [rate_factor(done, kind=kind, steps=steps, warmup_steps=warmup) for done in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup] == sorted(set(factors[:warmup]))
    assert factors[warmup] == 1
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


@given(st.integers(2, 2000), st.integers(0, 1999), st.sampled_from(SCHEDULES[:2]))
def test_the_rate_ends_at_nothing(steps, warmup, kind):
    """After the last step the rate would be 0, and it stays 0, as the trainer asks for one step too many."""
    warmup = min(warmup, steps - 1)
    assert rate_factor(steps, kind=kind, steps=steps, warmup_steps=warmup) == 0
    assert rate_factor(steps + 1, kind=kind, steps=steps, warmup_steps=warmup) == 0


def test_a_warm_up_of_as_many_steps_as_the_run_has_is_rejected():
    """The learning rate would never reach its value; a share below 1 always leaves the last step."""
    with pytest.raises(ConfigError, match="TUNE_WARMUP=50 is 50 steps, and the run has 3"):
        schedule(settings(warmup=50.0), examples=8)
    assert schedule(settings(warmup=0.99, max_steps=3), examples=8).warmup_steps == 2
    assert schedule(settings(warmup=50.0, schedule="constant"), examples=8).warmup_steps == 0


def test_more_steps_than_possible():
    """A number of epochs that no one can train is a mistake, and is said before anything is loaded."""
    with pytest.raises(ConfigError, match=r"1\.00e\+15 optimizer steps"):
        schedule(settings(epochs=1e6, batch_size=1), examples=10**9)
    assert schedule(settings(max_steps=MOST_STEPS), examples=8).steps == MOST_STEPS
