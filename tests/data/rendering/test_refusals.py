"""Rows are rendered in every form that a template may want before they are refused; a reason is one that was tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from job.data.examples import Example, RowError, Turn
from job.data.rendering.renderer import Renderer
from job.data.tokenizer.load import Tokenizer, wrap_tokenizer
from tests.data.rendering.test_losses import CLOSE, OPEN, template
from tests.tiny_tokenizer import DATE, tiny

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo né"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": {}}}
CALLS = (
    "{{% if {} %}}{{% for c in m.tool_calls %}}{{{{ {} }}}}{{% endfor %}}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
)
CONCATENATED = CALLS.format("m.tool_calls", "c.function.name + c.function.arguments")
PRINTED = CALLS.format("m.tool_calls", "c.function.name ~ c.function.arguments")
NULL_ONLY = CALLS.format("m.content is none", "c.function.name + c.function.arguments")
QUOTED = CALLS.format("m.tool_calls", "c.function.name + c.function.arguments | tojson")
"""As DeepSeek's templates, as they print a dictionary, as DeepSeek V3's, and as most others."""


def called(**more: Any) -> Example:
    turns = (
        Turn(role="user", content="Weather in Oslo?"),
        Turn(role="assistant", content="", tool_calls=(CALL,)),
        Turn(role="tool", content="3 degrees", tool_call_id="c1"),
        Turn(role="assistant", content="It is 3 degrees."),
    )
    return replace(Example(source="a.jsonl", line=3, format="messages", turns=turns, tools=(TOOL,)), **more)


def learned(found: Tokenizer, row: Example, **options: Any) -> str:
    (sequence,) = Renderer(tokenizer=found, **options).render(row)
    return str(found.hf.decode([label for label in sequence.labels if label >= 0]))


@pytest.mark.parametrize("body", [CONCATENATED, PRINTED, NULL_ONLY, QUOTED], ids=["text", "repr", "null", "object"])
@pytest.mark.parametrize("train_on", ["responses", "all"])
def test_arguments_are_given_in_the_form_that_the_template_wants(body: str, train_on: Any) -> None:
    """As an object, as JSON text, with null for the content: JSON is learned, once, and never as Python prints it."""
    said = learned(template(body), called(), train_on=train_on)
    assert 'weather{"city": "Oslo né"}' in said
    assert "It is 3 degrees." in said


def test_the_roles_weights_use_the_same_form() -> None:
    """TUNE_ROLE_WEIGHTS renders the conversation again, in the form that was accepted."""
    said = learned(template(CONCATENATED), called(), weights={"assistant": 1.0, "tool": 0.5})
    assert "3 degrees<|im_end|>" in said


def named(hf_templates: dict[str, str]) -> Tokenizer:
    hf = tiny()
    hf.chat_template = hf_templates
    return wrap_tokenizer(hf, date=DATE)


PLAIN = f"{OPEN}{{{{ m.content }}}}{CLOSE}"
NO_TOOLS = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN
WITH_TOOLS = f"{{% if tools %}}tools: {{{{ tools | tojson }}}}\n{{% endif %}}{OPEN}{QUOTED}{CLOSE}"


@pytest.mark.parametrize("usual", [PLAIN, NO_TOOLS], ids=["drops tools", "refuses tools"])
def test_rows_with_tools_use_the_tokenizers_template_for_tools(usual: str) -> None:
    """As transformers chooses it at inference; all other rows use the usual template."""
    found = named({"default": usual, "tool_use": WITH_TOOLS, "rag": PLAIN})
    (sequence,) = Renderer(tokenizer=found).render(called())
    assert found.hf.decode(sequence.input_ids).startswith("tools: [")
    assert sequence.not_rendered == ()
    (plain,) = Renderer(tokenizer=found).render(called(turns=(called().turns[0], called().turns[3]), tools=()))
    assert found.hf.decode(plain.input_ids).startswith("<|im_start|>user")
    assert any("tool_use" in note for note in found.notes)
    assert any("`rag`" in note for note in found.notes)


def test_calls_without_tools_use_it_where_the_usual_template_drops_them() -> None:
    """A row of calls that lists no tools is rendered by the usual template if that prints them."""
    found = named({"default": PLAIN, "tool_use": WITH_TOOLS})
    assert 'weather{"city": "Oslo né"}' in learned(found, called(tools=()))


def test_a_template_that_the_settings_name_is_the_only_one() -> None:
    """TUNE_CHAT_TEMPLATE overrules all templates of the tokenizer."""
    hf = tiny()
    hf.chat_template = {"default": PLAIN, "tool_use": WITH_TOOLS}
    found = wrap_tokenizer(hf, chat_template="chatml", date=DATE)
    assert (dict(found.named), [note for note in found.notes if "tool_use" in note]) == ({}, [])


def refusal(found: Tokenizer, row: Example, **options: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        Renderer(tokenizer=found, **options).render(row)
    return caught.value


THINKING = (
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
)
THOUGHT = Turn(role="assistant", content="22", reasoning_content="17 + 3 is 20.")


@pytest.mark.parametrize("before", [(), (Turn(role="system", content="Be brief."),)], ids=["alone", "system"])
def test_a_reason_is_tried_against_the_test_that_failed(before: tuple[Turn, ...]) -> None:
    """A row without tools, calls and results is never refused because of them, nor because of a system turn without
    which it would be refused all the same."""
    row = called(turns=(*before, Turn(role="user", content="a"), THOUGHT), tools=())
    error = refusal(template(THINKING + "{{ m.content }}", "<think>\n\n</think>\n\n"), row)
    assert not {"tool", "system"} & set((error.message + error.remedy).split())
    assert "it has no place for reasoning" in error.message
    assert error.remedy.startswith("Remove the reasoning")


NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
NO_RESULTS = NO_SYSTEM.replace("system", "tool")


@pytest.mark.parametrize(
    ("body", "says"),
    [(NO_SYSTEM, "it does not allow system turns"), (NO_RESULTS, "it does not accept the tools")],
)
def test_the_true_reason_is_still_found(body: str, says: str) -> None:
    """What one change mends is named, with its remedy."""
    row = called(turns=(Turn(role="system", content="Be brief."), *called().turns)) if "system" in says else called()
    assert says in refusal(template(body + QUOTED), row).message
