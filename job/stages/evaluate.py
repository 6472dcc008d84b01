"""What the model can do at a step: the loss on the held-out rows, and its answers to the sample prompts."""

from __future__ import annotations

import math
import time

import structlog

from job.data.prepare import Data
from job.observability.masking import masked
from job.observability.timeline import Timeline
from job.stages.context import Finetune
from job.state.record import Record

log = structlog.get_logger()
EVALUATIONS = 10
"""Over a run, where TUNE_EVAL_STEPS is auto."""
MOST_COST = 0.1
"""Share of a run's time that evaluations may take then."""
EVALUATED_TO_TRAINED = 1 / 3
"""Cost of evaluating a row over training on it: the forward pass without the backward pass."""
SHOWN_CHARACTERS = 2000
"""Of a sample in the log; the record has it whole."""


class Evaluator:
    """Evaluates one model on one run's held-out rows and prompts; results go to the log and to the record."""

    def __init__(self, finetune: Finetune, data: Data, *, record: Record, timeline: Timeline) -> None:
        self._finetune, self._data, self._record, self._timeline = finetune, data, record, timeline

    @property
    def rows(self) -> int:
        """Held-out sequences."""
        return self._data.evaluation.counts.sequences if self._data.evaluation else 0

    def evaluate(self, step: int) -> float | None:
        """The loss on the held-out rows; None where there are none. Logs `evaluated`."""
        if self._data.evaluation is None:
            return None
        started = time.monotonic()
        with self._timeline.span("evaluate"):
            found = self._finetune.evaluate(self._data.evaluation.dataset)
        entry = {
            "step": step,
            "eval_loss": found.loss,
            "eval_perplexity": found.perplexity,
            "eval_tokens": found.tokens,
        }
        self._record.note({"event": "evaluated", **entry})
        log.info("evaluated", **entry, eval_seconds=round(time.monotonic() - started, 3))
        return float(found.loss)

    def evaluate_and_sample(self, *, phase: str, step: int) -> float | None:
        """The same, and the answers to the sample prompts; `phase` is `before` or `after` training."""
        loss, prompts = self.evaluate(step), self._data.prompts
        with self._timeline.span("evaluate"):
            answers = self._finetune.answer(prompts)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            shown = {"prompt": masked(prompt.text), "reference": masked(prompt.reference), "answer": masked(answer)}
            entry = {"phase": phase, "index": index, **shown}
            self._record.note({"event": "sample", **entry})
            log.info("sample", **{k: v[:SHOWN_CHARACTERS] if isinstance(v, str) else v for k, v in entry.items()})
        return loss

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation at a step was done, perhaps by an earlier attempt."""
        return any(True for _ in self._record.noted("evaluated", step=step))


def steps_between(*, steps: int, rows: int, batch_size: int) -> int:
    """Optimizer steps between evaluations where TUNE_EVAL_STEPS is `auto`: ten over the run, or fewer if evaluation is
    expensive.

    Args:
        steps: of the whole run.
        rows: held out.
        batch_size: rows trained on in a step.
    """
    affordable = math.ceil(rows * EVALUATED_TO_TRAINED / MOST_COST / batch_size)
    return max(1, steps // EVALUATIONS, affordable)
