"""What a Parquet file says of its sizes, checked before anything is allocated by them.

A few kilobytes can claim any number of rows, values and bytes, and Arrow's reader believes them. So the headers of all
pages are read before the pages. Source: Apache Parquet's `parquet.thrift`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow as pa

from job.data.reading.parquet.footer import Chunk, Footer
from job.data.reading.parquet.thrift import DamagedError, Thrift, TooLargeError

MIB = 1 << 20
LARGEST_PAGE = 256 * MIB
LARGEST_HEADER, MOST_EMPTY = MIB, 1000
LARGEST_CHUNK, MOST_VALUES = 512 * MIB, 1 << 24
"""Bytes and values of one column in a row group, where rows may be of any size. Stored, they may be more."""
LARGEST_SHARED = 2 * MIB
"""Bytes that values share, where a row may hold many of them and each is read as a text of its own."""
LARGEST_FIXED = 64 << 10
"""Bytes of a value of fixed length."""
RATIO = 64
"""Values, rows or bytes for each byte that is stored, beyond these numbers."""
MOST_ROWS = 1_000_000
WINDOW = 256 * MIB
"""Bytes that the rows of one batch may take."""
BATCHES = (512, 64, 8, 1)
"""Rows of a batch, the first that fits."""

_LENGTH = struct.Struct("<I")
_SHARED_BEGINNINGS = 7  # DELTA_BYTE_ARRAY
_DELTA = (6, _SHARED_BEGINNINGS)  # with DELTA_LENGTH_BYTE_ARRAY
_UNKNOWN = -1
_DATA, _DICTIONARY, _DATA_2 = 5, 7, 8  # the fields of a page's header for its kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a row group can be read in bounded memory."""

    rows: int
    """How many may be read at once."""
    in_dictionary: frozenset[str]
    """Columns of text to be read as they are stored: a text that many values share takes memory once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Page:
    offset: int
    """Of what follows the header."""
    values: int
    size: int
    """Decompressed."""
    stored: int
    dictionary: bool
    encoding: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """A column in a row group, and its pages."""

    chunk: Chunk
    data: list[_Page]
    dictionary: list[_Page]
    longest: int
    """Bytes of the longest text in the dictionary, or more."""

    @property
    def values(self) -> int:
        return sum(page.values for page in self.data)

    @property
    def delta(self) -> bool:
        """Whether Arrow cannot read it into a dictionary."""
        return any(page.encoding in _DELTA for page in self.data)

    @property
    def expands(self) -> bool:
        """Whether values that share a text may together be much longer than what is stored."""
        return (self.values if self.chunk.leaf.nested else BATCHES[0]) * self.longest > WINDOW // 4


def check_rows(file: IO[bytes], footer: Footer) -> None:
    """Raise TooLargeError for more rows than a file of this size has."""
    stored = os.fstat(file.fileno()).st_size
    if footer.rows > MOST_ROWS + RATIO * stored:
        raise TooLargeError(f"it has {footer.rows:,} rows in {stored:,} bytes")


def plan(file: IO[bytes], chunks: list[Chunk]) -> Plan:
    """Look at the headers of all pages of a row group.

    Raises:
        TooLargeError: a page or a column is too large for what is stored.
        DamagedError: the pages are not where the footer says.
    """
    columns = [_column(file.fileno(), chunk) for chunk in chunks]
    shared = frozenset(column.chunk.leaf.path for column in columns if column.expands and not column.delta)
    return Plan(rows=_rows_at_once(columns, shared), in_dictionary=shared)


def _column(descriptor: int, chunk: Chunk) -> _Column:
    where = f"column {chunk.leaf.path}"
    if chunk.leaf.fixed > LARGEST_FIXED:
        raise TooLargeError(f"{where}: values of {chunk.leaf.fixed:,} bytes, more than {LARGEST_FIXED:,}")
    pages = list(_pages(descriptor, chunk))
    if large := [page.size for page in pages if page.size > LARGEST_PAGE]:
        raise TooLargeError(f"{where}: a page of {large[0]:,} bytes, more than {LARGEST_PAGE:,}")
    dictionary = [page for page in pages if page.dictionary]
    texts = dictionary if chunk.leaf.text else []
    found = _Column(
        chunk=chunk,
        data=[page for page in pages if not page.dictionary],
        dictionary=dictionary,
        longest=max((_longest(descriptor, page, chunk.codec) for page in texts), default=0),
    )
    if chunk.leaf.nested:
        _check_nested(found, where)
    return found


def _check_nested(column: _Column, where: str) -> None:
    """A row may hold any number of the values, so their sum counts."""
    pages = [*column.data, *column.dictionary]
    stored, size = sum(page.stored for page in pages), sum(page.size for page in pages)
    if column.values > MOST_VALUES + RATIO * stored:
        raise TooLargeError(f"{where}: {column.values:,} values in {stored:,} bytes")
    if size > LARGEST_CHUNK + RATIO * stored:
        raise TooLargeError(f"{where}: {size:,} bytes in {stored:,}")
    shared = [page.size for page in column.data if page.encoding == _SHARED_BEGINNINGS]
    shared += [column.longest] if column.delta else []
    if max(shared, default=0) > LARGEST_SHARED:
        raise TooLargeError(f"{where}: {max(shared):,} bytes that values share, more than {LARGEST_SHARED:,}")


def _longest(descriptor: int, page: _Page, codec: str) -> int:
    """The bytes of the longest value of a dictionary, or more: it is looked at only where that is cheap."""
    if page.size > LARGEST_SHARED:
        return page.size
    data = os.pread(descriptor, page.stored, page.offset)
    try:
        if codec:
            data = pa.Codec(codec).decompress(data, decompressed_size=page.size, asbytes=True)
    except (ValueError, OSError, NotImplementedError):
        return page.size
    position, longest, end = 0, 0, len(data) - _LENGTH.size
    while position <= end:
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size + length
        longest = max(longest, length)
    return min(longest, page.size)


def _rows_at_once(columns: list[_Column], in_dictionary: Collection[str]) -> int:
    for rows in BATCHES:
        expanded = (column.chunk.leaf.path not in in_dictionary for column in columns)
        if sum(_window(*one, rows) for one in zip(columns, expanded, strict=True)) <= WINDOW:
            return rows
    return BATCHES[-1]


def _window(column: _Column, expanded: bool, rows: int) -> int:
    """The most bytes that so many rows in a row can take, with the whole pages that they are in.

    Args:
        column: which.
        expanded: whether a text that values share is read once for each of them.
        rows: how many.
    """
    rows_per_value = column.chunk.rows / max(column.values, 1) if column.chunk.leaf.nested else 1.0
    values = min(rows / rows_per_value if rows_per_value else rows, column.values)
    largest = size = first = 0
    covered = 0.0
    for last, page in enumerate(column.data):
        size += _expanded(page, rows)
        covered += page.values * rows_per_value
        # The rows may begin with the last row of the first page, and end with the first of this one.
        while first < last and covered - (column.data[first].values + page.values) * rows_per_value > rows - 2:
            size -= _expanded(column.data[first], rows)
            covered -= column.data[first].values * rows_per_value
            first += 1
        largest = max(largest, size)
    shared = int(values * column.longest) if expanded else 0
    return largest + sum(page.size for page in column.dictionary) + shared


def _expanded(page: _Page, rows: int) -> int:
    return page.size * (min(rows, page.values) if page.encoding == _SHARED_BEGINNINGS else 1)


def _pages(descriptor: int, chunk: Chunk) -> Iterator[_Page]:
    """The headers of a column's pages, read as far as a reader would."""
    offset, values, empty = chunk.start, 0, 0
    while offset < chunk.end and values < chunk.values:
        page = _page(descriptor, offset)
        offset = page.offset + page.stored
        values += 0 if page.dictionary else page.values
        empty += page.dictionary or not page.values
        if empty > MOST_EMPTY:
            raise DamagedError(f"column {chunk.leaf.path} has pages without values")
        yield page


def _page(descriptor: int, offset: int) -> _Page:
    for size in (512, LARGEST_HEADER):
        thrift = Thrift(os.pread(descriptor, size, offset), most=1000)
        try:
            fields = thrift.struct()
        except IndexError:
            continue
        kind = next((key for key in (_DATA, _DICTIONARY, _DATA_2) if isinstance(fields.get(key), dict)), 0)
        data = fields[kind] if kind else {}
        sizes = fields.get(2), fields.get(3), data.get(1, 0)
        if not all(isinstance(one, int) and one >= 0 for one in sizes):
            break
        return _Page(
            offset=offset + thrift.position,
            values=data.get(1, 0),
            size=fields[2],
            stored=fields[3],
            dictionary=kind == _DICTIONARY,
            encoding=data.get(4 if kind == _DATA_2 else 2, _UNKNOWN),
        )
    raise DamagedError(f"there is no page at byte {offset:,}")
