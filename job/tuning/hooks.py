"""What a run does at the events of its training loop: the seam between `job.stages.train` and the callbacks.

Plain functions and numbers; imports nothing, torch least of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run does at the events of its training loop."""

    note: Callable[[dict[str, Any]], None]
    """Keeps a line of the metrics."""
    ready: Callable[[], None]
    """The plan is in force, and the first step is about to begin."""
    first_step: Callable[[], None]
    """After the first step of this process."""
    evaluate: Callable[[int], Any] | None
    """Evaluates at a step; None where no rows were held out."""
    evaluated: Callable[[int], bool]
    """Whether the evaluation at a step was done already, before an interruption."""
    evaluate_every: int
    """Optimizer steps."""
    save: Callable[[int, Path, Callable[[], float]], None]
    """Takes over the files of a checkpoint: the step, where they are, and the seconds that training has waited."""
    save_every: int
    """Optimizer steps."""
    save_minutes: float
    """The longest time between checkpoints."""
    worth_saving: Callable[[float], bool]
    """When asked to stop: whether a checkpoint fits into what is left of the grace period, given how long the last one
    made training wait."""
    poll: Callable[[], None]
    """Every step; raises what ends the run."""
