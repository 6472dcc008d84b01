"""How often a run evaluates and saves: laws for any number of steps."""

from hypothesis import given
from hypothesis import strategies as st

from job.stages.evaluate import steps_between
from job.stages.train import steps_between_saves


@given(st.integers(1, 10**9), st.none() | st.integers(1, 10**9))
def test_saves(steps, most):
    """At least every quarter of the run and every TUNE_CHECKPOINT_STEPS, whichever is less."""
    every = steps_between_saves(steps=steps, most=most)
    assert 1 <= every <= steps
    assert every == min(-(-steps // 4), most or steps)
    assert steps < 4 or steps // every >= 2


@given(steps=st.integers(1, 10**9), rows=st.integers(0, 10**7), batch=st.integers(1, 4096))
def test_evaluations(steps, rows, batch):
    """Ten over a run or fewer, and together they cost at most about a tenth of it."""
    every = steps_between(steps=steps, rows=rows, batch_size=batch)
    assert every >= 1
    assert steps // every <= 19
    assert every * batch * 0.1 >= rows / 3 * 0.999
