"""Token ids and the characters that they cover.

Knows the interface of `tokenizers.Encoding`; nothing of the tokenizer that made it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Offsets = tuple[int, int]
TWO_BITS, CONTINUATION = 0xC0, 0x80
"""In UTF-8 a byte whose first two bits are 10 continues a character (RFC 3629)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """A text's tokens, in the order of its characters."""

    ids: list[int]
    added: int
    """How many of them, at the start, are not part of the text: BOS, if the text did not have it."""
    raw: Any
    """The `tokenizers.Encoding` without the added tokens, or `CountedOffsets` in its place; None if made of parts."""
    known_offsets: list[Offsets] | None
    """Only if made of parts."""

    @property
    def offsets(self) -> list[Offsets]:
        """For each token the characters [start, end) that it covers; (0, 0) for added tokens."""
        own = self.raw.offsets if self.known_offsets is None else self.known_offsets
        return [(0, 0)] * self.added + own

    def inside(self, start: int, end: int) -> slice:
        """The tokens that lie completely inside the characters [start, end)."""
        first = self._starting_from(start)
        return slice(first, max(first, self._ending_by(end)))

    def crosses(self, character: int) -> bool:
        """Whether a token covers characters on both sides of the border before `character`."""
        return self.crossing(character) is not None

    def crossing(self, character: int) -> tuple[int, int] | None:
        """The token that covers characters on both sides of the border before `character`, and where it ends."""
        if self.raw is not None:
            token = self.raw.char_to_token(character)
            start, end = self.raw.token_to_chars(token) if token is not None else (character, character)
            return (token + self.added, end) if start < character < end else None
        crossing = ((at, end) for at, (start, end) in enumerate(self.offsets) if start < character < end)
        return next(crossing, None)

    def _starting_from(self, character: int) -> int:
        """The first token that starts at or after a character."""
        if self.raw is not None:  # two look-ups in compiled code; the list of offsets costs as much as all the rest
            token = self.raw.char_to_token(character)
            if token is not None and self.raw.token_to_chars(token)[0] == character:
                return int(token) + self.added
        return bisect_left(self.offsets, character, lo=self.added, key=itemgetter(0))

    def _ending_by(self, character: int) -> int:
        """The number of tokens that end at or before a character."""
        if self.raw is not None:
            token = self.raw.char_to_token(character)
            if token is not None:
                return int(token) + self.added
        return bisect_left(self.offsets, character + 1, lo=self.added, key=itemgetter(1))


class CountedOffsets:
    """The part of `tokenizers.Encoding` that concerns characters, counted from the bytes of each token."""

    def __init__(self, ids: list[int], starts: NDArray[np.int32], ends: NDArray[np.int32]) -> None:
        self.ids = ids
        self._starts, self._ends = starts, ends

    @property
    def offsets(self) -> list[Offsets]:
        """For each token the characters [start, end) that it covers, completely or in part."""
        return list(zip(self._starts.tolist(), self._ends.tolist(), strict=True))

    def char_to_token(self, character: int) -> int | None:
        """The first token that covers a character."""
        token = int(self._ends.searchsorted(character, side="right"))
        return token if token < len(self._ends) and self._starts[token] <= character else None

    def token_to_chars(self, token: int) -> Offsets:
        """The characters that a token covers."""
        return int(self._starts[token]), int(self._ends[token])


def count_offsets(text: str, ids: list[int], widths: NDArray[np.int32]) -> CountedOffsets | None:
    """The characters of each token of a text; None if the tokens' bytes are not those of the text.

    Args:
        widths: bytes of each token of the vocabulary.
    """
    each = widths[ids]
    ends = each.cumsum(dtype=np.int32)
    size = int(ends[-1]) if ids else 0
    if text.isascii():
        return CountedOffsets(ids, ends - each, ends) if size == len(text) else None
    encoded = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    if size != len(encoded):
        return None
    characters = np.cumsum((encoded & TWO_BITS) != CONTINUATION, dtype=np.int32) - 1  # of each byte
    return CountedOffsets(ids, characters[ends - each], characters[ends - 1] + 1)


def from_raw(raw: Any, *, bos_ids: Sequence[int]) -> Encoding:
    """The library's encoding, after BOS unless the text has it already."""
    ids: list[int] = raw.ids
    bos = _missing_bos(ids, bos_ids)
    return Encoding(ids=bos + ids, added=len(bos), raw=raw, known_offsets=None)


def from_parts(ids: list[int], offsets: list[Offsets], *, bos_ids: Sequence[int]) -> Encoding:
    """The same for the tokens of a text that was encoded in parts."""
    bos = _missing_bos(ids, bos_ids)
    return Encoding(ids=bos + ids, added=len(bos), raw=None, known_offsets=offsets)


def _missing_bos(ids: list[int], bos_ids: Sequence[int]) -> list[int]:
    bos = list(bos_ids)
    return [] if ids[: len(bos)] == bos else bos
