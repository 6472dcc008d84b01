"""`python -m job check`: whether a run would begin, and what it would learn, told in seconds and without a GPU.

It does what a run does up to rendering, without loading weights: it reads none, asks for no GPU, claims no attempt, and
writes nothing to the output but a probe that it deletes. Whatever is wrong is collected, and the first that a run would
end with gives the exit code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from job.commands.check_text import show
from job.config import environment
from job.config.schema import Config
from job.data.prepare import Data, DatasetFacts, judge, read, render
from job.data.tokenizer.load import import_without_torch
from job.inputs import pull
from job.inputs.pull import Inputs, Puller, Sources
from job.model import base_model, shape
from job.model.base_model import BaseModel
from job.model.memory import Estimate
from job.observability import logs, termination
from job.observability.redaction import secret_values
from job.report import build
from job.report.page import Page
from job.runtime import errors, libraries, process
from job.runtime.errors import AccessDeniedError, ConfigError, InterruptedError, JobError, StopRequested, StorageError  # noqa: A004
from job.runtime.libraries import LibrarySettings
from job.stages import preflight
from job.stages.claim import finished
from job.state import attempts, checkpoints, fingerprint
from job.state.ledger import Ledger
from job.state.record import Record
from job.storage.open import open_store

log = structlog.get_logger()
PATIENCE_SECONDS = 10.0
PATIENCE_SPENT_SECONDS = 1.0
"""Once the output was refused or not reached for all the patience, the inputs will hardly be an exception."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that a run would end with."""

    check: str
    """Which check found it."""
    error: JobError

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        more = {"problems": list(self.error.problems)} if isinstance(self.error, ConfigError) else {}
        return {"check": self.check, **termination.facts(self.error), **more}


@dataclass(kw_only=True)
class Checked:
    """What is known so far; what a problem keeps from being known stays None."""

    problems: list[Problem] = field(default_factory=list)
    config: Config | None = None
    conditional_writes: bool | None = None
    base: BaseModel | None = None
    facts: DatasetFacts | None = None
    data: Data | None = None
    expected: Estimate | None = None
    finished: bool = False
    """Whether the run was finished before, so that nothing is left to do."""

    @contextlib.contextmanager
    def collecting(self, check: str) -> Iterator[None]:
        """Note what goes wrong in one check, and go on with the next."""
        try:
            yield
        except StopRequested as stop:
            self.add(check, InterruptedError(f"{stop.signal_name} asked the run to stop.", remedy="Start it again."))
            raise
        except Exception as error:
            if errors.known(error) is None:
                log.exception("check_failed", check=check)
            self.add(check, errors.as_job_error(error))

    def add(self, check: str, error: JobError) -> None:
        """Note a problem."""
        self.problems.append(Problem(check=check, error=error))

    @property
    def exit_code(self) -> int:
        """That of the first problem, as a run would end; 0 without one."""
        return self.problems[0].error.exit_code if self.problems else 0

    def page(self) -> Page | None:
        """The page; None without a valid configuration."""
        if self.config is None:
            return None
        found = [problem.error for problem in self.problems]
        return build.check_page(self.config, self.data, self.expected, found)


def command(*, as_json: bool, report: Path | None) -> int:
    """Check, and say on stdout what was found; logs go to stderr.

    Args:
        as_json: one JSON object instead of words.
        report: where to write the page.

    Returns:
        the exit code, as of a run.
    """
    started = time.monotonic()
    result = logs.to_stderr()
    secrets = secret_values(process.variables())
    logs.configure(form=environment.asked_log_format(), level="warning", secrets=secrets)
    checked = Checked()
    with contextlib.suppress(StopRequested):
        check(checked)
    written = None
    with checked.collecting("report"):
        written = _write(checked, report)
    facts = {**_facts(checked), "report": str(written) if written else None, "seconds": time.monotonic() - started}
    said = json.dumps(logs.redact(facts), ensure_ascii=False, default=str) + "\n"
    with os.fdopen(result, "w", encoding="utf-8", errors="replace") as stdout:
        if as_json:
            stdout.write(said)
        else:
            show(json.loads(said), stdout)
    if checked.problems:
        termination.write(checked.problems[0].error)
    return checked.exit_code


def check(checked: Checked) -> None:
    """All checks, in the order in which a run would meet them; each as far as those before it allow."""
    with checked.collecting("configuration"):
        checked.config = environment.load()
    if checked.config is None:
        return
    config = dataclasses.replace(checked.config, storage_patience_minutes=PATIENCE_SECONDS / 60)
    logs.bind(run_id=config.identity())
    with checked.collecting("scratch"):
        scratch = process.scratch()
        libraries.prepare(LibrarySettings(scratch=scratch, expect_gpu=False, cpu_only=True, quiet=True))
        with tempfile.TemporaryDirectory(prefix="check-", dir=scratch) as work:
            _inside(checked, config, scratch, Path(work))


def _inside(checked: Checked, config: Config, scratch: Path, work: Path) -> None:
    store = open_store(config.output, patience_seconds=PATIENCE_SECONDS)
    record, began = Record(store=store, run_id=config.identity()), None
    with checked.collecting("output"):
        checked.conditional_writes = preflight.probe_output(config.output)
        began = _begun(checked, config, record)
    if any(isinstance(problem.error, AccessDeniedError | StorageError) for problem in checked.problems):
        config = dataclasses.replace(config, storage_patience_minutes=PATIENCE_SPENT_SECONDS / 60)
    before = len(checked.problems)
    pulled = _pull(checked, config, scratch, began)
    if began and len(checked.problems) == before and not fingerprint.contents_may_change(config.allow_change):
        with checked.collecting("inputs"):
            record.check_inputs(began, pulled.as_json())
    with checked.collecting("dataset"):
        if pulled.dataset:
            checked.facts = read(config, pulled)
            with checked.collecting("quality"):
                judge(checked.facts.scan, quality=config.quality)
    if pulled.eval_dataset and not checked.facts:
        _read_evaluation(checked, config, pulled)
    if not (checked.base and checked.facts):
        return
    with checked.collecting("rendering"):
        import_without_torch()
        checked.data = render(config, pulled, checked.facts, directory=work)
        checked.expected = build.expect(config, checked.base, checked.data)


def _read_evaluation(checked: Checked, config: Config, pulled: Inputs) -> None:
    """The evaluation files alone, so that what is wrong with the training files hides nothing of them."""
    told = {problem.error.message for problem in checked.problems}
    alone = dataclasses.replace(pulled, dataset=pulled.eval_dataset, eval_dataset=())
    with checked.collecting("evaluation dataset"):
        try:
            read(dataclasses.replace(config, eval_fraction=0.0), alone)
        except JobError as error:
            if error.message not in told:  # where only these files are wrong, they were the reason already
                raise


def _begun(checked: Checked, config: Config, record: Record) -> dict[str, Any] | None:
    """What an earlier attempt at this run read; None if there was none, or it may be another now.

    Raises:
        ConfigError: it had other settings, was finished on other inputs, or has no checkpoint where one is required; or
            the store cannot do what is required of it.
    """
    checked.finished = config.resume != "fresh" and finished(config, record) is not None
    if checked.finished:
        return record.inputs()
    if config.fencing == "require" and not checked.conditional_writes:
        raise attempts.unfenced(config.output)
    if config.resume == "fresh":
        return None
    if first := record.first():
        settings = fingerprint.settings(config)
        fingerprint.check(record.run_id, first["fingerprint"], settings, allowed=config.allow_change)
    if config.resume == "require" and not _may_resume(record):
        raise checkpoints.nothing_to_resume(record.uri)
    return record.inputs() if first else None


def _may_resume(record: Record) -> bool:
    """Whether there is a checkpoint; whether it is whole is not looked at."""
    ledger = Ledger(store=record.store, run_id=record.run_id)
    return any(entry.kind in {"checkpoint", None} for entry in ledger.newest_first())


def _pull(checked: Checked, config: Config, scratch: Path, began: dict[str, Any] | None) -> Inputs:
    """Bring the inputs here, each as far as it can be had: what is missing is empty."""
    pinned = None if fingerprint.contents_may_change(config.allow_change) else began
    puller = Puller.of(Sources.of(config), scratch=scratch, pinned=pinned, weights=False)
    pulled = Inputs(
        model=scratch,
        model_files=(),
        model_revision=None,
        dataset=(),
        eval_dataset=(),
        template_text=None,
        template_files=(),
        date=pull.day(began["date"] if began else None),
    )
    with checked.collecting("model"):
        pulled = pulled.with_model(puller.model(config.model))
        base = base_model.inspect(pulled.model, name=config.model)
        base_model.check_fits(base, precision=config.precision, max_length=config.max_length, export=config.export)
        checked.base = base
        shape.check_targets_of(base, config.lora_targets)
    with checked.collecting("chat template"):
        text, files = puller.template(config.chat_template)
        pulled = dataclasses.replace(pulled, template_text=text, template_files=files)
    with checked.collecting("dataset"):
        pulled = dataclasses.replace(pulled, dataset=puller.data(config.dataset))
    with checked.collecting("evaluation dataset"):
        held_out = puller.data(config.eval_dataset)
        return dataclasses.replace(pulled, eval_dataset=held_out)
    return pulled


def _write(checked: Checked, path: Path | None) -> Path | None:
    """Write the page, if one is asked for and anything is known; returns where it is.

    Raises:
        ConfigError: it cannot be written there.
    """
    page = checked.page() if path else None
    if path is None or page is None:
        return None
    try:
        path.write_bytes(page.encoded())
    except OSError as error:
        raise ConfigError(
            f"The report cannot be written to {path}: {error.strerror}.",
            remedy="Give --report a file in a directory that is there and may be written.",
        ) from None
    return path


def _facts(checked: Checked) -> dict[str, Any]:
    """All that was found, as JSON holds it."""
    config, data, base = checked.config, checked.data, checked.base
    return {
        "ok": not checked.problems,
        "finished": checked.finished,
        "exit_code": checked.exit_code,
        "run_id": config.identity() if config else None,
        "problems": [problem.as_json() for problem in checked.problems],
        "findings": [dataclasses.asdict(finding) for finding in data.all_findings()] if data else [],
        "output": {"uri": config.output, "conditional_writes": checked.conditional_writes} if config else None,
        "model": _model(base) if base else None,
        "files": [dataclasses.asdict(facts) for facts in checked.facts.files] if checked.facts else [],
        "skipped_files": list(checked.facts.skipped) if checked.facts else [],
        "train": dataclasses.asdict(data.train.counts) if data else None,
        "evaluation": dataclasses.asdict(data.held_out) if data and data.held_out else None,
        "eval_note": checked.facts.split.note if checked.facts else "",
        "lengths": _lengths(data, config) if data and config else None,
        "chat_template": data.tokenizer.name if data else None,
        "tokenizer_notes": list(data.tokenizer.notes) if data else [],
        "estimate": dataclasses.asdict(checked.expected) if checked.expected else None,
    }


def _lengths(data: Data, config: Config) -> dict[str, Any]:
    return dataclasses.asdict(build.length_chart(data.train.lengths, max_length=config.max_length))


def _model(base: BaseModel) -> dict[str, Any]:
    names = ("name", "architecture", "parameters", "positions", "prequantised")
    return {name: getattr(base, name) for name in names}
