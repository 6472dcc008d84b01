"""The training part of a run: what is due at each step, what is done with a checkpoint, and the right to publish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from job import checkpoints, env, signals
from job.attempts import Attempts
from job.checkpoints import Restored
from job.compile_cache import CompileCache
from job.config import Config
from job.data import Data
from job.errors import JobError, Stop
from job.ledger import Ledger
from job.record import Record, versions
from job.suspects import masked
from job.timeline import Timeline, compile_seconds
from job.uploader import Saved, Setup, Uploader

log = structlog.get_logger()
EVALUATIONS = 10  # over a run, where TUNE_EVAL_STEPS is auto
SAVES = 4  # over a run, at least
SHOWN_CHARACTERS = 2000  # of a sample in the log; the record has it whole
SAVE_SAFETY = 1.5
FACTS = ("steps", "plan", "fingerprint", "results", "versions")  # of the final record


@dataclass(frozen=True, kw_only=True)
class Life:
    """One attempt at a run: the settings, and where it reads and writes what."""

    config: Config
    record: Record
    attempts: Attempts
    ledger: Ledger
    expect_gpu: bool
    scratch: Path
    work: Path
    timeline: Timeline
    cache: CompileCache


def say_differences(finetune: Any, restored: Restored) -> None:
    """Warn where the resumed run will not be, bit for bit, the run that was interrupted."""
    now = {**finetune.circumstances(), "versions": versions()}
    del now["asked"]  # another wish that comes to the same plan changes nothing
    differences = {
        name: {"was": restored.body.get(name), "is": value}
        for name, value in now.items()
        if restored.body.get(name) != value
    }
    if differences:
        log.warning("bitwise_equality_ended", **differences)


def train(
    life: Life,
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
    earlier = _published_before(ledger, mark, restored, finetune.plan.steps)
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
    except Stop:
        signals.hear()
        committed = _hand_over(uploader)
        log.info("stopped_between_steps", step=finetune.step, committed=committed)
        raise
    finally:
        uploader.close()
    life.timeline.add("compile", compile_seconds(_own_steps(record)) + finetune.fitting.seconds)
    after = look(life, finetune, data, phase="after", step=finetune.plan.steps)
    ledger.last = uploader.last
    if earlier is not None:
        ledger.append("final", **earlier)
        return earlier
    before = next((entry["eval_loss"] for entry in record.noted("evaluated", step=0)), None)
    loss = next(entry["loss"] for entry in record.noted("train_progress"))
    facts = {
        "steps": finetune.plan.steps,
        "plan": finetune.circumstances()["plan"],
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


def _published_before(
    ledger: Ledger, mark: dict[str, Any], restored: Restored | None, steps: int
) -> dict[str, Any] | None:
    """The facts of an attempt that had won the right to publish this very result, from this very checkpoint."""
    if restored is None or restored.step != steps:
        return None
    found = ledger.newest("final", below=ledger.last, above=restored.number)
    if found is None or found.body is None or (found.body["steps"], found.body["fingerprint"]) != (steps, mark):
        return None
    return {name: found.body[name] for name in FACTS}


def _setup(life: Life, restored: Restored | None) -> Setup:
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
    life: Life, finetune: Any, data: Data, uploader: Uploader, mark: dict[str, Any], ready: Callable[[], None]
) -> Any:
    """What happens at the events of the training loop."""
    config, record = life.config, life.record
    staging = life.work / "staging"

    def save(step: int, directory: Path, stalled: Callable[[], float]) -> None:
        (directory / checkpoints.HISTORY).write_bytes(record.history_text())
        staging.mkdir(exist_ok=True)
        staged = directory.rename(staging / f"{directory.name}-{time.monotonic_ns()}")
        facts = {"fingerprint": mark, "versions": versions(), **finetune.circumstances()}
        saved = Saved(step=step, directory=staged, stall_seconds=stalled(), facts=facts)
        life.timeline.add("checkpoint_stall", saved.stall_seconds)
        uploader.submit(saved)

    def worth_saving(stall_seconds: float) -> bool:
        expected = SAVE_SAFETY * (stall_seconds + (uploader.upload_seconds or 0.0))
        return expected < signals.seconds_left()

    def first_step() -> None:
        life.cache.save_soon()
        seconds = round(env.seconds_since_start(), 3)
        if "resumed_step" in life.attempts.facts:
            log.info("resumed", seconds_to_first_step=seconds, **life.attempts.facts)
        life.attempts.facts["seconds_to_first_step"] = seconds

    steps = finetune.plan.steps
    rows = data.evaluation.counts.sequences if data.evaluation else 0
    return finetune.hooks(
        note=record.note,
        ready=ready,
        first_step=first_step,
        evaluate=(lambda step: look_at_loss(life, finetune, data, step=step)) if data.evaluation else None,
        evaluated=lambda step: any(True for _ in record.noted("evaluated", step=step)),
        evaluate_every=_evaluation_steps(config, steps, rows),
        save=save,
        save_every=config.checkpoint_steps or math.ceil(steps / SAVES),
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


def look(life: Life, finetune: Any, data: Data, *, phase: str, step: int) -> float | None:
    """Evaluate and answer the sample prompts; both go to the log and the record."""
    record = life.record
    loss = look_at_loss(life, finetune, data, step=step)
    with life.timeline.span("evaluate"):
        answers = finetune.answer(data.prompts)
    for index, (prompt, answer) in enumerate(zip(data.prompts, answers, strict=True)):
        shown = {"prompt": masked(prompt.text), "reference": masked(prompt.reference), "answer": masked(answer)}
        entry = {"phase": phase, "index": index, **shown}
        record.note({"event": "sample", **entry})
        log.info("sample", **{k: v[:SHOWN_CHARACTERS] if isinstance(v, str) else v for k, v in entry.items()})
    return loss


def look_at_loss(life: Life, finetune: Any, data: Data, *, step: int) -> float | None:
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


def _evaluation_steps(config: Config, steps: int, rows: int) -> int:
    """Steps between evaluations; `auto`: ten over the run, or fewer where they would cost over a tenth of it."""
    if config.eval_steps != "auto":
        return config.eval_steps
    # A row evaluated costs a third of a row trained: the forward pass without the backward.
    affordable = math.ceil(rows * EVALUATIONS / 3 / config.batch_size)
    return max(1, steps // EVALUATIONS, affordable)
