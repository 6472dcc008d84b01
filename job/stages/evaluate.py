"""The loss on the held-out rows and the answers to the sample prompts, to the log and the record; and how often."""

from __future__ import annotations

import math
import time
from typing import Any

import structlog

from job.config.schema import Config
from job.data.prepare import Data
from job.observability.masking import masked
from job.stages.context import RunContext

log = structlog.get_logger()
EVALUATIONS = 10  # over a run, where TUNE_EVAL_STEPS is auto
SHOWN_CHARACTERS = 2000  # of a sample in the log; the record has it whole


def look(life: RunContext, finetune: Any, data: Data, *, phase: str, step: int) -> float | None:
    """Evaluate and answer the sample prompts; both go to the log and the record."""
    record = life.record
    loss = evaluate_held_out(life, finetune, data, step=step)
    with life.timeline.span("evaluate"):
        answers = finetune.answer(data.prompts)
    for index, (prompt, answer) in enumerate(zip(data.prompts, answers, strict=True)):
        shown = {"prompt": masked(prompt.text), "reference": masked(prompt.reference), "answer": masked(answer)}
        entry = {"phase": phase, "index": index, **shown}
        record.note({"event": "sample", **entry})
        log.info("sample", **{k: v[:SHOWN_CHARACTERS] if isinstance(v, str) else v for k, v in entry.items()})
    return loss


def evaluate_held_out(life: RunContext, finetune: Any, data: Data, *, step: int) -> float | None:
    """The loss on the held-out rows, if there are any; logs `evaluated`."""
    if data.evaluation is None:
        return None
    record, started = life.record, time.monotonic()
    with life.timeline.span("evaluate"):
        found = finetune.evaluate(data.evaluation.dataset)
    entry = {"step": step, "eval_loss": found.loss, "eval_perplexity": found.perplexity, "eval_tokens": found.tokens}
    record.note({"event": "evaluated", **entry})
    log.info("evaluated", **entry, eval_seconds=round(time.monotonic() - started, 3))
    return float(found.loss)


def evaluation_steps(config: Config, steps: int, rows: int) -> int:
    """Steps between evaluations; `auto`: ten over the run, or fewer where they would cost over a tenth of it."""
    if config.eval_steps != "auto":
        return config.eval_steps
    # A row evaluated costs a third of a row trained: the forward pass without the backward.
    affordable = math.ceil(rows * EVALUATIONS / 3 / config.batch_size)
    return max(1, steps // EVALUATIONS, affordable)
