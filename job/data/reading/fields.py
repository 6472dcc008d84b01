"""A value of a row where text, a list or an object belongs -> that, or why it is not, with a remedy.

Knows JSON values and how to speak of them; nothing of formats and roles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from job.data.examples import JsonObject
from job.data.reading import strict_json
from job.observability.masking import shown

Fields = Mapping[str, Any]
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
LISTED = 30
"""How many names a message lists."""
DEEPEST = 100
"""Lists and objects inside one another that templates, and what looks for texts in them, can take."""


class Unreadable(bytes):
    """What stands for a value that a file has and cannot give: text that is no UTF-8, a date beyond all calendars."""


KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    bytes: "bytes",
    Unreadable: "unreadable",
    list: "a list",
}
REMEDIES = {
    "null": "Give it a text, or remove these rows.",
    "a boolean": "Write it as text, in quotes.",
    "a number": "Write it as text, in quotes.",
    "bytes": "Store the column as strings.",
    "unreadable": "Store it as text in UTF-8, or remove these rows.",
}
ONE_TEXT = "Make it one text; where it is data, write it as JSON text."
NAME_IT = "Make it one text, or name the text inside it by TUNE_COLUMNS, as in TUNE_COLUMNS=answer=reply.text."
WHOLE_CHARACTERS = "Write the character whole, as UTF-8 or as both halves of the pair, or remove it."


class InvalidError(ValueError):
    """Why a row is no example, and what to do about it; the caller adds file and line."""

    def __init__(self, reason: str, *, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def value_of(fields: Fields, key: str) -> Any:
    """The value; None also for NaN, which is how pandas writes what is missing."""
    value = fields.get(key)
    return None if isinstance(value, float) and value != value else value  # noqa: PLR0124 - only NaN differs


def present(fields: Fields) -> list[str]:
    """The names of the fields that have a value."""
    return [str(key) for key in fields if value_of(fields, key) is not None]


def quoted(names: list[str]) -> str:
    """Names for a message: the first of them, none of them long."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(f"`{shown(name)}`" for name in names[:LISTED]) + more


def kind(value: Any) -> str:
    """What a value is, in words."""
    return KINDS.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def text(fields: Fields, key: str, *, empty: bool = True, where: str = "") -> str:
    """The text at `key`."""
    value = value_of(fields, key)
    if not isinstance(value, str):
        remedy = REMEDIES.get(kind(value), ONE_TEXT if where else NAME_IT)
        raise InvalidError(f"{where}`{key}` is {kind(value)}, not text", remedy=remedy)
    if not empty and not value.strip():
        raise InvalidError(f"{where}`{key}` is empty", remedy="Give it a text, or remove these rows.")
    whole(value, f"{where}`{key}`")
    return value


def optional(fields: Fields, key: str) -> str:
    """The text at `key`, empty if there is none."""
    return "" if value_of(fields, key) is None else text(fields, key)


def whole(value: Any, what: str, depth: int = 0) -> None:
    """Raise InvalidError if a text in the value holds half a character, which no tokenizer can encode, or if the value
    is nested too deeply."""
    if depth > DEEPEST:
        raise InvalidError(
            f"{what} is nested more than {DEEPEST} levels deep", remedy="Flatten it, or write it as text."
        )
    if isinstance(value, str):
        if not value.isascii() and HALF_A_PAIR.search(value):
            raise InvalidError(f"{what} holds half a surrogate pair, which is no character", remedy=WHOLE_CHARACTERS)
    elif isinstance(value, dict):
        for part in (*value.keys(), *value.values()):
            whole(part, what, depth + 1)
    elif isinstance(value, list):
        for part in value:
            whole(part, what, depth + 1)


def decoded(value: Any, what: str) -> Any:
    """CSV cells and some Parquet columns hold lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidError(
            f"{what} is text, but not JSON: {error}",
            remedy="Write it as JSON (a list or an object), not as other text.",
        ) from error


def items(value: Any, what: str) -> list[Any]:
    """A list, perhaps as JSON text."""
    listed = decoded(value, what)
    if not isinstance(listed, list):
        raise InvalidError(f"{what} is {kind(listed)}, not a list", remedy="Put it into a list: `[...]`.")
    return listed


def objects(value: Any, what: str) -> list[JsonObject]:
    """A list of objects, perhaps as JSON text."""
    listed = items(value, what)
    if bad := [item for item in listed if not isinstance(item, dict)]:
        raise InvalidError(
            f"{what} holds {kind(bad[0])}, not an object", remedy="Each item of the list must be an object: `{...}`."
        )
    return listed


def object_texts(value: Any, what: str) -> list[JsonObject]:
    """A list of objects, each perhaps as JSON text: so Parquet files hold objects that have no common schema."""
    return objects([decoded(item, what) for item in items(value, what)], what)
