"""All optimizer steps that are left: what happens at the events of the training loop, and what a signal ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from job.observability.timeline import compile_seconds
from job.runtime import process, signals
from job.runtime.errors import JobError, StopRequested
from job.stages.context import Finetune, RunContext, TrainingInputs
from job.stages.evaluate import Evaluator, steps_between
from job.stages.resume import pin, warn_if_not_bitwise
from job.state import checkpoints
from job.state.checkpoints import Restored
from job.state.record import Record, versions
from job.state.uploader import Saved, Setup, Uploader
from job.tuning.hooks import Hooks

log = structlog.get_logger()
SAVES = 4
"""Checkpoints over a run, at least."""
SAVE_SAFETY = 1.5
"""A checkpoint on a signal is begun if what is left of the grace is this many times what the last one took."""


def train(
    context: RunContext,
    finetune: Finetune,
    training: TrainingInputs,
    evaluator: Evaluator,
    restored: Restored | None,
) -> None:
    """Train to the last step, with every checkpoint committed before this returns.

    Raises:
        PermanentError: it diverged or ran out of memory.
        StorageError, AccessDeniedError, FencedError: why checkpoints cannot be committed any more.
        StopRequested: a signal came; a checkpoint was committed if there was time.
    """
    uploader = Uploader(_setup(context, restored))
    loop = _Loop(context=context, finetune=finetune, training=training, uploader=uploader, restored=restored)
    try:
        with context.timeline.span("train"):
            finetune.train(
                loop.hooks(evaluator),
                resume_from=(restored.directory, restored.step) if restored else None,
                changed=bool(context.config.allow_change),
            )
        context.cache.save_now()
        with context.timeline.span("upload"):
            uploader.drain()
    except StopRequested:
        signals.acknowledge()
        committed = _hand_over(uploader)
        log.info("stopped_between_steps", step=finetune.step, committed=committed)
        raise
    finally:
        uploader.close()
    context.timeline.add("compile", compile_seconds(_own_steps(context.record)) + finetune.planning_seconds)
    context.ledger.last = uploader.last


def steps_between_saves(*, steps: int, most: int | None) -> int:
    """Optimizer steps between checkpoints: a quarter of the run, or fewer.

    Args:
        steps: of the whole run.
        most: TUNE_CHECKPOINT_STEPS.
    """
    return min(math.ceil(steps / SAVES), most or steps)


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What happens at the events of the training loop."""

    context: RunContext
    finetune: Finetune
    training: TrainingInputs
    uploader: Uploader
    restored: Restored | None

    def hooks(self, evaluator: Evaluator) -> Hooks:
        config, steps = self.context.config, self.finetune.plan.steps
        every = config.eval_steps
        if every == "auto":
            every = steps_between(steps=steps, rows=evaluator.rows, batch_size=config.batch_size)
        return Hooks(
            note=self.context.record.note,
            ready=self.ready,
            first_step=self.first_step,
            evaluate=evaluator.evaluate if evaluator.rows else None,
            evaluated=evaluator.evaluated,
            evaluate_every=every,
            save=self.save,
            save_every=steps_between_saves(steps=steps, most=config.checkpoint_steps),
            save_minutes=config.checkpoint_minutes,
            worth_saving=self.worth_saving,
            poll=self.uploader.check,
        )

    def ready(self) -> None:
        """The plan is in force: the run's identity is pinned, or compared with what was pinned."""
        if self.restored is None:
            pin(self.context, self.training, self.finetune)
        else:
            warn_if_not_bitwise(self.finetune, self.restored)

    def first_step(self) -> None:
        """The first step of this process is done: what was compiled may be saved."""
        facts = self.context.attempts.facts
        self.context.cache.save_soon()
        seconds = round(process.seconds_since_start(), 3)
        if self.restored is not None:
            log.info("resumed", seconds_to_first_step=seconds, **facts)
        facts["seconds_to_first_step"] = seconds

    def save(self, step: int, directory: Path, stalled: Callable[[], float]) -> None:
        """Stage a checkpoint's files and hand them to the uploader."""
        (directory / checkpoints.HISTORY).write_bytes(self.context.record.history_text())
        staging = self.context.work / "staging"
        staging.mkdir(exist_ok=True)
        staged = directory.rename(staging / f"{directory.name}-{time.monotonic_ns()}")
        facts = {
            "fingerprint": self.training.fingerprint,
            "versions": versions(),
            **self.finetune.reproducibility_facts(),
        }
        saved = Saved(step=step, directory=staged, stall_seconds=stalled(), facts=facts)
        self.context.timeline.add("checkpoint_stall", saved.stall_seconds)
        self.uploader.submit(saved)

    def worth_saving(self, stall_seconds: float) -> bool:
        """Whether a checkpoint fits into what is left of the grace."""
        expected = SAVE_SAFETY * (stall_seconds + (self.uploader.upload_seconds or 0.0))
        return expected < signals.seconds_left()


def _setup(context: RunContext, restored: Restored | None) -> Setup:
    config, record, ledger = context.config, context.record, context.ledger
    return Setup(
        uri=record.store.uri,
        run_id=record.run_id,
        attempt=record.attempt,
        patience_seconds=config.storage_patience_minutes * 60,
        owner=ledger.owner,
        life=ledger.life,
        conditional=ledger.conditional,
        last=ledger.last,
        keep=config.checkpoint_keep,
        kept=[restored.prefix] if restored else [],
    )


def _hand_over(uploader: Uploader) -> bool:
    """Wait for the last checkpoint as long as the grace allows."""
    try:
        return uploader.drain(max(0.0, signals.seconds_left()))
    except JobError as error:
        log.warning("checkpoint_not_committed", reason=error.message)
        return False


def _own_steps(record: Record) -> list[float]:
    """Seconds of each step of this attempt."""
    newest_first = [entry["step_seconds"] for entry in record.noted("train_progress", attempt=record.attempt)]
    return newest_first[::-1]
