"""The story of one run: pull, read, render, fence, restore, load, train, look, export, publish; `done.json` last."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from job import bytecode, checkpoints, env, fingerprint, logs, metrics, preflight, reporting, signals
from job.artifacts import Artifact, publish
from job.attempts import Attempts
from job.base_model import BaseModel
from job.card import Card
from job.checkpoints import Restored
from job.compile_cache import CompileCache
from job.config import Config
from job.data import Data, glance, prepare
from job.errors import ConfigError, FencedError, JobError, Stop, known
from job.gathering import arrived, finished, gather
from job.inputs import Inputs
from job.ledger import Ledger
from job.record import Record, versions
from job.storage.store import Store, open_store
from job.timeline import Timeline
from job.training import Life, look, say_differences, train
from job.workspace import workspace

log = structlog.get_logger()


def run(config: Config) -> None:
    """Do everything that the configuration asks for. Returns when `done.json` exists.

    Raises:
        JobError: of the kind that says why it could not.
        Stop: SIGTERM or SIGINT; the attempt's end is recorded.
    """
    signals.grace(config.grace_seconds)
    process = env.process()
    store = open_store(config.output, patience_seconds=config.storage_patience_minutes * 60)
    record = Record(store=store, run_id=config.identity())
    logs.bind(run_id=record.run_id, rank=process.rank)

    def closing(patience_seconds: float) -> Store:
        return open_store(config.output, patience_seconds=patience_seconds, denied_patience_seconds=patience_seconds)

    attempts = Attempts(store=store, closing=closing, run_id=record.run_id)
    if config.resume != "fresh" and already_complete(config, record, attempts):
        return
    expect_gpu = preflight.machine(config)
    metrics.serve(config.metrics_port)
    ledger = Ledger(store=store, run_id=record.run_id)
    signals.listen(lambda: attempts.end("interrupted"))
    with _recorded(attempts, record):
        _begin(config, record, attempts, ledger)
        if config.resume == "fresh":
            ledger.fence()
            ledger.begin_anew()
            log.warning("run_set_aside", uri=record.set_aside())
        scratch = env.scratch()
        with workspace(scratch, record.run_id) as work:
            life = Life(
                config=config,
                record=record,
                attempts=attempts,
                ledger=ledger,
                expect_gpu=expect_gpu,
                scratch=scratch,
                work=work,
                timeline=Timeline(),
                cache=CompileCache(config, scratch=scratch, work=work, saves=process.rank == 0),
            )
            _live(life)


def _begin(config: Config, record: Record, attempts: Attempts, ledger: Ledger) -> None:
    """Claim an attempt, unless too many before it were in vain."""
    newest = ledger.newest("checkpoint")
    from_step = newest.body["step"] if newest and newest.body else 0
    record.attempt = attempts.claim(env.process(), fencing=config.fencing, from_step=from_step, versions=versions())
    ledger.attempt, ledger.owner = attempts.number, attempts.owner
    ledger.conditional = record.conditional = attempts.conditional
    logs.bind(attempt=record.attempt)
    attempts.check_progress(from_step)


def already_complete(config: Config, record: Record, attempts: Attempts) -> bool:
    """Whether this run was finished before, on the inputs that it would read now.

    Raises:
        ConfigError: it was finished, but with other settings, or the inputs changed since.
    """
    done = finished(config, record)
    if done is None:
        return False
    completed = attempts.completed()
    if not completed or not record.latest_is_whole():
        record.write_latest(done)  # a crash may have lost it after done.json was written
    if not completed:
        attempts.complete_late()
    log.info("already_complete", uri=record.uri, artifacts=len(done["artifacts"]))
    return True


@contextlib.contextmanager
def _recorded(attempts: Attempts, record: Record) -> Iterator[None]:
    """Whatever ends the attempt is written down, and may turn out to be one time too many."""
    try:
        yield
    except Stop:
        signals.hear()
        _quietly(lambda: attempts.end("interrupted"))
        raise
    except Exception as error:
        if (name := signals.asked()) and not isinstance(error, FencedError):
            signals.hear()  # a library caught `Stop` and made an error of it
            _quietly(lambda: attempts.end("interrupted"))
            raise Stop(name) from error
        reason, step = known(error) or error, next((entry["step"] for entry in record.noted("train_progress")), None)
        hopeless = _quietly(lambda: attempts.fail(reason, step=step))
        if hopeless:
            raise hopeless from error
        raise


def _live(life: Life) -> None:
    started = time.monotonic()
    config, record, spans = life.config, life.record, life.timeline.span
    log.info("run_started", uri=record.uri, config=config.as_variables(), versions=versions())

    pulled, coming = gather(life)
    glance(config, pulled)
    finetuning = _import_tuning(life, coming.base)
    pulled, base, base_hashes = arrived(life, pulled, coming)
    with spans("tokenise"):
        data = prepare(config, pulled, directory=life.work / "data")
    mark = fingerprint.fingerprint(
        config, base, base_hashes, template=data.tokenizer.template or "", training_data=data.train.digest
    )

    restored = restore(life, mark, check=finetuning.check_checkpoint)
    reporting.publish(config, record, base, data, state="in progress")
    life.cache.wait()
    earlier = restored.body if restored else record.first()
    with spans("load"):
        finetune = finetuning.Finetune.load(base, config, data, directory=life.work, earlier=earlier)
    if restored is not None and restored.step > finetune.plan.steps:
        raise ConfigError(
            f"The checkpoint has {restored.step} steps, and the settings ask for {finetune.plan.steps}.",
            remedy="Raise TUNE_MAX_STEPS or TUNE_EPOCHS, or set another TUNE_RUN_ID to train less.",
        )
    if restored is None:
        look(life, finetune, data, phase="before", step=0)

    def ready() -> None:
        if restored is None:
            begin(life, pulled, mark, finetune.circumstances())
        else:
            say_differences(finetune, restored)

    final = train(life, finetune, data, mark, restored, ready=ready)

    card = _card(final, data, pulled, base, base_hashes)
    artifacts = export(life, finetune, base, card, directory=life.work / "export")
    life.ledger.check()
    measured = {**final["results"], **finetune.memory_report()}
    parts = {f"{part}_seconds": seconds for part, seconds in life.timeline.seconds().items()}
    reporting.publish(config, record, base, data, state="complete", measured={**measured, **parts})
    record.finish({**final, "artifacts": [artifact.as_json() for artifact in artifacts]})
    seconds = round(time.monotonic() - started, 1)
    _quietly(lambda: life.attempts.end("complete", exit_code=0, seconds=seconds))
    life.cache.finish()
    log.info(
        "run_complete",
        uri=record.uri,
        steps=finetune.plan.steps,
        seconds=seconds,
        seconds_to_first_step=life.attempts.facts.get("seconds_to_first_step"),
        timeline_seconds=life.timeline.seconds(),
        **measured,
    )


def begin(life: Life, pulled: Inputs, mark: dict[str, Any], circumstances: dict[str, Any]) -> None:
    """Write down what the run is, now that all is checked and the first step is about to begin."""
    config, record = life.config, life.record
    pinned = record.pin(config, inputs=pulled.as_json(), fingerprint=mark, circumstances=circumstances)
    if not pinned and not fingerprint.contents_may_change(config):
        record.check_inputs(record.inputs() or {}, pulled.as_json())


def _import_tuning(life: Life, base: BaseModel) -> Any:
    """The training stack: seconds of imports, only after all cheap checks."""
    compiled = life.cache.directory
    env.prepare_libraries(
        life.scratch,
        compiled=compiled,
        expect_gpu=life.expect_gpu,
        cpu_only=life.config.device == "cpu",
        deterministic=life.config.deterministic,
        linear_attention=base.linear_attention,
    )
    if compiled is not None and bytecode.missing():
        life.cache.wait_for_modules()
        env.keep_modules(compiled / bytecode.FOLDER)
    gc.disable()  # a fifth of the imports' time went into looking for garbage among what stays
    try:
        with life.timeline.span("import"):
            from job.tuning import finetune  # noqa: PLC0415
    except NotImplementedError as error:  # how Unsloth says that it must not fall back to the CPU
        raise preflight.no_gpu(
            life.config.device, f"the training library finds none that it can use: {error}"
        ) from error
    finally:
        gc.enable()
    gc.freeze()  # nor is it ever to be looked through: Unsloth asks for that a dozen times while it loads a model
    env.keep_compiled()
    return finetune


def restore(life: Life, mark: dict[str, Any], *, check: Callable[[Path, dict[str, Any]], None]) -> Restored | None:
    """Fence all earlier attempts, then take the newest good checkpoint that they left, if it is of this very run."""
    config, record = life.config, life.record
    life.ledger.fence()
    restored = checkpoints.restore(life.ledger, life.work / "restored", check=check)
    if restored is None:
        if config.resume == "require":
            raise checkpoints.none_there(record.uri)
        return None
    changed = fingerprint.check(record.run_id, restored.body["fingerprint"], mark, allowed=config.allow_change)
    if changed:
        log.warning("resumed_with_changes", changed=changed)
    record.resume(restored.history())
    life.attempts.facts.update(resumed_from=restored.number, resumed_step=restored.step)
    log.info("checkpoint_restored", step=restored.step, commit=restored.number, from_attempt=restored.body["attempt"])
    return restored


def export(life: Life, finetune: Any, base: BaseModel, card: Card, *, directory: Path) -> list[Artifact]:
    """Publish the adapter, and only then, with the adapter safe, whatever else was asked for."""
    record, spans = life.record, life.timeline.span
    record.sweep()
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


def _card(final: dict[str, Any], data: Data, pulled: Inputs, base: BaseModel, base_hashes: dict[str, str]) -> Card:
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


def _quietly(write: Callable[[], Any]) -> Any:
    """Record the end of a failed attempt as well as can be: the failure itself must be what is reported."""
    try:
        return write()
    except (JobError, OSError) as error:
        log.warning("record_incomplete", reason=str(error))
        return None
