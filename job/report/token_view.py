"""Training sequences for a reader: token by token, with the learned ones marked, and secrets masked."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from job.data.prepare import Data
from job.data.rendering.labels import IGNORED
from job.data.tokenizer.load import Tokenizer
from job.observability import logs
from job.observability.masking import MASK, suspicious
from job.report.page import SequenceView, Token

SHOWN_FIRST, SHOWN_LAST = 900, 300
"""Tokens shown of a sequence that is too long to be shown whole."""
LONGEST_CHARACTER = 8
"""Tokens that one character may take; byte-level tokenizers need up to four."""
UNFINISHED = "\ufffd"


def sequence_views(data: Data) -> tuple[SequenceView, ...]:
    """The first two sequences, one of median length, and the longest."""
    rows = data.train.dataset
    lengths = rows.data.column("length").to_numpy()
    order = np.argsort(lengths, kind="stable")
    named = {0: "The first sequence", 1: "The second"}
    named.setdefault(int(order[len(order) // 2]), "One of median length")
    named.setdefault(int(order[-1]), "The longest")
    return tuple(
        sequence_view(data.tokenizer, rows[at], name=f"{name} (number {at + 1:,})", place=data.train.provenance.at(at))
        for at, name in named.items()
        if at < len(lengths)
    )


def sequence_view(tokenizer: Tokenizer, row: Mapping[str, Any], *, name: str, place: str) -> SequenceView:
    """One sequence. Tokens that overlap an apparent secret or an e-mail address are masked; a sequence with a secret of
    this environment is not shown at all, since parts of the secret might remain readable.

    Args:
        row: `input_ids`, `labels`, and `weights` if weights differ; all of the same length.
    """
    ids = row["input_ids"]
    learned = _learned(row)
    text = _decode(tokenizer.hf, ids)
    if logs.redact_data(text) != text:
        note = "Not shown: it contains a secret of this environment"
        counts = {"count": len(ids), "learned": len(learned)}
        return SequenceView(name=name, place=place, tokens=(), left_out=0, left_out_after=0, **counts, note=note)
    left_out = max(len(ids) - SHOWN_FIRST - SHOWN_LAST, 0)
    last = SHOWN_FIRST + left_out
    if suspicious(text):  # all tokens count, including those left out: a secret may begin among them
        tokens = _masked(_tokens(tokenizer.hf, ids, learned, 0, len(ids)))
        tokens = tokens[:SHOWN_FIRST] + tokens[last:] if left_out else tokens
    else:
        tokens = _tokens(tokenizer.hf, ids, learned, 0, SHOWN_FIRST if left_out else len(ids))
        tokens += _tokens(tokenizer.hf, ids, learned, last, len(ids)) if left_out else []
    return SequenceView(
        name=name,
        place=place,
        tokens=tuple(tokens),
        left_out=left_out,
        left_out_after=SHOWN_FIRST,
        count=len(ids),
        learned=len(learned),
    )


def _learned(row: Mapping[str, Any]) -> dict[int, float | None]:
    """The positions of the learned tokens, with their weights if weights differ."""
    weights = row.get("weights") or [None] * len(row["labels"])
    return {at: weights[at] for at, label in enumerate(row["labels"]) if label != IGNORED}


def _tokens(hf: Any, ids: Sequence[int], learned: Mapping[int, float | None], start: int, end: int) -> list[Token]:
    """The text of each token. If several tokens make one character, the first shows it and the others are empty."""
    special = {number for number, token in hf.added_tokens_decoder.items() if token.special}
    found: list[Token] = []
    at = start
    while at < end:
        upto = at + 1
        text = _added(hf, ids, at, upto)
        while text.endswith(UNFINISHED) and upto < min(end, at + LONGEST_CHARACTER):
            upto += 1
            text = _added(hf, ids, at, upto)
        if text.endswith(UNFINISHED):  # the text itself contains half a character
            upto = at + 1
            text = _added(hf, ids, at, upto)
        found += [
            Token(
                text=text if number == at else "",
                learned=number in learned,
                special=ids[number] in special,
                weight=learned.get(number),
            )
            for number in range(at, upto)
        ]
        at = upto
    return found


def _masked(tokens: list[Token]) -> list[Token]:
    """The same with a mask in place of the first token that overlaps a suspicious range, and nothing for the others."""
    ends = list(accumulate(len(token.text) for token in tokens))
    found = list(tokens)
    for start, end in suspicious("".join(token.text for token in tokens)):
        first, stop = bisect_right(ends, start), bisect_left(ends, end) + 1
        masks = [MASK, *[""] * (stop - first - 1)]
        found[first:stop] = [replace(token, text=mask) for token, mask in zip(tokens[first:stop], masks, strict=True)]
    return found


def _added(hf: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The text of tokens after the one before them: some tokenizers drop the space before the first word of a text."""
    before, both = _decode(hf, ids[max(start - 1, 0) : start]), _decode(hf, ids[max(start - 1, 0) : end])
    return both.removeprefix(before) if both.startswith(before) else _decode(hf, ids[start:end])


def _decode(hf: Any, ids: Sequence[int]) -> str:
    return str(hf.backend_tokenizer.decode(list(ids), skip_special_tokens=False))
