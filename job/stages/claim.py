"""The right to work on a run: whether it is finished already, the claim of an attempt, and how that attempt ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import structlog

from job.config.schema import Config
from job.inputs import pull
from job.inputs.pull import Sources
from job.observability import logs, memory
from job.observability.timeline import Timeline
from job.runtime import process, signals
from job.runtime.errors import AccessDeniedError, FencedError, JobError, StopRequested, StorageError, known
from job.runtime.process import Process
from job.runtime.workspace import workspace
from job.stages.context import RunContext, RunOutput
from job.state import fingerprint
from job.state.attempts import Attempts
from job.state.compile_cache.cache import CompileCache
from job.state.ledger import Ledger
from job.state.publication import Publication, Published
from job.state.record import Record, check_inputs, versions
from job.storage.base import Store
from job.storage.open import open_store

log = structlog.get_logger()


def open_output(config: Config) -> RunOutput:
    """Where the run keeps what it writes; nothing is claimed yet."""
    signals.grace(config.grace_seconds)
    store = open_store(config.output, patience_seconds=config.storage_patience_minutes * 60)
    run_id = config.identity()
    logs.bind(run_id=run_id, rank=Process.current().rank)

    def closing(patience_seconds: float) -> Store:
        return open_store(config.output, patience_seconds=patience_seconds, denied_patience_seconds=patience_seconds)

    ledger = Ledger(store=store, run_id=run_id)
    return RunOutput(
        record=Record(ledger=ledger),
        attempts=Attempts(store=store, closing=closing, run_id=run_id),
        ledger=ledger,
        publication=Publication(ledger=ledger),
    )


def already_complete(config: Config, output: RunOutput) -> bool:
    """Whether this run was finished before, on the inputs that it would read now; repairs what a crash left undone.

    Raises:
        ConfigError: it was finished, but with other settings, or the inputs changed since.
    """
    record, attempts = output.record, output.attempts
    published = None if config.resume == "fresh" else finished(config, record, output.publication)
    if published is None:
        return False
    if attempts.completed(since=published.attempt):
        output.publication.restore(published)
    else:  # a crash came after the `published` record
        output.publication.proclaim(published)
        attempts.complete_late(published.attempt)
    log.info("already_complete", uri=published.body["uri"], artifacts=len(published.names))
    return True


def finished(config: Config, record: Record, publication: Publication) -> Published | None:
    """What a run has published that was finished on what it would read now; None while it is not finished.

    Raises:
        ConfigError: it was finished, but with other settings, or the inputs changed or the results were deleted since.
    """
    published = publication.published()
    if published is None:
        return None
    publication.check_results(published)
    now = fingerprint.settings(config)
    fingerprint.check(record.run_id, published.body["fingerprint"], now, allowed=(), finished=True)
    if not fingerprint.contents_may_change(config.allow_change):
        pinned = record.inputs() or {}
        check_inputs(record.run_id, pinned, pull.listing(Sources.of(config), pinned=pinned), added_too=True)
    return published


@contextlib.contextmanager
def attempt(config: Config, output: RunOutput) -> Iterator[RunContext]:
    """One attempt at the run, from its claim to its recorded end.

    Raises:
        JobError: why the attempt ended; one of its own errors may be the last of too many.
        StopRequested: SIGTERM, SIGINT or SIGHUP.
    """
    signals.listen(lambda: output.attempts.end("interrupted"))
    with _end_recorded(output):
        _claim(config, output)
        if config.resume == "fresh":
            output.ledger.fence()
            output.ledger.start_over()
            log.warning("run_started_over", uri=output.record.uri)
        scratch = process.scratch()
        with workspace(scratch, output.record.run_id) as work, memory.watched(output.attempts.note_memory):
            log.info("run_started", uri=output.record.uri, config=config.as_variables(), versions=versions())
            yield RunContext(
                config=config,
                record=output.record,
                attempts=output.attempts,
                ledger=output.ledger,
                publication=output.publication,
                scratch=scratch,
                work=work,
                timeline=Timeline(),
                cache=CompileCache(
                    config.cache,
                    config.as_variables(),
                    scratch=scratch,
                    work=work,
                    saves=Process.current().rank == 0,
                ),
            )


def _claim(config: Config, output: RunOutput) -> None:
    """Claim the next attempt, unless too many before it failed at the same place."""
    attempts, ledger = output.attempts, output.ledger
    progress = ledger.progress()
    from_step = progress.checkpoint.body["step"] if progress.checkpoint and progress.checkpoint.body else 0
    ledger.attempt = attempts.claim(
        Process.current(), fencing=config.fencing, from_step=from_step, versions=versions(), above=progress.attempt
    )
    ledger.owner, ledger.conditional = attempts.owner, attempts.conditional
    logs.bind(attempt=ledger.attempt)
    attempts.check_progress(from_step)


@contextlib.contextmanager
def _end_recorded(output: RunOutput) -> Iterator[None]:
    """Whatever ends the attempt is recorded; it may be the last of too many failures at the same step.

    Once a later attempt has taken over, the run and what is said of it are that attempt's, whatever failed here.
    """
    record, attempts = output.record, output.attempts
    try:
        yield
    except StopRequested:
        signals.acknowledge()
        quietly(lambda: attempts.end("interrupted"))
        raise
    except GeneratorExit:  # the signal came between two lines of contextlib
        if signals.asked():
            quietly(lambda: attempts.end("interrupted"))
        raise
    except Exception as error:
        if (name := signals.asked()) and not isinstance(error, FencedError):
            signals.acknowledge()  # a library caught `StopRequested` and made an error of it
            quietly(lambda: attempts.end("interrupted"))
            raise StopRequested(name) from error
        reason, step = known(error) or error, next((entry["step"] for entry in record.noted("train_progress")), None)
        replaced = _replaced(output, reason)
        final = quietly(lambda: attempts.fail(replaced or reason, step=step)) or replaced
        if final:
            raise final from error
        raise


def _replaced(output: RunOutput, reason: Exception) -> FencedError | None:
    """The error of an attempt that a later one has replaced."""
    if not output.ledger.attempt or isinstance(reason, FencedError | StorageError | AccessDeniedError):
        return None
    try:
        output.ledger.check_all()
    except FencedError as error:
        return error
    except JobError:
        return None  # the end itself must be what is reported
    return None


def quietly(write: Callable[[], Any]) -> Any:
    """Write how an attempt ended, and only warn where that fails: the end itself must be what is reported."""
    try:
        return write()
    except (JobError, OSError) as error:
        log.warning("end_not_recorded", reason=str(error))
        return None
