"""The inputs on their way here: the small files first, which tell most mistakes in a second, and the weights beside
whatever else there is to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from job.config.schema import Config
from job.inputs import pull
from job.inputs.pull import Inputs, ModelFiles, Puller, Sources
from job.model import base_model, shape
from job.model.base_model import BaseModel
from job.runtime.background import Background
from job.stages.context import RunContext
from job.state import fingerprint
from job.state.record import Record


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model with its weights, on this disk."""

    files: ModelFiles
    base: BaseModel
    hashes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PendingModel:
    """The model on its way here."""

    model: Background[Model]
    base: BaseModel
    """What its small files say of it."""
    pinned: dict[str, Any] | None
    """What the run's first attempt read."""


def finished(config: Config, record: Record) -> dict[str, Any] | None:
    """`done.json` of a run that was finished on what it would read now; None while it is not finished.

    Raises:
        ConfigError: it was finished, but with other settings, or the inputs changed since.
    """
    done = record.finished()
    if done is None:
        return None
    fingerprint.check(record.run_id, done["fingerprint"], fingerprint.settings(config), allowed=(), finished=True)
    if not fingerprint.contents_may_change(config.allow_change):
        pinned = record.inputs() or {}
        record.check_inputs(pinned, pull.listing(Sources.of(config), pinned=pinned), added_too=True)
    return done


def fetch_inputs(life: RunContext) -> tuple[Inputs, PendingModel]:
    """Bring the inputs here, the same as the run's first attempt read, and refuse what cannot be trained.

    What a model's small files say is checked first. Its weights then come in the background, and of a model that is
    not on this disk the inputs name stubs until `await_model`.
    """
    config, record = life.config, life.record
    first = record.first()
    if first is not None:
        fingerprint.check(
            record.run_id, first["fingerprint"], fingerprint.settings(config), allowed=config.allow_change
        )
    began = record.inputs()
    pinned = None if fingerprint.contents_may_change(config.allow_change) else began
    with life.timeline.span("download"):
        puller = Puller.of(Sources.of(config), scratch=life.scratch, pinned=pinned, weights=False)
        small = puller.model(config.model)
        base = _inspected(config, small)
        life.cache.begin(base.config)
        whole = Puller.of(Sources.of(config), scratch=life.scratch, pinned=pinned)
        model = Background(lambda: _pull_model(life, whole), name="model")
        pulled = puller.rest(small, date=began["date"] if began else None)
    if pinned is not None:
        record.check_inputs(pinned, pulled.as_json())
    return pulled, PendingModel(model=model, base=base, pinned=pinned)


def _inspected(config: Config, files: ModelFiles) -> BaseModel:
    base = base_model.inspect(files.path, name=config.model)
    base_model.check_fits(base, precision=config.precision, max_length=config.max_length, export=config.export)
    shape.check_targets_of(base, config.lora_targets)
    return base


def _pull_model(life: RunContext, puller: Puller) -> Model:
    """All of the model; hashing its weights takes as long as a fast download."""
    with life.timeline.span("download"):
        files = puller.model(life.config.model)
        base = _inspected(life.config, files)
        return Model(files=files, base=base, hashes=fingerprint.weights(base))


def await_model(life: RunContext, pulled: Inputs, coming: PendingModel) -> tuple[Inputs, BaseModel, dict[str, str]]:
    """Wait for the weights: all inputs as they are, the model, and the hashes of its weights."""
    whole = coming.model.result()
    pulled = pulled.with_model(whole.files)
    if coming.pinned is not None:
        life.record.check_inputs(coming.pinned, pulled.as_json())
    return pulled, whole.base, whole.hashes
