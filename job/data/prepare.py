"""The data of a run: files -> examples -> sides of the split -> token ids and labels on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path

import structlog

from job.config import role_weights
from job.config.schema import Config
from job.data.examples import Example, RowError
from job.data.findings import LOSSES, Finding, is_grave
from job.data.quality.scan import QualityScan, ScanResult, Scope
from job.data.reading.columns import parse_columns
from job.data.reading.dataset import ExampleStream, FileFacts, Source
from job.data.rendering.renderer import Prompt, Renderer
from job.data.split import EvaluationSplit, split_by_content, split_by_files
from job.data.tokenized.arrow import DatasetPlan, TokenizedDataset, write_datasets
from job.data.tokenized.counts import Counts
from job.data.tokenized.draft import Draft
from job.data.tokenizer.load import Tokenizer, load_tokenizer
from job.inputs.data_files import LeftOut
from job.inputs.files import File
from job.inputs.pull import Inputs
from job.runtime.errors import DataError

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What one pass over the files showed, apart from the rows themselves."""

    split: EvaluationSplit
    files: tuple[FileFacts, ...]
    left_out: tuple[LeftOut, ...]
    """What lies beside the data and is not read."""
    scan: ScanResult
    """The findings in the rows, and how many repeat others."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The datasets of a run and what is known of them."""

    tokenizer: Tokenizer
    train: TokenizedDataset
    evaluation: TokenizedDataset | None
    """None if no row was held out, or no label is left in those that were."""
    files: tuple[FileFacts, ...]
    findings: tuple[Finding, ...]
    """In the rows."""
    prompts: tuple[Prompt, ...]
    held_out: Counts | None = None
    """The effects of rendering on the held-out rows, even if no label is left in them."""
    left_out: tuple[LeftOut, ...] = ()
    """What lies beside the data and is not read."""

    def all_findings(self) -> tuple[Finding, ...]:
        """The findings in the rows and in rendering them."""
        return (*self.findings, *self._in_rendering())

    def losses(self) -> tuple[Finding, ...]:
        """The findings of what rows say and their text does not."""
        return tuple(finding for finding in self._in_rendering() if finding.code in LOSSES)

    def _in_rendering(self) -> tuple[Finding, ...]:
        held_out = self.held_out.findings(side="evaluation") if self.held_out else ()
        return (*self.train.counts.findings(side="training"), *held_out)


def validate_head(config: Config, inputs: Inputs) -> None:
    """Read the first rows before anything slow starts: most mistakes show in them.

    Raises the errors of reading, with the total of all invalid rows of a file.
    """
    files = _Files.of(config, inputs)
    complete = files.train.validate_head()
    if files.held_out and (complete or not config.columns):  # a column may appear in a later row
        files.held_out.validate_head()


def read(config: Config, inputs: Inputs) -> DatasetFacts:
    """Go through the files once: check, scan and split the rows. Needs no tokenizer."""
    files, scan = _Files.of(config, inputs), QualityScan(scope=_scope(config, inputs))
    for example in files.train:
        scan.add(example)
    for example in files.held_out or ():
        scan.add(example, held_out=True)
    return _facts(files, scan.result(), left_out=inputs.left_out, fraction=config.eval_fraction)


def judge(findings: Sequence[Finding], *, rows: int, quality: str) -> None:
    """Log a warning for each finding; under TUNE_QUALITY=fail, end the run if some are grave (`is_grave`).

    Raises DataError with all findings.
    """
    if quality == "off":
        return
    grave = [finding.code for finding in findings if is_grave(finding, rows)]
    if quality == "fail" and grave:
        listed = "\n".join(f"{one.code}: {one.message} First: {', '.join(one.first)}. {one.remedy}" for one in findings)
        raise DataError(
            f"TUNE_QUALITY=fail, and these findings in the data are grave: {', '.join(grave)}. All findings:\n{listed}",
            remedy="Correct the rows, or set TUNE_QUALITY=warn to train on them as they are.",
        )
    for finding in findings:
        log.warning("data_quality", **asdict(finding))


def render(config: Config, inputs: Inputs, facts: DatasetFacts, *, directory: Path) -> Data:
    """Token ids and labels on disk of files that were read before; logs `dataset_ready`."""
    files, renderers = _Files.of(config, inputs), _Renderers.of(config, _tokenizer(config, inputs))
    with Draft(directory) as draft:
        _render_rows(draft, renderers, files.train, files.held_out)
        datasets = _write(draft, renderers, facts, directory=directory, micro_batch=config.rows_in_pass)
    _log_ready(datasets, facts, renderers)
    return _data(datasets, facts, renderers, _prompts(renderers.train, files, facts.split, count=config.samples))


def prepare(config: Config, inputs: Inputs, *, directory: Path) -> Data:
    """Read, judge and render in one pass over the files; logs `dataset_ready`.

    The findings in the rows are judged once all are rendered and before any dataset is written, those in rendering them
    afterwards.
    """
    files, renderers = _Files.of(config, inputs), _Renderers.of(config, _tokenizer(config, inputs))
    scan = QualityScan(scope=_scope(config, inputs))
    with Draft(directory) as draft:
        held_out = _scanned(files.held_out, scan, held_out=True) if files.held_out else None
        _render_rows(draft, renderers, _scanned(files.train, scan), held_out)
        facts = _facts(files, scan.result(), left_out=inputs.left_out, fraction=config.eval_fraction)
        judge(facts.scan.findings, rows=facts.scan.rows, quality=config.quality)
        datasets = _write(draft, renderers, facts, directory=directory, micro_batch=config.rows_in_pass)
    data = _data(datasets, facts, renderers, _prompts(renderers.train, files, facts.split, count=config.samples))
    judge(data.losses(), rows=facts.scan.rows, quality=config.quality)
    _log_ready(datasets, facts, renderers)
    return data


@dataclass(frozen=True, kw_only=True)
class _Files:
    train: ExampleStream
    held_out: ExampleStream | None
    """Of the user's evaluation files."""

    @classmethod
    def of(cls, config: Config, inputs: Inputs) -> _Files:
        columns = parse_columns(config.columns)

        def stream(files: Iterable[File]) -> ExampleStream:
            sources = [Source(name=file.name, path=file.path) for file in files]
            return ExampleStream(sources, format=config.format, columns=columns)

        return cls(train=stream(inputs.dataset), held_out=stream(inputs.eval_dataset) if inputs.eval_dataset else None)


def _scope(config: Config, inputs: Inputs) -> Scope:
    """What to scan for. `off` never leaves out what the split depends on."""
    if config.quality != "off":
        return "everything"
    return "near_duplicates" if config.eval_fraction > 0 and not inputs.eval_dataset else "exact_duplicates"


def _scanned(examples: Iterable[Example], scan: QualityScan, *, held_out: bool = False) -> Iterator[Example]:
    for example in examples:
        scan.add(example, held_out=held_out)
        yield example


def _facts(files: _Files, scan: ScanResult, *, left_out: tuple[LeftOut, ...], fraction: float) -> DatasetFacts:
    if files.held_out:
        split = split_by_files(train_rows=scan.rows, held_out_rows=scan.held_out)
    else:
        split = split_by_content(scan.group_keys(), fraction=fraction)
    if split.note:
        log.warning("evaluation_disabled", reason=split.note)
    held_out = files.held_out.facts if files.held_out else ()
    return DatasetFacts(
        split=split,
        files=(*files.train.facts, *(replace(facts, held_out=True) for facts in held_out)),
        left_out=left_out,
        scan=scan,
    )


def _tokenizer(config: Config, inputs: Inputs) -> Tokenizer:
    tokenizer = load_tokenizer(
        inputs.model,
        name=config.model,
        chat_template=config.chat_template,
        template_text=inputs.template_text,
        date=inputs.date,
    )
    for note in tokenizer.notes:
        log.warning("tokenizer_note", note=note)
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class _Renderers:
    train: Renderer
    held_out: Renderer
    """Differs from the other only in its weights, with TUNE_ROLE_WEIGHTS."""

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> _Renderers:
        plain = Renderer(
            tokenizer=tokenizer, train_on=config.train_on, max_length=config.max_length, overlong=config.overlong
        )
        weights = role_weights.learned(config.role_weights)
        if not weights:
            return cls(train=plain, held_out=plain)
        return cls(
            train=replace(plain, weights=weights), held_out=replace(plain, weights=role_weights.held_out(weights))
        )


def _render_rows(
    draft: Draft, renderers: _Renderers, train: Iterable[Example], held_out: Iterable[Example] | None
) -> None:
    """All rows into the draft; without evaluation files each for both sides, since the split is not known yet.

    Raises DataError for rows that cannot be read or rendered.
    """
    if held_out is None:
        draft.add(train, renderers.train, renderers.held_out)
    else:
        draft.add(train, renderers.train)
        draft.add(held_out, renderers.held_out)
    draft.check()


@dataclass(frozen=True, kw_only=True)
class _Datasets:
    train: TokenizedDataset
    held_out: TokenizedDataset


def _write(draft: Draft, renderers: _Renderers, facts: DatasetFacts, *, directory: Path, micro_batch: int) -> _Datasets:
    """Both sides of the split."""
    evaluation_files = facts.scan.held_out > 0
    plans = (
        DatasetPlan(name="train", rows=facts.split.train, renderer=renderers.train),
        DatasetPlan(
            name="evaluation",
            rows=facts.split.held_out,
            renderer=renderers.held_out,
            may_be_empty=not evaluation_files,
        ),
    )
    train, held_out = write_datasets(draft, plans, directory=directory, micro_batch=micro_batch)
    if held_out.counts.rows and not held_out.counts.sequences:
        log.warning(
            "evaluation_disabled", reason=f"none of the {held_out.counts.rows:,} held-out rows has a label left"
        )
    return _Datasets(train=train, held_out=held_out)


def _log_ready(datasets: _Datasets, facts: DatasetFacts, renderers: _Renderers) -> None:
    train, held_out = datasets.train, datasets.held_out
    log.info(
        "dataset_ready",
        **asdict(train.counts),
        lengths=asdict(train.lengths),
        evaluation=asdict(held_out.counts),
        files=[asdict(file) for file in facts.files],
        left_out_files=[asdict(one) for one in facts.left_out],
        duplicates=facts.scan.duplicates,
        findings={finding.code: finding.count for finding in facts.scan.findings},
        eval_rows=held_out.counts.rows,
        eval_rows_shared=facts.scan.shared,
        eval_note=facts.split.note,
        chat_template=renderers.train.tokenizer.name,
    )


def _data(datasets: _Datasets, facts: DatasetFacts, renderers: _Renderers, prompts: tuple[Prompt, ...]) -> Data:
    held_out = datasets.held_out
    return Data(
        tokenizer=renderers.train.tokenizer,
        train=datasets.train,
        evaluation=held_out if held_out.counts.sequences else None,
        files=facts.files,
        findings=facts.scan.findings,
        prompts=prompts,
        held_out=held_out.counts if held_out.counts.rows else None,
        left_out=facts.left_out,
    )


def _prompts(renderer: Renderer, files: _Files, split: EvaluationSplit, *, count: int) -> tuple[Prompt, ...]:
    """The first prompts, of held-out rows if there are any, that leave room for an answer."""
    found: list[Prompt] = []
    for example in _prompt_rows(files, split):
        if len(found) == count:
            break
        with contextlib.suppress(RowError):
            prompt = renderer.prompt(example)
            if len(prompt.input_ids) < renderer.max_length:
                found.append(prompt)
    return tuple(found)


def _prompt_rows(files: _Files, split: EvaluationSplit) -> Iterable[Example]:
    if files.held_out:
        return files.held_out
    return compress(files.train, split.held_out) if any(split.held_out) else files.train
