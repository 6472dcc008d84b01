"""Where a run's time goes: seconds by what was being done.

Parts may overlap, since downloads, imports and uploads run in parallel: their sum may exceed the run's time.
A part never exceeds it, because time that two threads spend on the same part counts once.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

Part = Literal[
    "import", "download", "tokenise", "load", "compile", "train", "checkpoint_stall", "evaluate", "export", "upload"
]
PARTS: tuple[Part, ...] = get_args(Part)


class Timeline:
    """The seconds of one attempt, part by part. Any thread may measure."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._inside: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._began: dict[Part, float] = {}
        self._created = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the attempt began."""
        return time.monotonic() - self._created

    @contextlib.contextmanager
    def span(self, part: Part) -> Iterator[None]:
        """Measure the block as time of a part, also where it raises; inside another span of the same part, and in
        parallel to one, it adds nothing to what that one measures."""
        with self._lock:
            self._inside[part] += 1
            if self._inside[part] == 1:
                self._began[part] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._inside[part] -= 1
                if not self._inside[part]:
                    self._seconds[part] += time.monotonic() - self._began[part]

    def add(self, part: Part, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        with self._lock:
            self._seconds[part] += seconds

    def seconds(self) -> dict[str, float]:
        """All parts, in seconds; a span that has not ended does not count yet."""
        with self._lock:
            return {part: round(seconds, 3) for part, seconds in self._seconds.items()}


def compile_seconds(step_seconds: Sequence[float]) -> float:
    """What the first step took more than the steps after it: compiling, and warming of caches.

    Args:
        step_seconds: of an attempt's steps, in order; 0 is returned for fewer than two.
    """
    if len(step_seconds) < 2:  # noqa: PLR2004 - the first, and one to compare with
        return 0.0
    return max(0.0, step_seconds[0] - statistics.median(step_seconds[1:]))
