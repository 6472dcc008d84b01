"""The story of one run: pull, read, render, load, look, train, look again, export, publish, record; the record last."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from job import base_model, dataset, env, inputs, logs
from job import tokenizer as tokenizers
from job.arrow import Prepared, prepare
from job.artifacts import Artifact, publish
from job.base_model import BaseModel
from job.card import Card
from job.checkpoints import Place, commit
from job.config import Config
from job.digests import hashes
from job.errors import ConfigError, JobError, Stop
from job.examples import Example, RowError
from job.inputs import Inputs
from job.record import Record, versions
from job.rendering import Prompt, Renderer
from job.storage.store import open_store
from job.tokenizer import Tokenizer

log = structlog.get_logger()
EVALUATIONS = 10  # over a run, where TUNE_EVAL_STEPS is auto
SHOWN_CHARACTERS = 2000  # of a sample in the log; the record has it whole


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
    prompts: tuple[Prompt, ...]


def run(config: Config) -> None:
    """Do everything that the configuration asks for. Returns when `done.json` exists.

    Raises:
        JobError: of the kind that says why it could not.
        Stop: SIGTERM or SIGINT; the attempt's end is recorded.
    """
    process = env.process()
    store = open_store(config.output, patience_seconds=config.storage_patience_minutes * 60)
    record = Record(store=store, run_id=config.identity())
    logs.bind(run_id=record.run_id, rank=process.rank)
    if process.world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE={process.world_size}, but this job trains on one GPU.", remedy="Start one process without it."
        )
    if already_complete(config, record):
        return
    expect_gpu = config.device == "cuda" or (config.device == "auto" and env.gpu_present())
    if expect_gpu and not env.gpu_present():
        raise no_gpu(config.device, "this machine shows no GPU device")
    logs.bind(attempt=record.claim_attempt(process))
    scratch = env.scratch()
    work = Path(tempfile.mkdtemp(prefix=f"{record.run_id}-", dir=scratch))
    try:
        _work(config, record, expect_gpu=expect_gpu, scratch=scratch, work=work)
    except Stop:
        _quietly(lambda: record.end_attempt({"outcome": "interrupted"}))
        raise
    except Exception as error:
        reason = error
        _quietly(lambda: record.fail(reason))
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def no_gpu(asked: str, why: str) -> ConfigError:
    """The error for a GPU that was expected and is not there: training on the CPU instead would take for ever."""
    return ConfigError(
        f"TUNE_DEVICE={asked}, but {why}.",
        remedy="Request a GPU for the container (--gpus all, or nvidia.com/gpu) and check its driver with nvidia-smi, "
        "or set TUNE_DEVICE=cpu to train on the CPU on purpose.",
    )


def already_complete(config: Config, record: Record) -> bool:
    """Whether this run was finished before, on the inputs that it would read now.

    Raises:
        ConfigError: it was finished, but with other settings, or the inputs changed since.
    """
    done = record.finished()
    if done is None:
        return False
    pinned = record.pinned(config) or {}
    record.check_inputs(pinned, inputs.listing(config, pinned=pinned))
    record.repair_latest(done)
    log.info("already_complete", uri=record.uri, artifacts=len(done["artifacts"]))
    return True


def _work(config: Config, record: Record, *, expect_gpu: bool, scratch: Path, work: Path) -> None:
    started = time.monotonic()
    log.info("run_started", uri=record.uri, config=config.as_variables(), versions=versions())

    pinned = record.pinned(config)
    pulled = inputs.pull(config, scratch=scratch, pinned=pinned)
    if pinned is not None:
        record.check_inputs(pinned, pulled.as_json())
    base = base_model.inspect(pulled.model, name=config.model)
    base_model.check_fits(base, precision=config.precision, max_length=config.max_length, export=config.export)
    examples = read(config, pulled)

    env.prepare_libraries(scratch, expect_gpu=expect_gpu, cpu_only=config.device == "cpu")
    try:
        from job.tuning.finetune import Finetune  # noqa: PLC0415 - seconds of imports, only after all cheap checks
    except NotImplementedError as error:  # how Unsloth says that it must not fall back to the CPU
        raise no_gpu(config.device, f"the training library finds none that it can use: {error}") from error

    data = render(config, pulled, examples, directory=work / "data")
    del examples  # from here on they are on disk
    finetune = Finetune.load(base, config, data, directory=work)

    record.pin(config, pulled.as_json())
    before = look(finetune, data, record, phase="before", step=0)
    place = Place(store=record.store, run_id=record.run_id, attempt=record.attempt)
    finetune.train(
        note=record.note,
        evaluate=lambda step: look_at_loss(finetune, data, record, step=step),
        evaluate_every=_evaluation_steps(
            config, finetune.plan.steps, data.evaluation.counts.sequences if data.evaluation else 0
        ),
        save=lambda step, directory, stall: _save(place, record, step, directory, stall),
    )
    after = look(finetune, data, record, phase="after", step=finetune.plan.steps)

    results = {"train_loss": finetune.final_loss, "eval_loss_before": before, "eval_loss": after}
    artifacts = export(config, finetune, data, record, pulled, base, results, directory=work / "export")
    record.finish(_done(config, finetune, results, artifacts))
    seconds = round(time.monotonic() - started, 1)
    record.end_attempt({"outcome": "complete", "exit_code": 0, "seconds": seconds})
    log.info(
        "run_complete",
        uri=record.uri,
        steps=finetune.plan.steps,
        seconds=seconds,
        **results,
        **finetune.memory_report(),
    )


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


def look(finetune: Any, data: Data, record: Record, *, phase: str, step: int) -> float | None:
    """Evaluate and answer the sample prompts; both go to the log and the record."""
    loss = look_at_loss(finetune, data, record, step=step)
    for index, (prompt, answer) in enumerate(zip(data.prompts, finetune.answer(data.prompts), strict=True)):
        entry = {"phase": phase, "index": index, "prompt": prompt.text, "reference": prompt.reference, "answer": answer}
        record.note({"event": "sample", **entry})
        log.info("sample", **{k: v[:SHOWN_CHARACTERS] if isinstance(v, str) else v for k, v in entry.items()})
    return loss


def look_at_loss(finetune: Any, data: Data, record: Record, *, step: int) -> float | None:
    """The loss on the held-out rows, if there are any; logs `evaluated`."""
    if data.evaluation is None:
        return None
    started = time.monotonic()
    found = finetune.evaluate(data.evaluation.dataset)
    entry = {"step": step, "eval_loss": found.loss, "eval_perplexity": found.perplexity, "eval_tokens": found.tokens}
    record.note({"event": "evaluated", **entry})
    log.info("evaluated", **entry, eval_seconds=round(time.monotonic() - started, 3))
    return float(found.loss)


def export(
    config: Config,
    finetune: Any,
    data: Data,
    record: Record,
    pulled: Inputs,
    base: BaseModel,
    results: dict[str, Any],
    *,
    directory: Path,
) -> list[Artifact]:
    """Publish the adapter, and only then, with the adapter safe, whatever else was asked for."""
    adapter = directory / "adapter"
    finetune.save_adapter(adapter, base=base)
    (adapter / "README.md").write_text(_card(config, finetune, data, pulled, base, results).text())
    published = publish(record.store, run_id=record.run_id, name="adapter", directory=adapter)
    if "merged_16bit" in config.export:
        merged = directory / "merged_16bit"
        finetune.merge(adapter, merged, base=base)
        published += publish(record.store, run_id=record.run_id, name="merged_16bit", directory=merged)
    return published


def _save(place: Place, record: Record, step: int, directory: Path, stall_seconds: float) -> None:
    commit(place, step=step, directory=directory, stall_seconds=stall_seconds)
    shutil.rmtree(directory)
    record.write_metrics()


def _card(config: Config, finetune: Any, data: Data, pulled: Inputs, base: BaseModel, results: dict[str, Any]) -> Card:
    weights = [file.path for file in pulled.model_files if file.path.suffix == ".safetensors"]
    return Card(
        base=base.name,
        base_revision=pulled.model_revision,
        base_hashes={path.name: digest for path, digest in hashes(weights).items()},
        data=[asdict(facts) for facts in data.files],
        settings=config.fingerprint_fields(),
        plan=asdict(finetune.plan),
        metrics={key: value for key, value in results.items() if value is not None},
        versions=versions(),
        template=data.tokenizer.name,
    )


def _done(config: Config, finetune: Any, results: dict[str, Any], artifacts: Sequence[Artifact]) -> dict[str, Any]:
    return {
        "steps": finetune.plan.steps,
        "plan": asdict(finetune.plan),
        "fingerprint": config.fingerprint_fields(),
        "results": results,
        "artifacts": [artifact.as_json() for artifact in artifacts],
    }


def _evaluation_steps(config: Config, steps: int, rows: int) -> int:
    """Steps between evaluations; `auto`: ten over the run, or fewer where they would cost over a tenth of it."""
    if config.eval_steps != "auto":
        return config.eval_steps
    # A row evaluated costs a third of a row trained: the forward pass without the backward.
    affordable = math.ceil(rows * EVALUATIONS / 3 / config.batch_size)
    return max(1, steps // EVALUATIONS, affordable)


def _sources(files: Sequence[inputs.File]) -> list[dataset.Source]:
    return [dataset.Source(name=file.name, path=file.path, named=file.named) for file in files]


def _quietly(write: Callable[[], None]) -> None:
    """Record the end of a failed attempt as well as can be: the failure itself must be what is reported."""
    try:
        write()
    except (JobError, OSError) as error:
        log.warning("record_incomplete", reason=str(error))
