"""What a run learns from and how it went -> one HTML file that needs nothing else: no network, no scripts.

Everything shown is data of others: all of it is escaped, what cannot be seen is made visible, and secrets and e-mail
addresses are masked. A policy inside the file forbids it to load or run anything.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from job.data.findings import Finding
from job.model.memory import Estimate
from job.observability import logs
from job.observability.masking import masked
from job.report import charts
from job.report.charts import Bin

SHADES = 5
"""Steps between a token that counts little and one that counts most."""
WIDE, HIGH = 720, 220
"""Of a chart, in its own units."""
LEFT, BELOW, RIGHT, ABOVE = 56, 26, 26, 12
_HIDDEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Controls, what Unicode calls default ignorable (DerivedCoreProperties.txt), and the blank Braille pattern."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token as a reader sees it."""

    text: str
    learned: bool
    special: bool
    weight: float | None = None
    """What its loss counts, where tokens do not all count the same and it is learned."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sequence as the model will see it."""

    name: str
    """Which it is, e.g. `the longest`."""
    place: str
    """The row that it comes from, as `file:line`."""
    tokens: tuple[Token, ...]
    """Those that are shown: the whole sequence, or its beginning and its end."""
    left_out: int
    """Tokens between the two that are not shown."""
    left_out_after: int
    """After how many shown tokens they stand."""
    count: int
    learned: int
    note: str = ""

    @property
    def weights(self) -> tuple[float, ...]:
        """What its tokens count, each weight once."""
        return tuple(sorted({token.weight for token in self.tokens if token.weight is not None}))


@dataclass(frozen=True, kw_only=True)
class LimitEffect:
    """What a maximum length would cut."""

    max_length: int
    sequences: int
    """Longer than it."""
    share: float
    tokens_lost: float
    """Share of all tokens."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens per sequence."""

    p50: int
    p90: int
    p99: int
    longest: int
    limit: int
    """TUNE_MAX_LENGTH."""
    suggested: int
    """The least length that is too short for at most 1 % of the sequences."""
    padding_waste: float
    """Share of padding if passes were padded."""
    bins: tuple[Bin, ...]
    cuts: tuple[LimitEffect, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt, what the data answers, and what the model answered before and after training."""

    prompt: str
    reference: str
    before: str | None
    after: str | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page shows; what is empty is left out."""

    title: str
    state: str
    """`check`, `in progress` or `complete`."""
    summary: tuple[tuple[str, str], ...]
    """The numbers at the top: what, and how much."""
    problems: tuple[str, ...] = ()
    """Why a run would be refused."""
    findings: tuple[Finding, ...] = ()
    samples: tuple[Sample, ...] = ()
    lengths: Lengths | None = None
    files: tuple[Mapping[str, Any], ...] = ()
    """name, format, rows, bytes and sha256 of each."""
    skipped: tuple[str, ...] = ()
    estimate: Estimate | None = None
    measured: tuple[tuple[str, str], ...] = ()
    """Memory and time as measured."""
    curves: tuple[Curve, ...] = ()
    """Losses by step."""
    answers: tuple[Answer, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def weights(self) -> tuple[float, ...]:
        """What tokens of the samples count, from the least on; empty where all count the same."""
        return tuple(sorted({weight for sample in self.samples for weight in sample.weights}))

    def shade(self, weight: float | None) -> str:
        """How strongly a token that counts so much is marked: a class from `w1` to `w5`, by its share of the most."""
        if weight is None or not self.weights:
            return ""
        return f"w{max(math.ceil(round(SHADES * weight / self.weights[-1], 4)), 1)}"

    def html(self) -> str:
        """The whole page."""
        return _environment().get_template("report.html").render(report=self)

    def encoded(self) -> bytes:
        """The page as a file's content."""
        return self.html().encode(errors="replace")


def visible(text: str) -> str:
    """The text with a mark for each character that shows nothing, or that changes how others are shown."""
    return _HIDDEN.sub(lambda found: _mark(found[0]), text).replace("\n", "↵\n").replace("\t", "→\t")


def _mark(character: str) -> str:
    number = ord(character)
    if number < 0x20:  # noqa: PLR2004 - the control characters, which have pictures of their own
        return chr(0x2400 + number)
    return f"⟨U+{number:04X}⟩"


def shown_bytes(number: float) -> str:
    """A size in GB, or MB for a small one."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"  # noqa: PLR2004 - a gigabyte


def _safe(value: Any) -> Any:
    """What every value passes on its way into the page, before it is escaped."""
    if not isinstance(value, str) or hasattr(value, "__html__"):  # the second is the page's own, escaped already
        return value
    return _HIDDEN.sub(lambda found: _mark(found[0]), masked(logs.redact(value)))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files("job.report").joinpath(name).read_text()),
        autoescape=True,
        finalize=_safe,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": shown_bytes, "visible": visible, "percent": lambda share: f"{share:.1%}"}
    environment.globals |= {"histogram": histogram, "lines": lines}
    return environment


def histogram(lengths: Lengths) -> dict[str, Any]:
    """The geometry of the bars, ticks, and the line at the maximum length where it is in sight."""
    across = max(lengths.bins[-1].end, lengths.limit if lengths.limit <= 1.25 * lengths.bins[-1].end else 0)
    x = charts.Axis(low=0, high=across, ticks=charts.axis([across], from_zero=True).ticks)
    y = charts.axis([one.count for one in lengths.bins], from_zero=True)
    bars = [
        {
            "x": _across(x, one.start),
            "y": _up(y, one.count),
            "width": max(_across(x, one.end) - _across(x, one.start) - 1, 0.5),
            "height": HIGH - BELOW - _up(y, one.count),
            "title": f"{one.start:,} to {one.end - 1:,} tokens: {one.count:,}",
        }
        for one in lengths.bins
    ]
    limit = _across(x, lengths.limit) if lengths.limit <= across else None
    return {**_frame(x, y), "bars": bars, "limit": limit}


def lines(curves: Sequence[Curve]) -> dict[str, Any]:
    """The geometry of curves over the steps."""
    every = [point for curve in curves for point in curve.points]
    x = charts.axis([step for step, _ in every], from_zero=True)
    y = charts.axis([loss for _, loss in every])
    drawn = []
    for curve in curves:
        points = [(_across(x, step), _up(y, loss)) for step, loss in charts.thinned(curve.points)]
        path = " ".join(f"{at:.1f},{up:.1f}" for at, up in points)
        drawn.append({"name": curve.name, "path": path, "points": points if len(points) <= 60 else []})  # noqa: PLR2004 - dots that do not touch
    return {**_frame(x, y), "curves": drawn}


def _frame(x: charts.Axis, y: charts.Axis) -> dict[str, Any]:
    return {
        "wide": WIDE,
        "high": HIGH,
        "left": LEFT,
        "right": WIDE - RIGHT,
        "bottom": HIGH - BELOW,
        "x_ticks": [
            (_across(x, tick), f"{tick:,.4g}" if tick < 1 else f"{tick:,.0f}") for tick in x.ticks if tick <= x.high
        ],
        "y_ticks": [(_up(y, tick), f"{tick:,.4g}" if abs(tick) < 1000 else f"{tick:,.0f}") for tick in y.ticks],  # noqa: PLR2004 - where digits get groups
    }


def _across(x: charts.Axis, value: float) -> float:
    return round(LEFT + x.share(value) * (WIDE - LEFT - RIGHT), 1)


def _up(y: charts.Axis, value: float) -> float:
    return round(HIGH - BELOW - y.share(value) * (HIGH - BELOW - ABOVE), 1)
