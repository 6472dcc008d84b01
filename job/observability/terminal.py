"""What a person at a terminal sees: one readable line an event, and a progress bar while training."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from structlog.typing import EventDict, WrappedLogger

HIDDEN = {"timestamp", "level", "event", "run_id", "attempt", "rank", "exception", "message", "remedy", "problems"}
STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red", "critical": "bold red"}
LONGEST_VALUE = 300


class Screen:
    """Renders events as lines above a progress bar that `train_progress` events move."""

    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._bar: Progress | None = None

    def render(self, _: WrappedLogger, __: str, event: EventDict) -> str:
        """The event as a line; empty for those that only move the bar."""
        if event["event"] == "train_progress":
            self._advance(event)
            return ""
        if event["event"] in {"run_complete", "run_failed", "interrupted"}:
            self._stop()
        head = f"{event['timestamp'][11:19]} {event['event'].replace('_', ' ')}"
        fields = "  ".join(f"{key}={_short(value)}" for key, value in event.items() if key not in HIDDEN)
        problems = (f"- {problem}" for problem in event.get("problems", ()))
        parts = (event.get("message"), event.get("exception"), *problems, event.get("remedy"))
        body = "\n".join(str(part) for part in parts if part)
        return f"[{event['level']}]{head}  {fields}" + (f"\n{body}" if body else "")

    def write(self, line: str) -> None:
        """Print a rendered line, above the bar where there is one."""
        if not line:
            return
        level, _, text = line.removeprefix("[").partition("]")
        self._console.print(Text(text.rstrip(), style=STYLES.get(level, "")))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _advance(self, event: EventDict) -> None:
        if self._bar is None:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._bar.add_task("", total=event["max_steps"])
            self._bar.start()
        loss = f"loss {event['loss']:.3f}" if "loss" in event else ""
        speed = f"{event['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in event else ""
        self._bar.update(self._bar.task_ids[0], completed=event["step"], description=f"{loss}  {speed}")

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
