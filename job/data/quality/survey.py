"""Rows -> findings: duplicates, leaks into the evaluation, answers that teach nothing, secrets, garbage.

One pass; for each row some 350 bytes of hashes stay in memory, no text. What is learned from the rows that are alike
also serves the split: rows of one group belong on one side. Nothing found is ever quoted: a finding tells rows by file
and line, and the secret itself stays where it is.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from job.data.examples import SHOWN, Example, Turn, content_key
from job.data.findings import Finding
from job.data.quality.garbage import garbage
from job.data.quality.near_duplicates import Signatures, groups, spaced
from job.data.quality.verdicts import WORDS
from job.observability.masking import holds_email, holds_secret

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Level = Literal["all", "alike", "exact"]

MOST_ALIKE = 50
"""A group of more contents is no group of near duplicates: its rows share a long text, as every row does that begins
with the same instructions. Holding it together would empty a side of a small split. It is no share of the rows, so that
no row that is unlike the group changes what becomes of it."""
NOTED_SHARE = 0.01
"""One-word answers are worth a word from this share of the rows on."""
SHORT_ANSWERS = 5
"""Words of the median answer up to which answers of one word are the dataset's way, as labels are."""

LONG_ENOUGH = 1000
"""Characters of an answer whose words are counted: all that is asked is whether it is short."""

EMPTY, REPEATS, ONE_WORD, SECRET, EMAIL, GARBAGE = (1 << bit for bit in range(6))


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """What one pass over all rows gave."""

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
    """For each of them, in order: the two halves of the smallest content key in its group."""

    def group_keys(self) -> Iterator[str]:
        """For each row, in order, the smallest content key of the rows that are nearly the same."""
        for high, low in self.leaders:
            yield f"{high:016x}{low:016x}"


def survey(examples: Iterable[Example], held_out: Iterable[Example] = (), *, level: Level = "all") -> ScanResult:
    """Look at all rows once: those to train on (or to split), then those of an evaluation file.

    `alike` looks for no more than the groups that a split needs, `exact` only for rows that are the same.
    """
    rows = QualityScan(level=level)
    for example in examples:
        rows.add(example)
    for example in held_out:
        rows.add(example, held_out=True)
    return rows.result()


@dataclass(kw_only=True)
class QualityScan:
    """What is kept of each row, while rows pass by."""

    level: Level
    held_out: int = 0
    """Rows of an evaluation file."""
    names: dict[str, int] = field(default_factory=dict)
    sources: array[int] = field(default_factory=lambda: array("I"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    keys: bytearray = field(default_factory=bytearray)
    signatures: Signatures = field(default_factory=Signatures)
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    """Hashes of what stands before the last answer; 0 for a row that asks nothing."""
    answers: array[int] = field(default_factory=lambda: array("Q"))
    words: array[int] = field(default_factory=lambda: array("I"))
    """Of the last answer."""
    flags: array[int] = field(default_factory=lambda: array("B"))
    garbage: dict[str, int] = field(default_factory=dict)
    """Rows by kind."""

    def add(self, example: Example, *, held_out: bool = False) -> None:
        """One more row; those of an evaluation file (`held_out`) come last."""
        self.held_out += held_out
        self.sources.append(self.names.setdefault(example.source, len(self.names)))
        self.lines.append(example.line)
        self.keys += bytes.fromhex(content_key(example))
        if self.level == "exact":
            return
        said = [_content(turn) for turn in example.turns]
        self.signatures.add(_compared(example, said))
        if self.level == "all":
            self._look(example, said)

    def result(self) -> ScanResult:
        """What was found in all rows."""
        return _surveyed(self, len(self.lines) - self.held_out)

    def _look(self, example: Example, said: list[str]) -> None:
        trained = [at for at, turn in enumerate(example.turns) if turn.role == "assistant" and turn.trained]
        answer = said[trained[-1]] if trained else ""
        self.prompts.append(_prompt(example, said[: trained[-1]]) if trained else 0)
        self.answers.append(_hash(answer.strip().casefold()))
        self.words.append(len(spaced(answer[:LONG_ENOUGH]).split()))
        flags = EMPTY * any(not said[at].strip() for at in trained)
        flags |= ONE_WORD * (self.words[-1] == 1)
        flags |= REPEATS * any(at > 0 and _repeats(*example.turns[at - 1 : at + 1]) for at in trained)
        self.flags.append(flags | self._suspect(_all(example, said)))

    def _suspect(self, text: str) -> int:
        kind = garbage(text)
        if kind:
            self.garbage[kind] = self.garbage.get(kind, 0) + 1
        return GARBAGE * bool(kind) | SECRET * holds_secret(text) | EMAIL * holds_email(text)

    def places(self, rows: Numbers) -> tuple[str, ...]:
        """`file:line` of the first ten."""
        names = list(self.names)
        return tuple(f"{names[self.sources[row]]}:{self.lines[row]}" for row in rows[:SHOWN])


def _hash(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")))


def _content(turn: Turn) -> str:
    calls = json.dumps(turn.tool_calls, ensure_ascii=False, default=str) if turn.tool_calls else ""
    return f"{turn.text}\n{calls}" if calls else turn.text


def _compared(example: Example, said: list[str]) -> str:
    """The conversation without its system prompt, so that a shared one makes no rows alike."""
    if example.text is not None:
        return example.text
    turns = zip(example.turns, said, strict=True)
    return "\n".join(text for turn, text in turns if turn.role not in {"system", "developer"})


def _all(example: Example, said: list[str]) -> str:
    """Every text of the row."""
    if example.text is not None:
        return example.text
    return "\n".join([*said, *(turn.reasoning_content for turn in example.turns if turn.reasoning_content)])


def _prompt(example: Example, said: list[str]) -> int:
    """A hash of what is said before an answer, and by whom; 0 if nothing is asked."""
    before = list(zip(example.turns, said, strict=False))
    if not any(turn.role == "user" and text.strip() for turn, text in before):
        return 0
    tools = json.dumps(example.tools, sort_keys=True, default=str) if example.tools else ""
    return _hash("\x1f".join([*(f"{turn.role}\x1f{text.strip()}" for turn, text in before), tools])) or 1


def _repeats(before: Turn, answer: Turn) -> bool:
    return before.role == "user" and before.text.strip() == answer.text.strip() != ""


@dataclass(frozen=True, kw_only=True)
class _Alike:
    """Which rows are the same, or nearly so. Contents are numbered by their key, so that no order of rows matters."""

    content: Numbers
    """For each row the number of its content."""
    group: Numbers
    """For each row the smallest number of its group's contents."""
    boilerplate: Flags
    """For each row whether it is alike with so many that they share a text."""
    leaders: NDArray[np.uint64]
    """For each row its group's smallest key."""


def _alike(rows: QualityScan) -> _Alike:
    keys = np.frombuffer(bytes(rows.keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    content = np.empty(len(keys), dtype=np.int64)
    content[order] = np.cumsum(new) - 1
    distinct = order[new]
    own = np.arange(len(distinct))
    group = own if rows.level == "exact" else groups(rows.signatures.all()[distinct])
    sizes = np.bincount(group, minlength=len(distinct))
    many = sizes[group] > MOST_ALIKE
    group = np.where(many, own, group)
    return _Alike(
        content=content, group=group[content], boilerplate=many[content], leaders=keys[distinct][group[content]]
    )


def _surveyed(rows: QualityScan, trained: int) -> ScanResult:
    alike = _alike(rows)
    repeated = _later(alike.content[:trained])
    near = ~repeated & _later(alike.group[:trained])
    leaked = np.isin(alike.group[trained:], alike.group[:trained])
    found = [
        *_found(rows, "exact_duplicates", repeated),
        *_found(rows, "near_duplicates", near),
        *_found(rows, "eval_leakage", np.concatenate((np.zeros(trained, dtype=bool), leaked)), total=len(leaked)),
    ]
    if rows.level == "all":
        found += [*_found(rows, "shared_text", alike.boilerplate), *_of_answers(rows, trained), *_of_texts(rows)]
    return ScanResult(
        rows=trained,
        held_out=len(rows.lines) - trained,
        findings=tuple(found) if rows.level == "all" else (),
        duplicates=int(repeated.sum()),
        shared=int(leaked.sum()),
        leaders=alike.leaders[:trained],
    )


def _later(numbers: Numbers) -> Flags:
    """Where a number stands that stood before."""
    flags = np.ones(len(numbers), dtype=bool)
    flags[np.unique(numbers, return_index=True)[1]] = False
    return flags


def _of_answers(rows: QualityScan, trained: int) -> Iterator[Finding]:
    flags, words = np.array(rows.flags), np.array(rows.words)
    yield from _found(rows, "empty_answers", flags & EMPTY > 0)
    yield from _found(rows, "answers_repeat_prompts", flags & REPEATS > 0)
    yield from _found(rows, "conflicting_answers", _conflicting(rows, trained))
    one_word, usual = flags & ONE_WORD > 0, float(np.median(words)) if len(words) else 0
    if usual > SHORT_ANSWERS and one_word.sum() >= NOTED_SHARE * len(words):
        yield from _found(rows, "one_word_answers", one_word, usual=f"{usual:.0f}")


def _conflicting(rows: QualityScan, trained: int) -> Flags:
    """Training rows whose prompt has another answer elsewhere."""
    prompts, answers = np.array(rows.prompts)[:trained], np.array(rows.answers)[:trained]
    pairs = np.unique(np.stack([prompts, answers]), axis=1)
    asked, ways = np.unique(pairs[0], return_counts=True)
    return np.isin(prompts, asked[(ways > 1) & (asked > 0)])


def _of_texts(rows: QualityScan) -> Iterator[Finding]:
    flags = np.array(rows.flags)
    kinds = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(rows.garbage.items()))
    yield from _found(rows, "garbage", flags & GARBAGE > 0, kinds=kinds)
    yield from _found(rows, "secrets", flags & SECRET > 0)
    yield from _found(rows, "email_addresses", flags & EMAIL > 0)


def _percent(share: float) -> str:
    """With two digits, or three for all."""
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{max(100 * share, 0.001):.2g}%"  # noqa: PLR2004 - two digits


def _found(rows: QualityScan, code: str, where: Flags, *, total: int = 0, **words: str) -> Iterator[Finding]:
    """The finding, if it is in any row; `where` may end before the rows do, `total` is what the count is a part of."""
    count, total = int(where.sum()), total or len(where)
    if count:
        message, remedy = WORDS[code]
        yield Finding(
            code=code,
            count=count,
            first=rows.places(np.flatnonzero(where)),
            message=message.format(rows=f"{count:,} of {total:,} rows ({_percent(count / total)})", **words),
            remedy=remedy,
        )
