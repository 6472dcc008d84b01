"""The end of a run: the right to publish, the adapter and whatever else was asked for, and the record of it all."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from job.report import build
from job.stages.claim import quietly
from job.stages.context import Finetune, RunContext, TrainingInputs
from job.stages.evaluate import Evaluator
from job.state.artifacts import Artifact, publish
from job.state.checkpoints import Restored
from job.state.model_card import Card
from job.state.record import versions

log = structlog.get_logger()
FACTS = ("steps", "plan", "fingerprint", "results", "versions")
"""Of the final record."""


def report(context: RunContext, training: TrainingInputs, *, measured: dict[str, Any] | None = None) -> None:
    """Write `report.html` with what is known so far; the run is complete where there are measurements."""
    build.publish(context.config, context.record, training.base, training.data, measured=measured)


def win(
    context: RunContext,
    finetune: Finetune,
    training: TrainingInputs,
    evaluator: Evaluator,
    restored: Restored | None,
) -> dict[str, Any]:
    """Evaluate the trained model and append the ledger's final record, which gives the right to publish.

    Returns:
        the facts that everything published depends on; those of an earlier attempt where one had won the right with
        this very checkpoint.

    Raises:
        FencedError: another attempt has taken over.
    """
    record, steps = context.record, finetune.plan.steps
    earlier = _earlier_final(context, training.fingerprint, restored, steps)
    after = evaluator.evaluate_and_sample(phase="after", step=steps)
    before = next((entry["eval_loss"] for entry in record.noted("evaluated", step=0)), None)
    facts = earlier or {
        "steps": steps,
        "plan": finetune.reproducibility_facts()["plan"],
        "fingerprint": training.fingerprint,
        "results": {
            "final_step_loss": next(entry["loss"] for entry in record.noted("train_progress")),
            "eval_loss_before": before,
            "eval_loss": after,
        },
        "versions": versions(),
    }
    context.ledger.append("final", **facts)
    return facts


def _earlier_final(
    context: RunContext, fingerprint: dict[str, Any], restored: Restored | None, steps: int
) -> dict[str, Any] | None:
    """The final record of an attempt that was to publish this very result, from this very checkpoint."""
    if restored is None or restored.step != steps:
        return None
    ledger = context.ledger
    found = ledger.newest("final", below=ledger.last, above=restored.number)
    if found is None or found.body is None or (found.body["steps"], found.body["fingerprint"]) != (steps, fingerprint):
        return None
    return {name: found.body[name] for name in FACTS}


def export(context: RunContext, finetune: Finetune, training: TrainingInputs, final: dict[str, Any]) -> list[Artifact]:
    """Publish the adapter, and only then, with the adapter safe, whatever else was asked for."""
    record, spans, directory = context.record, context.timeline.span, context.work / "export"
    record.remove_unfinished_uploads()
    adapter = directory / "adapter"
    with spans("export"):
        finetune.save_adapter(adapter, base=training.base)
        (adapter / "README.md").write_text(_card(training, final).text())
    published = _upload(context, adapter)
    if "merged_16bit" in context.config.export:
        merged = directory / "merged_16bit"
        with spans("export"):
            finetune.merge(adapter, merged, base=training.base)
        published += _upload(context, merged)
    context.ledger.check()
    return published


def _upload(context: RunContext, directory: Path) -> list[Artifact]:
    record = context.record
    with context.timeline.span("upload"):
        return publish(record.store, run_id=record.run_id, name=directory.name, directory=directory)


def _card(training: TrainingInputs, final: dict[str, Any]) -> Card:
    return Card(
        base=training.base.name,
        base_revision=training.inputs.model_revision,
        base_hashes=training.base_hashes,
        data=[asdict(facts) for facts in training.data.files],
        settings={name: value for name, value in final["fingerprint"].items() if name.startswith("TUNE_")},
        plan=final["plan"],
        metrics={key: value for key, value in final["results"].items() if value is not None},
        versions=final["versions"],
        template=training.data.tokenizer.name,
    )


def record_completion(
    context: RunContext,
    finetune: Finetune,
    training: TrainingInputs,
    final: dict[str, Any],
    artifacts: list[Artifact],
) -> None:
    """Write the report and `done.json`, the latter last of all; then say so.

    Raises:
        FencedError: another attempt has published a different result.
    """
    record, attempts, timeline = context.record, context.attempts, context.timeline
    measured = {**final["results"], **finetune.memory_report()}
    parts = {f"{part}_seconds": seconds for part, seconds in timeline.seconds().items()}
    report(context, training, measured={**measured, **parts})
    record.finish({**final, "artifacts": [artifact.as_json() for artifact in artifacts]})
    seconds = round(timeline.elapsed(), 1)
    quietly(lambda: attempts.end("complete", exit_code=0, seconds=seconds))
    context.cache.finish()
    log.info(
        "run_complete",
        uri=record.uri,
        steps=finetune.plan.steps,
        seconds=seconds,
        seconds_to_first_step=attempts.facts.get("seconds_to_first_step"),
        timeline_seconds=timeline.seconds(),
        **measured,
    )
