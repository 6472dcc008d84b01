"""The checks of `python -m job check`: all that a run does up to rendering, each as far as those before it allow.

No weights are loaded, no GPU is asked for, no attempt is claimed, and nothing is written to the output but a probe that
is deleted. Knows what is wrong, not how it is shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from job.config import environment
from job.config.schema import Config
from job.data.prepare import Data, DatasetFacts, judge, read, render
from job.data.tokenizer.load import import_without_torch
from job.inputs import pull
from job.inputs.files import DataFiles
from job.inputs.pull import Inputs, Puller, Sources
from job.model import base_model, shape
from job.model.base_model import BaseModel
from job.model.memory import Estimate
from job.observability import logs, termination
from job.report import build
from job.report.page import Page
from job.runtime import errors, libraries, process, signals
from job.runtime.errors import ConfigError, InterruptedError, JobError, StopRequested  # noqa: A004
from job.runtime.libraries import LibrarySettings
from job.stages import preflight
from job.stages.claim import finished
from job.state import attempts, checkpoints, fingerprint
from job.state.ledger import Ledger
from job.state.publication import Publication
from job.state.record import Record, check_inputs
from job.storage.open import open_store

log = structlog.get_logger()
PATIENCE_SECONDS = 10.0
PATIENCE_SPENT_SECONDS = 1.0
"""Once the output was denied or not reached for all the patience, the inputs will hardly be different."""


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


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a run would find at its output."""

    conditional_writes: bool
    finished: bool = False
    """Whether the run was finished before, so that nothing is left to do."""
    inputs: dict[str, Any] | None = None
    """What an earlier attempt read; None if there was none, or it may be different now."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What would be learned, and what that would take."""

    data: Data
    expected: Estimate | None = None


@dataclass(kw_only=True)
class Checked:
    """The problems, and what is known so far, check by check; what a problem keeps from being known stays None."""

    problems: list[Problem] = field(default_factory=list)
    config: Config | None = None
    output: Output | None = None
    base: BaseModel | None = None
    rows: DatasetFacts | None = None
    rendered: Rendered | None = None

    @contextlib.contextmanager
    def collecting(self, check: str) -> Iterator[None]:
        """Note what goes wrong in one check, and continue with the next."""
        try:
            yield
        except StopRequested as stop:
            self._stopped(check, stop.signal_name)
            raise
        except Exception as error:
            if name := signals.asked():  # a library caught `StopRequested` and made an error of it
                self._stopped(check, name)
                raise StopRequested(name) from error
            if errors.known(error) is None:
                log.exception("check_failed", check=check)
            self.problems.append(Problem(check=check, error=errors.as_job_error(error)))

    def _stopped(self, check: str, signal_name: str) -> None:
        """Note once that a signal ended the check: checks may be nested."""
        signals.acknowledge()
        if not any(isinstance(problem.error, InterruptedError) for problem in self.problems):
            ended = InterruptedError(f"{signal_name} asked the run to stop.", remedy="Start it again.")
            self.problems.append(Problem(check=check, error=ended))

    @property
    def exit_code(self) -> int:
        """That of the first problem, as a run would end; 0 without one."""
        return self.problems[0].error.exit_code if self.problems else 0

    @property
    def data(self) -> Data | None:
        """What would be learned."""
        return self.rendered.data if self.rendered else None

    @property
    def expected(self) -> Estimate | None:
        """What the run would take."""
        return self.rendered.expected if self.rendered else None

    def page(self) -> Page | None:
        """The page; None without a valid configuration."""
        if self.config is None:
            return None
        found = [problem.error for problem in self.problems]
        return build.check_page(self.config, self.data, self.expected, found)


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
    with checked.collecting("output"):
        checked.output = Output(conditional_writes=preflight.probe_output(config.output))
        checked.output = _earlier_attempt(checked.output, config)
    if checked.output is None:
        config = dataclasses.replace(config, storage_patience_minutes=PATIENCE_SPENT_SECONDS / 60)
    read_before = checked.output.inputs if checked.output else None
    before = len(checked.problems)
    inputs = _pull(checked, config, scratch, read_before)
    if read_before and len(checked.problems) == before and not fingerprint.contents_may_change(config.allow_change):
        with checked.collecting("inputs"):
            check_inputs(config.identity(), read_before, inputs.as_json())
    with checked.collecting("dataset"):
        if inputs.dataset:
            checked.rows = read(config, inputs)
            with checked.collecting("quality"):
                judge(checked.rows.scan.findings, rows=checked.rows.scan.rows, quality=config.quality)
    if inputs.eval_dataset and not checked.rows:
        _read_evaluation(checked, config, inputs)
    if not (checked.base and checked.rows):
        return
    with checked.collecting("rendering"):
        import_without_torch()
        data = render(config, inputs, checked.rows, directory=work)
        checked.rendered = Rendered(data=data)
        checked.rendered = Rendered(data=data, expected=build.expect(config, checked.base, data))
        with checked.collecting("quality"):
            judge(data.losses(), rows=checked.rows.scan.rows, quality=config.quality)


def _read_evaluation(checked: Checked, config: Config, pulled: Inputs) -> None:
    """The evaluation files alone, so that what is wrong with the training files hides nothing of them."""
    already_said = {problem.error.message for problem in checked.problems}
    alone = dataclasses.replace(pulled, dataset=pulled.eval_dataset, eval_dataset=())
    with checked.collecting("evaluation dataset"):
        try:
            read(dataclasses.replace(config, eval_fraction=0.0), alone)
        except JobError as error:
            if error.message not in already_said:  # where only these files are wrong, they were the reason already
                raise


def _earlier_attempt(output: Output, config: Config) -> Output:
    """Look at what an earlier attempt at this run left at the output.

    Raises:
        ConfigError: that attempt had other settings, was finished on other inputs, or has no checkpoint where one is
            required; or the store cannot do what is required of it.
    """
    ledger = Ledger(store=open_store(config.output, patience_seconds=PATIENCE_SECONDS), run_id=config.identity())
    record = Record(ledger=ledger)
    if config.resume != "fresh" and finished(config, record, Publication(ledger=ledger)) is not None:
        return dataclasses.replace(output, finished=True, inputs=record.inputs())
    if config.fencing == "require" and not output.conditional_writes:
        raise attempts.unfenced(config.output)
    if config.resume == "fresh":
        return output
    first = record.first()
    if first:
        settings = fingerprint.settings(config)
        fingerprint.check(record.run_id, first["fingerprint"], settings, allowed=config.allow_change)
    if config.resume == "require" and not _may_resume(ledger):
        raise checkpoints.nothing_to_resume(record.uri)
    return dataclasses.replace(output, inputs=record.inputs() if first else None)


def _may_resume(ledger: Ledger) -> bool:
    """Whether there is a checkpoint; whether it is whole is not looked at."""
    return any(entry.kind in {"checkpoint", None} for entry in ledger.newest_first())


def _pull(checked: Checked, config: Config, scratch: Path, began: dict[str, Any] | None) -> Inputs:
    """Download the inputs, each as far as possible: what is missing is empty."""
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
    training = evaluation = DataFiles()
    with checked.collecting("dataset"):
        training = puller.data("training")
    with checked.collecting("evaluation dataset"):
        evaluation = puller.data("evaluation")
    return pulled.with_data(training, evaluation)
