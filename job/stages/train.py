"""The training part of a run: what is due at each step, what is done with a checkpoint, and the right to publish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from job.data.prepare import Data
from job.observability.timeline import compile_seconds
from job.runtime import process, signals
from job.runtime.errors import JobError, StopRequested
from job.stages.context import RunContext
from job.stages.evaluate import evaluate_held_out, evaluation_steps, look
from job.stages.resume import published_before
from job.state import checkpoints
from job.state.checkpoints import Restored
from job.state.record import Record, versions
from job.state.uploader import Saved, Setup, Uploader
from job.tuning.hooks import Hooks

log = structlog.get_logger()
SAVES = 4  # over a run, at least
SAVE_SAFETY = 1.5


def train(
    life: RunContext,
    finetune: Any,
    data: Data,
    mark: dict[str, Any],
    restored: Restored | None,
    *,
    ready: Callable[[], None],
) -> dict[str, Any]:
    """All steps that are left, with checkpoints; then win the right to publish.

    Args:
        ready: called when the plan is in force, before the first step.

    Returns:
        the facts that everything published depends on: those of the ledger's final record.
    """
    ledger, record, spans = life.ledger, life.record, life.timeline.span
    earlier = published_before(ledger, mark, restored, finetune.plan.steps)
    uploader = Uploader(_setup(life, restored))
    try:
        with spans("train"):
            finetune.train(
                _hooks(life, finetune, data, uploader, mark, ready),
                resume_from=(restored.directory, restored.step) if restored else None,
                changed=bool(life.config.allow_change),
            )
        life.cache.save_now()
        with spans("upload"):
            uploader.drain()
    except StopRequested:
        signals.acknowledge()
        committed = _hand_over(uploader)
        log.info("stopped_between_steps", step=finetune.step, committed=committed)
        raise
    finally:
        uploader.close()
    life.timeline.add("compile", compile_seconds(_own_steps(record)) + finetune.planning_seconds)
    after = look(life, finetune, data, phase="after", step=finetune.plan.steps)
    ledger.last = uploader.last
    if earlier is not None:
        ledger.append("final", **earlier)
        return earlier
    before = next((entry["eval_loss"] for entry in record.noted("evaluated", step=0)), None)
    loss = next(entry["loss"] for entry in record.noted("train_progress"))
    facts = {
        "steps": finetune.plan.steps,
        "plan": finetune.reproducibility_facts()["plan"],
        "fingerprint": mark,
        "results": {"train_loss": loss, "eval_loss_before": before, "eval_loss": after},
        "versions": versions(),
    }
    ledger.append("final", **facts)
    return facts


def _own_steps(record: Record) -> list[float]:
    """Seconds of each step of this attempt."""
    newest_first = [entry["step_seconds"] for entry in record.noted("train_progress", attempt=record.attempt)]
    return newest_first[::-1]


def _setup(life: RunContext, restored: Restored | None) -> Setup:
    return Setup(
        uri=life.record.store.uri,
        run_id=life.record.run_id,
        attempt=life.record.attempt,
        patience_seconds=life.config.storage_patience_minutes * 60,
        owner=life.ledger.owner,
        life=life.ledger.life,
        conditional=life.ledger.conditional,
        last=life.ledger.last,
        keep=life.config.checkpoint_keep,
        kept=[restored.prefix] if restored else [],
    )


def _hooks(
    life: RunContext, finetune: Any, data: Data, uploader: Uploader, mark: dict[str, Any], ready: Callable[[], None]
) -> Hooks:
    """What happens at the events of the training loop."""
    config, record = life.config, life.record
    staging = life.work / "staging"

    def save(step: int, directory: Path, stalled: Callable[[], float]) -> None:
        (directory / checkpoints.HISTORY).write_bytes(record.history_text())
        staging.mkdir(exist_ok=True)
        staged = directory.rename(staging / f"{directory.name}-{time.monotonic_ns()}")
        facts = {"fingerprint": mark, "versions": versions(), **finetune.reproducibility_facts()}
        saved = Saved(step=step, directory=staged, stall_seconds=stalled(), facts=facts)
        life.timeline.add("checkpoint_stall", saved.stall_seconds)
        uploader.submit(saved)

    def worth_saving(stall_seconds: float) -> bool:
        expected = SAVE_SAFETY * (stall_seconds + (uploader.upload_seconds or 0.0))
        return expected < signals.seconds_left()

    def first_step() -> None:
        life.cache.save_soon()
        seconds = round(process.seconds_since_start(), 3)
        if "resumed_step" in life.attempts.facts:
            log.info("resumed", seconds_to_first_step=seconds, **life.attempts.facts)
        life.attempts.facts["seconds_to_first_step"] = seconds

    steps = finetune.plan.steps
    rows = data.evaluation.counts.sequences if data.evaluation else 0
    return Hooks(
        note=record.note,
        ready=ready,
        first_step=first_step,
        evaluate=(lambda step: evaluate_held_out(life, finetune, data, step=step)) if data.evaluation else None,
        evaluated=lambda step: any(True for _ in record.noted("evaluated", step=step)),
        evaluate_every=evaluation_steps(config, steps, rows),
        save=save,
        save_every=config.checkpoint_steps or math.ceil(steps / SAVES),
        save_minutes=config.checkpoint_minutes,
        worth_saving=worth_saving,
        poll=uploader.check,
    )


def _hand_over(uploader: Uploader) -> bool:
    """Wait for the last checkpoint as long as the grace allows."""
    try:
        return uploader.drain(max(0.0, signals.seconds_left()))
    except JobError as error:
        log.warning("checkpoint_not_committed", reason=error.message)
        return False
