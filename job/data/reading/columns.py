"""TUNE_COLUMNS: a row with the user's names for columns -> the same row with ours.

Knows names and how to find a nested one; nothing of formats or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from job.data.reading.fields import quoted, value_of
from job.runtime.errors import ConfigError

ENOUGH = 1000
"""Names after which no more are noted: some objects have a key for each thing that they hold."""


@dataclass(kw_only=True)
class Columns:
    """The user's names, and which of them were found so far."""

    theirs: Mapping[str, str] = field(default_factory=dict)
    """Our name -> theirs; parts of a nested name are separated by dots, an item of a list is named by its number."""
    found: set[str] = field(default_factory=set)
    """Of our names, those whose column had a value in some row."""
    there: dict[str, None] = field(default_factory=dict)
    """The columns that were seen, with those one level down, in their order."""

    def renamed(self, row: Any) -> Any:
        """The row with our names. A column under a name of ours is hidden where the row has the one meant by it."""
        if not self.theirs or not isinstance(row, dict):
            return row
        self._note(row)
        there = {ours: theirs for ours, theirs in self.theirs.items() if _has(row, theirs)}
        taken = {*there, *there.values()}
        kept = {key: value for key, value in row.items() if key not in taken}
        named = {ours: _at(row, theirs) for ours, theirs in self.theirs.items()}
        self.found.update(ours for ours in named if value_of(named, ours) is not None)
        return kept | {ours: value for ours, value in named.items() if value is not None}

    def check(self) -> None:
        """Raise ConfigError if a column that the user named had a value in no row so far."""
        missing = [(ours, theirs) for ours, theirs in self.theirs.items() if ours not in self.found]
        if missing and self.there:
            pairs = ",".join(f"{ours}={theirs}" for ours, theirs in missing)
            names = list(self.there)
            raise ConfigError(
                f"TUNE_COLUMNS names {pairs}, but no row has {quoted([theirs for _, theirs in missing])}. "
                f"The rows have {quoted(names)}.",
                remedy="Name a column that is there; the parts of a nested name are separated by dots.",
            )

    def explained(self, reason: str) -> str:
        """A reason that names our columns, with the user's names for them."""
        named = [
            f"`{ours}` is `{theirs}`"
            for ours, theirs in self.theirs.items()
            if ours != theirs and f"`{ours}`" in reason
        ]
        return f"{reason} ({', '.join(named)} in the file)" if named else reason

    def _note(self, row: dict[str, Any]) -> None:
        if len(self.found) == len(self.theirs) or len(self.there) > ENOUGH:
            return
        for key, value in row.items():
            names = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
            self.there.update(dict.fromkeys(names))


def parsed(pairs: Iterable[str]) -> Columns:
    """From `ours=theirs`, as `Config.columns` holds them."""
    return Columns(theirs={ours: theirs for ours, _, theirs in (pair.partition("=") for pair in pairs)})


def _has(row: dict[str, Any], name: str) -> bool:
    """Whether the row has the column under a name, or the one that a path begins with, be it empty."""
    return name in row or name.partition(".")[0] in row


def _at(row: Any, name: str) -> Any:
    """The value under a name, or under a path of names; None if there is nothing."""
    if isinstance(row, dict) and name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inner = row.get(first) if isinstance(row, dict) else _item(row, first)
    return _at(inner, rest) if dot else inner


def _item(row: Any, number: str) -> Any:
    return row[int(number)] if isinstance(row, list) and number.isdecimal() and int(number) < len(row) else None
