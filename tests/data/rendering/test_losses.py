"""Every answer is held against what is learned of it: what is missing is counted, named by file and line, and grave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokenizers
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from job.data.examples import Example, Turn
from job.data.findings import is_grave
from job.data.rendering.labels import Rendered
from job.data.rendering.renderer import CUT, Renderer
from job.data.tokenizer.load import Tokenizer, wrap_tokenizer
from tests import model_templates as real
from tests.data.datasets import tokenized
from tests.tiny_tokenizer import DATE, tiny

OPEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CLOSE = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WITHOUT_THOUGHT = "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
EACH = "{{ m.content }}{% for c in m.tool_calls or [] %}<f={{ c.function.name }}>"
VALUES = "{% for k, v in c.function.arguments.items() %}<p={{ k }}>{{ v if v is string else v | tojson }}{% endfor %}"
THOUGHT = "<think>\n17 and 5: 17 + 3 is 20, 2 more is 22.\n</think>\n\n22"
QUESTION = Turn(role="user", content="What is 17 + 5?")
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "when": {"day": "Monday"}}},
}


def template(body: str, prompt: str = "") -> Tokenizer:
    closing = CLOSE.replace("assistant\n", f"assistant\n{prompt}")
    return wrap_tokenizer(tiny(), template_text=f"{OPEN}{body}{closing}", date=DATE)


def answered(content: str, **more: Any) -> Example:
    turns = (QUESTION, Turn(role="assistant", content=content, **more))
    return Example(source="a.jsonl", line=7, format="messages", turns=turns)


FROM_ANN = replace(answered("b"), turns=(replace(QUESTION, name="Ann"), Turn(role="assistant", content="b")))
TWICE = replace(answered("b"), turns=(QUESTION, Turn(role="assistant", content="One."), *answered("b").turns))


def rendered(found: Tokenizer, row: Example, **options: Any) -> Rendered:
    (sequence,) = Renderer(tokenizer=found, **options).render(row)
    return sequence


@pytest.mark.parametrize("prompt", ["", "<think>\n"], ids=["plain", "thinking"])
@pytest.mark.parametrize("train_on", ["responses", "last_response", "all"])
def test_dropped_reasoning_is_named(prompt: str, train_on: Any) -> None:
    """Reasoning inside an answer that the template drops is missing, whatever is learned and however prompts end."""
    assert rendered(template(WITHOUT_THOUGHT, prompt), answered(THOUGHT), train_on=train_on).lost == (
        "text with `<think>`",
    )


def test_reasoning_that_the_prompt_opens_is_whole() -> None:
    """A generation prompt that ends with the tag that answers begin with takes nothing from them."""
    found = template("{{ m.content }}", "<think>\n")
    assert rendered(found, answered(THOUGHT)).lost == ()
    assert rendered(found, answered("22")).lost == ()


@pytest.mark.parametrize(
    ("body", "row", "lost"),
    [
        ("{{ m.content }}", answered("Sure.\n\n  x = 1\n"), ()),
        ("{{ m.content | trim }}", answered("  Sure.\n"), ()),
        ("{{ m.content | tojson }}", answered('He said "né".\nYes.'), ()),
        ("{{ m.content.split() | join(' ') }}", answered("def f():\n    return 1"), ("white space inside the text",)),
        ("{{ m.content | replace('\n', '') }}", answered("a\nb"), ("white space inside the text",)),
        ("{{ m.content | replace('</think>', '</think>\n\n') }}", answered("<think>a</think>b"), ()),
        ("{{ m.content | replace('<b>', '**') }}", answered("A <b>word"), ("text with `<b>`",)),
        ("{{ m.content[:40] }}", answered("word " * 20), ("text",)),
        ("{{ m.content | upper if m.role == 'assistant' else m.content }}", answered("Yes"), ("text",)),
        (
            "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}",
            answered("Let me look.", tool_calls=(WEATHER,)),
            ("text next to a tool call",),
        ),
        (
            f"{EACH}{{% endfor %}}",
            answered("", tool_calls=(WEATHER,)),
            ("arguments of tool calls",),
        ),
        (
            f"{EACH}{{{{ c.function.arguments.city }}}}{{% endfor %}}",
            answered("", tool_calls=(WEATHER,)),
            ("arguments of tool calls",),
        ),
        (
            f"{EACH}{VALUES}{{% endfor %}}",
            answered("", tool_calls=(WEATHER,)),
            (),
        ),
        (
            "{{ m.content }}{% if m.reasoning_content %}({{ m.reasoning_content[:4] }}){% endif %}",
            answered("22", reasoning_content="1234\n1234 and more"),
            ("a part of the reasoning",),
        ),
    ],
)  # fmt: skip
def test_what_an_answer_says_and_is_not_learned_is_named(body: str, row: Example, lost: tuple[str, ...]) -> None:
    """Nothing but the white space around an answer may be missing without a word."""
    assert rendered(template(body), row).lost == lost


@pytest.mark.parametrize(
    ("body", "row", "notes"),
    [
        ("{{ m.content | trim }}", answered("Yes.\n"), ("white_space",)),
        ("{{ m.content | trim }}", answered("Yes."), ()),
        ("{{ m.content }}", FROM_ANN, ("names",)),
        ("{{ m.name or '' }}: {{ m.content }}", FROM_ANN, ()),
        (
            "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}",
            TWICE,
            ("earlier_answers",),
        ),
    ],
)  # fmt: skip
def test_what_else_a_template_leaves_out_is_noted(body: str, row: Example, notes: tuple[str, ...]) -> None:
    """White space around answers, names of speakers, and answers before the last one."""
    assert Renderer(tokenizer=template(body)).render(row)[-1].not_rendered == notes


@pytest.mark.parametrize(
    "name", ["llama-3.1", "gemma-3", "mistral-nemo", "chatml", "zephyr", "phi-4", "qwen-3", "gpt-oss"]
)
def test_plain_answers_are_whole_under_real_templates(name: str) -> None:
    """No template of a well-known model is said to drop what it prints."""
    row = answered('Größe: 3 < 4 & "quoted".\n\n```python\nif x:\n\treturn [1]\n```')
    assert rendered(real.tokenizer(name), row).lost == ()


def test_an_answer_that_shares_a_token_with_the_next_turn_is_cut() -> None:
    """A token with characters of the next turn is not learned, so the end of the answer is not."""
    found = wrap_tokenizer(tiny(), template_text="{% for m in messages %}{{ m.content }}{% endfor %}", date=DATE)
    said = [("user", "What? "), ("assistant", "The capital of Fra"), ("user", "nce."), ("assistant", "Yes.")]
    turns = tuple(Turn(role=role, content=content) for role, content in said)
    assert rendered(found, replace(answered(""), turns=turns)).lost == (CUT,)
    assert rendered(found, replace(answered(""), turns=turns), train_on="all").lost == ()


def test_an_answer_whose_first_token_begins_the_sequence_is_cut() -> None:
    """A first token has no context, so it is never learned: an answer to nothing loses it."""
    found = wrap_tokenizer(tiny(), chat_template="prompt_completion", date=DATE)
    turns = (Turn(role="user", content=""), Turn(role="assistant", content="Once upon a time"))
    assert rendered(found, replace(answered(""), turns=turns)).lost == (CUT,)


def test_rows_are_counted_once_by_kind_and_place(tmp_path: Path) -> None:
    """A row with two broken answers is one row; each kind is counted; the finding names the first rows and is grave."""
    found = template(WITHOUT_THOUGHT)
    turns = (QUESTION, Turn(role="assistant", content=THOUGHT)) * 2
    rows = [
        replace(answered(THOUGHT), line=1),
        replace(answered(""), turns=turns, line=2),
        replace(answered("22"), line=3),
    ]
    counts = tokenized(rows, renderer=Renderer(tokenizer=found), directory=tmp_path).counts
    assert (counts.answers_not_learned.count, counts.answers_not_learned.first) == (2, ("a.jsonl:1", "a.jsonl:2"))
    assert counts.lost == {"text with `<think>`": 2}
    (one,) = [finding for finding in counts.findings(side="training") if finding.code == "answers_not_learned"]
    assert is_grave(one, 1000)
    assert "text with `<think>`: 2" in one.message
    assert "17 + 3" not in one.message + one.remedy


def test_characters_that_the_tokenizer_does_not_know_are_counted(tmp_path: Path) -> None:
    """An answer that becomes the token for unknown characters is not learned; EOS is never taken for that token."""

    def word_level(unknown: str) -> Tokenizer:
        vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", "a", "b", "user", "assistant"])}
        backend = Tokenizers(models.WordLevel(vocabulary, unk_token=unknown))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        hf = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, eos_token="</s>")
        text = "{% for m in messages %} {{ m.role }} {{ m.content }} </s> {% endfor %}"
        text += "{% if add_generation_prompt %} assistant {% endif %}"
        return wrap_tokenizer(hf, template_text=text, date=DATE)

    rows = [replace(answered(said), line=line) for line, said in enumerate(("a b", "a {", "b"), 1)]
    counts = tokenized(rows, renderer=Renderer(tokenizer=word_level("<unk>")), directory=tmp_path / "a").counts
    assert (counts.unknown_tokens.count, counts.unknown_tokens.first) == (1, ("a.jsonl:2",))
    counts = tokenized(rows, renderer=Renderer(tokenizer=word_level("</s>")), directory=tmp_path / "b").counts
    assert counts.unknown_tokens.count == 0


texts = st.lists(
    st.sampled_from(["Yes", " no", "\n", "  ", "{x}", '"q"', "é", "<b>", "</think>", "\\n"]), min_size=1, max_size=6
).map("".join)


@settings(max_examples=100, deadline=None)
@given(said=texts.filter(str.strip))
def test_an_answer_that_is_printed_as_it_is_has_lost_nothing(said: str) -> None:
    """Whatever an answer contains, a template that prints it whole is not accused."""
    for found in (template("{{ m.content }}"), template("{{ m.content }}", "<think>\n")):
        sequence = rendered(found, answered(said))
        assert (sequence.lost, sequence.not_rendered) == ((), ())


@settings(max_examples=100, deadline=None)
@given(said=texts.filter(str.strip), word=st.sampled_from(["missing", "<think>missing", "mis\nsing"]))
def test_a_word_that_a_template_removes_is_missed(said: str, word: str) -> None:
    """Whatever is around a word that the template takes out, the row has lost it."""
    found = template(f"{{{{ m.content | replace({word!r}, '') }}}}")
    assert rendered(found, answered(f"{said}{word}{said}")).lost
