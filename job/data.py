"""What is trained on: files -> examples -> splits -> token ids and labels on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from job import dataset, inputs
from job import tokenizer as tokenizers
from job.arrow import Prepared, prepare
from job.config import Config
from job.examples import Example, RowError
from job.findings import Finding
from job.inputs import Inputs
from job.rendering import Prompt, Renderer
from job.tokenizer import Tokenizer

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What was read."""

    split: dataset.Split
    files: tuple[dataset.FileFacts, ...]
    skipped: tuple[str, ...]


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
    """Files to examples, split into training and evaluation."""
    reading = dataset.read(_sources(pulled.dataset), format=config.format)
    if not pulled.eval_dataset:
        split = dataset.split(reading, fraction=config.eval_fraction)
        return Examples(split=split, files=reading.facts, skipped=reading.skipped)
    held_out = dataset.read(_sources(pulled.eval_dataset), format=config.format)
    split = dataset.given(reading, held_out)
    return Examples(split=split, files=(*reading.facts, *held_out.facts), skipped=(*reading.skipped, *held_out.skipped))


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
    train = prepare(split.train, renderer=renderer, directory=directory, name="train")
    held_out = prepare(split.evaluation, renderer=renderer, directory=directory, name="evaluation", may_be_empty=True)
    log.info(
        "dataset_ready",
        **asdict(train.counts),
        evaluation=asdict(held_out.counts),
        files=[asdict(facts) for facts in examples.files],
        skipped_files=list(examples.skipped),
        duplicates=split.duplicates,
        eval_rows=held_out.counts.rows,
        eval_rows_shared=split.shared,
        eval_note=split.note,
        chat_template=tokenizer.name,
    )
    return Data(
        tokenizer=tokenizer,
        train=train,
        evaluation=held_out if held_out.counts.sequences else None,
        files=examples.files,
        findings=(),
        prompts=_prompts(config, renderer, split.evaluation or split.train),
    )


def _prompts(config: Config, renderer: Renderer, examples: Sequence[Example]) -> tuple[Prompt, ...]:
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
