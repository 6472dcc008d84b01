"""Files -> examples -> splits.

Knows which files count, which format each has, which rows are invalid, and which side of the split a row is on.
Nothing of file types (rows), columns (formats), tokens or storage. Files are read anew each time that examples are
gone through, and memory never holds more than one example.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import xxhash

from job.data.examples import Example, InvalidRows, RowError
from job.data.reading.columns import Columns
from job.data.reading.fields import InvalidError
from job.data.reading.files import CODECS, TYPES, Row, file_type, rows
from job.data.reading.formats import FORMATS, columns_of, detect, example
from job.runtime.errors import DataError
from job.runtime.hashing import sha256

LOOK_AHEAD = 100
"""Rows whose columns decide a file's format."""
UNREADABLE = 1000
"""Rows without one object among them after which a file is given up."""
GLANCED, GLANCE_SECONDS = 5000, 1.0
"""Valid rows, and time, after which a validate_head at the data ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One local file and the name under which the user knows it."""

    name: str
    """E.g. `s3://bucket/data/a.jsonl`; its suffix decides the file's type."""
    path: Path
    named: bool = True
    """Whether the user named this very file; one that was found under a prefix is skipped if its suffix is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """What one file turned out to be."""

    name: str
    format: str
    """Empty for a file without rows."""
    rows: int
    bytes: int
    """As stored, before decompression."""
    sha256: str
    """Of the file as stored."""
    empty_answers: int
    """Rows whose last turn is an assistant's that says nothing. They are kept, and teach to say nothing."""


class ExampleStream:
    """The examples of several files, in order, each time that it is iterated; `facts` is complete after the first."""

    def __init__(self, sources: Sequence[Source], *, format: str, columns: Columns) -> None:  # noqa: A002 - TUNE_FORMAT
        self._sources = [source for source in sources if source.named or file_type(source.name).type]
        self._format = format
        self._columns = columns
        self._invalid = InvalidRows()
        self._rows = 0
        self.skipped: tuple[str, ...] = tuple(source.name for source in sources if source not in self._sources)
        """Files under a prefix that are no data, by their suffix."""
        self.facts: tuple[FileFacts, ...] = ()
        """One for each file read to its end."""

    def __iter__(self) -> Iterator[Example]:
        self._invalid, self._rows = InvalidRows(), 0
        known = {facts.name: facts for facts in self.facts}
        for source in self._sources:
            yield from self._file(source, known.get(source.name))
        self._columns.check()
        self._invalid.raise_if_any(self._rows)
        if not self._rows:
            raise DataError(
                f"The dataset has no rows ({len(self._sources)} data files, {len(self.skipped)} others).",
                remedy="Upload the data files again: they are empty."
                if self._sources
                else f"Give files that end in {', '.join(TYPES)}, also with {' or '.join(CODECS)}.",
            )

    @property
    def invalid(self) -> bool:
        """Whether a row was invalid so far, so that the end will be an error."""
        return bool(self._invalid.total)

    def validate_head(self) -> bool:
        """Read only the first few thousand rows, or for a second; all of them once one is invalid.

        Raises what iterating raises. Returns whether the end was reached.
        """
        end = time.monotonic() + GLANCE_SECONDS
        for number, _ in enumerate(self, 1):
            if not self.invalid and (number >= GLANCED or time.monotonic() > end):
                return False
        return True

    def _file(self, source: Source, known: FileFacts | None) -> Iterator[Example]:
        if not file_type(source.name).type:
            raise DataError(
                f"{source.name} is of no known type.",
                remedy=f"The name must end in {', '.join(TYPES)}, also with {' or '.join(CODECS)}.",
            )
        found, empty, before = known.format if known else self._format, 0, self._rows
        stream: Iterator[Row] = map(self._renamed, rows(source.name, source.path))
        if found == "auto":
            head = self._head(source, stream)
            found, stream = self._detected(source, head) if head else "", chain(head, stream)
        for row in stream:
            self._rows += 1
            if read_row := self._row(source, row, found):
                empty += _is_empty(read_row)
                yield read_row
        if not known:
            self.facts += (_facts(source, found if self._rows > before else "", self._rows - before, empty),)

    def _renamed(self, row: Row) -> Row:
        return replace(row, value=self._columns.renamed(row.value)) if self._columns.theirs else row

    def _detected(self, source: Source, head: list[Row]) -> str:
        columns = set[str]().union(*(columns_of(row.value) for row in head))
        try:
            return detect(source.name, columns, named=self._columns.theirs)
        except DataError:
            self._columns.check()  # a name that no row has is the likelier reason
            raise

    def _head(self, source: Source, stream: Iterator[Row]) -> list[Row]:
        """The rows up to the hundredth object; raises DataError if the first thousand hold none at all."""
        head: list[Row] = []
        objects = 0
        for row in stream:
            head.append(row)
            objects += isinstance(row.value, dict)
            if objects == LOOK_AHEAD or (not objects and len(head) == UNREADABLE):
                break
        if head and not objects:
            self._give_up(source, head)
        return head

    def _give_up(self, source: Source, head: list[Row]) -> None:
        for row in head:
            self._row(source, row, next(iter(FORMATS)))
        self._invalid.raise_if_any(self._rows + len(head))

    def _row(self, source: Source, row: Row, found: str) -> Example | None:
        reason, remedy = row.problem, row.remedy
        if not reason:
            try:
                return example(row.value, format=found, source=source.name, line=row.line)
            except InvalidError as error:
                reason, remedy = self._columns.explained(str(error)), error.remedy
        self._invalid.add(RowError(source=source.name, line=row.line, reason=reason, remedy=remedy))
        return None


def read(sources: Sequence[Source], *, format: str = "auto", columns: Columns | None = None) -> ExampleStream:  # noqa: A002
    """Read all files; `format` is `auto` (found out for each file) or one of `job.data.reading.formats.FORMATS`.

    `columns` are the user's names for columns; they may be shared by several readings, of which the first to end must
    have met them all.

    Iterating raises DataError: at once for a file that cannot be read or whose format is unclear, at the end for
    invalid rows (the first ten in words, all in number), and if there are no rows; ConfigError for a column that the
    user named and no row has.
    """
    return ExampleStream(sources, format=format, columns=columns or Columns())


def _is_empty(read_row: Example) -> bool:
    if not read_row.turns:
        return False
    last = read_row.turns[-1]
    return last.role == "assistant" and not (last.content.strip() or last.tool_calls)


def _facts(source: Source, found: str, count: int, empty: int) -> FileFacts:
    size = source.path.stat().st_size
    return FileFacts(
        name=source.name, format=found, rows=count, bytes=size, sha256=sha256(source.path), empty_answers=empty
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which rows are on the evaluation side."""

    held_out: bytes
    """One byte for each row in order, 1 for those on the evaluation side; an evaluation file's rows come last."""
    note: str
    """Why there is no evaluation side although one was asked for; else empty."""

    @property
    def train(self) -> bytes:
        """One byte for each row, 1 for those on the training side."""
        return self.held_out.translate(bytes.maketrans(b"\0\1", b"\1\0"))


def split(keys: Iterable[str], *, fraction: float) -> Split:
    """Put a row on the evaluation side if and only if its key's hash, as a number in [0, 1), is below `fraction`.

    `keys` has one for each row; where it is the smallest content key of the rows that are nearly the same, those are
    all on one side, and a row stays where it is when rows that are unlike it are added. One that is nearly the same may
    have the smaller key, and then moves its whole group. If one side came out empty, all rows are trained on and the
    note says so.
    """
    held_out = bytes(is_evaluation(key, fraction) for key in keys)
    if fraction > 0 and len(set(held_out)) < 2:  # noqa: PLR2004 - the sides
        note = f"{fraction:.3g} of {len(held_out):,} rows leaves one side empty"
        return Split(held_out=bytes(len(held_out)), note=note)
    return Split(held_out=held_out, note="")


def is_evaluation(key: str, fraction: float) -> bool:
    """The split's rule, for one key."""
    return bool(xxhash.xxh3_64_intdigest(key.encode()) < fraction * 2**64)


def given(*, rows: int, held_out: int) -> Split:
    """The split that the user made with files of their own, of so many rows each; no row is moved."""
    return Split(held_out=bytes(rows) + bytes([1]) * held_out, note="")
