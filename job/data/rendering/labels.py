"""Tokens and learned characters -> a training sequence: which tokens are learned, their labels and weights.

A token is learned if it lies completely inside a learned span; the first of a sequence never is. Knows nothing of
templates, of the length limit, or of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from job.data.rendering.losses import NotRendered
from job.data.rendering.spans import Piece, Span
from job.data.rendering.truncation import Tokens
from job.data.tokenizer.encoding import Encoding

Outcome = Literal["kept", "shortened", "cut", "overlong", "masked"]

IGNORED = -100
"""The label that the loss skips (torch's cross_entropy, ignore_index)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceMeta:
    """One training sequence without its tokens: all that the counts need."""

    source: str
    line: int
    outcome: Outcome
    """`kept`, `shortened` (whole turns are lost) and `cut` (it ends inside an answer, or inside ready text) are trained
    on; `overlong` was dropped because of its length, `masked` has no label left."""
    length: int
    """Tokens before truncation."""
    keep: int
    """Tokens after it."""
    learned: tuple[Tokens, ...]
    """The ranges of labelled tokens before truncation."""
    roles: tuple[str, ...]
    """The role of each of these ranges."""
    part: int
    """The number of the sequence among the row's, from 0."""
    parts: int
    """Into how many sequences the row was split: 1 unless the template rewrites earlier turns."""
    header_differs: bool
    """See `job.data.rendering.spans.Piece`."""
    not_rendered: tuple[NotRendered, ...]
    lost: tuple[str, ...]
    """What its learned answers say and its labels do not, in words; for both see `job.data.rendering.losses.Losses`."""

    @property
    def trained(self) -> bool:
        """Whether the sequence is trained on."""
        return self.outcome in {"kept", "shortened", "cut"}

    def labelled(self) -> Iterator[tuple[int, int, str]]:
        """The ranges of labelled tokens after truncation, with their roles; some may be empty."""
        for (start, stop), role in zip(self.learned, self.roles, strict=True):
            yield min(start, self.keep), min(stop, self.keep), role


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered(SequenceMeta):
    """One training sequence with its tokens."""

    input_ids: list[int]
    role_weights: Mapping[str, float] | None = None
    """The weight of each role's tokens; None if all weigh the same."""

    @property
    def labels(self) -> list[int]:
        """As long as input_ids; -100 where nothing is learned."""
        found: list[int] = token_labels(np.array(self.input_ids, dtype=np.int32), [self]).tolist()
        return found

    @property
    def weights(self) -> list[float] | None:
        """The weight of each label, 0 where nothing is learned; None if all weigh the same."""
        return None if self.role_weights is None else [float(one) for one in token_weights([self], self.role_weights)]


def token_labels(input_ids: NDArray[np.int32], sequences: Sequence[SequenceMeta]) -> NDArray[np.int32]:
    """The ids of the learned tokens, -100 elsewhere, for concatenated sequences."""
    found = np.full(len(input_ids), IGNORED, dtype=np.int32)
    for start, stop, _ in _placed(sequences):
        found[start:stop] = input_ids[start:stop]
    return found


def token_weights(sequences: Sequence[SequenceMeta], role_weights: Mapping[str, float]) -> NDArray[np.float32]:
    """The weight of each label, 0 where nothing is learned, for concatenated sequences; each role must have one."""
    found = np.zeros(sum(sequence.keep for sequence in sequences), dtype=np.float32)
    for start, stop, role in _placed(sequences):
        found[start:stop] = role_weights[role]
    return found


def _placed(sequences: Sequence[SequenceMeta]) -> Iterator[tuple[int, int, str]]:
    before = 0
    for sequence in sequences:
        for start, stop, role in sequence.labelled():
            yield before + start, before + stop, role
        before += sequence.keep


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedTokens:
    """The ranges of learned tokens in a text; none is empty."""

    tokens: tuple[Tokens, ...]
    roles: tuple[str, ...]
    cut: bool
    """Whether an answer has characters that no learned token covers."""


def learned_tokens(encoding: Encoding, piece: Piece, role_weights: Mapping[str, float] | None) -> LearnedTokens:
    """The tokens of the answers; with weights, those of all roles that have one."""
    spans = _learned_spans(piece, role_weights)
    found = [_tokens_inside(encoding, piece, span) for span in spans]
    return LearnedTokens(
        tokens=tuple((start, stop) for start, stop, _ in found if start < stop),
        roles=tuple(span.role for (start, stop, _), span in zip(found, spans, strict=True) if start < stop),
        cut=any(cut and span.role == "assistant" for (_, _, cut), span in zip(found, spans, strict=True)),
    )


def _learned_spans(piece: Piece, role_weights: Mapping[str, float] | None) -> tuple[Span, ...]:
    if role_weights is None:
        return piece.spans
    chosen = (span for span in (*piece.spans, *piece.others) if span.role in role_weights)
    return tuple(sorted(chosen, key=lambda span: span.start))


def _tokens_inside(encoding: Encoding, piece: Piece, span: Span) -> tuple[int, int, bool]:
    """The tokens [start, stop) that lie completely inside a span, never the first of the sequence, which has no
    context; and whether characters of the span are left to no learned token.

    The last token may also cover white space after the span, since some end markers include it (Phi 3's `<|end|>`, an
    added token with `rstrip`).
    """
    found = encoding.inside(span.start, span.end)
    start, stop = max(found.start, 1), found.stop
    cut = found.start == 0 < stop
    if crossing := encoding.crossing(span.end):
        spaces = crossing[0] == stop and piece.text[span.end : crossing[1]].isspace()
        stop, cut = stop + spaces, cut or not spaces
    return start, stop, cut or (start >= stop and not piece.text[span.start : span.end].isspace())
