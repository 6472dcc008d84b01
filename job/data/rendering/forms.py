"""A template -> the same template, given messages in the other forms that templates expect.

OpenAI's API returns a call's arguments as JSON text and null for the content beside it. Most templates want an object
and text, as servers give them (vLLM decodes the arguments); DeepSeek's concatenate the arguments, and print a call only
where the content is null. Which form is right shows in the trial alone: the first that a template accepts is taken.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from job.data.examples import JsonObject, Turn
from job.data.tokenizer.chat_template import Template

_Change = Callable[[JsonObject], JsonObject]


@functools.cache
def call_forms(template: Template) -> tuple[Template, ...]:
    """The template with calls in each form: as an object first, as for most templates."""
    changes: tuple[_Change, ...] = (
        _arguments_as_text,
        _null_content,
        lambda one: _null_content(_arguments_as_text(one)),
    )
    return (template, *(replace(template, apply=_changed(template.apply, change)) for change in changes))


def calls_tools(turns: tuple[Turn, ...]) -> bool:
    """Whether a conversation has a call or the result of one."""
    return any(turn.tool_calls or turn.role == "tool" for turn in turns)


def _changed(apply: Callable[..., str], change: _Change) -> Callable[..., str]:
    def changed(messages: list[JsonObject], **more: Any) -> str:
        return apply(messages=[change(one) if "tool_calls" in one else one for one in messages], **more)

    return changed


def _null_content(message: JsonObject) -> JsonObject:
    return message if message["content"] else message | {"content": None}


def _arguments_as_text(message: JsonObject) -> JsonObject:
    return message | {"tool_calls": [_as_text(call) for call in message["tool_calls"]]}


def _as_text(call: JsonObject) -> JsonObject:
    """A call with its arguments as JSON text, spaced as `tojson` does in templates."""
    if isinstance(function := call.get("function"), dict):
        return call | {"function": _as_text(function)}
    return call | {"arguments": json.dumps(call.get("arguments"), ensure_ascii=False)}
