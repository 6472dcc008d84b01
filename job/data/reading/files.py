"""A file -> its rows, one at a time, each with the line where it starts.

Knows file types and compression; nothing of what a row means. Memory stays flat: lines, array elements and Parquet
batches are read as a stream, and no line may be longer than `MAX_LINE`.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from job.data.reading import strict_json
from job.data.reading.decompressed import Decompressed, seekable
from job.data.reading.fields import quoted
from job.data.reading.json_stream import elements
from job.data.reading.parquet.footer import MOST_COLUMNS
from job.data.reading.parquet.table import Table, TooLongError
from job.data.reading.parquet.thrift import DamagedError, TooLargeError
from job.data.reading.signature import BOM, HEAD, UTF_8, check_contents
from job.inputs.data_files import FileType, file_type
from job.observability.masking import printable, shown
from job.runtime.errors import DataError

MAX_LINE = 64 * 1024 * 1024
"""Bytes in one line or array element; more is a decompression bomb or a file of another kind, not a row of text."""

BLANK, MOST_BLANK = 2, 1_000_000
"""Bytes of a blank line with its end, and how many may follow each other: a few kilobytes can hold any number."""
BUFFER = 1 << 20
ARROW_ERRORS = (
    *(pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowIndexError, pa.ArrowKeyError, pa.ArrowTypeError),
    *(pa.ArrowSerializationError, pa.ArrowCapacityError),
)
"""What Arrow raises for a damaged file."""
OTHER_DELIMITERS = {",": ";\t", "\t": ",;"}
"""Separators of files that are called CSV or TSV but use another one."""
DAMAGED = "Upload the file again, or rename it to what it is."
ONE_ROW_A_LINE = "Write each row as JSON on a line of its own."
LINE_ENDS = "Save the file with line feeds (LF) at the ends of its lines."
SMALLER = (
    "Check where the file is from. If it is right, write it without compression; Parquet with smaller pages and row "
    "groups, and without columns that are not trained on."
)
CUT_OFF = "Upload the file again; if it is whole, correct its last line."
QUOTES = "Put cells that hold separators, quotes or line ends into quotes, and double the quotes inside them."
KEEP_ONE = "Keep one of the two keys."


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a file: a value (any JSON value), or the reason why it cannot be read."""

    line: int
    value: Any = None
    problem: str = ""
    remedy: str = ""
    """What to do about the problem."""


def read_rows(name: str, path: Path) -> Iterator[Row]:
    """All rows of the file at `path`; its type follows from `name`.

    Raises DataError if the file is damaged, or of another type than its name says. A row that cannot be read is yielded
    with its problem.
    """
    kind = file_type(name)
    if kind.compression and not path.stat().st_size:
        raise DataError(f"{name} is empty, so it is not a valid {kind.compression} file.", remedy=DAMAGED)
    try:
        with _opened(name, path, kind) as stream:
            yield from _READERS[kind.type](name, stream)
    except TooLargeError as error:
        raise DataError(f"{name} claims more than is read: {printable(str(error))}.", remedy=SMALLER) from error
    except (*ARROW_ERRORS, DamagedError) as error:
        raise DataError(
            f"{name} cannot be read: {printable(str(error).strip().rstrip('.'))}.", remedy=DAMAGED
        ) from error
    except OSError as error:
        if error.errno is not None:  # an error of the disk or the kernel, not of the file
            raise
        raise DataError(
            f"{name} cannot be read: {printable(str(error).strip().rstrip('.'))}.", remedy=DAMAGED
        ) from error


@contextmanager
def _opened(name: str, path: Path, kind: FileType) -> Iterator[io.BufferedReader]:
    """Decompress as a stream. Arrow's readers, unlike zstandard's, notice a file that was cut off."""
    with path.open("rb", buffering=BUFFER) as opened:
        stored = cast("io.BufferedReader", opened)
        check_contents(name, stored.peek(HEAD)[:HEAD], kind.compression or kind.type)
        if not kind.compression:
            yield stored
            return
        decompressed = Decompressed(stored, kind.compression, path.stat().st_size)
        stream = cast("io.BufferedReader", io.BufferedReader(decompressed, BUFFER))
        check_contents(name, stream.peek(HEAD)[:HEAD], kind.type, within=kind.compression)
        yield stream


def _lines(name: str, stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Numbered lines as bytes, with their line ends, without a byte-order mark."""
    number = blank = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise _too_long(name, number)
        blank = blank + 1 if len(line) <= BLANK and not line.strip() else 0
        if blank > MOST_BLANK:
            raise TooLargeError(f"after line {number - blank:,} more than {MOST_BLANK:,} lines are blank")
        yield number, line.removeprefix(BOM) if number == 1 else line


def _too_long(name: str, line: int) -> DataError:
    return DataError(
        f"{name}:{line}: a row is longer than {MAX_LINE // 2**20} MiB.", remedy="Split it, or correct the file."
    )


def _jsonl(name: str, stream: io.BufferedReader) -> Iterator[Row]:
    if _begins_with(stream, b"["):
        raise DataError(
            f"{name} is one JSON array, but a file of this name has one row per line.",
            remedy="Rename it to .json, or write each row on a line of its own.",
        )
    for number, line in _lines(name, stream):
        if line.strip():
            yield _parsed(number, line)


def _begins_with(stream: io.BufferedReader, mark: bytes) -> bool:
    return stream.peek(BUFFER).removeprefix(BOM).lstrip().startswith(mark)


def _parsed(number: int, line: bytes) -> Row:
    whole = line.endswith(b"\n")
    try:  # concatenated files have byte-order marks in the middle, too; a line end would count as column 1
        return Row(line=number, value=strict_json.loads(line.removeprefix(BOM).decode("utf-8").rstrip("\r\n")))
    except UnicodeDecodeError as error:
        return Row(line=number, problem=f"not UTF-8 at byte {error.start + 1}", remedy=UTF_8)
    except json.JSONDecodeError as error:
        whole = whole or error.msg == "Extra data"
        cut_off = "" if whole else " (the file ends here without a line end: was it cut off?)"
        remedy = (LINE_ENDS if b"\r" in line.rstrip() else ONE_ROW_A_LINE) if whole else CUT_OFF
        return Row(line=number, problem=f"not JSON: {error.msg} at column {error.colno}{cut_off}", remedy=remedy)
    except strict_json.RepeatedKeyError as error:
        return Row(line=number, problem=str(error), remedy=KEEP_ONE)
    except RecursionError:
        return Row(line=number, problem="not JSON that can be read: nested too deeply", remedy="Remove these rows.")
    except ValueError as error:  # e.g. an integer of more than 4,300 digits
        return Row(line=number, problem=f"not JSON that can be read: {error}", remedy="Write such numbers as text.")


def _json(name: str, stream: io.BufferedReader) -> Iterator[Row]:
    """A `.json` file holds one array of rows, or one row per line; anything else is an error."""
    if _begins_with(stream, b"["):
        yield from _array(name, stream)
        return
    for row in _jsonl(name, stream):
        if row.problem and row.line == 1:
            raise DataError(
                f"{name} is neither an array of rows nor one row per line: line 1 is {row.problem}.",
                remedy="Write the rows as `[{...}, {...}]`, or each on a line of its own.",
            )
        yield row


def _array(name: str, stream: io.BufferedReader) -> Iterator[Row]:
    for element in elements(stream, limit=MAX_LINE):
        if element.too_long:
            raise _too_long(name, element.line)
        if element.repeated is not None:
            problem = f"the key `{shown(element.repeated)}` appears twice in one object"
            yield Row(line=element.line, problem=problem, remedy=KEEP_ONE)
        elif element.problem:
            yield Row(line=element.line, problem=element.problem, remedy=f"Correct the file there. {DAMAGED}")
        else:
            yield Row(line=element.line, value=element.value)


def _csv(name: str, stream: io.BufferedReader, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    lines = _TextLines(name, stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(filter(None, reader), None)
    except csv.Error as error:
        words, remedy = _not_csv(error, DAMAGED)
        raise DataError(f"{name}:{reader.line_num}: the header is not CSV: {words}.", remedy=remedy) from error
    if header is None:
        return
    _check_header(f"{name}:{reader.line_num}", header, delimiter)
    while row := _csv_row(lines, reader, header):
        if row.value != {}:
            yield row


def _check_header(where: str, header: list[str], delimiter: str) -> None:
    if len(header) > MOST_COLUMNS:
        raise TooLargeError(f"the header has {len(header):,} columns, more than {MOST_COLUMNS:,}")
    _check_unique(where, list(filter(None, header)))  # spreadsheets write empty columns
    if len(header) == 1 and (other := [mark for mark in OTHER_DELIMITERS[delimiter] if mark in header[0]]):
        raise DataError(
            f"{where}: the columns {shown(repr(header[0]))} are separated by {other[0]!r}, not by {delimiter!r}.",
            remedy="Save it with commas as .csv, or with tabs as .tsv.",
        )


def _check_unique(where: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        raise DataError(
            f"{where}: a column name appears twice: {quoted(repeated)}.", remedy="Give each column its own name."
        )


def _not_csv(error: csv.Error, remedy: str) -> tuple[str, str]:
    """The reader's words and a remedy; its words about a lone carriage return are meant for programmers."""
    if str(error).startswith("new-line character seen in unquoted field"):
        return "a line contains a carriage return (CR)", LINE_ENDS
    return str(error), remedy


def _csv_row(lines: _TextLines, reader: Any, header: list[str]) -> Row | None:
    """The next record; an empty value for a blank line; None at the end."""
    line = reader.line_num + 1
    lines.begin_row()
    try:
        cells = next(reader, None)
    except csv.Error as error:
        words, remedy = _not_csv(error, QUOTES)
        return Row(line=line, problem=f"not CSV: {words}", remedy=remedy)
    if cells is None:
        return None
    if cells and len(cells) != len(header):
        problem = f"{len(cells)} cells, but the header has {len(header)}"
        return Row(line=line, problem=problem, remedy=QUOTES)
    return Row(line=line, value=dict(zip(header, cells, strict=False)))


class _TextLines:
    """The lines of a file as text; the lines of one row are together no longer than a line may be."""

    def __init__(self, name: str, stream: io.BufferedReader) -> None:
        self._name, self._lines = name, _lines(name, stream)
        self._first = self._number = self._size = 0

    def begin_row(self) -> None:
        """The next line is the first of a row."""
        self._first, self._size = self._number + 1, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._number, line = next(self._lines)
        self._size += len(line)
        if self._size > MAX_LINE:
            raise _too_long(self._name, self._first)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._name}:{self._number}: not UTF-8 at byte {error.start + 1}.", remedy=UTF_8
            ) from error


def _tsv(name: str, stream: io.BufferedReader) -> Iterator[Row]:
    return _csv(name, stream, "\t")


def _parquet(name: str, stream: io.BufferedReader) -> Iterator[Row]:
    with seekable(stream) as file:
        table = Table.open(file)
        _check_unique(name, table.names)
        try:
            for number, value in enumerate(table.rows(longest=MAX_LINE), 1):
                yield Row(line=number, value=value)
        except TooLongError as error:
            raise _too_long(name, error.row) from None


_READERS: dict[str, Callable[[str, io.BufferedReader], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
