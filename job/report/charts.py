"""Numbers -> the geometry of a chart: bins, ticks, points of a line. Knows nothing of SVG, HTML or what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

POINTS = 400
TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Bin:
    """How many values lie in [start, end)."""

    start: int
    end: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of values that begins and ends at a tick."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """The position of a value, 0 at the low end and 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


def nice(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (and their tenths) that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def axis(values: Sequence[float], *, from_zero: bool = False) -> Axis:
    """Round ends and about five ticks around the values."""
    low, high = (0.0 if from_zero else min(values)), max(values)
    step = nice(max((high - low) / TICKS, abs(high) / 1000, 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return Axis(low=first * step, high=last * step, ticks=tuple(step * at for at in range(first, last + 1)))


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about four hundred points: neighbours are averaged."""
    every = math.ceil(len(points) / POINTS)
    parts = [points[at : at + every] for at in range(0, len(points), every)] if every else []
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
