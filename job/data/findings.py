"""What was found in data: the value that quality, lengths, check and report share. Knows nothing of how it is found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One kind of thing that was found, with the rows where it stands."""

    code: str
    """Constant snake_case: `near_duplicates`, `one_word_answers`, ..."""
    count: int
    """Rows (or sequences) concerned."""
    first: tuple[str, ...]
    """`file:line` of the first ten."""
    message: str
    """One sentence: what, how many."""
    remedy: str
    """One sentence: what to do."""
