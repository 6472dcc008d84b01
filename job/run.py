"""The story of one run: pull, read, render, fence, restore, load, train, look, export, publish; `done.json` last."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import structlog

from job.config.schema import Config
from job.data.prepare import prepare, validate_head
from job.model.base_model import BaseModel
from job.observability import logs, prometheus
from job.observability.timeline import Timeline
from job.report import build
from job.runtime import libraries, process, signals
from job.runtime.errors import ConfigError, FencedError, JobError, StopRequested, known
from job.runtime.process import Process
from job.runtime.workspace import workspace
from job.stages import preflight
from job.stages.context import RunContext
from job.stages.evaluate import look
from job.stages.fetch import await_model, fetch_inputs, finished
from job.stages.publish import export, model_card
from job.stages.resume import begin, restore, warn_if_not_bitwise
from job.stages.train import train
from job.state import fingerprint
from job.state.attempts import Attempts
from job.state.compile_cache import bytecode
from job.state.compile_cache.cache import CompileCache
from job.state.ledger import Ledger
from job.state.record import Record, versions
from job.storage.base import Store
from job.storage.open import open_store

log = structlog.get_logger()


def run(config: Config) -> None:
    """Do everything that the configuration asks for. Returns when `done.json` exists.

    Raises:
        JobError: of the kind that says why it could not.
        StopRequested: SIGTERM or SIGINT; the attempt's end is recorded.
    """
    signals.grace(config.grace_seconds)
    here = Process.current()
    store = open_store(config.output, patience_seconds=config.storage_patience_minutes * 60)
    record = Record(store=store, run_id=config.identity())
    logs.bind(run_id=record.run_id, rank=here.rank)

    def closing(patience_seconds: float) -> Store:
        return open_store(config.output, patience_seconds=patience_seconds, denied_patience_seconds=patience_seconds)

    attempts = Attempts(store=store, closing=closing, run_id=record.run_id)
    if config.resume != "fresh" and already_complete(config, record, attempts):
        return
    expect_gpu = preflight.machine(config)
    prometheus.serve(config.metrics_port)
    ledger = Ledger(store=store, run_id=record.run_id)
    signals.listen(lambda: attempts.end("interrupted"))
    with _recorded(attempts, record):
        _begin(config, record, attempts, ledger)
        if config.resume == "fresh":
            ledger.fence()
            ledger.begin_anew()
            log.warning("run_archived", uri=record.set_aside())
        scratch = process.scratch()
        with workspace(scratch, record.run_id) as work:
            life = RunContext(
                config=config,
                record=record,
                attempts=attempts,
                ledger=ledger,
                expect_gpu=expect_gpu,
                scratch=scratch,
                work=work,
                timeline=Timeline(),
                cache=CompileCache(config, scratch=scratch, work=work, saves=here.rank == 0),
            )
            _live(life)


def _begin(config: Config, record: Record, attempts: Attempts, ledger: Ledger) -> None:
    """Claim an attempt, unless too many before it were in vain."""
    newest = ledger.newest("checkpoint")
    from_step = newest.body["step"] if newest and newest.body else 0
    record.attempt = attempts.claim(Process.current(), fencing=config.fencing, from_step=from_step, versions=versions())
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
    except StopRequested:
        signals.acknowledge()
        _quietly(lambda: attempts.end("interrupted"))
        raise
    except Exception as error:
        if (name := signals.asked()) and not isinstance(error, FencedError):
            signals.acknowledge()  # a library caught `StopRequested` and made an error of it
            _quietly(lambda: attempts.end("interrupted"))
            raise StopRequested(name) from error
        reason, step = known(error) or error, next((entry["step"] for entry in record.noted("train_progress")), None)
        final = _quietly(lambda: attempts.fail(reason, step=step))
        if final:
            raise final from error
        raise


def _live(life: RunContext) -> None:
    started = time.monotonic()
    config, record, spans = life.config, life.record, life.timeline.span
    log.info("run_started", uri=record.uri, config=config.as_variables(), versions=versions())

    pulled, coming = fetch_inputs(life)
    validate_head(config, pulled)
    finetuning = _import_tuning(life, coming.base)
    pulled, base, base_hashes = await_model(life, pulled, coming)
    with spans("tokenise"):
        data = prepare(config, pulled, directory=life.work / "data")
    mark = fingerprint.fingerprint(
        config, base, base_hashes, template=data.tokenizer.template or "", training_data=data.train.digest
    )

    restored = restore(life, mark, check=finetuning.check_checkpoint)
    build.publish(config, record, base, data)
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
            begin(life, pulled, mark, finetune.reproducibility_facts())
        else:
            warn_if_not_bitwise(finetune, restored)

    final = train(life, finetune, data, mark, restored, ready=ready)

    card = model_card(final, data, pulled, base, base_hashes)
    artifacts = export(life, finetune, base, card, directory=life.work / "export")
    life.ledger.check()
    measured = {**final["results"], **finetune.memory_report()}
    parts = {f"{part}_seconds": seconds for part, seconds in life.timeline.seconds().items()}
    build.publish(config, record, base, data, measured={**measured, **parts})
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


def _import_tuning(life: RunContext, base: BaseModel) -> Any:
    """The training stack: seconds of imports, only after all cheap checks."""
    compiled = life.cache.directory
    libraries.prepare_libraries(
        life.scratch,
        compiled=compiled,
        expect_gpu=life.expect_gpu,
        cpu_only=life.config.device == "cpu",
        deterministic=life.config.deterministic,
        linear_attention=base.linear_attention,
    )
    if compiled is not None and bytecode.missing():
        life.cache.wait_for_modules()
        libraries.keep_modules(compiled / bytecode.FOLDER)
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
    libraries.keep_compiled()
    return finetune


def _quietly(write: Callable[[], Any]) -> Any:
    """Record the end of a failed attempt as well as can be: the failure itself must be what is reported."""
    try:
        return write()
    except (JobError, OSError) as error:
        log.warning("end_not_recorded", reason=str(error))
        return None
