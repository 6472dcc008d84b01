"""Rows -> findings: duplicates, leaks into the evaluation, answers that teach nothing, secrets, garbage.

One pass; about 350 bytes of hashes stay in memory for each row, and no text. The groups of near duplicates also serve
the split, which keeps each on one side. A finding names rows by file and line and never quotes them, so that no secret
is repeated.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from job.data.examples import SHOWN, Example, Turn, content_key
from job.data.findings import Finding, finding
from job.data.quality.garbage import garbage_kind, holds_media
from job.data.quality.near_duplicates import Signatures, groups, spaced
from job.observability.masking import holds_email, holds_secret

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Scope = Literal["everything", "near_duplicates", "exact_duplicates"]
"""What a scan looks for: findings of all kinds, only the groups that a split needs, or only rows that are equal."""

MAX_GROUP = 50
"""Different contents in a group of near duplicates. The rows of a larger group share a long text, e.g. instructions at
their start; to keep it on one side would empty the other side of a small split. The limit is a number and not a share,
so that no row outside the group has an effect on it."""
ONE_WORD_SHARE = 0.01
"""One-word answers are a finding from this share of the rows on."""
SHORT_ANSWERS = 5
"""Words. Up to this median, short answers are normal for the dataset (labels, for example), and not a finding."""
COUNTED_CHARACTERS = 1000
"""Characters of an answer whose words are counted: only whether it is short matters."""

EMPTY, REPEATS, ONE_WORD, SECRET, EMAIL, GARBAGE, MEDIA = (1 << bit for bit in range(7))


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """The result of one pass over all rows."""

    rows: int
    """Training rows, or all rows where the split is still to be made."""
    held_out: int
    """Rows of an evaluation file."""
    findings: tuple[Finding, ...]
    duplicates: int
    """Rows that repeat an earlier one exactly."""
    shared: int
    """Rows of an evaluation file that also occur in training, exactly or nearly."""
    leaders: NDArray[np.uint64]
    """For each of these rows, in order: the two halves of the smallest content key in its group."""

    def group_keys(self) -> Iterator[str]:
        """For each row, in order, the smallest content key of the rows that are nearly the same."""
        for high, low in self.leaders:
            yield f"{high:016x}{low:016x}"


@dataclass(kw_only=True)
class QualityScan:
    """Takes rows one by one and keeps hashes of them."""

    scope: Scope = "everything"
    held_out: int = 0
    """Rows of an evaluation file."""
    names: dict[str, int] = field(default_factory=dict)
    sources: array[int] = field(default_factory=lambda: array("I"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    keys: bytearray = field(default_factory=bytearray)
    signatures: Signatures = field(default_factory=Signatures)
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """Hashes of the conversation before the last answer; 0 for a row that asks nothing."""
    answers: array[int] = field(default_factory=lambda: array("Q"))
    words: array[int] = field(default_factory=lambda: array("I"))
    """Of the last answer."""
    flags: array[int] = field(default_factory=lambda: array("B"))
    garbage: dict[str, int] = field(default_factory=dict)
    """Rows by kind."""

    def add(self, example: Example, *, held_out: bool = False) -> None:
        """Add a row; rows of evaluation files (`held_out`) come last."""
        self.held_out += held_out
        self.sources.append(self.names.setdefault(example.source, len(self.names)))
        self.lines.append(example.line)
        self.keys += bytes.fromhex(content_key(example))
        if self.scope == "exact_duplicates":
            return
        contents = [_content(turn) for turn in example.turns]
        self.signatures.add(_compared(example, contents))
        if self.scope == "everything":
            self._examine(example, contents)

    def result(self) -> ScanResult:
        """The findings in all rows, and their groups."""
        return _result(self)

    def _examine(self, example: Example, contents: list[str]) -> None:
        trained = [at for at, turn in enumerate(example.turns) if turn.role == "assistant" and turn.trained]
        answer = contents[trained[-1]] if trained else ""
        self.prompts.append(_prompt(example, contents[: trained[-1]]) if trained else 0)
        self.answers.append(_hash(answer.strip().casefold()))
        self.words.append(len(spaced(answer[:COUNTED_CHARACTERS]).split()))
        flags = EMPTY * any(not contents[at].strip() for at in trained)
        flags |= ONE_WORD * (self.words[-1] == 1)
        flags |= REPEATS * any(at > 0 and _repeats(*example.turns[at - 1 : at + 1]) for at in trained)
        self.flags.append(flags | self._suspect(_all_text(example, contents)))

    def _suspect(self, text: str) -> int:
        kind = garbage_kind(text)
        if kind:
            self.garbage[kind] = self.garbage.get(kind, 0) + 1
        suspect = GARBAGE * bool(kind) | SECRET * holds_secret(text) | EMAIL * holds_email(text)
        return suspect | MEDIA * holds_media(text)

    def places(self, rows: Numbers) -> tuple[str, ...]:
        """`file:line` of the first ten."""
        names = list(self.names)
        return tuple(f"{names[self.sources[row]]}:{self.lines[row]}" for row in rows[:SHOWN])


def _hash(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")))


def _content(turn: Turn) -> str:
    calls = json.dumps(turn.tool_calls, ensure_ascii=False, default=str) if turn.tool_calls else ""
    return f"{turn.text}\n{calls}" if calls else turn.text


def _compared(example: Example, contents: list[str]) -> str:
    """The conversation without its system prompt, so that rows with the same system prompt are not alike for it."""
    if example.text is not None:
        return example.text
    turns = zip(example.turns, contents, strict=True)
    return "\n".join(text for turn, text in turns if turn.role not in {"system", "developer"})


def _all_text(example: Example, contents: list[str]) -> str:
    """Every text of the row."""
    if example.text is not None:
        return example.text
    return "\n".join([*contents, *(turn.reasoning_content for turn in example.turns if turn.reasoning_content)])


def _prompt(example: Example, contents: list[str]) -> int:
    """A hash of the turns before an answer, with their roles; 0 if nothing is asked."""
    before = list(zip(example.turns, contents, strict=False))
    if not any(turn.role == "user" and text.strip() for turn, text in before):
        return 0
    tools = json.dumps(example.tools, sort_keys=True, default=str) if example.tools else ""
    return _hash("\x1f".join([*(f"{turn.role}\x1f{text.strip()}" for turn, text in before), tools])) or 1


def _repeats(before: Turn, answer: Turn) -> bool:
    return before.role == "user" and before.text.strip() == answer.text.strip() != ""


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """Which rows are equal, or nearly so. Contents are numbered by key, so that the order of rows does not matter."""

    content: Numbers
    """For each row the number of its content."""
    group: Numbers
    """For each row the smallest number of its group's contents."""
    too_large: Flags
    """For each row whether its group was too large and was dissolved (`MAX_GROUP`)."""
    leaders: NDArray[np.uint64]
    """For each row its group's smallest key."""


def _groups(scan: QualityScan) -> _Groups:
    keys = np.frombuffer(bytes(scan.keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    content = np.empty(len(keys), dtype=np.int64)
    content[order] = np.cumsum(new) - 1
    distinct = order[new]
    own = np.arange(len(distinct))
    group = own if scan.scope == "exact_duplicates" else groups(scan.signatures.all()[distinct])
    sizes = np.bincount(group, minlength=len(distinct))
    too_large = sizes[group] > MAX_GROUP
    group = np.where(too_large, own, group)
    return _Groups(
        content=content, group=group[content], too_large=too_large[content], leaders=keys[distinct][group[content]]
    )


def _result(scan: QualityScan) -> ScanResult:
    grouped = _groups(scan)
    trained = len(scan.lines) - scan.held_out
    repeated = _repeats_earlier(grouped.content[:trained])
    near = ~repeated & _repeats_earlier(grouped.group[:trained])
    leaked = np.isin(grouped.group[trained:], grouped.group[:trained])
    findings: list[Finding] = []
    if scan.scope == "everything":
        findings = [
            *_found(scan, "exact_duplicates", repeated),
            *_found(scan, "near_duplicates", near),
            *_found(scan, "eval_leakage", np.concatenate((np.zeros(trained, dtype=bool), leaked)), total=len(leaked)),
            *_found(scan, "shared_text", grouped.too_large),
            *_of_answers(scan, trained),
            *_of_texts(scan),
        ]
    return ScanResult(
        rows=trained,
        held_out=scan.held_out,
        findings=tuple(findings),
        duplicates=int(repeated.sum()),
        shared=int(leaked.sum()),
        leaders=grouped.leaders[:trained],
    )


def _repeats_earlier(numbers: Numbers) -> Flags:
    """For each number whether it appeared before."""
    flags = np.ones(len(numbers), dtype=bool)
    flags[np.unique(numbers, return_index=True)[1]] = False
    return flags


def _of_answers(scan: QualityScan, trained: int) -> Iterator[Finding]:
    flags, words = np.array(scan.flags), np.array(scan.words)
    yield from _found(scan, "empty_answers", flags & EMPTY > 0)
    yield from _found(scan, "answers_repeat_prompts", flags & REPEATS > 0)
    yield from _found(scan, "conflicting_answers", _conflicting(scan, trained))
    one_word, usual = flags & ONE_WORD > 0, float(np.median(words)) if len(words) else 0
    if usual > SHORT_ANSWERS and one_word.sum() >= ONE_WORD_SHARE * len(words):
        yield from _found(scan, "one_word_answers", one_word, usual=f"{usual:.0f}")


def _conflicting(scan: QualityScan, trained: int) -> Flags:
    """Training rows whose prompt has another answer elsewhere."""
    prompts, answers = np.array(scan.prompts)[:trained], np.array(scan.answers)[:trained]
    pairs = np.unique(np.stack([prompts, answers]), axis=1)
    asked, ways = np.unique(pairs[0], return_counts=True)
    return np.isin(prompts, asked[(ways > 1) & (asked > 0)])


def _of_texts(scan: QualityScan) -> Iterator[Finding]:
    flags = np.array(scan.flags)
    kinds = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(scan.garbage.items()))
    yield from _found(scan, "garbage", flags & GARBAGE > 0, kinds=kinds)
    yield from _found(scan, "embedded_media", flags & MEDIA > 0)
    yield from _found(scan, "secrets", flags & SECRET > 0)
    yield from _found(scan, "email_addresses", flags & EMAIL > 0)


def _percent(share: float) -> str:
    """With two digits, or three for all."""
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{max(100 * share, 0.001):.2g}%"  # noqa: PLR2004 - two digits


def _found(scan: QualityScan, code: str, where: Flags, *, total: int = 0, **values: str) -> Iterator[Finding]:
    """The finding, if any row has it; `where` may end before the rows do, `total` is what the count is a part of."""
    count, total = int(where.sum()), total or len(where)
    if count:
        rows = f"{count:,} of {total:,} rows ({_percent(count / total)})"
        yield finding(code, count=count, first=scan.places(np.flatnonzero(where)), rows=rows, **values)
