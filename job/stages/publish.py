"""The adapter and whatever else was asked for, from memory to the output; the adapter first."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from job.data.prepare import Data
from job.inputs.pull import Inputs
from job.model.base_model import BaseModel
from job.stages.context import RunContext
from job.state.artifacts import Artifact, publish
from job.state.model_card import Card


def export(life: RunContext, finetune: Any, base: BaseModel, card: Card, *, directory: Path) -> list[Artifact]:
    """Publish the adapter, and only then, with the adapter safe, whatever else was asked for."""
    record, spans = life.record, life.timeline.span
    record.remove_unfinished_uploads()
    adapter = directory / "adapter"
    with spans("export"):
        finetune.save_adapter(adapter, base=base)
        (adapter / "README.md").write_text(card.text())
    with spans("upload"):
        published = publish(record.store, run_id=record.run_id, name="adapter", directory=adapter)
    if "merged_16bit" in life.config.export:
        merged = directory / "merged_16bit"
        with spans("export"):
            finetune.merge(adapter, merged, base=base)
        with spans("upload"):
            published += publish(record.store, run_id=record.run_id, name="merged_16bit", directory=merged)
    return published


def model_card(final: dict[str, Any], data: Data, pulled: Inputs, base: BaseModel, base_hashes: dict[str, str]) -> Card:
    """What the model card says."""
    return Card(
        base=base.name,
        base_revision=pulled.model_revision,
        base_hashes=base_hashes,
        data=[asdict(facts) for facts in data.files],
        settings={name: value for name, value in final["fingerprint"].items() if name.startswith("TUNE_")},
        plan=final["plan"],
        metrics={key: value for key, value in final["results"].items() if value is not None},
        versions=final["versions"],
        template=data.tokenizer.name,
    )
