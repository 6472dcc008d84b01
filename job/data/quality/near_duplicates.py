"""Texts -> signatures -> groups of texts that are nearly the same.

The similarity of two texts is the share of their word pairs that both have (Jaccard). It is estimated from 128 numbers
for each text (MinHash by one permutation: Li, Owen, Zhang 2012; empty bins filled as in Shrivastava 2017). Texts are
compared only if all eight numbers of one of 16 bands agree (locality-sensitive hashing).

It is written out here and not taken from a library because the split depends on it: the same rows must give the same
groups on every machine and with every version of the libraries. All of it is numpy on batches of bytes; no word ever
becomes a Python object. Knows nothing of rows.
"""

from __future__ import annotations

import functools
import re
from unicodedata import ucd_3_2_0 as unicode

import numpy as np
from numpy.typing import NDArray

SIMILAR = 0.8
"""From this estimated similarity on, two texts are nearly the same."""
LEAST_WORDS = 8
"""Shorter texts are nearly the same only if all their words are equal: one other word makes a different text."""
LONGEST = 1 << 17
"""Bytes of a text that are compared."""
SLOTS, BANDS = 128, 16
NONE = np.iinfo(np.uint32).max
BATCH = 1 << 18
"""Bytes that are hashed at once; small enough for the processor's cache to help."""
ROUNDS = 8
"""How many texts of a bucket all others in the bucket are compared with."""

Hashes = NDArray[np.uint64]
Signature = NDArray[np.uint16]

# Scripts without spaces between words: each character is one.
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
NEVER_SPACELESS = bytes(byte for byte in range(256) if byte not in b"\xe0\xe1\xe3\xe4\xe5\xe6\xe7\xe8\xe9\xef")
"""Bytes of UTF-8 that begin none of these characters."""
ASCII = 0x7F
BETWEEN = b"\xc2\xc3\xca\xcb\xcd\xce\xcf\xd5\xd6\xd7\xd8\xd9\xdb\xdc\xe0\xe1\xe2\xe3\xef"
"""Bytes that begin, among others, the characters of `_between` that are not ASCII."""
KINDS = bytes(2 if byte in BETWEEN else byte > ASCII or chr(byte).isalnum() for byte in range(256))
"""For each byte 0 between words, 1 inside a word, 2 if it depends on the character that the byte begins."""
BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2**64."""


@functools.cache
def _powers(base: int) -> Hashes:
    """The base's powers modulo 2**64, one for each byte of the largest batch."""
    factors = np.full(BATCH + LONGEST + 2, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _mixed(values: Hashes) -> Hashes:
    """Every bit of the result depends on every bit of the value (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _donors() -> NDArray[np.int64]:
    """For each slot the order in which it tries the others when it is empty."""
    drawn = _mixed(np.arange(1, SLOTS * SLOTS + 1, dtype=np.uint64)).reshape(SLOTS, SLOTS)
    return np.argsort(drawn, axis=1, kind="stable")


@functools.cache
def _between() -> NDArray[np.bool_]:
    """For each character up to U+FFFF whether it separates words, by the categories of ASCII's separators.

    So words consist of letters, digits and emoji. Categories are those of Unicode 3.2, the same in every Python.
    """
    kinds = [unicode.category(chr(code)) for code in range(0x10000)]
    return np.array([kind[0] in "PZ" or kind in {"Cc", "Sc", "Sk", "Sm"} for kind in kinds])


def _in_word(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """For each byte of UTF-8 whether it is part of a word. The last byte is a line end."""
    kinds = np.frombuffer(data.tobytes().translate(KINDS), dtype=np.uint8)
    inside, at = kinds > 0, np.flatnonzero(kinds == 2)  # noqa: PLR2004 - see KINDS
    if not len(at):
        return inside
    one, two, three = (data.take(at + more, mode="clip").astype(np.intp) for more in range(3))
    long = one >= 0xE0  # noqa: PLR2004 - begins a character of three bytes
    code = np.where(long, (one & 0xF) << 12 | (two & 0x3F) << 6 | three & 0x3F, (one & 0x1F) << 6 | two & 0x3F)
    found = _between()[code] & (two > ASCII)  # not a lone first byte of a character, where a text was cut off
    at, long = at[found], long[found]
    inside[at] = inside[at + 1] = False
    inside[at[long] + 2] = False
    return inside


def spaced(text: str) -> str:
    """The text with a space after each character of a script that has none between its words."""
    if text.isascii() or not text.encode("utf-8", "replace").translate(None, NEVER_SPACELESS):
        return text
    return SPACELESS.sub(r"\g<0> ", text)


class Signatures:
    """Takes texts one by one; memory holds one batch of them, and 256 bytes for each text."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._done: list[Signature] = []
        self._powers, self._inverse = _powers(BASE), _powers(pow(BASE, -1, 2**64))
        self._donors = _donors()

    def add(self, text: str) -> None:
        """Add a text. Case, punctuation and white space do not matter."""
        words = spaced(text[:LONGEST].lower())
        self._waiting.append(words.encode("utf-8", "replace")[:LONGEST])
        self._bytes += len(self._waiting[-1]) + 1
        if self._bytes >= BATCH:
            self._flush()

    def all(self) -> Signature:
        """One row of 128 numbers for each text, all zero for a text without words."""
        if self._waiting:
            self._flush()
        return np.concatenate(self._done) if self._done else np.zeros((0, SLOTS), dtype=np.uint16)

    def _flush(self) -> None:
        lengths = np.array([len(words) + 1 for words in self._waiting])
        data = np.frombuffer(b"\n".join(self._waiting) + b"\n", dtype=np.uint8)
        self._done.append(self._sketched(data, np.cumsum(lengths)))
        self._waiting, self._bytes = [], 0

    def _sketched(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> Signature:
        words, rows = self._words(data, ends)
        counts = np.bincount(rows, minlength=len(ends))
        short = (counts > 0) & (counts < LEAST_WORDS)
        inside = rows[1:] == rows[:-1]
        pairs, rows = _mixed(words[:-1] * np.uint64(3) + words[1:])[inside], rows[:-1][inside]
        smallest = np.full(len(ends) * SLOTS, NONE, dtype=np.uint32)
        slots = rows * SLOTS + (pairs >> np.uint64(57)).astype(np.int64)
        np.minimum.at(smallest, slots, (pairs & np.uint64(NONE >> 1)).astype(np.uint32))
        found = self._filled(smallest.reshape(-1, SLOTS), counts >= LEAST_WORDS)
        found[short] = _of_all_words(words, counts)[short]
        return found

    def _words(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
        """A hash of each word, and the number of its text."""
        inside = _in_word(data)  # the last byte is a line end, so that words end as often as they start
        borders = np.flatnonzero(inside[1:] != inside[:-1]) + 1
        starts, stops = (borders[1::2], borders[::2]) if inside[0] else (borders[::2], borders[1::2])
        starts = np.concatenate(([0], starts)) if inside[0] else starts
        sums = np.cumsum(data * self._powers[: len(data)], dtype=np.uint64)
        before = np.where(starts > 0, sums[starts - 1], np.uint64(0))
        hashes = (sums[stops - 1] - before) * self._inverse[starts]
        words = np.diff(np.searchsorted(starts, ends), prepend=0)
        return _mixed(hashes), np.repeat(np.arange(len(ends)), words)

    def _filled(self, smallest: NDArray[np.uint32], long_enough: NDArray[np.bool_]) -> Signature:
        """Empty slots take the number of another slot: the first in their own order that has one."""
        found = smallest.copy()
        rows, slots = np.nonzero((smallest == NONE) & long_enough[:, None])
        for choice in range(SLOTS):
            if not len(rows):
                break
            taken = smallest[rows, self._donors[slots, choice]]
            found[rows, slots] = taken
            rows, slots = rows[taken == NONE], slots[taken == NONE]
        found[~long_enough] = 0
        return (found & np.uint32(0xFFFF)).astype(np.uint16)


def _of_all_words(words: Hashes, counts: NDArray[np.int64]) -> Signature:
    """For each text 128 numbers, equal only for texts of the same words in the same order."""
    place = np.arange(len(words)) - np.repeat(np.cumsum(counts) - counts, counts)
    sums = np.zeros(len(counts), dtype=np.uint64)
    np.add.at(sums, np.repeat(np.arange(len(counts)), counts), _mixed(words + place.astype(np.uint64)))
    numbers = _mixed(sums[:, None] + np.arange(1, SLOTS + 1, dtype=np.uint64) * np.uint64(BASE))
    return (numbers & np.uint64(0xFFFF)).astype(np.uint16)


def groups(signatures: Signature) -> NDArray[np.int64]:
    """For each text the number of the first text of its group of near duplicates; its own number if it has none.

    Similarity is transitive here: if a is similar to b and b to c, all three are one group.
    """
    numbers = np.arange(len(signatures))
    compared = numbers[signatures.any(axis=1)]
    if not len(compared):
        return numbers
    edges = [_similar_pairs(signatures, compared, band) for band in range(BANDS)]
    return _joined(numbers, np.concatenate(edges, axis=1))


def _similar_pairs(signatures: Signature, compared: NDArray[np.int64], band: int) -> NDArray[np.int64]:
    """Pairs of similar texts that agree in a band, as two rows of numbers.

    All texts of a bucket are compared with its first, those not similar to it with the first among them, and so on.
    """
    width = SLOTS // BANDS
    part = np.ascontiguousarray(signatures[compared, band * width : (band + 1) * width])
    halves = part.view(np.uint64).reshape(len(part), -1)
    buckets = _mixed(halves[:, 0]) + halves[:, 1]
    order = np.argsort(buckets, kind="stable")
    members, buckets = compared[order], buckets[order]
    found = []
    for _ in range(ROUNDS):
        first = np.concatenate(([True], buckets[1:] != buckets[:-1]))[: len(buckets)]
        leader = members[first][np.cumsum(first) - 1]
        similar = _similarity(signatures, members, leader) >= SIMILAR
        found.append(np.stack([leader, members])[:, similar & ~first])
        members, buckets = members[~similar & ~first], buckets[~similar & ~first]
        if not len(members):
            break
    return np.concatenate(found, axis=1)


def _similarity(signatures: Signature, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of equal numbers in the signatures of each pair; 4,096 pairs at a time."""
    share = np.ones(len(one))
    differ = np.flatnonzero(one != other)
    for at in range(0, len(differ), 4096):
        some = differ[at : at + 4096]
        share[some] = (signatures[one[some]] == signatures[other[some]]).mean(axis=1)
    return share


def _joined(labels: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest number that each can reach over the edges."""
    left, right = edges
    while True:
        smaller = np.minimum(labels[left], labels[right])
        joined = labels.copy()
        for side in (labels[left], labels[right], left, right):
            np.minimum.at(joined, side, smaller)
        joined = joined[joined]
        if np.array_equal(joined, labels):
            return joined
        labels = joined
