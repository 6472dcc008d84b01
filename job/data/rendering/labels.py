"""Tokens and learned characters -> a training sequence: which of its tokens are learned, their labels and weights.

A token is learned if it lies wholly inside a span that is learned; the first of a sequence never is. Knows nothing of
templates, of rows that are too long, or of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from job.data.rendering.spans import Piece, Span, Unshown
from job.data.rendering.truncation import Tokens
from job.data.tokenizer.encoding import Encoding

Outcome = Literal["kept", "shortened", "cut", "overlong", "masked"]

IGNORED = -100
"""The label that the loss skips (torch's cross_entropy, ignore_index)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceMeta:
    """One training sequence without its tokens: all that is counted."""

    source: str
    line: int
    outcome: Outcome
    """`kept`, `shortened` (whole turns are lost) and `cut` (it ends inside an answer, or inside ready text) are trained
    on; `overlong` was dropped for its length, `masked` has no label left."""
    length: int
    """Tokens before truncation."""
    keep: int
    """Tokens after it."""
    learned: tuple[Tokens, ...]
    """Where the labelled tokens were, before truncation."""
    roles: tuple[str, ...]
    """Whose turn each of these is."""
    part: int
    """Which of the row's sequences, from 0."""
    parts: int
    """Into how many sequences the row was split: 1 unless the template rewrites earlier turns."""
    header_differs: bool
    unshown: tuple[Unshown, ...]
    """Both: see `job.data.rendering.spans.Piece`."""

    @property
    def trained(self) -> bool:
        """Whether the sequence is trained on."""
        return self.outcome in {"kept", "shortened", "cut"}

    def labelled(self) -> Iterator[tuple[int, int, str]]:
        """Where the labelled tokens are after truncation, and whose turn it is; some may be empty."""
        for (start, stop), role in zip(self.learned, self.roles, strict=True):
            yield min(start, self.keep), min(stop, self.keep), role


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered(SequenceMeta):
    """One training sequence."""

    input_ids: list[int]
    shares: Mapping[str, float] | None = None
    """What the tokens of each role count, where that is not all the same."""

    @property
    def labels(self) -> list[int]:
        """As long as input_ids; -100 where nothing is learned."""
        found: list[int] = labels(np.array(self.input_ids, dtype=np.int32), [self]).tolist()
        return found

    @property
    def weights(self) -> list[float] | None:
        """What each label counts, where that is not all the same; 0 where nothing is learned."""
        return None if self.shares is None else [float(one) for one in weights([self], self.shares)]


def labels(input_ids: NDArray[np.int32], sequences: Sequence[SequenceMeta]) -> NDArray[np.int32]:
    """The ids of the learned tokens, elsewhere -100, for sequences that stand one behind the other."""
    found = np.full(len(input_ids), IGNORED, dtype=np.int32)
    for start, stop, _ in _placed(sequences):
        found[start:stop] = input_ids[start:stop]
    return found


def weights(sequences: Sequence[SequenceMeta], shares: Mapping[str, float]) -> NDArray[np.float32]:
    """What each label counts, 0 where nothing is learned; the share of each role must be there."""
    found = np.zeros(sum(sequence.keep for sequence in sequences), dtype=np.float32)
    for start, stop, role in _placed(sequences):
        found[start:stop] = shares[role]
    return found


def _placed(sequences: Sequence[SequenceMeta]) -> Iterator[tuple[int, int, str]]:
    before = 0
    for sequence in sequences:
        for start, stop, role in sequence.labelled():
            yield before + start, before + stop, role
        before += sequence.keep


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """Where the learned tokens of a text lie; none is empty."""

    tokens: tuple[Tokens, ...]
    roles: tuple[str, ...]


def learned(encoding: Encoding, piece: Piece, shares: Mapping[str, float] | None) -> Learned:
    """The tokens of the answers; with shares, those of the roles that have one."""
    found = [(tokens, span.role) for span in spans(piece, shares) if (tokens := inside(encoding, piece, span))]
    return Learned(tokens=tuple(tokens for tokens, _ in found), roles=tuple(role for _, role in found))


def spans(piece: Piece, shares: Mapping[str, float] | None) -> tuple[Span, ...]:
    """The characters that are learned, in order."""
    if shares is None:
        return piece.spans
    chosen = (span for span in (*piece.spans, *piece.others) if span.role in shares)
    return tuple(sorted(chosen, key=lambda span: span.start))


def inside(encoding: Encoding, piece: Piece, span: Span) -> Tokens | None:
    """The tokens that lie wholly inside a span; never the first of the sequence, which nothing stands before.

    White space that a token holds behind the end of a span is no reason to leave it out: some end markers take it in
    (Phi 3's `<|end|>`, an added token with `rstrip`).
    """
    found = encoding.inside(span.start, span.end)
    start, stop = max(found.start, 1), found.stop
    over = encoding.over(span.end)
    if over and over[0] == stop and piece.text[span.end : over[1]].isspace():
        stop += 1
    return (start, stop) if start < stop else None
