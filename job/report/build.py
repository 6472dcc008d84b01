"""A run's data, estimate and record -> its page: what is learned, what is expected, and what was measured so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from job.config.schema import Config
from job.data.prepare import Data
from job.data.tokenized.lengths import Lengths
from job.inputs.data_files import by_reason
from job.model.base_model import BaseModel
from job.model.memory import Estimate, TrainingSet, estimate
from job.report import charts
from job.report.page import Answer, Curve, LengthChart, LimitEffect, Page, shown_bytes
from job.report.token_view import sequence_views
from job.runtime.errors import ConfigError, JobError
from job.state.record import Record, versions
from job.storage.open import open_store

log = structlog.get_logger()
NAME = "report.html"
PATIENCE_SECONDS = 15.0
"""A run does not wait longer for the store to take its page."""
LOSSES = {"training": ("train_progress", "loss"), "held-out rows": ("evaluated", "eval_loss")}


def expect(config: Config, base: BaseModel, data: Data) -> Estimate:
    """What the run will need. Raises ConfigError if the warm-up is as long as the run."""
    counts = data.train.counts
    training_set = TrainingSet(
        sequences=counts.sequences,
        tokens=counts.tokens,
        labelled_tokens=counts.labelled_tokens,
        longest=counts.length_max,
    )
    return estimate(config, base, training_set)


def check_page(config: Config, data: Data | None, expected: Estimate | None, problems: Sequence[JobError]) -> Page:
    """The page of `python -m job check`, with all that is known."""
    return replace(_page(config, data, expected, state="check"), problems=tuple(map(_problem, problems)))


def run_page(
    config: Config, data: Data, expected: Estimate, record: Record, *, measured: Mapping[str, Any] | None
) -> Page:
    """The page of a run: complete once there are measurements, in progress without them."""
    return replace(
        _page(config, data, expected, state="in progress" if measured is None else "complete"),
        measured=_measured(measured or {}),
        curves=_curves(record),
        answers=_answers(record),
    )


def publish_early(config: Config, record: Record, base: BaseModel, data: Data) -> None:
    """Write the page of a run that is about to begin, under its attempt: `attempts/<n>.report.html`.

    An error is only logged: it must not end a good run.
    """
    with _only_logged():
        page = run_page(config, data, expect(config, base, data), record, measured=None)
        store = open_store(record.store.uri, patience_seconds=PATIENCE_SECONDS)
        store.write(f"{record.run_id}/attempts/{record.attempt:04d}.{NAME}", page.encoded())


def write(
    config: Config, record: Record, base: BaseModel, data: Data, *, directory: Path, measured: Mapping[str, Any]
) -> None:
    """Write the page of a run that is complete to a directory. An error is only logged."""
    with _only_logged():
        page = run_page(config, data, expect(config, base, data), record, measured=measured)
        (directory / NAME).write_bytes(page.encoded())


@contextlib.contextmanager
def _only_logged() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the page is for people: it must not end a good run
        log.warning("report_not_written", reason=f"{type(error).__name__}: {error}")


def length_chart(found: Lengths, *, max_length: int) -> LengthChart:
    """The lengths of sequences before any is cut, and the effect of each limit."""
    width = found.histogram_width
    bins = [charts.Bin(start=at * width + 1, end=(at + 1) * width + 1, count=n) for at, n in enumerate(found.histogram)]
    cuts = [
        LimitEffect(
            max_length=limit.max_length,
            sequences=limit.longer,
            share=limit.longer / found.sequences,
            tokens_lost=limit.tokens_lost / found.tokens,
        )
        for limit in found.limits
        if limit.longer
    ]
    return LengthChart(
        p50=found.p50,
        p90=found.p90,
        p99=found.p99,
        longest=found.max,
        limit=max_length,
        suggested=found.suggested_max_length,
        padding_waste=found.padding_waste,
        bins=tuple(bins),
        cuts=tuple(cuts),
    )


def _page(config: Config, data: Data | None, expected: Estimate | None, *, state: str) -> Page:
    """What the pages of a check and of a run have in common."""
    page = Page(
        title=f"Fine-tuning {config.model}, run {config.identity()}",
        state=state,
        summary=(),
        estimate=expected,
        settings=tuple((name, _text(value)) for name, value in config.as_variables().items()),
        versions=tuple(versions().items()),
    )
    if data is None:
        return page
    return replace(
        page,
        summary=_summary(data, expected),
        findings=data.all_findings(),
        sequences=sequence_views(data),
        lengths=length_chart(data.train.lengths, max_length=config.max_length),
        files=tuple(asdict(facts) for facts in data.files),
        left_out=by_reason(data.left_out),
    )


def _problem(error: JobError) -> str:
    """Message, single problems and remedy, each on a separate line."""
    single = error.problems if isinstance(error, ConfigError) else ()
    return "\n".join(part for part in (error.message, *single, error.remedy) if part)


def _summary(data: Data, expected: Estimate | None) -> tuple[tuple[str, str], ...]:
    counts = data.train.counts
    held_out = data.evaluation.counts.rows if data.evaluation else 0
    rows = [
        ("rows to train on", f"{counts.rows:,}"),
        ("held out", f"{held_out:,}"),
        ("sequences", f"{counts.sequences:,}"),
        ("tokens", f"{counts.tokens:,}"),
        ("of these, learned", f"{counts.labelled_tokens / max(counts.tokens, 1):.1%}"),
        ("chat template", data.tokenizer.name),
    ]
    if expected is not None:
        rows += [("optimizer steps", f"{expected.steps:,}"), ("epochs", f"{expected.epochs:.3g}")]
    return tuple(rows)


def _measured(facts: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Memory and losses that have a value; `gpu_memory_peak_bytes` becomes `gpu memory peak`."""
    found = []
    for name, value in facts.items():
        if value is not None and isinstance(value, int | float):
            text = shown_bytes(value) if name.endswith("_bytes") else f"{value:,.4g}"
            found.append((name.removesuffix("_bytes").replace("_", " "), text))
    return tuple(found)


def _curves(record: Record) -> tuple[Curve, ...]:
    """Losses by step, oldest first, without those that are NaN or infinite."""
    curves = []
    for name, (event, field) in LOSSES.items():
        points = [(float(entry["step"]), float(entry[field])) for entry in record.noted(event)]
        numbers = sorted(point for point in points if np.isfinite(point[1]))
        if numbers:
            curves.append(Curve(name=name, points=tuple(numbers)))
    return tuple(curves)


def _answers(record: Record) -> tuple[Answer, ...]:
    found: dict[int, dict[str, Any]] = {}
    for entry in record.noted("sample"):
        found.setdefault(entry["index"], {}).setdefault(entry["phase"], entry)
    return tuple(_answer(phases) for _, phases in sorted(found.items()))


def _answer(phases: Mapping[str, Mapping[str, Any]]) -> Answer:
    one = next(iter(phases.values()))
    said = {phase: entry["answer"] for phase, entry in phases.items()}
    return Answer(prompt=one["prompt"], reference=one["reference"], before=said.get("before"), after=said.get("after"))


def _text(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
