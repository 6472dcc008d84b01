"""A row's fields -> an example. Knows the six formats, what their columns are called and what makes a row invalid.

Knows nothing of files. Sources: TRL's dataset formats (`messages`, `prompt`/`completion`), OpenAI's chat messages,
ShareGPT's `conversations`, Stanford Alpaca's three fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from job.errors import DataError
from job.examples import Example, JsonObject, Turn

Fields = Mapping[str, Any]
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
SURROGATE = re.compile("[\ud800-\udfff]")  # looked for in every text: the expression is ten times as fast as a loop
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response"), "tool"),
}


class InvalidError(ValueError):
    """Why a row is no example; the caller adds file and line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format: the columns it needs, what they hold, and how they become turns."""

    needs: tuple[str, ...]
    holds: str
    turns: Callable[[Fields], tuple[Turn, ...]]


def example(fields: Any, *, format: str, source: str, line: int) -> Example:  # noqa: A002 - the domain's word
    """One row as an example. Raises InvalidError with the reason."""
    if not isinstance(fields, dict):
        raise InvalidError(f"the row is {_kind(fields)}, not an object")
    known = FORMATS[format]
    if missing := [column for column in known.needs if fields.get(column) is None]:
        raise InvalidError(f"no {_quoted(missing)} (columns: {_quoted(_present(fields)) or 'none'})")
    if format == "text":
        return Example(source=source, line=line, format=format, text=_text(fields, "text", empty=False))
    turns = known.turns(fields)
    if not any(turn.role == "assistant" for turn in turns):
        raise InvalidError("the conversation has no assistant turn, so there is nothing to learn")
    return Example(source=source, line=line, format=format, turns=turns, tools=_tools(fields.get("tools")))


def detect(name: str, columns: set[str]) -> str:
    """The one format whose columns are all there. Raises DataError for none or several: nothing is guessed."""
    matching = [key for key, known in FORMATS.items() if columns.issuperset(known.needs)]
    if len(matching) == 1:
        return matching[0]
    found = f"{name} has the columns {_quoted(sorted(columns)) or 'none'}"
    if matching:
        raise DataError(
            f"{found}, which is more than one format: {_wanted(matching)}.",
            remedy="Set " + " or ".join(f"TUNE_FORMAT={key}" for key in matching) + ".",
        )
    raise DataError(
        f"{found}, which is no format that is known: {_wanted(list(FORMATS))}.",
        remedy=f"Rename the columns, or set TUNE_FORMAT={'|'.join(FORMATS)} if only some rows lack them.",
    )


def columns_of(fields: Any) -> set[str]:
    """The columns in which a row has a value; empty for a row that is no object."""
    return set(_present(fields)) if isinstance(fields, dict) else set()


def _present(fields: Fields) -> list[str]:
    return [str(key) for key, value in fields.items() if value is not None]


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _wanted(names: list[str]) -> str:
    return "; ".join(f"{name} wants {_quoted(list(FORMATS[name].needs))} ({FORMATS[name].holds})" for name in names)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _text(fields: Fields, key: str, *, empty: bool = True, where: str = "") -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise InvalidError(f"{where}`{key}` is {_kind(value)}, not text")
    if not empty and not value.strip():
        raise InvalidError(f"{where}`{key}` is empty")
    if not value.isascii() and SURROGATE.search(value):
        raise InvalidError(f"{where}`{key}` holds half a surrogate pair, which is no character")
    return value


def _optional(fields: Fields, key: str) -> str:
    return "" if fields.get(key) is None else _text(fields, key)


def _decoded(value: Any, what: str) -> Any:
    """CSV cells and some Parquet columns hold lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f"{what} is text, but not JSON: {error}") from error


def _objects(value: Any, what: str) -> list[JsonObject]:
    listed = _decoded(value, what)
    if not isinstance(listed, list):
        raise InvalidError(f"{what} is {_kind(listed)}, not a list")
    if bad := [item for item in listed if not isinstance(item, dict)]:
        raise InvalidError(f"{what} holds {_kind(bad[0])}, not an object")
    return listed


def _tools(value: Any) -> tuple[JsonObject, ...]:
    return () if value is None or value in ("", []) else tuple(_objects(value, "`tools`"))


def _system(fields: Fields) -> tuple[Turn, ...]:
    content = _optional(fields, "system")
    return (Turn(role="system", content=content),) if content.strip() else ()


def _conversation(value: Any, what: str, turn: Callable[[JsonObject, str], Turn]) -> tuple[Turn, ...]:
    messages = _objects(value, what)
    if not messages:
        raise InvalidError(f"{what} is empty")
    return tuple(turn(message, f"{what}, turn {number}: ") for number, message in enumerate(messages, 1))


def _turn(message: JsonObject, where: str) -> Turn:
    role = message.get("role")
    if role not in ROLES:
        raise InvalidError(f"{where}role {role!r} is none of {', '.join(sorted(ROLES))}")
    calls = tuple(_objects(message["tool_calls"], f"{where}`tool_calls`")) if message.get("tool_calls") else ()
    content = "" if calls and message.get("content") is None else _content(message, where)
    optional: Any = {key: _text(message, key, where=where) for key in OPTIONAL if message.get(key) is not None}
    return Turn(role=role, content=content, tool_calls=calls, **optional)


OPTIONAL = ("tool_call_id", "name", "reasoning_content")


def _content(message: JsonObject, where: str) -> str:
    """Text, or a list of text parts as OpenAI writes them."""
    if not isinstance(message.get("content"), list):
        return _text(message, "content", where=where)
    parts = _objects(message["content"], f"{where}`content`")
    if other := [part.get("type") for part in parts if part.get("type") != "text"]:
        raise InvalidError(f"{where}a content part is of type {other[0]!r}; only text is trained on")
    return "".join(_text(part, "text", where=where) for part in parts)


def _sharegpt_turn(message: JsonObject, where: str) -> Turn:
    """`from`/`value` with ShareGPT's names for roles; rows that were half converted have `role`/`content`."""
    role = message.get("from", message.get("role"))
    if not isinstance(role, str) or role.lower() not in SHAREGPT_ROLES:
        raise InvalidError(f"{where}role {role!r} is none of {', '.join(sorted(SHAREGPT_ROLES))}")
    renamed = {"role": SHAREGPT_ROLES[role.lower()]}
    if "value" in message or "content" not in message:
        renamed["content"] = _text(message, "value", where=where)
    return _turn({**message, **renamed}, where)


def _messages(fields: Fields) -> tuple[Turn, ...]:
    return _conversation(fields["messages"], "`messages`", _turn)


def _sharegpt(fields: Fields) -> tuple[Turn, ...]:
    return _system(fields) + _conversation(fields["conversations"], "`conversations`", _sharegpt_turn)


def _alpaca(fields: Fields) -> tuple[Turn, ...]:
    question = Turn(
        role="user", content=_text(fields, "instruction", empty=False), input=_optional(fields, "input").strip()
    )
    return (*_system(fields), question, Turn(role="assistant", content=_text(fields, "output")))


def _prompt_completion(fields: Fields) -> tuple[Turn, ...]:
    """Both text, or both lists of messages (TRL's conversational kind)."""
    if isinstance(fields["prompt"], str) and isinstance(fields["completion"], str):
        return (*_system(fields), *_pair(fields, "prompt", "completion"))
    prompt = _conversation(fields["prompt"], "`prompt`", _turn)
    completion = _conversation(fields["completion"], "`completion`", _turn)
    if not any(turn.role == "assistant" for turn in completion):
        raise InvalidError("`completion` has no assistant turn, so there is nothing to learn")
    return (*(replace(turn, trained=False) for turn in prompt), *completion)


def _question_answer(fields: Fields) -> tuple[Turn, ...]:
    return (*_system(fields), *_pair(fields, "question", "answer"))


def _pair(fields: Fields, asked: str, answered: str) -> tuple[Turn, Turn]:
    answer = _text(fields, answered)
    return Turn(role="user", content=_text(fields, asked)), Turn(role="assistant", content=answer)


FORMATS: dict[str, Format] = {
    "messages": Format(needs=("messages",), holds="a list of {role, content}", turns=_messages),
    "sharegpt": Format(needs=("conversations",), holds="a list of {from, value}", turns=_sharegpt),
    "alpaca": Format(needs=("instruction", "output"), holds="text; `input` may be missing", turns=_alpaca),
    "prompt_completion": Format(
        needs=("prompt", "completion"), holds="text, or lists of messages", turns=_prompt_completion
    ),
    "question_answer": Format(needs=("question", "answer"), holds="text", turns=_question_answer),
    "text": Format(needs=("text",), holds="text, used as it is", turns=lambda _: ()),
}
