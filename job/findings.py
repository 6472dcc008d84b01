"""What was found in the data: a kind of problem, how many rows it concerns, where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One kind of problem, with the rows it concerns."""

    code: str
    """Constant snake_case: near_duplicates, one_word_answers, ..."""
    count: int
    """Rows (or sequences) concerned."""
    first: tuple[str, ...]
    """`file:line` of the first ten."""
    message: str
    """One sentence: what, how many."""
    remedy: str
    """One sentence: what to do."""
