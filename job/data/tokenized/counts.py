"""Sequences, one by one -> the counts of log and report. Knows the metadata of sequences; nothing of token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from job.data.examples import SHOWN
from job.data.findings import Finding, finding
from job.data.rendering.labels import Outcome, SequenceMeta
from job.data.rendering.losses import NotRendered
from job.data.tokenized.lengths import LengthStatistics, percentile
from job.data.tokenized.provenance import Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class Affected:
    """How many rows or sequences something happened to, and `file:line` of the first ten."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The effects of rendering. Tokens and lengths are those of the sequences trained on, after truncation."""

    rows: int
    """Valid rows read."""
    sequences: int
    """Sequences trained on."""
    tokens: int
    labelled_tokens: int
    weight_by_role: dict[str, float]
    """With TUNE_ROLE_WEIGHTS: the total weight of each role's labelled tokens; else empty."""
    length_p50: int
    length_p90: int
    length_max: int
    split: Affected
    """Rows that became one sequence per assistant turn, because the template rewrites earlier turns."""
    header_differs: Affected
    """Rows whose answers the template opens differently from its generation prompt."""
    tools_not_rendered: Affected
    """Rows with tools that the template does not print."""
    reasoning_not_rendered: Affected
    """Rows with reasoning that the template does not print where it would be learned."""
    answers_not_learned: Affected
    """Rows with answers of which a part is not in the labels."""
    lost: dict[str, int]
    """These rows by what is missing; a row may have several kinds."""
    white_space_changed: Affected
    """Rows with answers that the template writes with other white space."""
    names_not_rendered: Affected
    """Rows with names of speakers that the template does not print."""
    earlier_answers_not_rendered: Affected
    """Rows with answers that the template leaves out of the conversation before a later one."""
    unknown_tokens: Affected
    """Sequences, not rows, with labels that are the tokenizer's token for unknown characters."""
    truncated: Affected
    """Sequences, not rows, as in the following fields: a split row may lose some. Each is one of the next two."""
    lost_turns: Affected
    """Truncated after the last answer that fits whole."""
    cut_inside: Affected
    """Truncated inside an answer, since none fits whole, or inside ready text: its end is not learned."""
    dropped_overlong: Affected
    fully_masked: Affected
    """Dropped because no label is left, usually since truncation cut the answer off."""

    def findings(self, *, side: str) -> tuple[Finding, ...]:
        """The effects that the author of the rows may not expect, `side` being "training" or "evaluation"."""
        effects = {
            "lost_turns": self.lost_turns,
            "cut_inside": self.cut_inside,
            "dropped_overlong": self.dropped_overlong,
            "fully_masked": self.fully_masked,
            "split_by_template": self.split,
            "header_differs": self.header_differs,
            "tools_not_rendered": self.tools_not_rendered,
            "reasoning_not_rendered": self.reasoning_not_rendered,
            "answers_not_learned": self.answers_not_learned,
            "white_space_changed": self.white_space_changed,
            "names_not_rendered": self.names_not_rendered,
            "earlier_answers_not_rendered": self.earlier_answers_not_rendered,
            "unknown_tokens": self.unknown_tokens,
        }
        kinds = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(self.lost.items()))
        return tuple(
            finding(code, count=one.count, first=one.first, numbers=f"{one.count:,} {side}", kinds=kinds)
            for code, one in effects.items()
            if one.count
        )


@dataclass(kw_only=True)
class _Counter:
    """Counts rows or sequences and remembers the first ten places."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, sequence: SequenceMeta) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{sequence.source}:{sequence.line}")

    def affected(self) -> Affected:
        return Affected(count=self.count, first=tuple(self.first))


@dataclass(kw_only=True)
class Tally:
    """Counts the sequences of one side, row by row."""

    role_weights: Mapping[str, float] | None
    """The weight of each role's tokens, with TUNE_ROLE_WEIGHTS."""
    rows: int = 0
    lengths: LengthStatistics = field(default_factory=LengthStatistics)
    weights: dict[str, float] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    outcomes: dict[Outcome, _Counter] = field(default_factory=lambda: {one: _Counter() for one in get_args(Outcome)})
    not_rendered: dict[NotRendered, _Counter] = field(
        default_factory=lambda: {one: _Counter() for one in get_args(NotRendered)}
    )
    split: _Counter = field(default_factory=_Counter)
    header_differs: _Counter = field(default_factory=_Counter)
    truncated: _Counter = field(default_factory=_Counter)
    incomplete: _Counter = field(default_factory=_Counter)
    """Rows with an answer that is not learned whole."""
    lost: Counter[str] = field(default_factory=Counter)
    unknown: _Counter = field(default_factory=_Counter)
    lost_in_row: set[str] = field(default_factory=set)
    """What the row so far has lost; its sequences follow each other."""

    def __post_init__(self) -> None:
        self.weights.update(dict.fromkeys(self.role_weights or (), 0.0))

    def add(self, sequence: SequenceMeta) -> None:
        """Add a sequence, trained on or not."""
        if sequence.part == 0:
            self._add_row(sequence)
        if sequence.lost:
            self._add_lost(sequence)
        self.lengths.add(sequence.length, sequence.learned)
        self.outcomes[sequence.outcome].add(sequence)
        if sequence.trained:
            self._add_trained(sequence)

    def add_unknown(self, sequence: SequenceMeta) -> None:
        """Count a sequence with unknown characters in its labels."""
        self.unknown.add(sequence)

    def _add_lost(self, sequence: SequenceMeta) -> None:
        if not self.lost_in_row:
            self.incomplete.add(sequence)
        self.lost.update(set(sequence.lost) - self.lost_in_row)
        self.lost_in_row.update(sequence.lost)

    def _add_row(self, sequence: SequenceMeta) -> None:
        self.rows += 1
        self.lost_in_row.clear()
        if sequence.parts > 1:
            self.split.add(sequence)
        if sequence.header_differs:
            self.header_differs.add(sequence)
        for name in sequence.not_rendered:
            self.not_rendered[name].add(sequence)

    def _add_trained(self, sequence: SequenceMeta) -> None:
        self.provenance.add(sequence.source, sequence.line)
        if sequence.outcome != "kept":
            self.truncated.add(sequence)
        labelled = 0
        for start, stop, role in sequence.labelled():
            labelled += stop - start
            if self.role_weights:
                self.weights[role] += self.role_weights[role] * (stop - start)
        self.lengths.add_trained(sequence.keep, labelled)

    def counts(self) -> Counts:
        """All counts."""
        ordered = sorted(self.lengths.trained)
        return Counts(
            rows=self.rows,
            sequences=len(ordered),
            tokens=sum(ordered),
            labelled_tokens=self.lengths.labelled,
            weight_by_role={role: round(weight, 3) for role, weight in self.weights.items()},
            length_p50=percentile(ordered, 50),
            length_p90=percentile(ordered, 90),
            length_max=percentile(ordered, 100),
            split=self.split.affected(),
            header_differs=self.header_differs.affected(),
            tools_not_rendered=self.not_rendered["tools"].affected(),
            reasoning_not_rendered=self.not_rendered["reasoning"].affected(),
            answers_not_learned=self.incomplete.affected(),
            lost=dict(self.lost),
            white_space_changed=self.not_rendered["white_space"].affected(),
            names_not_rendered=self.not_rendered["names"].affected(),
            earlier_answers_not_rendered=self.not_rendered["earlier_answers"].affected(),
            unknown_tokens=self.unknown.affected(),
            truncated=self.truncated.affected(),
            lost_turns=self.outcomes["shortened"].affected(),
            cut_inside=self.outcomes["cut"].affected(),
            dropped_overlong=self.outcomes["overlong"].affected(),
            fully_masked=self.outcomes["masked"].affected(),
        )
