"""A draft -> Arrow files of token ids and labels, one for each dataset, and the counts that the report shows.

Memory stays flat: a few thousand sequences are in memory at a time, and their tokens never become Python objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from job.data.examples import SHOWN
from job.data.rendering.labels import SequenceMeta, token_labels, token_weights
from job.data.rendering.renderer import Renderer
from job.data.tokenized.counts import Counts, Tally
from job.data.tokenized.draft import Draft, DraftSequence
from job.data.tokenized.lengths import Lengths
from job.data.tokenized.provenance import Provenance
from job.runtime.errors import DataError

SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "length": pa.int32()}  # as `datasets` reads it
)
WEIGHTED = SCHEMA.append(pa.field("weights", pa.list_(pa.float32())))
"""For TUNE_ROLE_WEIGHTS, if labels alone are not enough."""


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """A training or evaluation dataset, in the order of its files."""

    dataset: Any
    """A memory-mapped `datasets.Dataset`: input_ids and labels (list of int32), length (int32), and weights (list of
    float32) if roles weigh differently."""
    counts: Counts
    lengths: Lengths
    provenance: Provenance
    """The row of each sequence."""
    digest: str
    """SHA-256 over the SHA-256 of all token ids, of all labels, lengths and weights, each in order: identifies what is
    learned, and in which order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPlan:
    """A dataset that is to be made from a draft."""

    name: str
    """Its file will be `<name>.arrow`."""
    rows: bytes
    """One byte for each row of the draft, 1 for the rows of this dataset."""
    renderer: Renderer
    """One of the renderers that these rows were rendered with."""
    may_be_empty: bool = False
    """For the evaluation side of a split; evaluation files must leave at least one sequence."""


def write_datasets(
    draft: Draft, plans: Sequence[DatasetPlan], *, directory: Path, micro_batch: int
) -> list[TokenizedDataset]:
    """Make these datasets from a draft without invalid rows, each in the draft's order; older files are replaced.

    Args:
        micro_batch: sequences in a micro-batch of training, for the share of padding.

    Raises DataError if nothing is left of a dataset that may not be empty.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_ArrowFile(plan, directory)) for plan in plans]
        numbers = [draft.renderers.index(plan.renderer) for plan in plans]
        for sequences in draft.sequences():
            for file, plan, number in zip(files, plans, numbers, strict=True):
                file.add([one for one in sequences if one.renderer == number and plan.rows[one.row]])
    return [file.finished(micro_batch=micro_batch) for file in files]


class _ArrowFile:
    """One dataset while it is written."""

    def __init__(self, plan: DatasetPlan, directory: Path) -> None:
        self._plan = plan
        self._path = directory / f"{plan.name}.arrow"
        self._tally = Tally(role_weights=plan.renderer.weights)
        self._schema = WEIGHTED if plan.renderer.weighted else SCHEMA
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
            self._tally.add(sequence.meta)
        if trained := [sequence for sequence in sequences if sequence.meta.trained]:
            self._write(trained)

    def _write(self, sequences: Sequence[DraftSequence]) -> None:
        metas = [sequence.meta for sequence in sequences]
        lengths = np.array([meta.keep for meta in metas], dtype=np.int32)
        ids = np.concatenate([sequence.input_ids for sequence in sequences])
        labels = token_labels(ids, metas)
        self._note_unknown(metas, labels, np.cumsum(lengths))
        columns = [ids, labels, lengths]
        if self._schema is WEIGHTED:
            columns.append(token_weights(metas, self._plan.renderer.weights or {}))
        for digest, column in zip(self._digests, columns, strict=True):
            digest.update(column.data)
        borders = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
        arrays = [
            pa.ListArray.from_arrays(borders, pa.array(column)) if pa.types.is_list(kind) else pa.array(column)
            for column, kind in zip(columns, self._schema.types, strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def _note_unknown(self, metas: Sequence[SequenceMeta], labels: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        """Count the sequences that learn the token for unknown characters, where the tokenizer has one of its own."""
        tokenizer = self._plan.renderer.tokenizer
        unknown = tokenizer.hf.unk_token_id
        if unknown is None or unknown in tokenizer.stop_ids:
            return
        for number in np.unique(ends.searchsorted(np.flatnonzero(labels == unknown), side="right")):
            self._tally.add_unknown(metas[number])

    def finished(self, *, micro_batch: int) -> TokenizedDataset:
        """The dataset. Raises DataError if it is empty and may not be."""
        from datasets import Dataset  # noqa: PLC0415 - in a run it is imported after job.tuning

        counts, lengths = self._tally.counts(), self._tally.lengths.summary(micro_batch=micro_batch)
        if not (counts.sequences or self._plan.may_be_empty):
            raise _nothing_left(self._plan, counts, longest=lengths.max)
        return TokenizedDataset(
            dataset=Dataset.from_file(str(self._path)),
            counts=counts,
            lengths=lengths,
            provenance=self._tally.provenance,
            digest=hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest(),
        )


def _nothing_left(plan: DatasetPlan, counts: Counts, *, longest: int) -> DataError:
    masked, overlong, limit = counts.fully_masked, counts.dropped_overlong, plan.renderer.max_length
    places = ", ".join((masked.first + overlong.first)[:SHOWN]) or "no rows"
    purpose = "train on" if plan.name == "train" else "evaluate"
    if longest <= limit:
        return DataError(
            f"Nothing to {purpose}: of {counts.rows:,} rows, {masked.count:,} sequences have no token that is learned "
            f"({places}), and none is longer than TUNE_MAX_LENGTH={limit}.",
            remedy="Check TUNE_ROLE_WEIGHTS, TUNE_TRAIN_ON and TUNE_CHAT_TEMPLATE: they leave no turn to learn.",
        )
    other = "" if plan.name == "train" else ", or remove TUNE_EVAL_DATASET"
    return DataError(
        f"Nothing to {purpose}: of {counts.rows:,} rows, {masked.count:,} sequences have no label left within "
        f"TUNE_MAX_LENGTH={limit}, {overlong.count:,} were dropped as too long ({places}).",
        remedy=f"Raise TUNE_MAX_LENGTH{other}; if the answers are short, check TUNE_CHAT_TEMPLATE and TUNE_TRAIN_ON.",
    )
