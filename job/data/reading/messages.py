"""Messages -> turns: roles, contents, tool calls, and which of them are learned.

Sources: OpenAI's chat messages (`tool_calls`, the older `function_call`), ShareGPT's `from` and `value` as
LLaMA-Factory reads them (`function_call`, `observation`), ms-swift's `tool_call` and `tool_response`. Marks are those
of `job.data.reading.marks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from job.data.examples import JsonObject, Turn
from job.data.reading import marks
from job.data.reading.fields import (
    InvalidError,
    as_decoded_objects,
    as_objects,
    check_encodable,
    decoded,
    kind_of,
    quoted,
    text_at,
    value_of,
)
from job.observability.masking import shown

ROLES = {role: role for role in ("assistant", "developer", "system", "tool", "user")}
CALL = "call"
"""The role of a message that is only a tool call: its content is the call, as JSON."""
MESSAGES_ROLES = {**ROLES, "function": "tool", "tool_call": CALL, "tool_response": "tool"}
SHAREGPT_ROLES = {
    **MESSAGES_ROLES,
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    "function_call": CALL,
}
MAX_TURNS = 2000
"""Turns of a row: to find an answer, all turns before it are rendered, so that time grows with the square."""
REASONING = ("reasoning_content", "reasoning", "thinking")
READ = (
    frozenset(
        {
            "role",
            "content",
            "from",
            "value",
            "tool_calls",
            "function_call",
            "tool_call_id",
            "name",
            "channel",
            *REASONING,
        }
    )
    | marks.MARKS
)
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of content parts that are text: of chat messages, and of OpenAI's Responses API. LLaMA-Factory's have none."""
OTHER_PARTS = {
    **dict.fromkeys(("thinking", "reasoning"), "Write reasoning into the message's `reasoning_content`, as text."),
    **dict.fromkeys(("tool_use", "tool_call"), "Write calls into the message's `tool_calls`, as OpenAI's API does."),
    "tool_result": "Write the result as a message of role `tool`, with its text as `content`.",
    "refusal": "Write the refusal as text, or remove these rows.",
}
"""What to do about other parts."""
OTHER_ROLES = (
    "Use one of these names. ShareGPT's names (`from`, `value`, human, gpt) are read from `conversations`: "
    "TUNE_COLUMNS=conversations=messages reads them from `messages`."
)
NEW_ROLES = "Use one of these names, or remove these rows."


def openai_turns(value: Any, what: str) -> tuple[Turn, ...]:
    """The turns of a list of `{role, content}`."""
    return _conversation(value, what, _openai_turn)


def sharegpt_turns(value: Any, what: str) -> tuple[Turn, ...]:
    """The turns of a list of `{from, value}`; rows that were converted only in part have `role` and `content`."""
    return _conversation(value, what, _sharegpt_turn)


def any_marked_learned(value: Any, what: str) -> bool:
    """Whether a message of the list is marked as learned."""
    return any(marks.learned_mark(message, what) for message in as_objects(value, what))


def check_turn_count(count: int, what: str) -> None:
    """Raise InvalidError for a conversation with too many turns to render."""
    if count > MAX_TURNS:
        raise InvalidError(
            f"{what} has {count:,} turns, more than {MAX_TURNS:,}",
            remedy="Split the conversation into rows, each with the turns that its answers need.",
        )


def _conversation(value: Any, what: str, read: Any) -> tuple[Turn, ...]:
    listed = as_objects(value, what)
    if not listed:
        raise InvalidError(f"{what} is empty", remedy="Remove rows without messages.")
    check_turn_count(len(listed), what)
    turns: list[Turn] = []
    for number, message in enumerate(listed, 1):
        where = f"{what}, turn {number}: "
        turn, only_calls = read(message, where)
        _check_call_id(turn, turns, where)
        if only_calls and turns and turns[-1].role == "assistant":
            turns[-1] = _joined(turns[-1], turn, where)
        else:
            turns.append(turn)
    return tuple(turns)


def _check_call_id(result: Turn, before: Sequence[Turn], where: str) -> None:
    """Raise InvalidError for a tool's result with the id of a call that does not exist; OpenAI's API rejects it too.

    Where a call has no id, or calls are part of an answer's text, a result may belong to any of them.
    """
    if result.role != "tool" or not result.tool_call_id:
        return
    ids = [str(call.get("id") or "") for turn in before for call in turn.tool_calls]
    if ids and all(ids) and result.tool_call_id not in ids:
        raise InvalidError(
            f"{where}`tool_call_id` is {shown(repr(result.tool_call_id))}, but the calls before it have {quoted(ids)}",
            remedy="Give the result the `id` of the call that it answers, or leave both out.",
        )


def _joined(before: Turn, call: Turn, where: str) -> Turn:
    """An assistant's text and the calls after it, or several calls in a row: one answer of the model, so one turn."""
    if before.trained != call.trained:
        raise InvalidError(
            f"{where}the call and the assistant's turn before it are one answer, but only one of them is learned",
            remedy="Give both the same mark.",
        )
    unread = tuple(dict.fromkeys((*before.unread, *call.unread)))
    return replace(before, tool_calls=(*before.tool_calls, *call.tool_calls), unread=unread)


def _openai_turn(message: JsonObject, where: str) -> tuple[Turn, bool]:
    return _turn(message, where, role=_role(message.get("role"), where, MESSAGES_ROLES, OTHER_ROLES), key="content")


def _sharegpt_turn(message: JsonObject, where: str) -> tuple[Turn, bool]:
    name = message.get(_key(message, "from", "role", where))
    key = _key(message, "value", "content", where)
    lower = name.lower() if isinstance(name, str) else name
    return _turn(message, where, role=_role(lower, where, SHAREGPT_ROLES, NEW_ROLES), key=key)


def _role(name: Any, where: str, known: Mapping[str, str], remedy: str) -> str:
    if not isinstance(name, str) or name not in known:
        raise InvalidError(f"{where}role {shown(repr(name))} is not one of {', '.join(sorted(known))}", remedy=remedy)
    return known[name]


def _key(message: JsonObject, one: str, other: str, where: str) -> str:
    """The one of two keys that has a value. Raises InvalidError if both have values and these differ."""
    first, second = value_of(message, one), value_of(message, other)
    if first is not None and second is not None and first != second:
        raise InvalidError(f"{where}`{one}` and `{other}` differ", remedy="Keep one of them.")
    return other if first is None and (second is not None or (one not in message and other in message)) else one


def _turn(message: JsonObject, where: str, *, role: str, key: str) -> tuple[Turn, bool]:
    """The turn, and whether it consists of calls only."""
    if role != CALL and len(message) == 2 and isinstance(message.get(key), str):  # noqa: PLR2004 - role and content
        return Turn(role=role, content=_content(message, key, where)), False
    marks.check_message(message, where)
    if role == CALL:
        turn = Turn(role="assistant", content="", tool_calls=_calls(_called(message, key, where), f"{where}`{key}`"))
    else:
        calls = _tool_calls(message, role, where)
        content = "" if calls and value_of(message, key) is None else _content(message, key, where)
        turn = Turn(role=role, content=content, tool_calls=calls, **_others(message, where))
    marked = marks.learned_mark(message, where)
    if marked and turn.role != "assistant":
        raise InvalidError(
            f"{where}it is marked as learned, but its role is {turn.role}",
            remedy="Only the assistant's turns are learned: write 0, or remove the mark. TUNE_TRAIN_ON=all learns "
            "whole conversations, without marks.",
        )
    trained = not (marked is False and turn.role == "assistant")
    return replace(turn, trained=trained, unread=tuple(marks.unread_keys(message, READ, key))), role == CALL


def _others(message: JsonObject, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: text_at(message, key, where=where)
        for key in ("tool_call_id", "name")
        if value_of(message, key) is not None
    }
    reasoning = {key: text_at(message, key, where=where) for key in REASONING if value_of(message, key) is not None}
    if len(set(reasoning.values())) > 1:
        raise InvalidError(f"{where}{quoted(list(reasoning))} have different texts", remedy="Keep one of them.")
    return found | {"reasoning_content": next(iter(reasoning.values()))} if reasoning else found


def _content(message: JsonObject, key: str, where: str) -> str:
    """Text, or a list of text parts as OpenAI (`text`) and LLaMA-Factory (`value`) write them."""
    if key not in message:
        raise InvalidError(
            f"{where}no `{key}` (it has {quoted(list(message)) or 'nothing'})",
            remedy=f"Call the field with the text `{key}`.",
        )
    if not isinstance(message[key], list):
        return text_at(message, key, where=where)
    parts = as_objects(message[key], f"{where}`{key}`")
    for part in parts:
        if (kind := part.get("type")) not in TEXT_PARTS:
            raise InvalidError(
                f"{where}a content part is of type {shown(repr(kind))}; only text is trained on",
                remedy=OTHER_PARTS.get(str(kind), "Remove these parts, or these rows."),
            )
        marks.check_part(part, where)
    return "".join(text_at(part, _key(part, "text", "value", where), where=where) for part in parts)


def _tool_calls(message: JsonObject, role: str, where: str) -> tuple[JsonObject, ...]:
    new, old = value_of(message, "tool_calls"), value_of(message, "function_call")
    if new in (None, "", []) and old in (None, ""):
        return ()
    if role != "assistant":
        raise InvalidError(
            f"{where}a turn of role {role} calls a tool",
            remedy="Only an assistant's turn calls tools: correct its role.",
        )
    if old in (None, ""):
        return _calls(new, f"{where}`tool_calls`")
    if new not in (None, "", []):
        raise InvalidError(f"{where}it has `tool_calls` and `function_call`", remedy="Keep `tool_calls`.")
    return _calls(old, f"{where}`function_call`")


def _called(message: JsonObject, key: str, where: str) -> Any:
    if value_of(message, key) in (None, ""):
        raise InvalidError(
            f"{where}`{key}` is empty, but it should be the call",
            remedy='Write the call as JSON: {"name": ..., "arguments": {...}}.',
        )
    return message[key]


def _calls(value: Any, what: str) -> tuple[JsonObject, ...]:
    """One call or several, each as an object or as JSON text."""
    calls = decoded(value, what)
    listed = as_decoded_objects([calls] if isinstance(calls, dict) else calls, what)
    if not listed:
        raise InvalidError(f"{what} is empty", remedy="Remove it, or write the call.")
    return tuple(_call(call, what) for call in listed)


def _call(call: JsonObject, what: str) -> JsonObject:
    """A call in OpenAI's shape with its arguments as an object: many templates would quote JSON text a second time."""
    function = call.get("function", {key: item for key, item in call.items() if key not in ("id", "type", "index")})
    if not isinstance(function, dict):
        raise InvalidError(f"{what}: `function` is {kind_of(function)}, not an object", remedy=_SHAPE)
    text_at(function, "name", empty=False, where=f"{what}: ")
    if value_of(function, "arguments") is None:
        raise InvalidError(f"{what}: the call has no `arguments`", remedy="Write {} for a call without arguments.")
    arguments = function["arguments"]
    given = {} if arguments == "" else decoded(arguments, f"{what}: `arguments`")
    if not isinstance(given, dict):
        raise InvalidError(f"{what}: `arguments` is {kind_of(given)}, not an object", remedy=_SHAPE)
    check_encodable([call, given], f"{what}: the call")
    outer = {"type": "function", **{key: item for key, item in call.items() if key in ("id", "type", "index")}}
    return {**(call if "function" in call else outer), "function": {**function, "arguments": given}}


_SHAPE = 'Write a call as {"type": "function", "function": {"name": ..., "arguments": {...}}}.'
