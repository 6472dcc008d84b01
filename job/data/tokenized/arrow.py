"""A draft -> Arrow files of token ids and labels, one for each set, and the counts that the report shows.

Memory stays flat: some thousand sequences are looked at a time, and their tokens never become Python objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from job.data.examples import SHOWN, Example
from job.data.rendering import labels
from job.data.rendering.renderer import Renderer
from job.data.tokenized.counts import Counts, Tally
from job.data.tokenized.draft import Draft, DraftSequence
from job.data.tokenized.lengths import Lengths
from job.data.tokenized.provenance import Provenance
from job.runtime.errors import DataError

SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32()}  # what datasets reads
)
WEIGHTED = SCHEMA.append(pa.field("weights", pa.list_(pa.float32())))
"""For TUNE_ROLE_WEIGHTS, where labels alone cannot say it."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training or evaluation set, in the order of its files."""

    dataset: Any
    """A memory-mapped `datasets.Dataset`: input_ids and labels (list of int32), length (int32), and where roles weigh
    differently weights (list of float32)."""
    counts: Counts
    lengths: Lengths
    places: Provenance
    """The row of each sequence."""
    digest: str
    """SHA-256 over those of all token ids, labels, lengths and weights in order: what is learned, in which order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A set that is to be made of a draft."""

    name: str
    """Its file will be `<name>.arrow`."""
    rows: bytes
    """One byte for each row of the draft, 1 for those that belong to it."""
    renderer: Renderer
    """One of those by which these rows were rendered."""
    may_be_empty: bool = False
    """For a split's evaluation set; of files of its own something must be left."""


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

    Raises DataError for rows that the template refuses or that are too long under `fail` (the first ten in words, all
    in number), and what `parts` raises.
    """
    with Draft(directory) as draft:
        draft.add(examples, renderer)
        draft.check()
        part = Part(name=name, rows=b"\1" * draft.rows, renderer=renderer, may_be_empty=may_be_empty)
        return parts(draft, [part], directory=directory, micro_batch=micro_batch)[0]


def parts(draft: Draft, wanted: Sequence[Part], *, directory: Path, micro_batch: int) -> list[Prepared]:
    """Make these sets of the draft's rows, all of which are valid, each in its order; older files are replaced.

    Args:
        micro_batch: sequences in one pass of training, for the share of padding.

    Raises DataError if nothing is left of a set that may not be empty.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_File(part, directory)) for part in wanted]
        numbers = [draft.renderers.index(part.renderer) for part in wanted]
        for sequences in draft.sequences():
            for file, part, number in zip(files, wanted, numbers, strict=True):
                file.add([one for one in sequences if one.renderer == number and part.rows[one.row]])
    return [file.prepared(micro_batch=micro_batch) for file in files]


class _File:
    """One set, while it is written."""

    def __init__(self, part: Part, directory: Path) -> None:
        self._part = part
        self._path = directory / f"{part.name}.arrow"
        self._tally = Tally(shares=part.renderer.weights)
        self._schema = WEIGHTED if part.renderer.weighted else SCHEMA
        self._digests = [hashlib.sha256() for _ in self._schema]

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            sink = entered.enter_context(pa.OSFile(str(self._path), "wb"))
            self._writer = entered.enter_context(pa.ipc.new_stream(sink, self._schema))
            self._left = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def add(self, sequences: Sequence[DraftSequence]) -> None:
        for sequence in sequences:
            self._tally.add(sequence.outline)
        if trained := [sequence for sequence in sequences if sequence.outline.trained]:
            self._write(trained)

    def _write(self, sequences: Sequence[DraftSequence]) -> None:
        outlines = [sequence.outline for sequence in sequences]
        lengths = np.array([outline.keep for outline in outlines], dtype=np.int32)
        ids = np.concatenate([sequence.input_ids for sequence in sequences])
        columns = [ids, labels.labels(ids, outlines), lengths]
        if self._schema is WEIGHTED:
            columns.append(labels.weights(outlines, self._part.renderer.weights or {}))
        for digest, column in zip(self._digests, columns, strict=True):
            digest.update(column.data)
        borders = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
        arrays = [
            pa.ListArray.from_arrays(borders, pa.array(column)) if pa.types.is_list(kind) else pa.array(column)
            for column, kind in zip(columns, self._schema.types, strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def prepared(self, *, micro_batch: int) -> Prepared:
        """Raises DataError if nothing is left and that may not be."""
        from datasets import Dataset  # noqa: PLC0415 - in a run it is imported after job.tuning

        counts, lengths = self._tally.counts(), self._tally.gathered.lengths(micro_batch=micro_batch)
        if not (counts.sequences or self._part.may_be_empty):
            raise _nothing_left(self._part, counts, longest=lengths.max)
        return Prepared(
            dataset=Dataset.from_file(str(self._path)),
            counts=counts,
            lengths=lengths,
            places=self._tally.places,
            digest=hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest(),
        )


def _nothing_left(part: Part, counts: Counts, *, longest: int) -> DataError:
    masked, overlong, limit = counts.fully_masked, counts.dropped_overlong, part.renderer.max_length
    places = ", ".join((masked.first + overlong.first)[:SHOWN]) or "no rows"
    wanted = "train on" if part.name == "train" else "evaluate"
    if longest <= limit:
        return DataError(
            f"Nothing to {wanted}: of {counts.rows:,} rows, {masked.count:,} sequences have no token that is learned "
            f"({places}), and none is longer than TUNE_MAX_LENGTH={limit}.",
            remedy="Check TUNE_ROLE_WEIGHTS, TUNE_TRAIN_ON and TUNE_CHAT_TEMPLATE: no row has a turn that they learn.",
        )
    other = "" if part.name == "train" else ", or set no TUNE_EVAL_DATASET"
    return DataError(
        f"Nothing to {wanted}: of {counts.rows:,} rows, {masked.count:,} sequences have no label left within "
        f"TUNE_MAX_LENGTH={limit}, {overlong.count:,} were dropped as too long ({places}).",
        remedy=f"Raise TUNE_MAX_LENGTH{other}; if the answers are short, check TUNE_CHAT_TEMPLATE and TUNE_TRAIN_ON.",
    )
