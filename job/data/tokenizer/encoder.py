"""Text -> token ids by a fast tokenizer: BOS stands exactly once, and markers that stand in what somebody said can be
encoded as the plain text they are.

Knows tokens and which of them open and end turns; nothing of how a tokenizer is loaded or corrected
(`job.data.tokenizer.load`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.data.tokenizer.chat_template import Template
from job.data.tokenizer.encoding import Encoding, Offsets, counted, encoding, stitched

STAND_INS = 0x100000
"""Special token number n stands as the character U+100000 + n (private use) in text that was disarmed."""
SAMPLES = (
    "",
    " leading,  double  and trailing ",
    "Lines\n\nand\r\n\ttabs, 1234567890 + 3.14; it's (a) [b] {c} <d> #e @f $g _h_ `i` ~j~ \\k",
    "Größe, naïve, æøå, Ωμέγα, Привет, שלום, नमस्ते, 日本語のテキスト, 한국어, 🙂👩‍👩‍👧, \u00a0 \u2028",
)
"""Texts on which offsets that are counted must be those that the library keeps account of."""
PLACEHOLDER = re.compile("[\U00100000-\U0010fffd]")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A fast tokenizer, and the template whose markers it knows."""

    hf: Any
    """The transformers tokenizer, with the template in force and the corrected EOS set: save this one."""
    chat: Template | None
    """None if the tokenizer has no chat template and none was asked for."""
    bos_ids: tuple[int, ...]
    """What the tokenizer puts before every text, usually BOS or nothing."""

    def encode(self, text: str) -> Encoding:
        """Token ids with BOS once where the tokenizer uses one, whether or not the text brings it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Many texts at once."""
        return [self.understood(text, one) for text, one in zip(texts, self.found(texts), strict=True)]

    def found(self, texts: Sequence[str]) -> list[Any]:
        """What the library finds in many texts, on all cores and without holding Python's lock; for `understood`."""
        backend = self.hf.backend_tokenizer
        encode = backend.encode_batch if self._widths is None else backend.encode_batch_fast
        result: list[Any] = encode(list(texts), add_special_tokens=False)
        return result

    def understood(self, text: str, found: Any) -> Encoding:
        """The tokens of one text, of which `found` has this."""
        if self._widths is None:
            return encoding(found, bos_ids=self.bos_ids)
        ids: list[int] = found.ids
        # A normaliser may change characters, but not those of ASCII: `SAMPLES` has them.
        backend = self.hf.backend_tokenizer
        known = backend.normalizer is None or text.isascii()
        quick = counted(text, ids, self._widths) if known else None
        return encoding(quick or backend.encode(text, add_special_tokens=False), bos_ids=self.bos_ids)

    @functools.cached_property
    def _widths(self) -> NDArray[np.int32] | None:
        """How many bytes of text each token stands for, of a byte-level tokenizer; None of others.

        Its tokens are spelt in an alphabet of one character for each byte (Radford et al. 2019, GPT-2's encoder), so
        that offsets can be counted, which takes a fifth less time than letting the library keep account of them.
        """
        backend = self.hf.backend_tokenizer
        spelt = backend.get_vocab(with_added_tokens=False)
        added = {number: len(token.content.encode()) for number, token in self.hf.added_tokens_decoder.items()}
        widths = np.zeros(max(*spelt.values(), *added, 0) + 1, dtype=np.int32)
        widths[list(spelt.values())] = [len(token) for token in spelt]
        widths[list(added)] = list(added.values())
        for text in (*SAMPLES, "".join(f"a {token} b" for token in self._special)):
            whole = backend.encode(text, add_special_tokens=False)
            found = counted(text, whole.ids, widths)
            if found is None or found.offsets != whole.offsets:
                return None
        return widths

    @functools.cached_property
    def _special(self) -> tuple[str, ...]:
        tokens = self.hf.added_tokens_decoder.values()
        return tuple(sorted({token.content for token in tokens if token.special}, key=lambda text: (-len(text), text)))

    @functools.cached_property
    def _starts(self) -> tuple[str, ...]:
        """With which characters special tokens begin: most texts hold none of them."""
        return tuple({token[0] for token in self._special if token})

    @functools.cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {token: number for number, token in enumerate(self._special)}

    @functools.cached_property
    def _any_special(self) -> re.Pattern[str]:
        return _one_of(self._special)

    @functools.cached_property
    def _turn_markers(self) -> re.Pattern[str]:
        """BOS, EOS and the special tokens with which the template opens and ends turns."""
        around = f"{self.chat.around if self.chat else ''}{self.hf.bos_token or ''}{self.hf.eos_token or ''}"
        return _one_of([token for token in self._special if token in around])

    def disarm(self, text: str) -> str:
        """Replace special tokens that stand in a text by stand-ins, so that they cannot become control tokens."""
        if not any(start in text for start in self._starts):
            return text
        return self._any_special.sub(lambda found: chr(STAND_INS + self._numbers[found[0]]), text)

    def disarm_answer(self, text: str) -> str:
        """The same for an answer, which may be meant to hold special tokens, but not those that open or end turns.

        An end marker at its very end stays: data often brings it, and learning it twice does no harm.
        """
        if not any(start in text for start in self._starts):
            return text
        end, markers = len(text.rstrip()), f"{self.hf.eos_token}{self.chat.end_of_turn if self.chat else ''}"

        def stand_in(found: re.Match[str]) -> str:
            return found[0] if found.end() == end and found[0] in markers else chr(STAND_INS + self._numbers[found[0]])

        return self._turn_markers.sub(stand_in, text)

    def rearm(self, text: str) -> str:
        """The text with the stand-ins replaced by what they stand for."""
        return PLACEHOLDER.sub(lambda found: self._special[ord(found[0]) - STAND_INS], text)

    def encode_parts(self, text: str, *, cuts: Sequence[int] = (), disarmed: bool = False) -> Encoding:
        """Like `encode`, but no token lies across a cut, and stand-ins are encoded as the plain text they stand for."""
        borders = {0, len(text), *cuts}
        if disarmed:
            borders.update(border for found in PLACEHOLDER.finditer(text) for border in found.span())
        ids: list[int] = []
        offsets: list[Offsets] = []
        for start, end in pairwise(sorted(borders)):
            if disarmed and PLACEHOLDER.match(text, start):
                plain = self._plain[self._special[ord(text[start]) - STAND_INS]]
                ids += plain
                offsets += [(start, end)] * len(plain)
            else:
                part_ids, part_offsets = self._part(self.hf.backend_tokenizer, text[start:end], inner=start > 0)
                ids += part_ids
                offsets += [(start + first, start + last) for first, last in part_offsets]
        return stitched(ids, offsets, bos_ids=self.bos_ids)

    @functools.cached_property
    def _plain(self) -> Mapping[str, list[int]]:
        """Each special token as the plain text it is, by a copy of the tokenizer that knows none."""
        copy = type(self.hf.backend_tokenizer).from_str(self.hf.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        return {token: self._part(copy, token, inner=True)[0] for token in self._special}

    @functools.cached_property
    def _anchors(self) -> tuple[str, ...]:
        """Characters to put before a part, where the tokenizer marks the start of each text as that of a word.

        SentencePiece tokenizers (Llama 2, Mistral, Phi 3) do: `b` alone is `▁b`, but behind `a` it is `b`.
        """
        encode = self.hf.backend_tokenizer.encode
        alone = encode("a", add_special_tokens=False).ids
        behind = encode("\na", add_special_tokens=False).ids
        return () if behind[-len(alone) :] == alone else ("\n", "|", "a")

    def _part(self, backend: Any, text: str, *, inner: bool) -> tuple[list[int], list[Offsets]]:
        """The tokens of a part of a text; those of an inner part are the ones it has behind other text."""
        for anchor in self._anchors if inner else ():
            found = backend.encode(f"{anchor}{text}", add_special_tokens=False)
            first = next((n for n, (start, end) in enumerate(found.offsets) if start >= 1 and end > 1), None)
            if first is not None and all(end <= 1 for _, end in found.offsets[:first]):
                return found.ids[first:], [(start - 1, end - 1) for start, end in found.offsets[first:]]
        found = backend.encode(text, add_special_tokens=False)
        return found.ids, found.offsets


def _one_of(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
