"""A row's fields -> an example. Knows the six formats, the names of their columns and what makes a row invalid.

Knows nothing of files; single messages are read by `job.data.reading.messages`. Sources: TRL's dataset formats
(`messages`, `prompt`/`completion`), OpenAI's chat messages, ShareGPT's `conversations`, Stanford Alpaca's three fields
with LLaMA-Factory's `system` and `history`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from job.data.examples import Example, JsonObject, Turn
from job.data.reading import marks, messages
from job.data.reading.fields import (
    Fields,
    InvalidError,
    as_decoded_objects,
    as_list,
    as_objects,
    check_encodable,
    kind_of,
    names_with_value,
    optional_text,
    quoted,
    text_at,
    value_of,
)
from job.runtime.errors import DataError

PREFERENCES = (
    "This job does not train on preference pairs. TUNE_COLUMNS=completion=chosen trains on the good answers alone, or "
    "TUNE_COLUMNS=messages=chosen where these are whole conversations."
)
ONE_FORMAT = (
    "All rows of a file have one format: give these rows the column, move them to another file, or name their column "
    "by TUNE_COLUMNS."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format: the columns it needs, their content in words, and how they become turns."""

    needs: tuple[str, ...]
    holds: str
    turns: Callable[[Fields], tuple[Turn, ...]]


def parse_row(row: Any, *, format: str, source: str, line: int) -> Example:  # noqa: A002 - the domain's word
    """One row as an example. Raises InvalidError with the reason."""
    if not isinstance(row, dict):
        raise InvalidError(
            f"the row is {kind_of(row)}, not an object",
            remedy="Write each row as an object with named columns: `{...}`.",
        )
    known = FORMATS[format]
    if missing := [column for column in known.needs if value_of(row, column) is None]:
        present = quoted(names_with_value(row)) or "none"
        raise InvalidError(f"no {quoted(missing)} (columns: {present})", remedy=ONE_FORMAT)
    unread: tuple[str, ...] = ()
    more = len(row) > len(known.needs)
    if more:
        marks.check_row(row, format)
        unread = tuple(marks.unread_columns(row, READ[format]))
    if format == "text":
        return Example(source=source, line=line, format=format, text=text_at(row, "text", empty=False), unread=unread)
    turns, tools = known.turns(row), _tools(row, format) if more else ()
    turns = _with_system(row, turns) if more else turns
    _check_learnable(turns)
    return Example(source=source, line=line, format=format, turns=turns, tools=tools, unread=unread)


def detect_format(name: str, columns: set[str], *, named: Collection[str] = ()) -> str:
    """The one format whose columns the file has. Raises DataError for none or several: nothing is guessed.

    Args:
        named: our names in TUNE_COLUMNS; a format with one of these columns wins over the others.
    """
    matching = [key for key, known in FORMATS.items() if columns.issuperset(known.needs)]
    preferred = [key for key in matching if not set(named).isdisjoint(FORMATS[key].needs)]
    if len(preferred or matching) == 1:
        return (preferred or matching)[0]
    found = f"{name} has the columns {quoted(sorted(columns)) or 'none'}"
    if matching:
        choices = " or ".join(f"TUNE_FORMAT={key}" for key in matching)
        raise DataError(
            f"{found}, which match more than one format: {_needed(matching)}.",
            remedy=f"Set {choices}, or put rows of different formats into separate files.",
        )
    raise DataError(
        f"{found}, which match none of the formats: {_needed(list(FORMATS))}.",
        remedy=PREFERENCES
        if {"chosen", "rejected"} <= columns
        else "Name the columns, as in TUNE_COLUMNS=prompt=query,completion=reply; or set "
        f"TUNE_FORMAT={'|'.join(FORMATS)} if only some rows lack them.",
    )


def columns_of(row: Any) -> set[str]:
    """The columns in which a row has a value; empty for a row that is not an object."""
    return set(names_with_value(row)) if isinstance(row, dict) else set()


def _needed(names: list[str]) -> str:
    return "; ".join(f"{name} needs {quoted(list(FORMATS[name].needs))} ({FORMATS[name].holds})" for name in names)


def _check_learnable(turns: tuple[Turn, ...]) -> None:
    """Raise InvalidError for a row with no answer to learn, which would otherwise get into the evaluation and the
    samples."""
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise InvalidError(
            "the conversation has no assistant turn, so there is nothing to learn",
            remedy="Remove these rows, or give them the answer.",
        )
    if not any(turn.trained for turn in answers):
        raise InvalidError(
            "every assistant turn is marked as context only, so there is nothing to learn",
            remedy="Remove these rows, or mark an answer as learned.",
        )


def _tools(row: Fields, format: str) -> tuple[JsonObject, ...]:  # noqa: A002 - the domain's word
    """OpenAI's `tools`, or its older `functions`, in the shape of `tools`."""
    tools, functions = value_of(row, "tools"), value_of(row, "functions")
    if tools not in (None, "", []):
        found = as_decoded_objects(tools, "`tools`")
    elif format in marks.CONVERSATIONS and functions not in (None, "", []):
        found = [{"type": "function", "function": one} for one in as_decoded_objects(functions, "`functions`")]
    else:
        return ()
    for tool in found:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidError(
                "`tools` holds an object without a name",
                remedy='Write a tool as {"type": "function", "function": {"name": ..., "parameters": {...}}}.',
            )
    check_encodable(found, "`tools`")
    return tuple(found)


def _with_system(row: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The column `system` before the conversation; where that begins with a system turn too, both must be equal."""
    content = optional_text(row, "system")
    if not content.strip():
        return turns
    if turns[0].role not in ("system", "developer"):
        return (Turn(role="system", content=content), *turns)
    if turns[0].content.strip() != content.strip():
        raise InvalidError(
            "the column `system` and the conversation's system turn differ",
            remedy="Keep one of them.",
        )
    return turns


def _messages(row: Fields) -> tuple[Turn, ...]:
    return messages.openai_turns(row["messages"], "`messages`")


def _sharegpt(row: Fields) -> tuple[Turn, ...]:
    return messages.sharegpt_turns(row["conversations"], "`conversations`")


def _alpaca(row: Fields) -> tuple[Turn, ...]:
    question = Turn(
        role="user", content=text_at(row, "instruction", empty=False), input=optional_text(row, "input").strip()
    )
    return (*_history(row), question, Turn(role="assistant", content=text_at(row, "output")))


def _prompt_completion(row: Fields) -> tuple[Turn, ...]:
    """Both text, or both lists of messages (TRL's conversational kind), perhaps as JSON text in a CSV file's cells."""
    prompt, completion = _perhaps_messages(row["prompt"]), _perhaps_messages(row["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        if value_of(row, "history") not in marks.NONE:
            raise InvalidError(
                "the row has `history`, but `prompt` is a list of messages",
                remedy="Write the earlier messages into `prompt`.",
            )
        return _conversational(prompt, completion)
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        raise InvalidError(
            f"`prompt` is {kind_of(row['prompt'])} and `completion` is {kind_of(row['completion'])}",
            remedy="Write both as text, or both as lists of messages.",
        )
    return _pair(row, "prompt", "completion")


def _perhaps_messages(value: Any) -> Any:
    """JSON text that can only be a list of messages as that list; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        listed = as_objects(value, "")
    except InvalidError:
        return value
    return listed if listed and all({"role", "content"} <= message.keys() for message in listed) else value


def _conversational(prompt: list[Any], completion: list[Any]) -> tuple[Turn, ...]:
    before, after = messages.openai_turns(prompt, "`prompt`"), messages.openai_turns(completion, "`completion`")
    if messages.any_marked_learned(prompt, "`prompt`: "):
        raise InvalidError(
            "`prompt` has a message that is marked as learned, but a prompt is only context",
            remedy="Move it to `completion`, or put both lists into one column `messages`.",
        )
    if not any(turn.role == "assistant" for turn in after):
        raise InvalidError(
            "`completion` has no assistant turn, so there is nothing to learn",
            remedy="Remove these rows, or give them the answer.",
        )
    return (*(replace(turn, trained=False) for turn in before), *after)


def _question_answer(row: Fields) -> tuple[Turn, ...]:
    return _pair(row, "question", "answer")


def _pair(row: Fields, asked: str, answered: str) -> tuple[Turn, ...]:
    question = Turn(role="user", content=text_at(row, asked))
    return (*_history(row), question, Turn(role="assistant", content=text_at(row, answered)))


def _history(row: Fields) -> tuple[Turn, ...]:
    """Earlier questions and answers, as LLaMA-Factory and ms-swift write them; as there, the answers are learned."""
    history = value_of(row, "history")
    if history in (None, "", []):
        return ()
    turns: list[Turn] = []
    pairs = as_list(history, "`history`")
    messages.check_turn_count(2 * len(pairs), "`history`")
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise InvalidError(
                f"`history`, pair {number}: it is not a list of two texts",
                remedy="Write `history` as [[question, answer], ...], or rename the column if it means something else.",
            )
        check_encodable(pair, "`history`")
        turns += [Turn(role="user", content=pair[0]), Turn(role="assistant", content=pair[1])]
    return tuple(turns)


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
_OPTIONAL = {"system", "tools", "history"}
READ = {
    **{name: {*known.needs, *_OPTIONAL} for name, known in FORMATS.items()},
    **{name: {*FORMATS[name].needs, "system", "tools", "functions"} for name in marks.CONVERSATIONS},
    "alpaca": {*FORMATS["alpaca"].needs, "input", *_OPTIONAL},
    "text": {"text"},
}
"""The columns that each format reads, besides marks."""
