"""Bytes that are nearly right: seeds that were cut, doubled and flipped, and JSON with strange values in it."""

import copy
import functools
import gzip
import json
from collections.abc import Callable, Sequence
from typing import Any

import zstandard
from hypothesis import strategies as st

BYTES = st.binary(max_size=200)
HUGE = ["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "1e999", "-1e999", '"' + "x" * 100_000 + '"', "NaN", "-0.0"]
"""JSON that is deep, long, or no number."""
STRANGE_TEXTS = [
    "", " ", "\0", "\ud800", "é", "日本語", "\u202e", "a\nb", "/", "..", "../../x", "/etc/passwd", "true", "null",
    "1e3", "0x10", "-1", "NaN", "x" * 5000, "{{ 1 }}", "{% for i in x %}", "%s%n", "s3://b/k", "https://u:p@h/?sig=x",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400])
    | st.floats()
    | st.sampled_from(STRANGE_TEXTS)
    | st.text(max_size=20)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def dumped(value: Any) -> bytes:
    """As Python writes it, NaN and half surrogates included."""
    return json.dumps(value).encode()


@st.composite
def changed(draw: st.DrawFn, seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """A seed with a few pieces flipped, cut out, doubled, or replaced by words of the format."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        how = draw(st.sampled_from(["flip", "cut", "double", "end", "word", "bytes"]))
        if how == "flip" and data:
            data[min(start, len(data) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[start:end]
        elif how == "double":
            data[start:start] = data[start:end] * draw(st.sampled_from([1, 2, 50]))
        elif how == "end":
            del data[start:]
        elif how == "word" and words:
            data[start : draw(st.sampled_from([start, end]))] = draw(st.sampled_from(words))
        else:
            data[start:end] = draw(BYTES)
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = (), depth: int = 5) -> list[tuple[Any, ...]]:
    """The paths of all values inside; of a long list only the first few."""
    found = [path]
    if depth and isinstance(value, dict):
        found += [place for key in list(value)[:40] for place in places(value[key], (*path, key), depth - 1)]
    elif depth and isinstance(value, list):
        found += [
            place for index in range(min(3, len(value))) for place in places(value[index], (*path, index), depth - 1)
        ]
    return found


@st.composite
def json_like(draw: st.DrawFn, seeds: Sequence[Any], keys: Sequence[str] = ()) -> bytes:
    """A JSON seed in which some values are others, missing, or under keys that mean something to somebody."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    huge = ""
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(value))) or ("",)
        holder = value
        for step in path:
            holder = holder[step]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add", "huge"]))
        if last == "":
            value = draw(JSON) if how == "replace" and draw(st.booleans()) else value
        elif how == "remove":
            del holder[last]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from([*keys, "x"]))] = draw(JSON)
        elif how == "huge":
            huge = draw(st.sampled_from(HUGE))
            holder[last] = "\1huge\1"
        else:
            holder[last] = draw(JSON)
    return dumped(value).replace(b'"\\u0001huge\\u0001"', huge.encode() or b"0")


def lines(rows: Sequence[Any], keys: Sequence[str]) -> st.SearchStrategy[bytes]:
    """A few rows as JSON Lines."""
    one = json_like(rows, keys)
    return st.lists(one, min_size=1, max_size=4).map(b"\n".join)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "zst": zstandard.ZstdCompressor().compress,
}


@functools.cache
def bomb(kind: str, how: str) -> bytes:
    """Millions of empty lines, or one line that is longer than any may be."""
    return COMPRESSIONS[kind](b"\n" * (4 << 20) if how == "bomb" else b" " * (80 << 20))


@st.composite
def compressed(draw: st.DrawFn, inner: st.SearchStrategy[bytes], kind: str) -> bytes:
    """Compressed, or half of it, or changed afterwards, or twice, or a bomb."""
    pack = COMPRESSIONS[kind]
    data = pack(draw(inner))
    how = draw(st.sampled_from(["whole", "whole", "changed", "twice", "bomb", "line"]))
    if how == "changed":
        return draw(changed([data]))
    if how == "twice":
        return pack(data)
    if how in ("bomb", "line"):
        return data + bomb(kind, how)
    return data
