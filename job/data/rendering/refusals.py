"""Why a template refuses a conversation, found by trial: which change would make it accept the turns.

A template's own error seldom states its rule well and never the remedy. The trials need no list of known errors, so
they also work for unknown templates.

Knows turns and templates; nothing of files or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from job.data.examples import JsonObject, Turn
from job.data.tokenizer.chat_template import QUESTION, RefusedError, Template, is_left_out

GENERAL = "Correct these rows, or set TUNE_CHAT_TEMPLATE to a template that allows them."


Attempt = Callable[[tuple[Turn, ...], Sequence[JsonObject]], object]
"""The test that failed: raises RefusedError for turns and tools that the template refuses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """The rules that a conversation breaks, and what to do."""

    rule: str
    """Empty if no trial made the template accept the conversation."""
    remedy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """One change to try."""

    change: Callable[[tuple[Turn, ...]], tuple[Turn, ...]]
    rule: Callable[[Sequence[Turn]], str]
    remedy: str
    drops_tools: bool = False


def explain_refusal(
    attempt: Attempt, templates: Sequence[Template], turns: tuple[Turn, ...], tools: Sequence[JsonObject]
) -> Refusal:
    """The rules of the templates that this conversation breaks: one if one explains it, else as many as necessary.

    A change explains a refusal only if it passes the very test that failed.

    Args:
        templates: those that were tried; a change that none of them renders is not tried further.
    """
    for changes in _trials(turns, tools):
        changed, kept = turns, tools
        for change in changes:
            changed, kept = change.change(changed), () if change.drops_tools else kept
        if any(_renders(template, changed, kept) for template in templates) and _passes(attempt, changed, kept):
            rules = [change.rule(turns) for change in changes]
            return Refusal(rule=", and ".join(rules), remedy=" ".join(change.remedy for change in changes))
    return Refusal(rule="", remedy=GENERAL)


def _trials(turns: tuple[Turn, ...], tools: Sequence[JsonObject]) -> Iterator[tuple[_Change, ...]]:
    useful = [change for change in CHANGES if change.change(turns) != turns or (change.drops_tools and tools)]
    yield from ((change,) for change in useful)
    yield from (tuple(useful[:count]) for count in range(2, len(useful) + 1))


def _passes(attempt: Attempt, turns: tuple[Turn, ...], tools: Sequence[JsonObject]) -> bool:
    if not any(turn.role == "assistant" and turn.trained for turn in turns):
        return False
    try:
        attempt(turns, tools)
    except RefusedError:
        return False
    return True


def _renders(template: Template, turns: tuple[Turn, ...], tools: Sequence[JsonObject]) -> bool:
    """Whether the template renders the turns, and leaves none out: a single rendering, where the test takes many."""
    if not turns:
        return False
    try:
        text = template.render(turns, add_generation_prompt=turns[-1].role != "assistant", tools=tools)
    except RefusedError:
        return False
    calls = (str((call.get("function") or call).get("name")) for turn in turns for call in turn.tool_calls)
    inputs = (turn for turn in turns if turn.role in {"system", "developer", "user"})
    return not any(is_left_out(turn, text) for turn in inputs) and all(name in text for name in calls)


def _without_tools(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(turn for turn in turns if turn.role != "tool" and not turn.tool_calls)


def _without_reasoning(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(replace(turn, reasoning_content=None) for turn in turns)


def _one_call(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(replace(turn, tool_calls=turn.tool_calls[:1]) for turn in turns)


def _developer_as_system(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(replace(turn, role="system") if turn.role == "developer" else turn for turn in turns)


def _system_first_only(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return turns[:1] + _without_system(turns[1:])


def _without_system(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(turn for turn in turns if turn.role not in {"system", "developer"})


def _question_first(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    head = sum(turn.role == "system" for turn in turns[:1])
    opens = turns[head : head + 1]
    return (*turns[:head], QUESTION, *turns[head:]) if opens and opens[0].role == "assistant" else turns


def _alternating(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    following = (turn for before, turn in pairwise(turns) if turn.role != before.role)
    return (*turns[:1], *following)


def _not_alternating(turns: Sequence[Turn]) -> str:
    numbers = (number for number, (one, two) in enumerate(pairwise(turns), 1) if one.role == two.role)
    number = next(numbers, 0)
    if not number:
        return "its user and assistant turns do not alternate"
    return f"turns {number} and {number + 1} are both `{turns[number - 1].role}`, but it requires alternating roles"


CHANGES = (
    _Change(
        change=_one_call,
        rule=lambda _: "it allows one tool call per turn",
        remedy="Put each call into a separate turn, followed by its result, or set TUNE_CHAT_TEMPLATE to a template "
        "that allows several, such as `qwen-2.5`.",
    ),
    _Change(
        change=_system_first_only,
        rule=lambda _: "it allows a system turn only at the start",
        remedy="Keep one system turn, as the first of the conversation.",
    ),
    _Change(
        change=_developer_as_system,
        rule=lambda _: "it does not know the role `developer`",
        remedy="Name the role `system`.",
    ),
    _Change(
        change=_without_system,
        rule=lambda _: "it does not allow system turns",
        remedy="Put the system text at the start of the first user turn, or set TUNE_CHAT_TEMPLATE to a template that "
        "allows system turns; this job's `gemma`, `llama-2`, `mistral` and `mistral-nemo` do the former themselves.",
    ),
    _Change(
        change=_question_first,
        rule=lambda _: "it requires a user turn before the first assistant turn",
        remedy="Remove the assistant's turns before the first user turn, or put a user turn before them, or set "
        "TUNE_CHAT_TEMPLATE to a template that allows it, such as `chatml`.",
    ),
    _Change(
        change=_alternating,
        rule=_not_alternating,
        remedy="Merge turns of the same role that follow each other, or set TUNE_CHAT_TEMPLATE to a template that "
        "allows them, such as `chatml`.",
    ),
    _Change(
        change=_without_reasoning,
        rule=lambda _: "it has no place for reasoning (`reasoning_content`) after its generation prompt",
        remedy="Remove the reasoning, or set TUNE_CHAT_TEMPLATE to a template that prints it, such as `qwen-3`.",
    ),
    _Change(
        change=_without_tools,
        rule=lambda _: "it does not accept the tools, tool calls or tool results in this form",
        remedy="Give `tools` and `tool_calls` as OpenAI's API does (Mistral's templates also want a `tool_call_id` of "
        "nine letters or digits), or set TUNE_CHAT_TEMPLATE to a template for tools, such as `qwen-2.5`.",
        drops_tools=True,
    ),
)
