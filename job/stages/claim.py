"""The right to work on a run: whether it is finished already, the claim of an attempt, and how that attempt ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import structlog

from job.config.schema import Config
from job.inputs import pull
from job.inputs.pull import Sources
from job.observability import logs
from job.observability.timeline import Timeline
from job.runtime import memory, process, signals
from job.runtime.errors import FencedError, JobError, StopRequested, known
from job.runtime.process import Process
from job.runtime.workspace import workspace
from job.stages.context import RunContext, RunOutput
from job.state import fingerprint
from job.state.attempts import Attempts
from job.state.compile_cache.cache import CompileCache
from job.state.ledger import Ledger
from job.state.record import Record, versions
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

    return RunOutput(
        record=Record(store=store, run_id=run_id),
        attempts=Attempts(store=store, closing=closing, run_id=run_id),
        ledger=Ledger(store=store, run_id=run_id),
    )


def already_complete(config: Config, output: RunOutput) -> bool:
    """Whether this run was finished before, on the inputs that it would read now; repairs what a crash left undone.

    Raises:
        ConfigError: it was finished, but with other settings, or the inputs changed since.
    """
    record, attempts = output.record, output.attempts
    done = None if config.resume == "fresh" else finished(config, record)
    if done is None:
        return False
    completed = attempts.completed()
    if not completed or not record.latest_is_whole():
        record.write_latest(done)  # a crash may have lost it after done.json was written
    if not completed:
        attempts.complete_late()
    log.info("already_complete", uri=record.uri, artifacts=len(done["artifacts"]))
    return True


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


@contextlib.contextmanager
def attempt(config: Config, output: RunOutput) -> Iterator[RunContext]:
    """One attempt at the run, from its claim to its recorded end.

    Raises:
        JobError: why the attempt ended; one of its own errors may be the last of too many.
        StopRequested: SIGTERM or SIGINT.
    """
    signals.listen(lambda: output.attempts.end("interrupted"))
    with _end_recorded(output):
        _claim(config, output)
        if config.resume == "fresh":
            output.ledger.fence()
            output.ledger.start_over()
            log.warning("run_archived", uri=output.record.archive())
        scratch = process.scratch()
        with workspace(scratch, output.record.run_id) as work, memory.watched(output.attempts.note_memory):
            log.info("run_started", uri=output.record.uri, config=config.as_variables(), versions=versions())
            yield RunContext(
                config=config,
                record=output.record,
                attempts=output.attempts,
                ledger=output.ledger,
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
    record, attempts, ledger = output.record, output.attempts, output.ledger
    newest = ledger.newest("checkpoint")
    from_step = newest.body["step"] if newest and newest.body else 0
    record.attempt = attempts.claim(Process.current(), fencing=config.fencing, from_step=from_step, versions=versions())
    ledger.attempt, ledger.owner = attempts.number, attempts.owner
    ledger.conditional = record.conditional = attempts.conditional
    logs.bind(attempt=record.attempt)
    attempts.check_progress(from_step)


@contextlib.contextmanager
def _end_recorded(output: RunOutput) -> Iterator[None]:
    """Whatever ends the attempt is recorded; it may be the last of too many failures at the same step."""
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
        final = quietly(lambda: attempts.fail(reason, step=step))
        if final:
            raise final from error
        raise


def quietly(write: Callable[[], Any]) -> Any:
    """Write how an attempt ended, and only warn where that fails: the end itself must be what is reported."""
    try:
        return write()
    except (JobError, OSError) as error:
        log.warning("end_not_recorded", reason=str(error))
        return None
