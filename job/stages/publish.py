"""The end of a run: the right to publish, the adapter and whatever else was asked for, and the record of it all."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import structlog

from job.report import build
from job.stages.claim import finished, quietly
from job.stages.context import Finetune, RunContext, TrainingInputs
from job.stages.evaluate import Evaluator
from job.state.checkpoints import Restored
from job.state.model_card import Card
from job.state.publication import Artifact
from job.state.record import versions

log = structlog.get_logger()


def report(context: RunContext, training: TrainingInputs) -> None:
    """Write the attempt's own `report.html`, with what is known before training."""
    build.publish_early(context.config, context.record, training.base, training.data)


def already_published(context: RunContext) -> bool:
    """Whether another attempt has finished the run since this one began; this one has fenced it and has only to say so.

    Raises:
        ConfigError: it was finished with other settings.
        FencedError: a third attempt has taken over.
    """
    published = finished(context.config, context.record, context.publication)
    if published is None:
        return False
    context.publication.proclaim(published)
    quietly(lambda: context.attempts.end("complete", exit_code=0))
    log.info("already_complete", uri=published.body["uri"], artifacts=len(published.names))
    return True


def win(
    context: RunContext,
    finetune: Finetune,
    training: TrainingInputs,
    evaluator: Evaluator,
    restored: Restored | None,
) -> dict[str, Any]:
    """Evaluate the trained model and win the right to publish it (`Publication.win`, which says what it returns)."""
    record, steps = context.record, finetune.plan.steps
    after = evaluator.evaluate_and_sample(phase="after", step=steps)
    losses = [entry["loss"] for entry in record.noted("train_progress")]
    before = next((entry["eval_loss"] for entry in record.noted("evaluated", step=0)), None)
    facts = {
        "steps": steps,
        "plan": finetune.reproducibility_facts()["plan"],
        "fingerprint": training.fingerprint,
        "results": {
            "train_loss": math.fsum(losses) / len(losses),
            "final_step_loss": losses[0],
            "eval_loss_before": before,
            "eval_loss": after,
        },
        "versions": versions(),
    }
    last = restored.number if restored is not None and restored.step == steps else 0
    return context.publication.win(facts, checkpoint=last)


def export(context: RunContext, finetune: Finetune, training: TrainingInputs, final: dict[str, Any]) -> list[Artifact]:
    """Upload the adapter, and only then, with the adapter safe, whatever else was asked for.

    Raises:
        FencedError: another attempt has taken over.
    """
    spans, directory = context.timeline.span, context.work / "export"
    context.ledger.check()  # what a successor is uploading is not unfinished
    context.record.remove_unfinished_uploads()
    adapter = directory / "adapter"
    with spans("export"):
        finetune.save_adapter(adapter, base=training.base)
        (adapter / "README.md").write_text(_card(training, final).text())
    with spans("upload"):
        uploaded = context.publication.upload(adapter, name="adapter")
    if "merged_16bit" in context.config.export:
        merged = directory / "merged_16bit"
        with spans("export"):
            finetune.merge(adapter, merged, base=training.base)
        with spans("upload"):
            uploaded += context.publication.upload(merged, name="merged_16bit")
    return uploaded


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


def finish(
    context: RunContext,
    finetune: Finetune,
    training: TrainingInputs,
    final: dict[str, Any],
    artifacts: list[Artifact],
) -> None:
    """Add metrics and report to the results, publish them, and say so.

    Raises:
        FencedError: another attempt has taken over.
    """
    record, timeline, publication = context.record, context.timeline, context.publication
    measured = {**final["results"], **finetune.memory_report()}
    parts = {f"{part}_seconds": seconds for part, seconds in timeline.seconds().items()}
    pages = context.work / "pages"
    pages.mkdir()
    (pages / "metrics.jsonl").write_bytes(record.history_text())
    build.write(context.config, record, training.base, training.data, directory=pages, measured={**measured, **parts})
    published = publication.publish(final, [*artifacts, *publication.upload(pages)])
    publication.proclaim(published)
    seconds = round(timeline.elapsed(), 1)
    quietly(lambda: context.attempts.end("complete", exit_code=0, seconds=seconds))
    context.cache.finish()
    log.info(
        "run_complete",
        uri=published.body["uri"],
        steps=finetune.plan.steps,
        seconds=seconds,
        seconds_to_first_step=context.attempts.facts.get("seconds_to_first_step"),
        timeline_seconds=timeline.seconds(),
        **measured,
    )
