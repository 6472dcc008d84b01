"""The lengths of sequences, and what a maximum length would cut.

Knows token counts and the learned ranges of a sequence; nothing of templates, files or batches. Memory holds two
integers for each sequence.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from job.data.rendering.truncation import Tokens, truncate

THRESHOLDS = (512, 1024, 2048, 4096, 8192)
BINS = 40
LEAST_SUGGESTED = 256
MAY_BE_CUT = 0.01
"""Share of the sequences that the suggested TUNE_MAX_LENGTH may cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The effect of one TUNE_MAX_LENGTH on the sequences under TUNE_OVERLONG=truncate."""

    max_length: int
    longer: int
    """Sequences with more tokens."""
    cut: int
    """Of these, those that would end inside an answer."""
    masked: int
    """Of these, those that would be dropped, since no learned token is left."""
    tokens_lost: int
    labelled_tokens_lost: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """The sequences as they were before anything was truncated or dropped, in tokens; the last group, as trained."""

    sequences: int
    p50: int
    p90: int
    p99: int
    max: int
    mean: float
    tokens: int
    histogram: tuple[int, ...]
    """Sequences of 1 to `histogram_width` tokens, of the next range of this width, and so on: at most 40 bins."""
    histogram_width: int
    limits: tuple[Limit, ...]
    suggested_max_length: int
    """The least of 256, 512, 1024, ... that is too short for at most 1 % of the sequences. Memory grows with the
    longest sequence, so a few long sequences cost memory in every step; kernels are optimised for powers of two."""

    tokens_per_epoch: int
    """Trained on: after truncation, without dropped sequences and padding."""
    labelled_tokens_per_epoch: int
    """Of these, learned."""
    micro_batch: int
    padding_waste: float
    """Share of padding if batches of `micro_batch` in random order were padded to their longest (on a CPU they are);
    padding-free batches, as on a GPU, have none."""


@dataclass(kw_only=True, slots=True)
class _LimitCounter:
    """Counts the effect of one limit."""

    max_length: int
    longer: int = 0
    cut: int = 0
    masked: int = 0
    tokens_lost: int = 0
    labelled_tokens_lost: int = 0

    def add(self, length: int, learned: Sequence[Tokens]) -> None:
        found = truncate(learned, length, self.max_length)
        keep = 0 if found.outcome == "masked" else found.keep
        self.longer += 1
        self.cut += found.outcome == "cut"
        self.masked += found.outcome == "masked"
        self.tokens_lost += length - keep
        self.labelled_tokens_lost += sum(max(stop - max(start, keep), 0) for start, stop in learned)

    def limit(self) -> Limit:
        return Limit(**asdict(self))


@dataclass(kw_only=True)
class LengthStatistics:
    """Takes sequences one by one."""

    before: array[int] = field(default_factory=lambda: array("i"))
    trained: array[int] = field(default_factory=lambda: array("i"))
    labelled: int = 0
    limits: tuple[_LimitCounter, ...] = field(
        default_factory=lambda: tuple(_LimitCounter(max_length=one) for one in THRESHOLDS)
    )

    def add(self, length: int, learned: Sequence[Tokens]) -> None:
        """Add a sequence as it is before truncation."""
        self.before.append(length)
        for limit in self.limits:
            if length <= limit.max_length:
                break
            limit.add(length, learned)

    def add_trained(self, length: int, labelled: int) -> None:
        """Add a sequence that is trained on, as it is after truncation."""
        self.trained.append(length)
        self.labelled += labelled

    def summary(self, *, micro_batch: int) -> Lengths:
        """All numbers; the share of padding is for micro-batches of this many sequences."""
        ordered = sorted(self.before)
        width = max(-(-(ordered[-1] if ordered else 0) // BINS), 1)
        return Lengths(
            sequences=len(ordered),
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            max=percentile(ordered, 100),
            mean=round(sum(ordered) / max(len(ordered), 1), 1),
            tokens=sum(ordered),
            histogram=_histogram(ordered, width),
            histogram_width=width,
            limits=tuple(limit.limit() for limit in self.limits),
            suggested_max_length=_suggested(ordered),
            tokens_per_epoch=sum(self.trained),
            labelled_tokens_per_epoch=self.labelled,
            micro_batch=micro_batch,
            padding_waste=round(_padding(sorted(self.trained), micro_batch), 4),
        )


def percentile(ordered: Sequence[int], percent: int) -> int:
    """Nearest rank; 0 of nothing."""
    return ordered[max(-(-len(ordered) * percent // 100) - 1, 0)] if ordered else 0


def _histogram(ordered: Sequence[int], width: int) -> tuple[int, ...]:
    bins = [0] * (-(-ordered[-1] // width) if ordered else 0)
    for length in ordered:
        bins[max(length - 1, 0) // width] += 1
    return tuple(bins)


def _suggested(ordered: Sequence[int]) -> int:
    fits = ordered[len(ordered) - int(len(ordered) * MAY_BE_CUT) - 1] if ordered else 0
    suggested = LEAST_SUGGESTED
    while suggested < fits:
        suggested *= 2
    return suggested


def _padding(ordered: Sequence[int], size: int) -> float:
    """The expected share of padding in a full batch of `size` rows drawn at random.

    The longest of the batch is row k of n in order with probability C(k-1, size-1) / C(n, size).
    """
    count = len(ordered)
    size = min(size, count)
    if not sum(ordered):
        return 0.0
    chance, longest = size / count, 0.0
    for k in range(count, size - 1, -1):
        longest += chance * ordered[k - 1]
        chance *= (k - size) / max(k - 1, 1)
    return max(1 - sum(ordered) / count / longest, 0.0)
