"""A row's value where text, a list or an object belongs -> that value, or the reason why it is not one, with a remedy.

Knows JSON values and how to describe them; nothing of formats and roles.
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
MAX_DEPTH = 100
"""Levels of nested lists and objects that templates, and the search for texts in them, can handle."""


class Unreadable(bytes):
    """Stands for a stored value that cannot be read: text that is not UTF-8, a date beyond all calendars."""


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
    """Why a row is invalid, and what to do about it; the caller adds file and line."""

    def __init__(self, reason: str, *, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def value_of(fields: Fields, key: str) -> Any:
    """The value; None also for NaN, which pandas writes for a missing value."""
    value = fields.get(key)
    return None if isinstance(value, float) and value != value else value  # noqa: PLR0124 - only NaN differs


def names_with_value(fields: Fields) -> list[str]:
    """The names of the fields that have a value."""
    return [str(key) for key in fields if value_of(fields, key) is not None]


def quoted(names: list[str]) -> str:
    """Names for a message, shortened: a limited number of them, each of limited length."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(f"`{shown(name)}`" for name in names[:LISTED]) + more


def kind_of(value: Any) -> str:
    """The kind of a value, in words."""
    return KINDS.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def text_at(fields: Fields, key: str, *, empty: bool = True, where: str = "") -> str:
    """The text at `key`; with `empty=False` blank text is an error too."""
    value = value_of(fields, key)
    if not isinstance(value, str):
        remedy = REMEDIES.get(kind_of(value), ONE_TEXT if where else NAME_IT)
        raise InvalidError(f"{where}`{key}` is {kind_of(value)}, not text", remedy=remedy)
    if not empty and not value.strip():
        raise InvalidError(f"{where}`{key}` is empty", remedy="Give it a text, or remove these rows.")
    check_encodable(value, f"{where}`{key}`")
    return value


def optional_text(fields: Fields, key: str) -> str:
    """The text at `key`, empty if the row has none."""
    return "" if value_of(fields, key) is None else text_at(fields, key)


def check_encodable(value: Any, what: str, depth: int = 0) -> None:
    """Raise InvalidError for a text with half of a surrogate pair, which no tokenizer can encode, and for nesting that
    is too deep."""
    if depth > MAX_DEPTH:
        raise InvalidError(
            f"{what} is nested more than {MAX_DEPTH} levels deep", remedy="Flatten it, or write it as text."
        )
    if isinstance(value, str):
        if not value.isascii() and HALF_A_PAIR.search(value):
            raise InvalidError(
                f"{what} contains half of a surrogate pair, which is not a character", remedy=WHOLE_CHARACTERS
            )
    elif isinstance(value, dict):
        for part in (*value.keys(), *value.values()):
            check_encodable(part, what, depth + 1)
    elif isinstance(value, list):
        for part in value:
            check_encodable(part, what, depth + 1)


def decoded(value: Any, what: str) -> Any:
    """The value; text is decoded as JSON, since CSV cells and some Parquet columns hold lists in this form."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidError(
            f"{what} is text, but not JSON: {error}",
            remedy="Write it as JSON (a list or an object), not as other text.",
        ) from error


def as_list(value: Any, what: str) -> list[Any]:
    """A list, perhaps as JSON text."""
    listed = decoded(value, what)
    if not isinstance(listed, list):
        raise InvalidError(f"{what} is {kind_of(listed)}, not a list", remedy="Put it into a list: `[...]`.")
    return listed


def as_objects(value: Any, what: str) -> list[JsonObject]:
    """A list of objects, perhaps as JSON text."""
    listed = as_list(value, what)
    if bad := [item for item in listed if not isinstance(item, dict)]:
        raise InvalidError(
            f"{what} holds {kind_of(bad[0])}, not an object", remedy="Each item of the list must be an object: `{...}`."
        )
    return listed


def as_decoded_objects(value: Any, what: str) -> list[JsonObject]:
    """A list of objects, each perhaps as JSON text: so Parquet files hold objects that have no common schema."""
    return as_objects([decoded(item, what) for item in as_list(value, what)], what)
