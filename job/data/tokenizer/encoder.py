"""Text -> token ids by a fast tokenizer: BOS occurs exactly once, and special tokens inside a turn's content can be
escaped, so that they are encoded as plain text.

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
from job.data.tokenizer.encoding import Encoding, Offsets, count_offsets, from_parts, from_raw

FIRST_PLACEHOLDER = 0x100000
"""In escaped text, special token number n is the character U+100000 + n (private use)."""
SAMPLES = (
    "",
    " leading,  double  and trailing ",
    "Lines\n\nand\r\n\ttabs, 1234567890 + 3.14; it's (a) [b] {c} <d> #e @f $g _h_ `i` ~j~ \\k",
    "Größe, naïve, æøå, Ωμέγα, Привет, שלום, नमस्ते, 日本語のテキスト, 한국어, 🙂👩‍👩‍👧, \u00a0 \u2028",
)
"""Texts on which counted offsets must equal those of the library."""
PLACEHOLDER = re.compile("[\U00100000-\U0010fffd]")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A fast tokenizer, and the template with its markers."""

    hf: Any
    """The transformers tokenizer, with the template in force and the corrected EOS set: save this one."""
    chat: Template | None
    """None if the tokenizer has no chat template and the settings name none."""
    bos_ids: tuple[int, ...]
    """The tokens that the tokenizer puts before every text: usually BOS or none."""

    def encode(self, text: str) -> Encoding:
        """Token ids with one BOS where the tokenizer uses it, whether or not the text has it already."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Many texts at once."""
        return [self.with_offsets(text, raw) for text, raw in zip(texts, self.encode_raw(texts), strict=True)]

    def encode_raw(self, texts: Sequence[str]) -> list[Any]:
        """The library's encodings of many texts, made on all cores and without Python's lock; see `with_offsets`."""
        backend = self.hf.backend_tokenizer
        encode = backend.encode_batch if self._widths is None else backend.encode_batch_fast
        result: list[Any] = encode(list(texts), add_special_tokens=False)
        return result

    def with_offsets(self, text: str, raw: Any) -> Encoding:
        """The tokens of a text and the characters that they cover, given the library's encoding (`encode_raw`)."""
        if self._widths is None:
            return from_raw(raw, bos_ids=self.bos_ids)
        ids: list[int] = raw.ids
        # A normaliser may change characters, but not those of ASCII: `SAMPLES` has them.
        backend = self.hf.backend_tokenizer
        unchanged = backend.normalizer is None or text.isascii()
        quick = count_offsets(text, ids, self._widths) if unchanged else None
        return from_raw(quick or backend.encode(text, add_special_tokens=False), bos_ids=self.bos_ids)

    @functools.cached_property
    def _widths(self) -> NDArray[np.int32] | None:
        """The bytes of text that each token stands for; None unless the tokenizer is byte-level.

        The tokens of such a tokenizer are spelt in an alphabet of one character for each byte (Radford et al. 2019,
        GPT-2's encoder), so that offsets can be counted. This takes a fifth less time than the library's offsets.
        """
        backend = self.hf.backend_tokenizer
        spelt = backend.get_vocab(with_added_tokens=False)
        added = {number: len(token.content.encode()) for number, token in self.hf.added_tokens_decoder.items()}
        widths = np.zeros(max(*spelt.values(), *added, 0) + 1, dtype=np.int32)
        widths[list(spelt.values())] = [len(token) for token in spelt]
        widths[list(added)] = list(added.values())
        for text in (*SAMPLES, "".join(f"a {token} b" for token in self._special)):
            whole = backend.encode(text, add_special_tokens=False)
            quick = count_offsets(text, whole.ids, widths)
            if quick is None or quick.offsets != whole.offsets:
                return None
        return widths

    @functools.cached_property
    def _special(self) -> tuple[str, ...]:
        tokens = self.hf.added_tokens_decoder.values()
        return tuple(sorted({token.content for token in tokens if token.special}, key=lambda text: (-len(text), text)))

    @functools.cached_property
    def _starts(self) -> tuple[str, ...]:
        """The first characters of special tokens: most texts contain none of them."""
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
        chat = self.chat.short_conversation if self.chat else ""
        markers = f"{chat}{self.hf.bos_token or ''}{self.hf.eos_token or ''}"
        return _one_of([token for token in self._special if token in markers])

    def _placeholder(self, token: str) -> str:
        return chr(FIRST_PLACEHOLDER + self._numbers[token])

    def _token_of(self, placeholder: str) -> str:
        return self._special[ord(placeholder) - FIRST_PLACEHOLDER]

    def escape(self, text: str) -> str:
        """Replace special tokens in a text by placeholders, so that they cannot become control tokens."""
        if not any(start in text for start in self._starts):
            return text
        return self._any_special.sub(lambda found: self._placeholder(found[0]), text)

    def escape_answer(self, text: str) -> str:
        """The same for an answer: only tokens that open or end turns, since others may be intended.

        An end marker at the very end stays: data often has it, and learning it twice does no harm.
        """
        if not any(start in text for start in self._starts):
            return text
        end, markers = len(text.rstrip()), f"{self.hf.eos_token}{self.chat.end_of_turn if self.chat else ''}"

        def escaped(found: re.Match[str]) -> str:
            return found[0] if found.end() == end and found[0] in markers else self._placeholder(found[0])

        return self._turn_markers.sub(escaped, text)

    def unescape(self, text: str) -> str:
        """The text with special tokens in place of their placeholders."""
        return PLACEHOLDER.sub(lambda found: self._token_of(found[0]), text)

    def encode_parts(self, text: str, *, cuts: Sequence[int] = (), escaped: bool = False) -> Encoding:
        """Like `encode`, but no token crosses a cut, and placeholders are encoded as the text of their tokens."""
        borders = {0, len(text), *cuts}
        if escaped:
            borders.update(border for found in PLACEHOLDER.finditer(text) for border in found.span())
        ids: list[int] = []
        offsets: list[Offsets] = []
        for start, end in pairwise(sorted(borders)):
            if escaped and PLACEHOLDER.match(text, start):
                plain = self._plain[self._token_of(text[start])]
                ids += plain
                offsets += [(start, end)] * len(plain)
            else:
                part_ids, part_offsets = self._part(self.hf.backend_tokenizer, text[start:end], inner=start > 0)
                ids += part_ids
                offsets += [(start + first, start + last) for first, last in part_offsets]
        return from_parts(ids, offsets, bos_ids=self.bos_ids)

    @functools.cached_property
    def _plain(self) -> Mapping[str, list[int]]:
        """The ids of each special token as plain text, by a copy of the tokenizer without special tokens."""
        copy = type(self.hf.backend_tokenizer).from_str(self.hf.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        return {token: self._part(copy, token, inner=True)[0] for token in self._special}

    @functools.cached_property
    def _anchors(self) -> tuple[str, ...]:
        """Characters to put before a part if the tokenizer treats the start of a text as the start of a word.

        SentencePiece tokenizers (Llama 2, Mistral, Phi 3) do: `b` alone is `▁b`, but after `a` it is `b`.
        """
        encode = self.hf.backend_tokenizer.encode
        alone = encode("a", add_special_tokens=False).ids
        after = encode("\na", add_special_tokens=False).ids
        return () if after[-len(alone) :] == alone else ("\n", "|", "a")

    def _part(self, backend: Any, text: str, *, inner: bool) -> tuple[list[int], list[Offsets]]:
        """The tokens of a part of a text; an inner part has the tokens that it has after other text."""
        for anchor in self._anchors if inner else ():
            found = _alone(backend, f"{anchor}{text}")
            first = next((n for n, (start, end) in enumerate(found.offsets) if start >= 1 and end > 1), None)
            if first is not None and all(end <= 1 for _, end in found.offsets[:first]):
                return found.ids[first:], [(start - 1, end - 1) for start, end in found.offsets[first:]]
        found = _alone(backend, text)
        return found.ids, found.offsets


def _alone(backend: Any, text: str) -> Any:
    """The encoding of one text. As a batch of one, since `encode` keeps Python's lock as long as it takes."""
    return backend.encode_batch([text], add_special_tokens=False)[0]


def _one_of(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
