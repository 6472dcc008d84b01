"""Files -> examples.

Knows which files count, the format of each, and which rows are invalid; nothing of file types
(`job.data.reading.files`), columns (`job.data.reading.formats`), tokens or storage. Each iteration reads the files
again, and memory never holds more than one example.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from job.data.examples import Example, InvalidRows, RowError
from job.data.reading.columns import Columns
from job.data.reading.fields import InvalidError
from job.data.reading.files import Row, read_rows
from job.data.reading.formats import FORMATS, columns_of, detect_format, parse_row
from job.inputs.data_files import CODECS, TYPES, file_type, split_of
from job.observability.masking import shown
from job.runtime.errors import DataError
from job.runtime.hashing import sha256

LOOK_AHEAD = 100
"""Rows whose columns decide a file's format."""
MOST_UNREAD = 100
"""Names of a file that are listed as not read; some tables have a column for each thing that they hold."""
UNREAD_IN = "messages[]"
"""Before the keys of messages, whatever the column is called."""
UNREADABLE = 1000
"""Rows without a single object after which reading the file stops."""
SPLIT, LONGEST_SPLIT = "split", 100
"""The column by which a row says its split, and characters of it that are looked at."""
HEAD_ROWS, HEAD_SECONDS = 5000, 1.0
"""Valid rows, and seconds, after which `validate_head` ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One local file and the name under which the user knows it."""

    name: str
    """E.g. `s3://bucket/data/a.jsonl`; its suffix decides the file's type."""
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """What is known of one file once it was read."""

    name: str
    format: str
    """Empty for a file without rows."""
    rows: int
    bytes: int
    """As stored, before decompression."""
    sha256: str
    """Of the file as stored."""
    empty_answers: int
    """Rows that end with an empty assistant turn. They are kept, and teach the model to answer nothing."""
    unread: dict[str, int]
    """Columns, and keys of messages as `messages[].name`, that nothing reads: in how many rows each has a value."""
    held_out: bool = False
    """Whether the rows are evaluated and not learned."""


class ExampleStream:
    """The examples of several files, in order; can be iterated again and again.

    Iterating raises DataError: at once for a file that cannot be read or whose format is unclear, at the end for
    invalid rows (the first ten in words, and the total), and if there are no rows; ConfigError for a column that the
    user named and no row has. After an invalid row no example follows: all that is left to do is to count the others.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        format: str = "auto",  # noqa: A002 - TUNE_FORMAT
        columns: Columns | None = None,
    ) -> None:
        """Args:
        format: `auto` (detected for each file) or one of `job.data.reading.formats.FORMATS`.
        columns: the user's names for columns. Several streams may share them; the first that ends must have found all.
        """
        self._sources = sources
        self._format = format
        self._columns = columns or Columns()
        self._invalid = InvalidRows()
        self._sides: dict[bool, str] = {}
        self._rows = 0
        self.facts: tuple[FileFacts, ...] = ()
        """One for each file; complete after the first iteration."""

    def __iter__(self) -> Iterator[Example]:
        self._invalid, self._sides, self._rows = InvalidRows(), {}, 0
        known = {facts.name: facts for facts in self.facts}
        for source in self._sources:
            yield from self._file(source, known.get(source.name))
        self._columns.check()
        self._invalid.raise_if_any(self._rows)
        if not self._rows:
            raise DataError(
                f"The dataset has no rows ({len(self._sources)} data files).",
                remedy="Upload the data files again: they are empty.",
            )

    def validate_head(self) -> bool:
        """Read only the first few thousand rows, or for a second; all of them if one is invalid.

        Raises the errors of iterating. Returns whether the end was reached.
        """
        end = time.monotonic() + HEAD_SECONDS
        return all(number < HEAD_ROWS and time.monotonic() <= end for number, _ in enumerate(self, 1))

    def _file(self, source: Source, known: FileFacts | None) -> Iterator[Example]:
        if not file_type(source.name).type:
            raise DataError(
                f"{source.name} has an unknown file type.",
                remedy=f"The name must end in {', '.join(TYPES)}, also with {' or '.join(CODECS)}.",
            )
        format_, empty, before = known.format if known else self._format, 0, self._rows
        unread: Counter[str] = Counter()
        stream: Iterator[Row] = map(self._renamed, read_rows(source.name, source.path))
        if format_ == "auto":
            head = self._head(source, stream)
            format_, stream = self._detected(source, head) if head else "", chain(head, stream)
        for row in stream:
            self._rows += 1
            example = self._example(source, row, format_)
            if example and not self._invalid.total:
                empty += _ends_empty(example)
                unread.update(name for name in _unread(example) if name in unread or len(unread) < 10 * MOST_UNREAD)
                yield example
        if not known:
            format_ = format_ if self._rows > before else ""
            self.facts += (_facts(source, format_, self._rows - before, empty, unread),)

    def _renamed(self, row: Row) -> Row:
        return replace(row, value=self._columns.renamed(row.value)) if self._columns.theirs else row

    def _detected(self, source: Source, head: list[Row]) -> str:
        columns = set[str]().union(*(columns_of(row.value) for row in head))
        try:
            return detect_format(source.name, columns, named=self._columns.theirs)
        except DataError:
            self._columns.check()  # a column that no row has is the likelier reason
            raise

    def _head(self, source: Source, stream: Iterator[Row]) -> list[Row]:
        """The rows up to the hundredth object; raises DataError if the first thousand rows contain no object."""
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
            self._example(source, row, next(iter(FORMATS)))
        self._invalid.raise_if_any(self._rows + len(head))

    def _example(self, source: Source, row: Row, format_: str) -> Example | None:
        """The row as an example; None if it is invalid, which is noted."""
        reason, remedy = row.problem, row.remedy
        if not reason:
            try:
                self._check_side(source, row)
                return parse_row(row.value, format=format_, source=source.name, line=row.line)
            except InvalidError as error:
                reason, remedy = self._columns.explained(str(error)), error.remedy
        self._invalid.add(RowError(source=source.name, line=row.line, reason=reason, remedy=remedy))
        return None

    def _check_side(self, source: Source, row: Row) -> None:
        """Raise InvalidError for a row that says another side of a split than one before it.

        Whoever wrote both into one file meant this column to separate them.
        """
        said = row.value.get(SPLIT) if isinstance(row.value, dict) else None
        if not isinstance(said, str) or not (split := _split_of(said[:LONGEST_SPLIT])):
            return
        held_out = split != "train"
        self._sides.setdefault(held_out, f"{source.name}:{row.line}")
        if (other := self._sides.get(not held_out)) is not None:
            raise InvalidError(
                f"its column `{SPLIT}` is {shown(repr(said))}, and that of {other} says another side",
                remedy="Write the rows of each split into files of their own (train.jsonl, test.jsonl), or remove the "
                "column.",
            )


_split_of = functools.lru_cache(maxsize=1000)(split_of)


def _ends_empty(example: Example) -> bool:
    if not example.turns:
        return False
    last = example.turns[-1]
    return last.role == "assistant" and not (last.content.strip() or last.tool_calls)


def _unread(example: Example) -> Iterable[str]:
    """What nothing reads of a row, each once; see `FileFacts.unread`."""
    if not any(turn.unread for turn in example.turns):
        return example.unread
    in_messages = (f"{UNREAD_IN}.{key}" for turn in example.turns for key in turn.unread)
    return dict.fromkeys((*example.unread, *in_messages))


def _facts(source: Source, format_: str, count: int, empty: int, unread: Counter[str]) -> FileFacts:
    return FileFacts(
        name=source.name,
        format=format_,
        rows=count,
        bytes=source.path.stat().st_size,
        sha256=sha256(source.path),
        empty_answers=empty,
        unread=dict(unread.most_common(MOST_UNREAD)),
    )
