"""A JSON array as a stream -> its elements, each with the line where it starts.

The standard decoder needs the whole text; this reads a window at a time, so that memory holds one element, not the
file. It is written by hand because ijson reports neither the line of an element nor a repeated key. Knows nothing of
rows.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from job.data.reading.strict_json import Decoder

CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")
LONGEST_WORD = 64
"""Characters: longer than any literal or part of a number. An error that is further than this from the window's end
cannot be due to text that is still unread."""


class Readable(Protocol):
    """Anything with `read(size) -> bytes`."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """One element, or the problem after which nothing more can be read."""

    line: int
    value: Any = None
    problem: str = ""
    repeated: str | None = None
    """A key that appears twice in an object of the element."""
    too_long: bool = False


class _DamagedError(Exception):
    """The array cannot be read further."""


class _TooLongError(Exception):
    """An element is longer than the limit."""


class _Window:
    """The part of the text that is in memory, a position in it, and that position's line in the file."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0
        self.line = 1
        self.line_start = 0
        self.ended = False
        self._undecodable = ""

    def grow(self) -> None:
        """Drop the text before the position and read at least as much again as is left.

        The text before a byte that is not UTF-8 is read first, so that the error has the byte's line.
        """
        if self._undecodable:
            raise _DamagedError(f"not UTF-8: {self._undecodable}")
        chunk = self._stream.read(max(CHUNK, len(self.text) - self.position))
        self.ended = not chunk
        try:
            new = self._decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            self._undecodable, self.ended = error.reason, False
            new = error.object[: error.start].decode("utf-8")
        self.line_start -= self.position
        self.text = self.text[self.position :] + new
        self.position = 0

    def advance(self, position: int) -> None:
        """Move to a later position, counting lines."""
        newlines = self.text.count("\n", self.position, position)
        if newlines:
            self.line += newlines
            self.line_start = self.text.rindex("\n", self.position, position) + 1
        self.position = position

    def next_character(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.advance(SPACE.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self.grow()

    def where(self, position: int) -> str:
        """`line 3 column 14` of the file."""
        before = self.text.rfind("\n", self.position, position)
        start = self.line_start if before < 0 else before + 1
        return f"line {self.line + self.text.count(chr(10), self.position, position)} column {position - start + 1}"


def elements(stream: Readable, *, limit: int) -> Iterator[Element]:
    """The elements of the array at the start of `stream`. An element with a problem is the last one."""
    window = _Window(stream)
    try:
        yield from _elements(window, limit)
    except _DamagedError as error:
        yield Element(line=window.line, problem=f"{error}; what follows was not read")
    except _TooLongError:
        yield Element(line=window.line, too_long=True)


def _elements(window: _Window, limit: int) -> Iterator[Element]:
    separator = window.next_character()  # the opening bracket
    while separator != "]":
        window.advance(window.position + 1)
        if window.next_character() == "]" and separator == "[":
            break
        line, decoder = window.line, Decoder()
        value = _value(window, decoder, limit)
        yield Element(line=line, value=value, repeated=decoder.repeated)
        separator = _separator(window)
    window.advance(window.position + 1)
    if window.next_character():
        raise _DamagedError(f"text after the array's end at {window.where(window.position)}")


def _separator(window: _Window) -> str:
    found = window.next_character()
    if not found:
        raise _DamagedError("the array is not closed: was the file cut off?")
    if found not in ",]":
        raise _DamagedError(f"not JSON: expected ',' or ']' at {window.where(window.position)}")
    return found


def _value(window: _Window, decoder: Decoder, limit: int) -> Any:
    """Decode the value at the position and move past it; read more text while the value is incomplete."""
    while True:
        try:
            value, end = decoder.value_at(window.text, window.position)
            if end < len(window.text) or window.ended:  # a number at the window's end may continue
                window.advance(end)
                return value
        except json.JSONDecodeError as error:
            if window.ended or not _may_be_incomplete(error, window.text):
                cut_off = " (the file ends here: was it cut off?)" if _ends_inside(error, window) else ""
                raise _DamagedError(f"not JSON: {error.msg} at {window.where(error.pos)}{cut_off}") from error
        except RecursionError as error:
            raise _DamagedError("not JSON that can be read: nested too deeply") from error
        except ValueError as error:
            raise _DamagedError(f"not JSON that can be read: {error}") from error
        if len(window.text) - window.position > limit:
            raise _TooLongError
        window.grow()


def _ends_inside(error: json.JSONDecodeError, window: _Window) -> bool:
    """Whether the file ends inside a string, inside an escape, or where a value should follow."""
    inside = (
        error.msg.startswith(("Unterminated string", "Invalid \\uXXXX")) and window.text.find('"', error.pos + 1) < 0
    )
    return window.ended and (inside or error.pos >= len(window.text.rstrip()))


def _may_be_incomplete(error: json.JSONDecodeError, text: str) -> bool:
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - LONGEST_WORD
