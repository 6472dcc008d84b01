"""Which rows are held out for evaluation: chosen by content, or the rows of the user's evaluation files.

Knows keys and hashes; nothing of files, rows or how keys are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import xxhash


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSplit:
    """The side of each row: training or evaluation."""

    held_out: bytes
    """One byte for each row in order, 1 for the evaluation side; the rows of evaluation files come last."""
    note: str
    """Why there is no evaluation side although a fraction was set; else empty."""

    @property
    def train(self) -> bytes:
        """One byte for each row, 1 for the training side."""
        return self.held_out.translate(bytes.maketrans(b"\0\1", b"\1\0"))


def split_by_content(keys: Iterable[str], *, fraction: float) -> EvaluationSplit:
    """Put a row on the evaluation side if and only if its key's hash, as a number in [0, 1), is below `fraction`.

    Where a row's key is the smallest content key of its group of near duplicates, the whole group is on one side, and
    adding unlike rows moves no row. A new near duplicate may have the smallest key of its group, and then it moves the
    group. If one side came out empty, all rows are trained on and the note says so.

    Args:
        keys: one for each row.
    """
    held_out = bytes(is_held_out(key, fraction) for key in keys)
    if fraction > 0 and len(set(held_out)) < 2:  # noqa: PLR2004 - the sides
        note = f"{fraction:.3g} of {len(held_out):,} rows leaves one side empty"
        return EvaluationSplit(held_out=bytes(len(held_out)), note=note)
    return EvaluationSplit(held_out=held_out, note="")


def is_held_out(key: str, fraction: float) -> bool:
    """The split's rule, for one key."""
    return bool(xxhash.xxh3_64_intdigest(key.encode()) < fraction * 2**64)


def split_by_files(*, train_rows: int, held_out_rows: int) -> EvaluationSplit:
    """The user's own split: training files and evaluation files. No row is moved."""
    return EvaluationSplit(held_out=bytes(train_rows) + bytes([1]) * held_out_rows, note="")
