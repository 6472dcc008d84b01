"""The page: its values, and how they become one HTML file that needs no network and no scripts.

Everything shown comes from untrusted data: all of it is escaped, invisible characters are made visible, and secrets and
e-mail addresses are masked. A policy inside the file forbids it to load or run anything. Knows nothing of runs, records
or datasets (`job.report.build`).
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
"""Steps between the tokens of the least weight and those of the greatest."""
WIDE, HIGH = 720, 220
"""Size of a chart, in its own units."""
LEFT, BELOW, RIGHT, ABOVE = 56, 26, 26, 12
_HIDDEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Controls, Unicode's default-ignorable characters (DerivedCoreProperties.txt), and the blank Braille pattern."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token as text."""

    text: str
    learned: bool
    special: bool
    weight: float | None = None
    """The weight of its loss, if it is learned and weights differ."""


@dataclass(frozen=True, kw_only=True)
class SequenceView:
    """A training sequence as the model will see it."""

    name: str
    """E.g. `The longest`."""
    place: str
    """The row that it comes from, as `file:line`."""
    tokens: tuple[Token, ...]
    """The tokens shown: the whole sequence, or its beginning and its end."""
    left_out: int
    """Tokens between beginning and end that are not shown."""
    left_out_after: int
    """The number of shown tokens before them."""
    count: int
    learned: int
    note: str = ""

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of its tokens, each once."""
        return tuple(sorted({token.weight for token in self.tokens if token.weight is not None}))


@dataclass(frozen=True, kw_only=True)
class LimitEffect:
    """The effect of a maximum length."""

    max_length: int
    sequences: int
    """Sequences that are longer."""
    share: float
    tokens_lost: float
    """Share of all tokens."""


@dataclass(frozen=True, kw_only=True)
class LengthChart:
    """Tokens per sequence."""

    p50: int
    p90: int
    p99: int
    longest: int
    limit: int
    """TUNE_MAX_LENGTH."""
    suggested: int
    """The least power of two that is too short for at most 1 % of the sequences."""
    padding_waste: float
    """Share of padding if micro-batches were padded."""
    bins: tuple[Bin, ...]
    cuts: tuple[LimitEffect, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt, the answer in the data, and the model's answers before and after training."""

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
class Page:
    """All values of the page; empty ones are not shown."""

    title: str
    state: str
    """`check`, `in progress` or `complete`."""
    summary: tuple[tuple[str, str], ...]
    """Names and values of the numbers at the top."""
    problems: tuple[str, ...] = ()
    """Why a run would fail."""
    findings: tuple[Finding, ...] = ()
    sequences: tuple[SequenceView, ...] = ()
    lengths: LengthChart | None = None
    files: tuple[Mapping[str, Any], ...] = ()
    """The name, format, rows, bytes, sha256 and side of each, and what nothing reads of it."""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The names of files that are not read, by reason."""
    estimate: Estimate | None = None
    measured: tuple[tuple[str, str], ...] = ()
    """Memory and time as measured."""
    curves: tuple[Curve, ...] = ()
    """Losses by step."""
    answers: tuple[Answer, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def unread(self) -> tuple[str, ...]:
        """The columns and keys that nothing reads, each with the number of its rows."""
        return tuple(f"{name} ({count:,})" for name, count in unread_names(self.files).items())

    @functools.cached_property
    def weights(self) -> tuple[float, ...]:
        """The weights of the tokens shown, in ascending order; empty if all weigh the same."""
        return tuple(sorted({weight for sequence in self.sequences for weight in sequence.weights}))

    def shade(self, weight: float | None) -> str:
        """The CSS class that marks a weight: `w1` to `w5`, by its share of the greatest weight."""
        if weight is None or not self.weights:
            return ""
        return f"w{max(math.ceil(round(SHADES * weight / self.weights[-1], 4)), 1)}"

    def html(self) -> str:
        """The whole page."""
        return _environment().get_template("report.html").render(page=self)

    def encoded(self) -> bytes:
        """The HTML as a file's content."""
        return self.html().encode(errors="replace")


def unread_names(files: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The columns and keys of messages that nothing reads, with the number of rows that have them, most first."""
    found: Counter[str] = Counter()
    for file in files:
        found.update(file.get("unread", {}))
    return dict(found.most_common())


def visible(text: str) -> str:
    """The text with a mark for each character that is invisible, or that changes how others are shown."""
    return _HIDDEN.sub(lambda found: _mark(found[0]), text).replace("\n", "↵\n").replace("\t", "→\t")


def _mark(character: str) -> str:
    number = ord(character)
    if number < 0x20:  # noqa: PLR2004 - control characters have pictures
        return chr(0x2400 + number)
    return f"⟨U+{number:04X}⟩"


def shown_bytes(number: float) -> str:
    """A size in GB, or MB for a small one."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"  # noqa: PLR2004 - a gigabyte


def _safe(value: Any) -> Any:
    """Applied to every value of the page before it is escaped."""
    if not isinstance(value, str) or hasattr(value, "__html__"):  # markup of the page itself is escaped already
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


def histogram(lengths: LengthChart) -> dict[str, Any]:
    """The geometry of the bars, ticks, and the line at the maximum length if that is within the chart."""
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
