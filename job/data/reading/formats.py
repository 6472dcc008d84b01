"""A row's fields -> an example. Knows the six formats, what their columns are called and what makes a row invalid.

Knows nothing of files, and of single messages only that `job.data.reading.messages` reads them. Sources: TRL's dataset
formats (`messages`, `prompt`/`completion`), OpenAI's chat messages, ShareGPT's `conversations`, Stanford Alpaca's three
fields with LLaMA-Factory's `system` and `history`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from job.data.examples import Example, JsonObject, Turn
from job.data.reading import fields as values
from job.data.reading import messages
from job.data.reading.fields import Fields, InvalidError, kind, optional, quoted, text, value_of
from job.observability.masking import shown
from job.runtime.errors import DataError

MEDIA = ("images", "videos", "audios")
UNDESIRED = ("label", "kto_tag")
"""Booleans by which TRL and LLaMA-Factory mark an answer as a bad one, for preference training (KTO)."""
LEFT_OUT = ("train", "training", "loss")
"""Booleans by which other tools leave a row out, as they do a message."""
WEIGHTS = ("weight", "loss_weight")
RENAME = "Remove these rows, or rename the column if it means something else."
PREFERENCES = (
    "Pairs of answers are not trained on as such. The good ones alone are with TUNE_COLUMNS=completion=chosen, or with "
    "TUNE_COLUMNS=messages=chosen where they are whole conversations."
)
ONE_FORMAT = (
    "All rows of a file have one format: give these rows the column, put them into a file of their own, or name their "
    "column by TUNE_COLUMNS."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format: the columns it needs, what they hold, and how they become turns."""

    needs: tuple[str, ...]
    holds: str
    turns: Callable[[Fields], tuple[Turn, ...]]


def example(fields: Any, *, format: str, source: str, line: int) -> Example:  # noqa: A002 - the domain's word
    """One row as an example. Raises InvalidError with the reason."""
    if not isinstance(fields, dict):
        raise InvalidError(
            f"the row is {kind(fields)}, not an object",
            remedy="Write each row as an object with named columns: `{...}`.",
        )
    known = FORMATS[format]
    if missing := [column for column in known.needs if value_of(fields, column) is None]:
        there = quoted(values.present(fields)) or "none"
        raise InvalidError(f"no {quoted(missing)} (columns: {there})", remedy=ONE_FORMAT)
    if len(fields) > len(known.needs):
        _refuse_what_would_be_lost(fields, format)
    if format == "text":
        return Example(source=source, line=line, format=format, text=text(fields, "text", empty=False))
    tools: tuple[JsonObject, ...] = ()
    if len(fields) == len(known.needs):  # no other columns to look at
        said = known.turns(fields)
    else:
        said, tools = _with_system(fields, known.turns(fields)), _tools(fields)
    _refuse_nothing_to_learn(said)
    return Example(source=source, line=line, format=format, turns=said, tools=tools)


def detect(name: str, columns: set[str], *, named: Collection[str] = ()) -> str:
    """The one format whose columns are all there. Raises DataError for none or several: nothing is guessed.

    Of several, the one whose column the user named (`named`: our names in TUNE_COLUMNS) is meant.
    """
    matching = [key for key, known in FORMATS.items() if columns.issuperset(known.needs)]
    meant = [key for key in matching if not set(named).isdisjoint(FORMATS[key].needs)]
    if len(meant or matching) == 1:
        return (meant or matching)[0]
    found = f"{name} has the columns {quoted(sorted(columns)) or 'none'}"
    if matching:
        choices = " or ".join(f"TUNE_FORMAT={key}" for key in matching)
        raise DataError(
            f"{found}, which is more than one format: {_wanted(matching)}.",
            remedy=f"Set {choices}, or put rows of different formats into files of their own.",
        )
    raise DataError(
        f"{found}, which is no format that is known: {_wanted(list(FORMATS))}.",
        remedy=PREFERENCES
        if {"chosen", "rejected"} <= columns
        else "Say which columns are meant, as in TUNE_COLUMNS=prompt=query,completion=reply; or set "
        f"TUNE_FORMAT={'|'.join(FORMATS)} if only some rows lack them.",
    )


def columns_of(fields: Any) -> set[str]:
    """The columns in which a row has a value; empty for a row that is no object."""
    return set(values.present(fields)) if isinstance(fields, dict) else set()


def _wanted(names: list[str]) -> str:
    return "; ".join(f"{name} wants {quoted(list(FORMATS[name].needs))} ({FORMATS[name].holds})" for name in names)


def _refuse_what_would_be_lost(fields: Fields, format: str) -> None:  # noqa: A002 - the domain's word
    """Columns that change what the row means, in tools that read them; this one would train on in silence."""
    ready = format == "text"
    if lost := [key for key in MEDIA if not ready and value_of(fields, key) not in (None, "", [])]:
        raise InvalidError(
            f"the row has {quoted(lost)}; only text is trained on", remedy="Remove these rows, or the column."
        )
    if lost := [key for key in UNDESIRED if not ready and _number(fields, key) == 0]:  # texts have labels of any kind
        raise InvalidError(
            f"{quoted(lost)} is false, which marks an answer that is not wanted; preferences are not trained on",
            remedy=RENAME,
        )
    if lost := [key for key in LEFT_OUT if _number(fields, key) == 0]:
        raise InvalidError(f"{quoted(lost)} is false, which marks a row that is not learned", remedy=RENAME)
    if lost := [key for key in WEIGHTS if _number(fields, key) not in (None, 1)]:
        raise InvalidError(
            f"the row has {quoted(lost)} {shown(repr(fields[lost[0]]))}, and rows are not weighted",
            remedy="Remove rows that should not count, and the column; or rename it if it means something else.",
        )


def _number(fields: Fields, key: str) -> float | None:
    """The number or boolean in a column, also one written as text, as CSV files do; None if it holds neither."""
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        value = {"false": "0", "true": "1"}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _refuse_nothing_to_learn(said: tuple[Turn, ...]) -> None:
    """Counting such rows instead would let them into the evaluation and the samples, where they say nothing."""
    answers = [turn for turn in said if turn.role == "assistant"]
    if not answers:
        raise InvalidError(
            "the conversation has no assistant turn, so there is nothing to learn",
            remedy="Remove these rows, or give them the answer.",
        )
    if not any(turn.trained for turn in answers):
        raise InvalidError(
            "every assistant turn is marked as only context, so there is nothing to learn",
            remedy="Remove these rows, or mark an answer as learned.",
        )


def _tools(fields: Fields) -> tuple[JsonObject, ...]:
    """OpenAI's `tools`, or its older `functions`, in the shape of `tools`."""
    tools, functions = value_of(fields, "tools"), value_of(fields, "functions")
    if tools not in (None, "", []):
        found = values.object_texts(tools, "`tools`")
    elif isinstance(functions, list) and "messages" in fields:
        found = [{"type": "function", "function": one} for one in values.object_texts(functions, "`functions`")]
    else:
        return ()
    for tool in found:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidError(
                "`tools` holds an object without a name",
                remedy='Write a tool as {"type": "function", "function": {"name": ..., "parameters": {...}}}.',
            )
    values.whole(found, "`tools`")
    return tuple(found)


def _with_system(fields: Fields, said: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The column `system` before the conversation. Where that begins with a system turn too, both must be the same."""
    content = optional(fields, "system")
    if not content.strip():
        return said
    if said[0].role not in ("system", "developer"):
        return (Turn(role="system", content=content), *said)
    if said[0].content.strip() != content.strip():
        raise InvalidError(
            "the column `system` and the conversation's own system turn do not say the same",
            remedy="Keep one of them.",
        )
    return said


def _messages(fields: Fields) -> tuple[Turn, ...]:
    return messages.messages(fields["messages"], "`messages`")


def _sharegpt(fields: Fields) -> tuple[Turn, ...]:
    return messages.sharegpt(fields["conversations"], "`conversations`")


def _alpaca(fields: Fields) -> tuple[Turn, ...]:
    question = Turn(
        role="user", content=text(fields, "instruction", empty=False), input=optional(fields, "input").strip()
    )
    return (*_history(fields), question, Turn(role="assistant", content=text(fields, "output")))


def _prompt_completion(fields: Fields) -> tuple[Turn, ...]:
    """Both text, or both lists of messages (TRL's conversational kind), perhaps as JSON text in a CSV file's cells."""
    prompt, completion = _perhaps_messages(fields["prompt"]), _perhaps_messages(fields["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversational(prompt, completion)
    if isinstance(fields["prompt"], list) or isinstance(fields["completion"], list):
        raise InvalidError(
            f"`prompt` is {kind(fields['prompt'])} and `completion` is {kind(fields['completion'])}",
            remedy="Write both as text, or both as lists of messages.",
        )
    return _pair(fields, "prompt", "completion")


def _perhaps_messages(value: Any) -> Any:
    """JSON text that can only be a list of messages as that list; everything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        listed = values.objects(value, "")
    except InvalidError:
        return value
    return listed if listed and all({"role", "content"} <= message.keys() for message in listed) else value


def _conversational(prompt: list[Any], completion: list[Any]) -> tuple[Turn, ...]:
    before, after = messages.messages(prompt, "`prompt`"), messages.messages(completion, "`completion`")
    if messages.asks_to_learn(prompt, "`prompt`: "):
        raise InvalidError(
            "`prompt` has a message that is marked as learned, and a prompt is only context",
            remedy="Move it to `completion`, or put both lists into one column `messages`.",
        )
    if not any(turn.role == "assistant" for turn in after):
        raise InvalidError(
            "`completion` has no assistant turn, so there is nothing to learn",
            remedy="Remove these rows, or give them the answer.",
        )
    return (*(replace(turn, trained=False) for turn in before), *after)


def _question_answer(fields: Fields) -> tuple[Turn, ...]:
    return _pair(fields, "question", "answer")


def _pair(fields: Fields, asked: str, answered: str) -> tuple[Turn, ...]:
    question = Turn(role="user", content=text(fields, asked))
    return (*_history(fields), question, Turn(role="assistant", content=text(fields, answered)))


def _history(fields: Fields) -> tuple[Turn, ...]:
    """Earlier questions and answers, as LLaMA-Factory and ms-swift write them; the answers are learned, as there."""
    history = value_of(fields, "history")
    if history in (None, "", []):
        return ()
    said: list[Turn] = []
    pairs = values.items(history, "`history`")
    messages.check_number(2 * len(pairs), "`history`")
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise InvalidError(
                f"`history`, pair {number}: it is not a list of two texts",
                remedy="Write `history` as [[question, answer], ...], or rename the column if it means something else.",
            )
        values.whole(pair, "`history`")
        said += [Turn(role="user", content=pair[0]), Turn(role="assistant", content=pair[1])]
    return tuple(said)


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
