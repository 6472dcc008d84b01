"""Sequences as they pass by -> the counts that the report shows. Knows outlines of sequences; nothing of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from job.data.examples import SHOWN
from job.data.rendering.labels import SequenceMeta
from job.data.tokenized.lengths import Gathering, percentile
from job.data.tokenized.provenance import Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted:
    """How many rows something happened to, and `file:line` of the first ten."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What rendering did. Tokens and lengths are those of the sequences trained on, as they are trained on."""

    rows: int
    """Valid rows read."""
    sequences: int
    """Sequences trained on."""
    tokens: int
    labelled_tokens: int
    weight_by_role: dict[str, float]
    """With TUNE_ROLE_WEIGHTS: what the labelled tokens of each role count in all; else empty."""
    length_p50: int
    length_p90: int
    length_max: int
    split: Noted
    """Rows that became one sequence per assistant turn, because the template rewrites earlier turns."""
    header_differs: Noted
    """Rows whose answers the template opens otherwise than its generation prompt."""
    tools_not_rendered: Noted
    """Rows with tools that the template does not print."""
    reasoning_not_rendered: Noted
    """Rows with reasoning that the template does not print where it would be learned."""
    truncated: Noted
    """Sequences, not rows, as in the next ones: a split row may lose some. Each is one of the next two."""
    lost_turns: Noted
    """Truncated behind the last answer that fits whole."""
    cut_inside: Noted
    """Truncated inside an answer, since none fits whole, or inside ready text: its end is not learned."""
    dropped_overlong: Noted
    fully_masked: Noted
    """Dropped because no label is left, usually since truncation cut the answer off."""


@dataclass(kw_only=True)
class _Places:
    """Counts rows or sequences and keeps the first ten places."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, sequence: SequenceMeta) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{sequence.source}:{sequence.line}")

    def noted(self) -> Noted:
        return Noted(count=self.count, first=tuple(self.first))


@dataclass(kw_only=True)
class Tally:
    """Counts while the sequences of one side pass by, row by row."""

    shares: Mapping[str, float] | None
    """What the tokens of each role count, with TUNE_ROLE_WEIGHTS."""
    rows: int = 0
    gathered: Gathering = field(default_factory=Gathering)
    weights: dict[str, float] = field(default_factory=dict)
    places: Provenance = field(default_factory=Provenance)
    split: _Places = field(default_factory=_Places)
    header_differs: _Places = field(default_factory=_Places)
    tools: _Places = field(default_factory=_Places)
    reasoning: _Places = field(default_factory=_Places)
    truncated: _Places = field(default_factory=_Places)
    shortened: _Places = field(default_factory=_Places)
    cut: _Places = field(default_factory=_Places)
    overlong: _Places = field(default_factory=_Places)
    masked: _Places = field(default_factory=_Places)

    def __post_init__(self) -> None:
        self.weights.update(dict.fromkeys(self.shares or (), 0.0))

    def add(self, sequence: SequenceMeta) -> None:
        """One more sequence, trained on or not."""
        if sequence.part == 0:
            self._add_row(sequence)
        self.gathered.add(sequence.length, sequence.learned)
        if sequence.outcome != "kept":
            getattr(self, sequence.outcome).add(sequence)
        if sequence.trained:
            self._add_trained(sequence)

    def _add_row(self, sequence: SequenceMeta) -> None:
        self.rows += 1
        if sequence.parts > 1:
            self.split.add(sequence)
        if sequence.header_differs:
            self.header_differs.add(sequence)
        for name in sequence.unshown:
            getattr(self, name).add(sequence)

    def _add_trained(self, sequence: SequenceMeta) -> None:
        self.places.add(sequence.source, sequence.line)
        if sequence.outcome != "kept":
            self.truncated.add(sequence)
        labelled = 0
        for start, stop, role in sequence.labelled():
            labelled += stop - start
            if self.shares:
                self.weights[role] += self.shares[role] * (stop - start)
        self.gathered.add_trained(sequence.keep, labelled)

    def counts(self) -> Counts:
        """All counts."""
        ordered = sorted(self.gathered.trained)
        return Counts(
            rows=self.rows,
            sequences=len(ordered),
            tokens=sum(ordered),
            labelled_tokens=self.gathered.labelled,
            weight_by_role={role: round(weight, 3) for role, weight in self.weights.items()},
            length_p50=percentile(ordered, 50),
            length_p90=percentile(ordered, 90),
            length_max=percentile(ordered, 100),
            split=self.split.noted(),
            header_differs=self.header_differs.noted(),
            tools_not_rendered=self.tools.noted(),
            reasoning_not_rendered=self.reasoning.noted(),
            truncated=self.truncated.noted(),
            lost_turns=self.shortened.noted(),
            cut_inside=self.cut.noted(),
            dropped_overlong=self.overlong.noted(),
            fully_masked=self.masked.noted(),
        )
