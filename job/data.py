"""What is trained on: files -> examples -> splits -> token ids and labels on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog

from job import columns, dataset, inputs, roles
from job import tokenizer as tokenizers
from job.arrow import Prepared, prepare
from job.config import Config
from job.errors import DataError
from job.examples import Example, RowError
from job.findings import Finding
from job.inputs import Inputs
from job.quality import Level, Surveyed, survey
from job.rendering import Prompt, Renderer
from job.tokenizer import Tokenizer
from job.verdicts import is_grave

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What was read."""

    split: dataset.Split
    files: tuple[dataset.FileFacts, ...]
    skipped: tuple[str, ...]
    surveyed: Surveyed
    """What was found in the rows, and how many repeat others."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on, and how it came to be."""

    tokenizer: Tokenizer
    train: Prepared
    evaluation: Prepared | None
    files: tuple[dataset.FileFacts, ...]
    findings: tuple[Finding, ...]
    prompts: tuple[Prompt, ...]


def read(config: Config, pulled: Inputs) -> Examples:
    """Files to examples, surveyed and split into training and evaluation.

    The files are gone through here once, and again for each side when it is rendered.
    """
    named = columns.parsed(config.columns)
    reading = dataset.read(_sources(pulled.dataset), format=config.format, columns=named)
    if not pulled.eval_dataset:
        surveyed = survey(reading, level=_level(config, splits=config.eval_fraction > 0))
        split = dataset.split(reading, surveyed.group_keys(), fraction=config.eval_fraction)
        if split.note:
            log.warning("evaluation_off", reason=split.note)
        return Examples(split=split, files=reading.facts, skipped=reading.skipped, surveyed=surveyed)
    held_out = dataset.read(_sources(pulled.eval_dataset), format=config.format, columns=named)
    surveyed = survey(reading, held_out, level=_level(config, splits=False))
    split = dataset.given(reading, held_out, rows=surveyed.rows, held_out=surveyed.held_out)
    files, skipped = (*reading.facts, *held_out.facts), (*reading.skipped, *held_out.skipped)
    return Examples(split=split, files=files, skipped=skipped, surveyed=surveyed)


def _level(config: Config, *, splits: bool) -> Level:
    """What `off` may leave out: never what decides who is on which side."""
    if config.quality != "off":
        return "all"
    return "alike" if splits else "exact"


def judge(config: Config, findings: Sequence[Finding], *, rows: int) -> None:
    """Let pass what was found in so many rows, with a warning each, or end the run where TUNE_QUALITY says so.

    Raises DataError under `fail`, naming all that was found, if some of it is grave (`job.verdicts.is_grave`).
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


def render(config: Config, pulled: Inputs, examples: Examples, *, directory: Path) -> Data:
    """Examples to token ids and labels on disk; logs `dataset_ready`."""
    split = examples.split
    tokenizer = tokenizers.load(
        pulled.model, chat_template=config.chat_template, template_text=pulled.template_text, date=pulled.date
    )
    for note in tokenizer.notes:
        log.warning("tokenizer_note", note=note)
    renderer = Renderer(
        tokenizer=tokenizer, train_on=config.train_on, max_length=config.max_length, overlong=config.overlong
    )
    held_out_renderer = renderer
    if weights := roles.learnt(config.role_weights):
        held_out_renderer = replace(renderer, weights=roles.held_out(weights))
        renderer = replace(renderer, weights=weights)
    train = prepare(split.train, renderer=renderer, directory=directory, name="train", micro_batch=config.rows_in_pass)
    held_out = prepare(
        split.evaluation, renderer=held_out_renderer, directory=directory, name="evaluation", may_be_empty=True
    )
    log.info(
        "dataset_ready",
        **asdict(train.counts),
        lengths=asdict(train.lengths),
        evaluation=asdict(held_out.counts),
        files=[asdict(facts) for facts in examples.files],
        skipped_files=list(examples.skipped),
        duplicates=examples.surveyed.duplicates,
        findings={finding.code: finding.count for finding in examples.surveyed.findings},
        eval_rows=held_out.counts.rows,
        eval_rows_shared=examples.surveyed.shared,
        eval_note=split.note,
        chat_template=tokenizer.name,
    )
    return Data(
        tokenizer=tokenizer,
        train=train,
        evaluation=held_out if held_out.counts.sequences else None,
        files=examples.files,
        findings=examples.surveyed.findings,
        prompts=_prompts(config, renderer, split.evaluation or split.train),
    )


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


def _sources(files: Sequence[inputs.File]) -> list[dataset.Source]:
    return [dataset.Source(name=file.name, path=file.path, named=file.named) for file in files]
