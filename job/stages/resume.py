"""What earlier attempts left: the newest good checkpoint, the run's pinned identity, and what differs from it now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from job.stages.context import Finetune, RunContext, TrainingInputs
from job.state import checkpoints, fingerprint
from job.state.checkpoints import Restored
from job.state.record import check_inputs, versions

log = structlog.get_logger()


def restore(
    context: RunContext, training: TrainingInputs, *, check: Callable[[Path, dict[str, Any]], None]
) -> Restored | None:
    """Fence all earlier attempts, then take the newest good checkpoint that they left, if it is of this very run.

    Args:
        check: raises DamagedError where the parts of a downloaded checkpoint disagree.

    Raises:
        ConfigError: the checkpoint is of other settings or contents, or there is none and TUNE_RESUME=require.
        PermanentError: there are checkpoints, and none is whole.
        FencedError: another attempt has taken over.
    """
    config, record = context.config, context.record
    context.ledger.fence()
    restored = checkpoints.restore(context.ledger, context.work / "restored", check=check)
    if restored is None:
        if config.resume == "require":
            raise checkpoints.nothing_to_resume(record.uri)
        return None
    changed = fingerprint.check(
        record.run_id, restored.body["fingerprint"], training.fingerprint, allowed=config.allow_change
    )
    if changed:
        log.warning("resumed_with_changes", changed=changed)
    record.resume(restored.history())
    context.attempts.facts.update(resumed_from=restored.number, resumed_step=restored.step)
    log.info("checkpoint_restored", step=restored.step, commit=restored.number, from_attempt=restored.body["attempt"])
    return restored


def pin(context: RunContext, training: TrainingInputs, finetune: Finetune) -> None:
    """Write down what the run is, now that all is checked and the first step is about to begin.

    Raises:
        ConfigError: an earlier attempt has written something else since this one began.
        FencedError: another attempt has taken over: what the run is, is its business.
    """
    config, record = context.config, context.record
    context.ledger.check()
    read = training.inputs.as_json()
    pinned = record.pin(
        settings=config.as_variables(),
        inputs=read,
        fingerprint=training.fingerprint,
        reproducibility_facts=finetune.reproducibility_facts(),
    )
    if (first := record.first()) is not None:
        fingerprint.check(record.run_id, first["fingerprint"], training.fingerprint, allowed=config.allow_change)
    if not pinned and not fingerprint.contents_may_change(config.allow_change):
        check_inputs(record.run_id, record.inputs() or {}, read)


def warn_if_not_bitwise(finetune: Finetune, restored: Restored) -> None:
    """Warn where the resumed run will not be, bit for bit, the run that was interrupted."""
    now = {**finetune.reproducibility_facts(), "versions": versions()}
    del now["asked"]  # another setting that leads to the same plan changes nothing
    differences = {
        name: {"was": restored.body.get(name), "is": value}
        for name, value in now.items()
        if restored.body.get(name) != value
    }
    if differences:
        log.warning("resume_not_bitwise", **differences)
