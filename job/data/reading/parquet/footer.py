"""The footer of a Parquet file, as far as its counts and sizes go: read before Arrow decodes it.

Source: Apache Parquet's `parquet.thrift`. Arrow takes up to 230 times a footer's size for it, and some of its accessors
end the whole process where numbers contradict each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from job.data.reading.parquet.thrift import DEEPEST, DamagedError, Thrift, TooLargeError

LONGEST = 64 << 20
"""Bytes."""
MOST_STRUCTS = 500_000
"""A column of a row group has about six."""
MOST_COLUMNS, LONGEST_PATH = 10_000, 4096
MAGIC = b"PAR1"
CODECS = ("", "snappy", "gzip", "lzo", "brotli", "lz4", "zstd", "lz4_raw")
BYTE_ARRAY, FIXED_LEN_BYTE_ARRAY = 6, 7
_REPEATED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """A column that holds values, not other columns."""

    path: str
    """With the columns that it is in, separated by dots."""
    text: bool
    """Whether a value may have any number of bytes."""
    fixed: int
    """Bytes of a value, where all have as many and the file says so; else 0."""
    nested: bool
    """Whether a row may have any number of values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A column in a row group."""

    leaf: Leaf
    rows: int
    values: int
    codec: str
    """As `pyarrow.Codec` calls it; empty for none."""
    start: int
    """Of the first page."""
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Footer:
    """What a file says of itself."""

    rows: int
    leaves: list[Leaf]
    row_groups: list[list[Chunk]]


def read_footer(file: IO[bytes]) -> Footer:
    """The footer of a file that has one.

    Raises:
        TooLargeError: it is too long, or has too many parts.
        DamagedError: it is not what the format says.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != MAGIC:
        raise DamagedError("it is not Parquet: the magic bytes at its end are missing")
    if length > size - 12:
        raise DamagedError("it was cut off, or its footer is damaged")
    if length > LONGEST:
        raise TooLargeError(f"its footer has {length:,} bytes, more than {LONGEST:,}")
    file.seek(size - 8 - length)
    try:
        footer = _footer(Thrift(file.read(length), most=MOST_STRUCTS).struct())
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise DamagedError("its footer is damaged") from None
    if sum(chunk.end - chunk.start for group in footer.row_groups for chunk in group) > size:
        raise DamagedError("its columns are together longer than the file")
    return footer


def _footer(fields: dict[int, Any]) -> Footer:
    leaves = list(islice(_leaves(fields[2]), MOST_COLUMNS + 1))
    if len(leaves) > MOST_COLUMNS:
        raise TooLargeError(f"it has more than {MOST_COLUMNS:,} columns")
    groups = [[_chunk(*one, rows=group[3]) for one in _paired(group[1], leaves)] for group in fields.get(4, [])]
    rows = sum(group[3] for group in fields.get(4, []))
    return Footer(rows=max(rows, fields[3]), leaves=leaves, row_groups=groups)


def _paired(chunks: list[dict[int, Any]], leaves: list[Leaf]) -> Iterator[tuple[dict[int, Any], Leaf]]:
    if len(chunks) != len(leaves):
        raise DamagedError("a row group does not have the columns of the schema")
    return zip((chunk[3] for chunk in chunks), leaves, strict=True)


def _chunk(fields: dict[int, Any], leaf: Leaf, *, rows: int) -> Chunk:
    start = min(fields[9], fields.get(11) or fields[9])
    if min(start, rows, fields[5], fields[7]) < 0:
        raise DamagedError("a size in its footer is negative")
    return Chunk(
        leaf=leaf,
        rows=rows,
        values=fields[5],
        codec=CODECS[fields[4]],
        start=start,
        end=start + fields[7],
    )


def _leaves(elements: list[dict[int, Any]]) -> Iterator[Leaf]:
    """The schema is a tree in depth-first order; the first element is its root."""
    open_: list[tuple[int, str, bool]] = []  # children that are still to come, path and whether repeated
    for number, element in enumerate(elements):
        while open_ and not open_[-1][0]:
            open_.pop()
        left, path, nested = open_.pop() if open_ else (1, "", False)
        open_.append((left - 1, path, nested))
        if number:
            path = f"{path}.{element[4].decode()}".removeprefix(".")
            nested = nested or element.get(3) == _REPEATED
        if len(path) > LONGEST_PATH or len(open_) > DEEPEST:
            raise TooLargeError("its columns have names that are too long, or lie too deep in each other")
        if element.get(5):
            open_.append((element[5], path, nested))
        elif number:
            kind = element.get(1)
            yield Leaf(
                path=path,
                text=kind == BYTE_ARRAY,
                fixed=max(element.get(2, 0), 0) if kind == FIXED_LEN_BYTE_ARRAY else 0,
                nested=nested,
            )
