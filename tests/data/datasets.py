"""Examples -> one tokenised dataset, as a run makes its two."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from job.data.examples import Example
from job.data.rendering.renderer import Renderer
from job.data.tokenized.arrow import DatasetPlan, TokenizedDataset, write_datasets
from job.data.tokenized.draft import Draft


def tokenized(
    examples: Iterable[Example],
    *,
    renderer: Renderer,
    directory: Path,
    may_be_empty: bool = False,
    micro_batch: int = 1,
) -> TokenizedDataset:
    """Render all examples into `<directory>/train.arrow`."""
    with Draft(directory) as draft:
        draft.add(examples, renderer)
        draft.check()
        plan = DatasetPlan(name="train", rows=b"\1" * draft.rows, renderer=renderer, may_be_empty=may_be_empty)
        return write_datasets(draft, [plan], directory=directory, micro_batch=micro_batch)[0]
