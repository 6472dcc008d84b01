"""TUNE_COLUMNS: a row under the user's column names -> the same row under ours.

Knows names and how to find a nested one; nothing of formats or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from job.data.reading.fields import quoted, value_of
from job.runtime.errors import ConfigError

MOST_SEEN = 1000
"""Names that are remembered for a message: some objects have a key for each thing that they hold."""


@dataclass(kw_only=True)
class Columns:
    """The user's names, and which of them were found so far."""

    theirs: Mapping[str, str] = field(default_factory=dict)
    """Our name -> theirs; dots separate the parts of a nested name, a number names an item of a list."""
    found: set[str] = field(default_factory=set)
    """Our names whose column had a value in some row."""
    seen: dict[str, None] = field(default_factory=dict)
    """The columns of the rows so far, and the fields one level down, in their order."""

    def renamed(self, row: Any) -> Any:
        """The row under our names. A column of the file that has one of our names by chance is hidden where the row has
        the column that the user named for it."""
        if not self.theirs or not isinstance(row, dict):
            return row
        self._note(row)
        present = {ours: theirs for ours, theirs in self.theirs.items() if _has(row, theirs)}
        taken = {*present, *present.values()}
        kept = {key: value for key, value in row.items() if key not in taken}
        named = {ours: _at(row, theirs) for ours, theirs in self.theirs.items()}
        self.found.update(ours for ours in named if value_of(named, ours) is not None)
        return kept | {ours: value for ours, value in named.items() if value is not None}

    def check(self) -> None:
        """Raise ConfigError if no row so far had a value in a column that the user named."""
        missing = [(ours, theirs) for ours, theirs in self.theirs.items() if ours not in self.found]
        if missing and self.seen:
            pairs = ",".join(f"{ours}={theirs}" for ours, theirs in missing)
            names = list(self.seen)
            raise ConfigError(
                f"TUNE_COLUMNS contains {pairs}, but no row has {quoted([theirs for _, theirs in missing])}. "
                f"The rows have {quoted(names)}.",
                remedy="Name a column that the rows have; dots separate the parts of a nested name.",
            )

    def explained(self, reason: str) -> str:
        """A reason that mentions our columns, completed by the user's names for them."""
        named = [
            f"`{ours}` is `{theirs}`"
            for ours, theirs in self.theirs.items()
            if ours != theirs and f"`{ours}`" in reason
        ]
        return f"{reason} ({', '.join(named)} in the file)" if named else reason

    def _note(self, row: dict[str, Any]) -> None:
        if len(self.found) == len(self.theirs) or len(self.seen) > MOST_SEEN:
            return
        for key, value in row.items():
            names = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
            self.seen.update(dict.fromkeys(names))


def parse_columns(pairs: Iterable[str]) -> Columns:
    """From `ours=theirs`, the form of `Config.columns`."""
    return Columns(theirs={ours: theirs for ours, _, theirs in (pair.partition("=") for pair in pairs)})


def _has(row: dict[str, Any], name: str) -> bool:
    """Whether the row has a column of this name, or of the first part of a nested name; it may be empty."""
    return name in row or name.partition(".")[0] in row


def _at(row: Any, name: str) -> Any:
    """The value under a name or a nested name; None if there is none."""
    if isinstance(row, dict) and name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inner = row.get(first) if isinstance(row, dict) else _item(row, first)
    return _at(inner, rest) if dot else inner


def _item(row: Any, number: str) -> Any:
    return row[int(number)] if isinstance(row, list) and number.isdecimal() and int(number) < len(row) else None
