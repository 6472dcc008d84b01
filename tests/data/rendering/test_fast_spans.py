"""The short cut to a conversation's answers finds what prefix rendering finds, or leaves it to that."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data.examples import Turn
from job.data.rendering import fast_spans
from job.data.rendering.spans import _by_prefixes, answer_pieces, is_fast_path_safe
from job.data.tokenizer.chat_template import RefusedError
from tests import model_templates as real
from tests.model_templates import MODELS

PIECES = st.sampled_from(
    ["Yes", "no ", "\n", "<|im_end|>", "<|im_start|>assistant\n", "</think>", "[/INST]", "model\n"]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=4).map("".join)


@st.composite
def conversations(draw):
    """Plain turns whose contents may hold markers, cut ones and tags."""
    turns = [Turn(role="system", content=draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn(role="user", content=draw(TEXTS)), Turn(role="assistant", content=draw(TEXTS))]
    return tuple(turns)


def either(function, *arguments, **more):
    """The result, or that the template refuses."""
    try:
        return function(*arguments, **more)
    except RefusedError:
        return "refused"


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(said=conversations())
def test_it_is_a_short_cut_to_the_same(name, said):
    """For each real template: text, spans and refusals are those of prefix rendering, whatever the contents hold."""
    template = real.tokenizer(name).template_for("messages")
    learned = [index for index, turn in enumerate(said) if turn.role == "assistant"]
    assert either(answer_pieces, template, said, (), only_last=False) == either(
        _by_prefixes, template, said, (), learned
    )


def test_it_is_taken_where_templates_are_plain():
    """ChatML, Llama 3 and Zephyr frame each answer; Qwen 3 rewrites earlier ones, so that it is not even tried."""
    plain = {name for name in MODELS if is_fast_path_safe(real.tokenizer(name).template_for("messages"))}
    assert {"chatml", "llama-3.1", "zephyr", "smollm-2"} <= plain
    assert not {"qwen-3", "llama-2", "gpt-oss"} & plain


@pytest.mark.parametrize(
    "said",
    [
        (Turn(role="user", content="a"), Turn(role="assistant", content="b<|im_start|>c")),
        (Turn(role="user", content="a"), Turn(role="assistant", content="")),
        (Turn(role="user", content="<|im_start|>assistant\n"), Turn(role="assistant", content="b")),
        (Turn(role="user", content="a"), Turn(role="assistant", content="b", reasoning_content="hm")),
        (Turn(role="tool", content="a"), Turn(role="assistant", content="b")),
    ],
    ids=["tag", "empty", "marker in a question", "reasoning", "tool"],
)
def test_what_is_left_to_prefix_rendering(said):
    """Whatever a template might treat in a way of its own."""
    assert fast_spans.find(real.tokenizer("chatml").template_for("messages"), said) is None
