"""A Parquet file -> its rows, as JSON would have them.

Knows tables and cells; nothing of what a row means. What a batch takes in memory is bounded before it is read
(`job.data.reading.parquet.sizes`), and what its rows take before they become Python objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from job.data.reading.fields import Unreadable
from job.data.reading.parquet.footer import Footer, read_footer
from job.data.reading.parquet.sizes import check_rows, plan
from job.data.reading.parquet.thrift import DEEPEST, TooLargeError

BUFFER = 1 << 20
MOST_VALUES, MOST_VALUES_AT_ONCE = 4_000_000, 1_000_000
"""Values in the lists and objects of one row, and of the rows that are Python objects at a time."""


MOST_IN_ALL, RATIO = 256 << 20, 1000
"""Bytes of text, and values, that all rows may have, and of these for each byte that is stored, beyond these."""


class TooLongError(Exception):
    """One row is longer than a row may be."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row
        """Its number, from 1."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """An open file."""

    file: IO[bytes]
    footer: Footer
    parquet: parquet.ParquetFile

    @classmethod
    def open(cls, file: IO[bytes]) -> Table:
        """Look at the file's metadata.

        Raises:
            TooLargeError, DamagedError: see `job.data.reading.parquet.sizes`.
            pa.ArrowInvalid, OSError: it is no Parquet file.
        """
        footer = read_footer(file)
        check_rows(file, footer)
        return cls(file=file, footer=footer, parquet=_opened(file))

    @property
    def names(self) -> list[str]:
        """The columns."""
        names: list[str] = self.parquet.schema_arrow.names
        return names

    def rows(self, *, longest: int) -> Iterator[dict[str, Any]]:
        """The rows, without the nulls inside them.

        A value that cannot be read is `Unreadable`, which is an error only where the value is needed.

        Args:
            longest: bytes of text in a row.

        Raises:
            TooLongError: a row is too long.
            TooLargeError, DamagedError: see `job.data.reading.parquet.sizes`.
            pa.ArrowInvalid, OSError: the file is damaged.
        """
        stored = os.fstat(self.file.fileno()).st_size
        number = values = size = 0
        for batch in self._batches():
            weight = _weight(batch)
            values, size = values + weight.values, size + weight.size
            if max(values, size) > MOST_IN_ALL + RATIO * stored:
                raise TooLargeError(f"{stored:,} bytes are more than {MOST_IN_ALL + RATIO * stored:,} as rows")
            for part in _parts(batch, weight, number, longest):
                columns, names = [_values(column) for column in part.columns], part.schema.names
                yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
            number += batch.num_rows

    def _batches(self) -> Iterator[Any]:
        for group, chunks in enumerate(self.footer.row_groups):
            made = plan(self.file, chunks)
            table = self.parquet
            if made.in_dictionary:
                shared = sorted(made.in_dictionary)
                table = _opened(self.file, metadata=table.metadata, read_dictionary=shared)
            yield from table.iter_batches(made.rows, row_groups=[group])


def _opened(file: IO[bytes], **options: Any) -> parquet.ParquetFile:
    file.seek(0)
    return parquet.ParquetFile(file, schema_depth_limit=DEEPEST, pre_buffer=False, buffer_size=BUFFER, **options)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weight:
    """How many values there are, with those inside lists and objects, and how many bytes their text has."""

    values: int
    size: int


def _parts(batch: Any, weight: _Weight, before: int, longest: int) -> Iterator[Any]:
    """The batch in parts that can become Python objects."""
    if batch.num_rows > 1 and (weight.values > MOST_VALUES_AT_ONCE or weight.size > longest):
        half = batch.num_rows // 2
        for part, start in ((batch.slice(0, half), before), (batch.slice(half), before + half)):
            yield from _parts(part, _weight(part), start, longest)
    elif weight.values > MOST_VALUES:
        raise TooLargeError(f"row {before + 1} has {weight.values:,} values, more than {MOST_VALUES:,}")
    elif weight.size > longest:
        raise TooLongError(before + 1)
    else:
        yield batch


def _weight(batch: Any) -> _Weight:
    values, size = _sums(batch.columns)
    return _Weight(values=values, size=size)


def _sums(arrays: Iterable[Any]) -> tuple[int, int]:
    counted = [_counted(array) for array in arrays]
    return sum(values for values, _ in counted), sum(size for _, size in counted)


def _counted(array: Any) -> tuple[int, int]:
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _counted(array.storage)
    if pa.types.is_struct(kind) or _is_list(kind):
        values, size = _sums(array.flatten() if pa.types.is_struct(kind) else [array.flatten()])
        return len(array) + values, size
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        lengths = pc.binary_length(array.dictionary).cast(pa.int64()).take(array.indices)
    elif _is_text(kind):
        lengths = pc.binary_length(array).cast(pa.int64())
    else:
        return len(array), 0
    return len(array), pc.sum(lengths).as_py() or 0


def _is_text(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )  # fmt: skip


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        or pa.types.is_map(kind)
    )  # fmt: skip


def _values(array: Any) -> list[Any]:
    """The values of an array as Python objects."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _values(array.storage)
    if pa.types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    if pa.types.is_struct(kind):
        return _objects(array)
    if _is_list(kind) and not pa.types.is_map(kind):
        return _lists(array)
    try:
        found: list[Any] = array.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the year 9999
        found = [_cell(cell) for cell in array]
    return found


def _objects(array: Any) -> list[dict[str, Any] | None]:
    """Parquet gives every object all keys of the column's schema; the keys that a row lacks are null."""
    names = [array.type.field(number).name for number in range(array.type.num_fields)]
    columns = [_values(part) for part in array.flatten()]
    rows = zip(*columns, strict=True) if columns else iter([()] * len(array))
    found: list[dict[str, Any] | None] = [
        {name: value for name, value in zip(names, row, strict=True) if value is not None} for row in rows
    ]
    if not array.null_count:
        return found
    return [value if valid else None for value, valid in zip(found, array.is_valid().to_pylist(), strict=True)]


def _lists(array: Any) -> list[list[Any] | None]:
    values = iter(_values(array.flatten()))  # without those of lists that are null
    lengths = array.value_lengths().to_pylist()
    return [None if length is None else list(islice(values, length)) for length in lengths]


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return Unreadable()
