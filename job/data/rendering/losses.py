"""A conversation and its rendering -> what the rendering lacks: every answer is held against the text that is learned.

A template may drop reasoning, text next to a tool call, arguments, white space, tools or names, and say nothing. What a
question says must be there (`check_printed`); what an answer says and the model would not learn is counted by kind, in
words that quote nothing but tags. Knows characters, nothing of tokens; `job.data.rendering.labels` adds what tokens cut
off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from job.data.examples import JsonObject, Turn
from job.data.tokenizer.chat_template import RefusedError, Template, is_left_out, is_printed

NotRendered = Literal["tools", "reasoning", "white_space", "names", "earlier_answers"]
"""A part of a row that its text lacks, besides the text of its answers."""
TAG = re.compile(r"</?[A-Za-z][\w.|-]{0,30}>|<\|[\w.-]{1,30}\|>|\[/?[A-Z][A-Z_]{1,30}\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What a row's text lacks."""

    not_rendered: tuple[NotRendered, ...] = ()
    of_answers: tuple[str, ...] = ()
    """What the learned answers say and their text does not: kinds in words, each once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedAnswer:
    """The rendering of a learned turn."""

    turn: Turn
    text: str
    """The text that is learned, after the generation prompt: some prompts open the thought that answers begin with."""


def find_losses(
    template: Template,
    turns: Sequence[Turn],
    tools: Sequence[JsonObject],
    *,
    answers: Sequence[LearnedAnswer],
    text: str,
) -> Losses:
    """Hold a conversation against its text.

    Args:
        turns: up to the last answer that is learned.
        text: all that is rendered of these turns.
    """
    names = [str((tool.get("function") or tool).get("name")) for tool in tools]
    found: list[NotRendered] = []
    if names and not (template.shows_tools and all(is_printed(name, text) for name in names)):
        found.append("tools")
    if any(_as_answer(one.turn.reasoning_content) and _drops_reasoning(one) for one in answers):
        found.append("reasoning")
    if any(_is_spaced_otherwise(one) for one in answers):
        found.append("white_space")
    if any(turn.name and turn.role != "tool" and not is_printed(turn.name, text) for turn in turns):
        found.append("names")
    if any(turn.role == "assistant" and is_left_out(turn, text) for turn in turns[:-1]):
        found.append("earlier_answers")
    return Losses(not_rendered=tuple(found), of_answers=tuple(dict.fromkeys(_lost(answers))))


def check_printed(turns: Sequence[Turn], text: str) -> None:
    """Raise RefusedError if a text lacks one of the turns; answers are not checked.

    A tool's result must be there only if no user turn follows: some templates drop it after the next question.
    """
    asked = max((at for at, turn in enumerate(turns) if turn.role == "user"), default=-1)
    for index, turn in enumerate(turns):
        expected = turn.role != "assistant" and (turn.role != "tool" or index > asked)
        if expected and is_left_out(turn, text):
            raise RefusedError(f"it leaves out turn {index + 1}, of the role `{turn.role}`")


def _as_answer(text: str | None) -> str:
    return (text or "").strip()


def _drops_reasoning(answer: LearnedAnswer) -> bool:
    return is_left_out(Turn(role="assistant", content=answer.turn.reasoning_content or ""), answer.text)


def _is_spaced_otherwise(answer: LearnedAnswer) -> bool:
    """Whether an answer is there, but with other white space: most often without that at its ends."""
    content, text = answer.turn.content, answer.text
    if not content.strip() or content in text or _is_json_printed(content, text):
        return False
    return not _kind(content.strip(), text)


def _lost(answers: Sequence[LearnedAnswer]) -> Iterator[str]:
    for answer in answers:
        content, calls = answer.turn.content.strip(), answer.turn.message().get("tool_calls", ())
        if content and (kind := _kind(content, answer.text)):
            yield "text next to a tool call" if calls and not TAG.search(content) else kind
        reasoning = _as_answer(answer.turn.reasoning_content)
        if reasoning and not _drops_reasoning(answer) and _kind(reasoning, answer.text):
            yield "a part of the reasoning"
        if not all(_is_value_printed(leaf, answer.text) for call in calls for leaf in _leaves(_arguments(call))):
            yield "arguments of tool calls"


def _kind(said: str, text: str) -> str:
    """What a text lacks of what is said, in words; empty if nothing but white space that separates nothing."""
    if said in text or _is_json_printed(said, text):
        return ""
    squeezed, at = "".join(said.split()), "".join(text.split()).find("".join(said.split()))
    if at >= 0:
        places = [place for place, character in enumerate(text) if not character.isspace()]
        rest = iter(text[places[at] : places[at + len(squeezed) - 1] + 1])
        more_space_only = all(character in rest for character in said)  # in their order
        return "" if more_space_only else "white space inside the text"
    tags = (tag for tag in TAG.findall(said) if tag not in text)
    tag = next(tags, "") or next(iter(TAG.findall(said)), "")
    return f"text with `{tag.replace('/', '', 1)}`" if tag else "text"


def _is_json_printed(said: str, text: str) -> bool:
    return is_printed(said, text) or json.dumps(said)[1:-1] in text


def _arguments(call: JsonObject) -> Any:
    return (call.get("function") or call).get("arguments")


def _leaves(value: Any) -> Iterator[str]:
    """The names and the texts of a call's arguments; how numbers are written is up to the template."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _is_value_printed(leaf: str, text: str) -> bool:
    return leaf in text or _is_json_printed(leaf, text) or repr(leaf)[1:-1] in text
