"""What a person sees of the demo: the job's events as lines and a bar, and its answers as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

SHOWN_ROWS = 4
SHOWN_CHARACTERS = 220
PLAIN_STEPS = 10  # without a terminal, one line every few steps


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out e-mail and what the model made of it."""

    email: str
    reference: str
    before: str
    after: str


LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "run_started": lambda e: f"run started: {e['uri']}",
    "dataset_ready": lambda e: (
        f"dataset ready: {e['sequences']} conversations of {e['length_p50']} tokens (median),"
        f" {e['labelled_tokens']:,} of {e['tokens']:,} tokens to learn, {e['eval_rows']} e-mails held out"
    ),
    "model_loaded": lambda e: (
        f"model loaded in {e['precision']} on {e['device_name']}: {e['parameters'] / 1e6:.0f} M parameters frozen,"
        f" {e['trainable_parameters'] / 1e6:.1f} M in the adapter"
    ),
    "evaluated": lambda e: f"step {e['step']}: loss on the held-out e-mails {e['eval_loss']:.3f}",
    "checkpoint_committed": lambda e: (
        f"step {e['step']}: checkpoint committed to S3 ({e['bytes'] / 1e6:.0f} MB, training waited"
        f" {e['stall_seconds']:.1f} s)"
    ),
    "artifact_uploaded": lambda e: f"{e['name']} uploaded: {e['files']} files, {e['bytes'] / 1e6:.0f} MB",
    "run_complete": lambda e: f"run complete in {e['seconds']:.0f} s",
    "interrupted": lambda e: f"interrupted by {e['signal']}",
    "run_failed": lambda e: " ".join(str(e[name]) for name in ("message", "remedy", "problems") if e.get(name)),
}
WAITS = {
    "run_started": "downloading model and data from S3, importing the training libraries",
    "dataset_ready": "loading the model",
    "model_loaded": "measuring the loss before training",
    "evaluated": "answering held-out e-mails",
    "sample before": "training",
    "sample after": "publishing the adapter",
    "artifact_uploaded": "publishing the record",
}
"""What the job does after an event, until the next."""


class View:
    """What a person sees while the job runs: a line a phase and a bar; without a terminal, plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show one line of the job's log, if a person wants to see it."""
        name = event.get("event", "")
        if name == "train_progress":
            self._step(event)
        if name in LINES:
            style = "bold red" if name in {"run_failed", "interrupted"} else ""
            self._console.print(f"  {event.get('timestamp', '')[11:19]}  {escape(LINES[name](event))}", style=style)
        if wait := WAITS.get(f"{name} {event.get('phase', '')}".strip()):
            self._progress.update(self._task, description=wait)

    def _step(self, event: dict[str, Any]) -> None:
        step, steps = event["step"], event["max_steps"]
        text = f"step {step}/{steps}  loss {event['loss']:.3f}  about {event['eta_seconds']:.0f} s left"
        self._progress.update(self._task, description=text, completed=step, total=steps)
        if not self._console.is_terminal and (step == 1 or step % PLAIN_STEPS == 0):
            self._console.print(f"  {event['timestamp'][11:19]}  {text}")


def show_samples(console: Console, samples: list[Sample]) -> None:
    """The first few answers, before and after, marked right or wrong."""
    table = Table(title="Held-out e-mails, answered before and after training", show_lines=True, expand=True)
    for title in ("e-mail", "before", "after"):
        table.add_column(title, ratio=1, overflow="fold")
    for sample in samples[:SHOWN_ROWS]:
        before, after = (_marked(answer, sample.reference) for answer in (sample.before, sample.after))
        table.add_row(escape(_short(sample.email)), before, after)
    console.print()
    console.print(table, soft_wrap=False)


def _marked(answer: str, reference: str) -> str:
    mark = "[green]✓[/]" if answer == reference else "[red]✗[/]"
    return f"{mark} {escape(_short(answer))}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
