"""Where a sequence that is too long is cut, so that no answer is learned without its end.

Knows token positions only; nothing of templates, files or statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tokens = tuple[int, int]
"""Tokens [start, stop) of a sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncation:
    """How much of a sequence is trained on."""

    keep: int
    """Tokens from its start."""
    outcome: Literal["kept", "shortened", "cut", "masked"]
    """`kept` lost no learned token, `shortened` lost whole turns, `cut` ends inside an answer, `masked` has no learned
    token left."""


def truncate(learned: Sequence[Tokens], length: int, limit: int, ends: Sequence[int] | None = None) -> Truncation:
    """Cut a sequence that is too long after the last answer that fits whole; if none fits, inside the first.

    Args:
        learned: the ranges of learned tokens, in order; none is empty.
        ends: where answers end, if not at the ends of the learned ranges.
    """
    if not learned or learned[0][0] >= limit:
        return Truncation(keep=min(length, limit), outcome="masked")
    if length <= limit:
        return Truncation(keep=length, outcome="kept")
    last = max((end for end in (ends or [stop for _, stop in learned]) if learned[0][0] < end <= limit), default=0)
    if last:
        return Truncation(keep=last, outcome="kept" if last >= learned[-1][1] else "shortened")
    return Truncation(keep=limit, outcome="cut")
