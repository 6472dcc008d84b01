"""The row of each training sequence, `file:line`, in four bytes for a sequence and one name for a file."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Provenance:
    """The rows of sequences, in their order. Long runs of sequences from one file take the least memory."""

    _lines: array[int] = field(default_factory=lambda: array("I"))
    _starts: list[int] = field(default_factory=list)
    """The first sequence of each run from one file."""
    _sources: list[str] = field(default_factory=list)

    def add(self, source: str, line: int) -> None:
        """Add the row of the next sequence."""
        if not self._sources or self._sources[-1] != source:
            self._starts.append(len(self._lines))
            self._sources.append(source)
        self._lines.append(line)

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self._lines)

    def at(self, number: int) -> str:
        """`file:line` of a sequence, numbered from 0. Raises IndexError if there is no such sequence."""
        return f"{self._sources[bisect_right(self._starts, number) - 1]}:{self._lines[number]}"
