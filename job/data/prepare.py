"""What is trained on: files -> examples -> splits -> token ids and labels on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path

import structlog

from job.config import role_weights
from job.config.schema import Config
from job.data.examples import Example, RowError
from job.data.findings import Finding
from job.data.quality.survey import Level, QualityScan, ScanResult
from job.data.quality.verdicts import is_grave
from job.data.reading import columns, dataset
from job.data.rendering.renderer import Prompt, Renderer
from job.data.tokenized.arrow import Part, Prepared, parts
from job.data.tokenized.counts import Counts
from job.data.tokenized.draft import Draft
from job.data.tokenizer import load as tokenizers
from job.data.tokenizer.load import Tokenizer
from job.inputs.pull import Inputs
from job.runtime.errors import DataError

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What was read."""

    split: dataset.Split
    files: tuple[dataset.FileFacts, ...]
    skipped: tuple[str, ...]
    surveyed: ScanResult
    """What was found in the rows, and how many repeat others."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on, and how it came to be."""

    tokenizer: Tokenizer
    train: Prepared
    evaluation: Prepared | None
    """None where no row was held out, or nothing is left of those that were."""
    files: tuple[dataset.FileFacts, ...]
    findings: tuple[Finding, ...]
    prompts: tuple[Prompt, ...]
    held_out: Counts | None = None
    """What rendering did to the rows that were held out, also where nothing is left of them."""
    skipped: tuple[str, ...] = ()
    """Files under a prefix that are no data, by their suffix."""


def validate_head(config: Config, pulled: Inputs) -> None:
    """Read a little, before anything that takes long is begun: most mistakes are in the first rows already.

    Raises what reading raises, with all invalid rows of a file in number.
    """
    files = _Files.of(config, pulled)
    complete = files.train.validate_head()
    if files.held_out and (complete or not config.columns):  # a column may be further on
        files.held_out.validate_head()


def read(config: Config, pulled: Inputs) -> Examples:
    """Go through the files once: examples, surveyed and split into training and evaluation. Needs no tokenizer."""
    files = _Files.of(config, pulled)
    survey = QualityScan(level=_level(config, pulled))
    for example in files.train:
        survey.add(example)
    for example in files.held_out or ():
        survey.add(example, held_out=True)
    return _examples(config, files, survey.result())


def render(config: Config, pulled: Inputs, examples: Examples, *, directory: Path) -> Data:
    """What was read to token ids and labels on disk; logs `dataset_ready`."""
    return _rendered(config, pulled, _Files.of(config, pulled), lambda: examples, directory=directory)


def prepare(config: Config, pulled: Inputs, *, directory: Path) -> Data:
    """Both at once, going through the files only once; in between, what was found is judged (see `judge`)."""
    files = _Files.of(config, pulled)
    survey = QualityScan(level=_level(config, pulled))

    def examples() -> Examples:
        found = _examples(config, files, survey.result())
        judge(config, found.surveyed.findings, rows=found.surveyed.rows)
        return found

    return _rendered(config, pulled, files, examples, directory=directory, survey=survey)


@dataclass(frozen=True, kw_only=True)
class _Files:
    train: dataset.ExampleStream
    held_out: dataset.ExampleStream | None
    """Of the user's own evaluation files."""

    @classmethod
    def of(cls, config: Config, pulled: Inputs) -> _Files:
        named = columns.parsed(config.columns)
        train, held_out = (
            dataset.read(
                [dataset.Source(name=file.name, path=file.path, named=file.named) for file in files],
                format=config.format,
                columns=named,
            )
            for files in (pulled.dataset, pulled.eval_dataset)
        )
        return cls(train=train, held_out=held_out if pulled.eval_dataset else None)


def _level(config: Config, pulled: Inputs) -> Level:
    """What `off` may leave out: never what decides who is on which side."""
    if config.quality != "off":
        return "all"
    return "alike" if config.eval_fraction > 0 and not pulled.eval_dataset else "exact"


def _examples(config: Config, files: _Files, surveyed: ScanResult) -> Examples:
    if files.held_out:
        split = dataset.given(rows=surveyed.rows, held_out=surveyed.held_out)
        found, skipped = (*files.train.facts, *files.held_out.facts), (*files.train.skipped, *files.held_out.skipped)
    else:
        split = dataset.split(surveyed.group_keys(), fraction=config.eval_fraction)
        found, skipped = files.train.facts, files.train.skipped
    if split.note:
        log.warning("evaluation_disabled", reason=split.note)
    return Examples(split=split, files=found, skipped=skipped, surveyed=surveyed)


def judge(config: Config, findings: Sequence[Finding], *, rows: int) -> None:
    """Let pass what was found in so many rows, with a warning each, or end the run where TUNE_QUALITY says so.

    Raises DataError under `fail`, naming all that was found, if some of it is grave
    (`job.data.quality.verdicts.is_grave`).
    """
    if config.quality == "off":
        return
    grave = [finding for finding in findings if is_grave(finding, rows)]
    if config.quality == "fail" and grave:
        raise _refused(findings, grave)
    for finding in findings:
        log.warning("data_quality", **asdict(finding))


def _refused(findings: Sequence[Finding], grave: Sequence[Finding]) -> DataError:
    listed = "\n".join(f"{one.code}: {one.message} First: {', '.join(one.first)}. {one.remedy}" for one in findings)
    names = ", ".join(finding.code for finding in grave)
    return DataError(
        f"TUNE_QUALITY=fail, and something grave is in the data ({names}):\n{listed}",
        remedy="Correct the rows, or set TUNE_QUALITY=warn to train on them as they are.",
    )


def _rendered(
    config: Config,
    pulled: Inputs,
    files: _Files,
    examples: Callable[[], Examples],
    *,
    directory: Path,
    survey: QualityScan | None = None,
) -> Data:
    """Args: examples: what was read, asked for when all was; survey: sees all rows, if it has not seen them before."""
    tokenizer = tokenizers.load(
        pulled.model, chat_template=config.chat_template, template_text=pulled.template_text, date=pulled.date
    )
    for note in tokenizer.notes:
        log.warning("tokenizer_note", note=note)
    renderer, held_out_renderer = _renderers(config, tokenizer)
    with Draft(directory) as draft:
        if files.held_out:
            draft.add(_passing(files.train, survey), renderer)
            draft.add(_passing(files.held_out, survey, held_out=True), held_out_renderer)
        else:
            draft.add(_passing(files.train, survey), renderer, held_out_renderer)
        draft.check()
        found = examples()
        split = found.split
        wanted = (
            Part(name="train", rows=split.train, renderer=renderer),
            Part(name="evaluation", rows=split.held_out, renderer=held_out_renderer, may_be_empty=not files.held_out),
        )
        train, held_out = parts(draft, wanted, directory=directory, micro_batch=config.rows_in_pass)
    surveyed = found.surveyed
    if held_out.counts.rows and not held_out.counts.sequences:
        log.warning(
            "evaluation_disabled", reason=f"nothing is left to learn of the {held_out.counts.rows:,} held-out rows"
        )
    log.info(
        "dataset_ready",
        **asdict(train.counts),
        lengths=asdict(train.lengths),
        evaluation=asdict(held_out.counts),
        files=[asdict(facts) for facts in found.files],
        skipped_files=list(found.skipped),
        duplicates=surveyed.duplicates,
        findings={finding.code: finding.count for finding in surveyed.findings},
        eval_rows=held_out.counts.rows,
        eval_rows_shared=surveyed.shared,
        eval_note=split.note,
        chat_template=tokenizer.name,
    )
    return Data(
        tokenizer=tokenizer,
        train=train,
        evaluation=held_out if held_out.counts.sequences else None,
        files=found.files,
        findings=surveyed.findings,
        prompts=_prompts(config, renderer, _shown(files, split)),
        held_out=held_out.counts if held_out.counts.rows else None,
        skipped=found.skipped,
    )


def _renderers(config: Config, tokenizer: Tokenizer) -> tuple[Renderer, Renderer]:
    """For training and for evaluation."""
    renderer = Renderer(
        tokenizer=tokenizer, train_on=config.train_on, max_length=config.max_length, overlong=config.overlong
    )
    weights = role_weights.learned(config.role_weights)
    if not weights:
        return renderer, renderer
    return replace(renderer, weights=weights), replace(renderer, weights=role_weights.held_out(weights))


def _passing(
    reading: dataset.ExampleStream, survey: QualityScan | None, *, held_out: bool = False
) -> Iterator[Example]:
    """The rows, once the survey has seen them; after an invalid one they are only read, for the error at the end."""
    for example in reading:
        if reading.invalid:
            continue
        if survey:
            survey.add(example, held_out=held_out)
        yield example


def _shown(files: _Files, split: dataset.Split) -> Iterable[Example]:
    """Rows for prompts: those held out, if there are any."""
    if files.held_out:
        return files.held_out
    return compress(files.train, split.held_out) if any(split.held_out) else files.train


def _prompts(config: Config, renderer: Renderer, examples: Iterable[Example]) -> tuple[Prompt, ...]:
    """The first prompts that leave room for an answer; rows that cannot be one are passed over."""
    found: list[Prompt] = []
    for example in examples:
        if len(found) == config.samples:
            break
        with contextlib.suppress(RowError):
            prompt = renderer.prompt(example)
            if len(prompt.input_ids) < config.max_length:
                found.append(prompt)
    return tuple(found)
