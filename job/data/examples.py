"""The values that reading, quality and rendering share: a turn, an example, an invalid row.

Knows nothing of files, formats, templates or tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import xxhash

from job.runtime.errors import DataError

JsonObject = dict[str, Any]

CORRECT = "Correct or remove these rows."
MAX_REASON = 1500
"""Characters; the error of a template may quote a whole turn."""
SHOWN = 10
"""How many invalid rows a message lists, besides their total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    """`system`, `developer`, `user`, `assistant` or `tool`."""
    content: str
    """The text; empty if an assistant only calls tools."""
    input: str = ""
    """Alpaca's second field: chat templates see it joined to the content, the `alpaca` block sees it separately."""
    tool_calls: tuple[JsonObject, ...] = ()
    """As in the row (OpenAI's shape), for templates that print tool calls."""
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    """An assistant's reasoning, for templates that print it."""

    trained: bool = True
    """False for an assistant turn that is context only, such as the answers inside a conversational `prompt`."""
    unread: tuple[str, ...] = ()
    """Keys of the message that nothing reads, for the report."""

    @property
    def text(self) -> str:
        """Content and input as one text, joined by an empty line."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content

    def message(self) -> JsonObject:
        """The turn as templates see it: `role` and `content`, and the other fields that are set."""
        message: JsonObject = {"role": self.role, "content": self.text}
        if self.input:
            message |= {"instruction": self.content, "input": self.input}
        if self.tool_calls:
            message["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        for key in ("tool_call_id", "name", "reasoning_content"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        return message


def _with_arguments(call: JsonObject) -> JsonObject:
    """A tool call with its arguments as an object, as templates expect them, even if the row has JSON text.

    OpenAI's API returns text, which most templates would print as a JSON string, quoted twice. Servers (vLLM, for
    example) decode it too before they apply the template.
    """
    function = call.get("function")
    if isinstance(function, dict):
        return call | {"function": _with_arguments(function)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        decoded = json.loads(arguments)
    except ValueError:
        return call
    return call | {"arguments": decoded} if isinstance(decoded, dict) else call


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row of a dataset: a conversation, or (format `text`) ready text."""

    source: str
    """The file as the user knows it, e.g. `s3://bucket/data/a.jsonl`."""
    line: int
    """Where the row starts: line number, or row number in Parquet; from 1."""
    format: str
    """`messages`, `sharegpt`, `alpaca`, `prompt_completion`, `question_answer` or `text`."""
    turns: tuple[Turn, ...] = ()
    """At least one assistant turn; empty for `text`."""
    text: str | None = None
    """Only for `text`."""
    tools: tuple[JsonObject, ...] = ()
    """Tool schemas of the conversation, for templates that print them."""
    unread: tuple[str, ...] = ()
    """Columns of the row that nothing reads; those of its messages are in the turns."""


_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str).encode


def _is_plain(turn: Turn) -> bool:
    more = (turn.tool_call_id, turn.name, turn.reasoning_content)
    return not (turn.input or turn.tool_calls) and more == (None, None, None)


def content_key(example: Example) -> str:
    """A hash of the example's content: 32 hexadecimal digits (XXH3, 128 bits).

    Two rows with the same turns, text and tools have the same key, whatever their file, line and format.
    """
    if example.text is None and not example.tools and all(map(_is_plain, example.turns)):
        parts = [f"{turn.role} {len(turn.content)} {turn.content}" for turn in example.turns]  # faster than JSON
        return str(xxhash.xxh3_128_hexdigest("".join(parts).encode("utf-8", "surrogatepass")))
    content = [[turn.message() for turn in example.turns], example.text, list(example.tools)]
    return str(xxhash.xxh3_128_hexdigest(_canonical(content).encode("utf-8", "surrogatepass")))


class RowError(DataError):
    """One row is invalid. Usually collected in `InvalidRows`, which reports all at once."""

    def __init__(self, *, source: str, line: int, reason: str, remedy: str = "") -> None:
        reason = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
        super().__init__(f"{source}:{line}: {reason}", remedy=remedy)
        self.reason = reason


@dataclass(kw_only=True)
class InvalidRows:
    """Collects invalid rows: the first ten in words, and the total."""

    total: int = 0
    shown: list[str] = field(default_factory=list)
    remedies: dict[str, None] = field(default_factory=dict)
    """Of the rows shown, each once and in order."""

    def add(self, error: RowError) -> None:
        """Add a row; from the eleventh on they are only counted."""
        self.total += 1
        if len(self.shown) < SHOWN:
            self.shown.append(error.message)
            self.remedies[error.remedy or CORRECT] = None

    def raise_if_any(self, rows: int) -> None:
        """Raise DataError if any of this many rows was invalid."""
        if not self.total:
            return
        head = f"{self.total:,} of {rows:,} rows are invalid" + (", the first ten:" if self.total > SHOWN else ":")
        raise DataError("\n".join([head, *self.shown]), remedy=" ".join(self.remedies))
