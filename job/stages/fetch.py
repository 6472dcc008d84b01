"""The inputs, downloaded: the small files first, which show most mistakes within a second, and the weights in the
background while other work continues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from job.config.schema import Config
from job.inputs.pull import Inputs, ModelFiles, Puller, Sources
from job.model import base_model, shape
from job.model.base_model import BaseModel
from job.runtime.background import Background
from job.stages.context import RunContext
from job.state import fingerprint
from job.state.record import check_inputs


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model with its weights, on this disk."""

    files: ModelFiles
    base: BaseModel
    hashes: dict[str, str]
    """SHA-256 of the files of weights, by name."""


@dataclass(frozen=True, kw_only=True)
class PendingModel:
    """A model whose weights are being downloaded."""

    download: Background[Model]
    base: BaseModel
    """What its small files say."""
    pinned: dict[str, Any] | None
    """What the run's first attempt read."""


def fetch_inputs(context: RunContext) -> tuple[Inputs, PendingModel]:
    """Download the inputs, the same that the run's first attempt read, and reject what cannot be trained.

    What a model's small files say is checked first. Its weights follow in the background; until `await_model` the
    inputs name stubs of them, unless the model is on this disk.
    """
    config, record = context.config, context.record
    first = record.first()
    if first is not None:
        fingerprint.check(
            record.run_id, first["fingerprint"], fingerprint.settings(config), allowed=config.allow_change
        )
    began = record.inputs()
    pinned = None if fingerprint.contents_may_change(config.allow_change) else began
    with context.timeline.span("download"):
        puller = Puller.of(Sources.of(config), scratch=context.scratch, pinned=pinned, weights=False)
        small = puller.model(config.model)
        base = _inspected(config, small)
        context.cache.begin(base.config)
        whole = Puller.of(Sources.of(config), scratch=context.scratch, pinned=pinned)
        download = Background(lambda: _pull_model(context, whole), name="model")
        pulled = puller.rest(small, date=began["date"] if began else None)
    if pinned is not None:
        check_inputs(record.run_id, pinned, pulled.as_json())
    return pulled, PendingModel(download=download, base=base, pinned=pinned)


def await_model(context: RunContext, pulled: Inputs, pending: PendingModel) -> tuple[Inputs, Model]:
    """Wait for the weights; the inputs then name the whole model.

    Raises:
        ConfigError: the model is not the one that the run's first attempt read.
    """
    model = pending.download.result()
    pulled = pulled.with_model(model.files)
    if pending.pinned is not None:
        check_inputs(context.record.run_id, pending.pinned, pulled.as_json())
    return pulled, model


def _inspected(config: Config, files: ModelFiles) -> BaseModel:
    base = base_model.inspect(files.path, name=config.model)
    base_model.check_fits(base, precision=config.precision, max_length=config.max_length, export=config.export)
    shape.check_targets_of(base, config.lora_targets)
    return base


def _pull_model(context: RunContext, puller: Puller) -> Model:
    """All of the model; hashing its weights takes as long as a fast download."""
    with context.timeline.span("download"):
        files = puller.model(context.config.model)
        base = _inspected(context.config, files)
        return Model(files=files, base=base, hashes=fingerprint.weights(base))
