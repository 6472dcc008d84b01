"""A run's values -> its report: what was read and rendered, what is expected, and what has been measured so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import structlog

from job.config.schema import Config
from job.data.findings import Finding
from job.data.prepare import Data
from job.data.tokenized.counts import Counts, Noted
from job.model import shape
from job.model.base_model import BaseModel
from job.model.memory import Estimate, estimate
from job.model.schedule import schedule
from job.report import charts
from job.report.page import Answer, Curve, Lengths, LimitEffect, Report, shown_bytes
from job.report.token_view import samples
from job.runtime.errors import ConfigError, JobError
from job.state.record import Record, versions
from job.storage.open import open_store

log = structlog.get_logger()
NAME = "report.html"
PATIENCE_SECONDS = 15.0
"""A report is not worth waiting for."""
LOSSES = {"training": ("train_progress", "loss"), "held-out rows": ("evaluated", "eval_loss")}


def expect(config: Config, base: BaseModel, data: Data) -> Estimate:
    """What the run will take. Raises ConfigError if the warm-up is as long as the run."""
    counts = data.train.counts
    return estimate(
        config,
        schedule(config, examples=counts.sequences),
        shape.of(base),
        parameters=base.parameters,
        tokens=counts.tokens,
        labelled_tokens=counts.labelled_tokens,
        longest=counts.length_max,
    )


def rendering_findings(counts: Counts, *, of: str = "training") -> tuple[Finding, ...]:
    """What rendering did to the rows that their author may not expect."""
    said = {
        "lost_turns": (
            counts.lost_turns,
            f"{counts.lost_turns.count:,} {of} sequences are longer than TUNE_MAX_LENGTH and lose their last turns.",
            "Raise TUNE_MAX_LENGTH, or shorten the rows: what is cut off is not learned.",
        ),
        "cut_inside": (
            counts.cut_inside,
            f"{counts.cut_inside.count:,} {of} sequences are cut inside an answer, whose end is not learned.",
            "Raise TUNE_MAX_LENGTH, or set TUNE_OVERLONG=drop: a model learns not to end such answers.",
        ),
        "dropped_overlong": (
            counts.dropped_overlong,
            f"{counts.dropped_overlong.count:,} {of} sequences are longer than TUNE_MAX_LENGTH and are dropped.",
            "Raise TUNE_MAX_LENGTH, or shorten the rows.",
        ),
        "fully_masked": (
            counts.fully_masked,
            f"{counts.fully_masked.count:,} {of} sequences have nothing left to learn and are dropped.",
            "Raise TUNE_MAX_LENGTH so that answers fit behind their prompts; for short rows, check TUNE_ROLE_WEIGHTS.",
        ),
        "split_by_template": (
            counts.split,
            f"{counts.split.count:,} {of} rows become one sequence for each answer, since the template rewrites turns.",
            "Nothing needs to be done: each answer is learned as it is generated.",
        ),
        "header_differs": (
            counts.header_differs,
            f"{counts.header_differs.count:,} {of} rows have answers that do not begin as the generation prompt ends.",
            "Check with the samples that the model is asked as it was taught.",
        ),
        "tools_not_rendered": (
            counts.tools_not_rendered,
            f"{counts.tools_not_rendered.count:,} {of} rows have tools that the chat template does not print.",
            "The model does not see them: set TUNE_CHAT_TEMPLATE to a template for tools, such as `qwen-2.5`.",
        ),
        "reasoning_not_rendered": (
            counts.reasoning_not_rendered,
            f"{counts.reasoning_not_rendered.count:,} {of} rows have reasoning that the chat template does not print.",
            "To learn it, set TUNE_CHAT_TEMPLATE to a template for reasoning, such as `qwen-3`.",
        ),
    }
    return tuple(_finding(code, *parts) for code, parts in said.items() if parts[0].count)


def _finding(code: str, noted: Noted, message: str, remedy: str) -> Finding:
    return Finding(code=code, count=noted.count, first=noted.first, message=message, remedy=remedy)


def all_findings(data: Data) -> tuple[Finding, ...]:
    """What was found in the rows and in rendering them."""
    held_out = rendering_findings(data.held_out, of="evaluation") if data.held_out else ()
    return (*data.findings, *rendering_findings(data.train.counts), *held_out)


def lengths(data: Data, config: Config) -> Lengths:
    """How long the sequences are before any is cut, and what each limit would cut."""
    found = data.train.lengths
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
    return Lengths(
        p50=found.p50,
        p90=found.p90,
        p99=found.p99,
        longest=found.max,
        limit=config.max_length,
        suggested=found.suggested_max_length,
        padding_waste=found.padding_waste,
        bins=tuple(bins),
        cuts=tuple(cuts),
    )


def report(
    config: Config,
    *,
    state: str,
    data: Data | None = None,
    expected: Estimate | None = None,
    problems: Sequence[JobError] = (),
    record: Record | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Report:
    """The page's values, as far as they are known."""
    return Report(
        title=f"Fine-tuning {config.model}, run {config.identity()}",
        state=state,
        summary=_summary(data, expected),
        problems=tuple(map(_problem, problems)),
        findings=all_findings(data) if data else (),
        samples=samples(data) if data else (),
        lengths=lengths(data, config) if data else None,
        files=tuple(asdict(facts) for facts in data.files) if data else (),
        skipped=data.skipped if data else (),
        estimate=expected,
        measured=_measured(measured or {}),
        curves=_curves(record) if record else (),
        answers=_answers(record) if record else (),
        settings=tuple((name, _text(value)) for name, value in config.as_variables().items()),
        versions=tuple(versions().items()),
    )


def publish(
    config: Config,
    record: Record,
    base: BaseModel,
    data: Data,
    *,
    state: str,
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Write the page beside the run's other files. Nothing that goes wrong here may end a good run."""
    try:
        expected = expect(config, base, data)
        page = report(config, state=state, data=data, expected=expected, record=record, measured=measured)
        store = open_store(record.store.uri, patience_seconds=PATIENCE_SECONDS)
        store.write(f"{record.run_id}/{NAME}", page.encoded())
    except Exception as error:  # noqa: BLE001 - as the docstring says
        log.warning("report_not_written", reason=f"{type(error).__name__}: {error}")


def _problem(error: JobError) -> str:
    """Message, single problems and remedy, each on a line of its own."""
    single = error.problems if isinstance(error, ConfigError) else ()
    return "\n".join(part for part in (error.message, *single, error.remedy) if part)


def _summary(data: Data | None, expected: Estimate | None) -> tuple[tuple[str, str], ...]:
    if data is None:
        return ()
    counts = data.train.counts
    held_out = data.evaluation.counts.rows if data.evaluation else 0
    rows = [
        ("rows to train on", f"{counts.rows:,}"),
        ("held out", f"{held_out:,}"),
        ("sequences", f"{counts.sequences:,}"),
        ("tokens", f"{counts.tokens:,}"),
        ("of them learned", f"{counts.labelled_tokens / max(counts.tokens, 1):.1%}"),
        ("chat template", data.tokenizer.name),
    ]
    if expected is not None:
        rows += [("optimizer steps", f"{expected.steps:,}"), ("epochs", f"{expected.epochs:.3g}")]
    return tuple(rows)


def _measured(facts: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Memory and losses, those that have a value; `gpu_memory_peak_bytes` becomes `gpu memory peak`."""
    found = []
    for name, value in facts.items():
        if value is not None and isinstance(value, int | float):
            text = shown_bytes(value) if name.endswith("_bytes") else f"{value:,.4g}"
            found.append((name.removesuffix("_bytes").replace("_", " "), text))
    return tuple(found)


def _curves(record: Record) -> tuple[Curve, ...]:
    """Losses by step, oldest first; those that are no number are left out."""
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
