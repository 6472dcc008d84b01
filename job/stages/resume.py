"""What an earlier attempt left: the newest good checkpoint, the right to publish, and what differs from it now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from job.inputs.pull import Inputs
from job.stages.context import RunContext
from job.state import checkpoints, fingerprint
from job.state.checkpoints import Restored
from job.state.ledger import Ledger
from job.state.record import versions

log = structlog.get_logger()
FACTS = ("steps", "plan", "fingerprint", "results", "versions")  # of the final record


def restore(
    life: RunContext, mark: dict[str, Any], *, check: Callable[[Path, dict[str, Any]], None]
) -> Restored | None:
    """Fence all earlier attempts, then take the newest good checkpoint that they left, if it is of this very run."""
    config, record = life.config, life.record
    life.ledger.fence()
    restored = checkpoints.restore(life.ledger, life.work / "restored", check=check)
    if restored is None:
        if config.resume == "require":
            raise checkpoints.nothing_to_resume(record.uri)
        return None
    changed = fingerprint.check(record.run_id, restored.body["fingerprint"], mark, allowed=config.allow_change)
    if changed:
        log.warning("resumed_with_changes", changed=changed)
    record.resume(restored.history())
    life.attempts.facts.update(resumed_from=restored.number, resumed_step=restored.step)
    log.info("checkpoint_restored", step=restored.step, commit=restored.number, from_attempt=restored.body["attempt"])
    return restored


def begin(life: RunContext, pulled: Inputs, mark: dict[str, Any], reproducibility_facts: dict[str, Any]) -> None:
    """Write down what the run is, now that all is checked and the first step is about to begin."""
    config, record = life.config, life.record
    pinned = record.pin(
        settings=config.as_variables(),
        inputs=pulled.as_json(),
        fingerprint=mark,
        reproducibility_facts=reproducibility_facts,
    )
    if not pinned and not fingerprint.contents_may_change(config.allow_change):
        record.check_inputs(record.inputs() or {}, pulled.as_json())


def warn_if_not_bitwise(finetune: Any, restored: Restored) -> None:
    """Warn where the resumed run will not be, bit for bit, the run that was interrupted."""
    now = {**finetune.reproducibility_facts(), "versions": versions()}
    del now["asked"]  # another wish that comes to the same plan changes nothing
    differences = {
        name: {"was": restored.body.get(name), "is": value}
        for name, value in now.items()
        if restored.body.get(name) != value
    }
    if differences:
        log.warning("resume_not_bitwise", **differences)


def published_before(
    ledger: Ledger, mark: dict[str, Any], restored: Restored | None, steps: int
) -> dict[str, Any] | None:
    """The facts of an attempt that had won the right to publish this very result, from this very checkpoint."""
    if restored is None or restored.step != steps:
        return None
    found = ledger.newest("final", below=ledger.last, above=restored.number)
    if found is None or found.body is None or (found.body["steps"], found.body["fingerprint"]) != (steps, mark):
        return None
    return {name: found.body[name] for name in FACTS}
