"""Many examples -> an Arrow file of token ids and labels on disk, and the counts that the report shows.

Memory stays flat: a few hundred examples are in flight at a time. Templates run here, in Python; tokens are made
meanwhile by another thread in compiled code, on all cores. That is four fifths of the work, and on two cores keeps
both busy, so that worker processes for the templates would gain nothing (measured: CHANGELOG.md).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from job.encoding import Encoding
from job.errors import DataError
from job.examples import SHOWN, Example, InvalidRows, RowError
from job.lengths import Gathering, Lengths, percentile
from job.places import Places
from job.rendering import Rendered, Renderer, Text

CHUNK = 256
"""Examples that are tokenised at once."""
IN_FLIGHT = 2
"""Chunks that wait for their tokens while the next is rendered."""
SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32()}  # what datasets reads
)
WEIGHTED = SCHEMA.append(pa.field("weights", pa.list_(pa.float32())))
"""For TUNE_ROLE_WEIGHTS, where labels alone cannot say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted:
    """How many rows something happened to, and `file:line` of the first ten."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What rendering did. Tokens and lengths are those of the sequences trained on, as they are trained on."""

    rows: int
    """Valid rows read."""
    sequences: int
    """Sequences trained on."""
    tokens: int
    labelled_tokens: int
    weight_by_role: dict[str, float]
    """With TUNE_ROLE_WEIGHTS: what the labelled tokens of each role count in all; else empty."""
    length_p50: int
    length_p90: int
    length_max: int
    split: Noted
    """Rows that became one sequence per assistant turn, because the template rewrites earlier turns."""
    header_differs: Noted
    """Rows whose answers the template opens otherwise than its generation prompt."""
    tools_not_rendered: Noted
    """Rows with tools that the template does not print."""
    reasoning_not_rendered: Noted
    """Rows with reasoning that the template does not print where it would be learnt."""
    truncated: Noted
    """Sequences, not rows, as in the next ones: a split row may lose some. Each is one of the next two."""
    lost_turns: Noted
    """Truncated behind the last answer that fits whole."""
    cut_inside: Noted
    """Truncated inside an answer, since none fits whole, or inside ready text: its end is not learnt."""
    dropped_overlong: Noted
    fully_masked: Noted
    """Dropped because no label is left, usually since truncation cut the answer off."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training or evaluation set, in the order of its files."""

    dataset: Any
    """A memory-mapped `datasets.Dataset`: input_ids and labels (list of int32), length (int32), and where roles weigh
    differently weights (list of float32)."""
    counts: Counts
    lengths: Lengths
    places: Places
    """The row of each sequence."""
    digest: str
    """SHA-256 of all token ids, labels, lengths and weights in order: what is learned, and in which order."""


def prepare(
    examples: Iterable[Example],
    *,
    renderer: Renderer,
    directory: Path,
    name: str = "train",
    may_be_empty: bool = False,
    micro_batch: int = 1,
) -> Prepared:
    """Render all into `<directory>/<name>.arrow`, replacing an older file.

    Args:
        micro_batch: sequences in one pass of training, for the share of padding.

    Raises DataError for rows that the template refuses or that are too long under `fail` (the first ten in words, all
    in number), and if nothing is left to train on, unless `may_be_empty` (for an evaluation set).
    """
    from datasets import Dataset  # noqa: PLC0415 - in a run it is imported after job.tuning

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.arrow"
    tally = _Tally()
    digest = hashlib.sha256()
    schema = WEIGHTED if renderer.weighted else SCHEMA
    with _settled(), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for chunk in _rendered(examples, renderer, tally):
            for sequence in chunk:
                tally.add(sequence)
            batch = _batch([sequence for sequence in chunk if sequence.trained], schema)
            _add(digest, batch)
            writer.write_batch(batch)
    tally.invalid.raise_if_any(tally.rows + tally.invalid.total)
    counts = tally.counts()
    if not (counts.sequences or may_be_empty):
        raise _nothing_left(counts, renderer)
    lengths = tally.gathered.lengths(micro_batch=micro_batch)
    return Prepared(
        dataset=Dataset.from_file(str(path)),
        counts=counts,
        lengths=lengths,
        places=tally.places,
        digest=digest.hexdigest(),
    )


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Inside, the garbage collector leaves alone what is there already.

    Rendering makes and drops objects all the time, and to look through all examples again and again took as long as
    the templates.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _add(digest: Any, batch: pa.RecordBatch) -> None:
    for column in batch.columns:
        values = column.flatten() if pa.types.is_list(column.type) else column
        digest.update(values.to_numpy(zero_copy_only=True).tobytes())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """Texts whose tokens are being made."""

    texts: list[Text]
    plain: Future[list[Encoding]]
    """For the pieces without stand-ins, in order."""


def _rendered(examples: Iterable[Example], renderer: Renderer, tally: _Tally) -> Iterator[list[Rendered]]:
    source = iter(examples)
    waiting: deque[_Chunk] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as thread:
        while part := list(islice(source, CHUNK)):
            texts = [text for example in part if (text := _text(example, renderer, tally))]
            plain = [piece.text for text in texts if not text.disarmed for piece in text.pieces]
            waiting.append(_Chunk(texts=texts, plain=thread.submit(renderer.tokenizer.encode_batch, plain)))
            if len(waiting) > IN_FLIGHT:
                yield _labelled(waiting.popleft(), renderer, tally)
        while waiting:
            yield _labelled(waiting.popleft(), renderer, tally)


def _text(example: Example, renderer: Renderer, tally: _Tally) -> Text | None:
    try:
        text = renderer.text(example)
    except RowError as error:
        tally.invalid.add(error)
        return None
    tally.rows += 1
    return text


def _labelled(chunk: _Chunk, renderer: Renderer, tally: _Tally) -> list[Rendered]:
    plain = iter(chunk.plain.result())
    done: list[Rendered] = []
    for text in chunk.texts:
        encodings = renderer.encoded(text) if text.disarmed else list(islice(plain, len(text.pieces)))
        try:
            done += renderer.labelled(text, encodings)
        except RowError as error:
            tally.rows -= 1
            tally.invalid.add(error)
    return done


def _batch(sequences: list[Rendered], schema: pa.Schema) -> pa.RecordBatch:
    lengths = [len(sequence.input_ids) for sequence in sequences]
    borders = array("i", [0])
    for length in lengths:
        borders.append(borders[-1] + length)
    columns = [
        _lists(borders, (sequence.input_ids for sequence in sequences)),
        _lists(borders, (sequence.labels for sequence in sequences)),
        pa.array(lengths, pa.int32()),
    ]
    if schema is WEIGHTED:
        columns.append(_lists(borders, (sequence.weights or [] for sequence in sequences), kind="f"))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _lists(borders: array[int], values: Iterable[list[Any]], *, kind: Literal["i", "f"] = "i") -> pa.ListArray:
    flat: array[Any] = array(kind)
    for one in values:
        flat.fromlist(one)
    return pa.ListArray.from_arrays(_flat(borders), _flat(flat))


def _flat(values: array[Any]) -> pa.Array:
    kind = pa.int32() if values.typecode == "i" else pa.float32()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


@dataclass(kw_only=True)
class _Places:
    """Counts rows or sequences and keeps the first ten places."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, sequence: Rendered) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{sequence.source}:{sequence.line}")

    def noted(self) -> Noted:
        return Noted(count=self.count, first=tuple(self.first))


@dataclass(kw_only=True)
class _Tally:
    """Counts while the sequences pass by."""

    rows: int = 0
    invalid: InvalidRows = field(default_factory=InvalidRows)
    gathered: Gathering = field(default_factory=Gathering)
    weights: Counter[str] = field(default_factory=Counter)
    places: Places = field(default_factory=Places)
    split: _Places = field(default_factory=_Places)
    header_differs: _Places = field(default_factory=_Places)
    tools: _Places = field(default_factory=_Places)
    reasoning: _Places = field(default_factory=_Places)
    truncated: _Places = field(default_factory=_Places)
    shortened: _Places = field(default_factory=_Places)
    cut: _Places = field(default_factory=_Places)
    overlong: _Places = field(default_factory=_Places)
    masked: _Places = field(default_factory=_Places)

    def add(self, sequence: Rendered) -> None:
        if sequence.part == 0:
            self._add_row(sequence)
        self.gathered.add(sequence.length, sequence.learnt)
        if sequence.outcome != "kept":
            getattr(self, sequence.outcome).add(sequence)
        if sequence.trained:
            self.places.add(sequence.source, sequence.line)
            self.weights.update(sequence.weight_by_role)
            if sequence.outcome != "kept":
                self.truncated.add(sequence)
            keep = len(sequence.input_ids)
            labelled = sum(max(min(stop, keep) - start, 0) for start, stop in sequence.learnt)
            self.gathered.add_trained(keep, labelled)

    def _add_row(self, sequence: Rendered) -> None:
        if sequence.parts > 1:
            self.split.add(sequence)
        if sequence.header_differs:
            self.header_differs.add(sequence)
        for name in sequence.unshown:
            getattr(self, name).add(sequence)

    def counts(self) -> Counts:
        ordered = sorted(self.gathered.trained)
        return Counts(
            rows=self.rows,
            sequences=len(ordered),
            tokens=sum(ordered),
            labelled_tokens=self.gathered.labelled,
            weight_by_role={role: round(weight, 3) for role, weight in self.weights.items()},
            length_p50=percentile(ordered, 50),
            length_p90=percentile(ordered, 90),
            length_max=percentile(ordered, 100),
            split=self.split.noted(),
            header_differs=self.header_differs.noted(),
            tools_not_rendered=self.tools.noted(),
            reasoning_not_rendered=self.reasoning.noted(),
            truncated=self.truncated.noted(),
            lost_turns=self.shortened.noted(),
            cut_inside=self.cut.noted(),
            dropped_overlong=self.overlong.noted(),
            fully_masked=self.masked.noted(),
        )


def _nothing_left(counts: Counts, renderer: Renderer) -> DataError:
    masked, overlong = counts.fully_masked, counts.dropped_overlong
    places = ", ".join((masked.first + overlong.first)[:SHOWN])
    return DataError(
        f"Nothing to train on: of {counts.rows:,} rows, {masked.count:,} sequences have no label left within "
        f"TUNE_MAX_LENGTH={renderer.max_length}, {overlong.count:,} were dropped as too long ({places or 'no rows'}).",
        remedy="Raise TUNE_MAX_LENGTH; if the answers are short, check TUNE_CHAT_TEMPLATE and TUNE_TRAIN_ON.",
    )
