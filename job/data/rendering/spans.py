"""A conversation and a template -> text and the character spans that are learned, by prefix rendering.

The text before an answer is what the template renders for the turns before it with its generation prompt, exactly as at
inference; the text up to an answer's end is what it renders for the turns including it. What lies between is the answer
as the template writes it, with its end marker; white space behind the marker is not learned, since generation stops at
the marker. No string is searched for, so markers inside a turn's content cannot move a span;
`job.data.rendering.fast_spans` is a short cut to the same.

Knows characters, nothing of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from job.data.examples import JsonObject, Turn
from job.data.rendering import fast_spans
from job.data.tokenizer.chat_template import ANSWER, QUESTION, SYSTEM, RefusedError, Template, left_out, printed
from job.observability.masking import shown

SAMPLES = (
    (QUESTION, ANSWER),
    (SYSTEM, QUESTION, ANSWER),
    (QUESTION, ANSWER, QUESTION, replace(ANSWER, content="Sure.\nOn two lines.")),
    (SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER, replace(QUESTION, content="And?"), ANSWER),
)
Unshown = Literal["tools", "reasoning"]
"""What a row has and its text does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int
    role: str = "assistant"
    """Whose turn it is, for weights."""
    turn: int = 0
    """Its number in the conversation, from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One training text and what is learned of it."""

    text: str
    spans: tuple[Span, ...]
    others: tuple[Span, ...] = ()
    """Turns of other roles that are learned too; see `job.data.rendering.role_spans`."""
    header_differs: bool = False
    """The template opens an answer otherwise than its generation prompt does (some reasoning models' templates)."""
    unshown: tuple[Unshown, ...] = ()
    """What of the row the template leaves out although nothing of it is refused for that; alike in a row's pieces."""

    def borders(self, marker: str) -> Iterator[int]:
        """Where no token may lie across: the start of each answer, and its end where it is this marker."""
        for span in self.spans:
            yield span.start
            if marker and self.text.endswith(marker, span.start, span.end):
                yield span.end


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    text: str
    """The conversation up to and including the answer."""
    span: Span
    header_differs: bool = False
    rewritten: bool = False
    """The turns before are rendered otherwise here than where they stand alone."""


def whole(template: Template, turns: Sequence[Turn], tools: Sequence[JsonObject]) -> tuple[Piece, ...]:
    """The conversation as one text, all of it learned. Raises RefusedError.

    Where it ends with an answer, the text before that is as at inference: some templates show the system turn or the
    tools only in a conversation that ends with a question.
    """
    text = template.closed(turns, add_generation_prompt=False, tools=tools)
    conversation = _Conversation(template=template, turns=turns, tools=tools)
    if turns[-1].role == "assistant" and (moved := conversation.moved(len(turns) - 1)):
        text = moved.text
    conversation.check_calls(len(turns))
    conversation.check_printed(len(turns), text)
    unshown = conversation.unshown([(len(turns) - 1, text)], text)
    return (Piece(text=text, spans=(Span(start=0, end=len(text)),), unshown=unshown),)


def answers(
    template: Template, turns: Sequence[Turn], tools: Sequence[JsonObject], *, only_last: bool
) -> tuple[Piece, ...]:
    """The conversation with its assistant turns (or the last of them) learned.

    One piece, or one for each answer if the template renders an earlier turn otherwise once another follows it: then
    each piece ends with its answer, as at inference. Turns behind the last answer are left out, since nothing is
    learned from them. Raises RefusedError if the template refuses the conversation or a part of it.
    """
    learned = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    learned = learned[-1:] if only_last else learned
    if not tools and frames(template) and (piece := _framed(template, turns[: learned[-1] + 1], learned)):
        return (piece,)
    return _by_prefixes(template, turns, tools, learned)


@functools.cache
def frames(template: Template) -> bool:
    """Whether `job.data.rendering.fast_spans` finds what prefix rendering finds, in short conversations of all
    shapes."""
    for turns in SAMPLES:
        learned = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        try:
            pieces = _by_prefixes(template, turns, (), learned)
        except RefusedError:
            continue
        if pieces != (_framed(template, turns, learned),):
            return False
    return True


def _framed(template: Template, turns: Sequence[Turn], learned: Sequence[int]) -> Piece | None:
    if (found := fast_spans.find(template, turns)) is None:
        return None
    text, places = found
    spans = tuple(Span(start=start, end=end, turn=index) for index, start, end in places if index in learned)
    _Conversation(template=template, turns=turns, tools=()).check_printed(len(turns) - 1, text)
    return Piece(text=text, spans=spans)


def _by_prefixes(
    template: Template, turns: Sequence[Turn], tools: Sequence[JsonObject], learned: Sequence[int]
) -> tuple[Piece, ...]:
    conversation = _Conversation(template=template, turns=turns, tools=tools)
    conversation.check_calls(learned[-1] + 1)
    found = [conversation.answer(index) for index in learned]
    conversation.check_printed(learned[-1], found[-1].text)
    said = [
        (index, answer.text[answer.span.start : answer.span.end]) for index, answer in zip(learned, found, strict=True)
    ]
    unshown = conversation.unshown(said, found[-1].text)
    if all(found[-1].text.startswith(answer.text) for answer in found[:-1]):
        return (_piece(found[-1].text, found, unshown),)
    for index, answer in zip(learned[:-1], found[:-1], strict=True):
        conversation.check_printed(index, answer.text)
    return tuple(_piece(answer.text, [answer], unshown) for answer in found)


def _piece(text: str, found: list[_Answer], unshown: tuple[Unshown, ...]) -> Piece:
    spans = tuple(answer.span for answer in found)
    header_differs = any(answer.header_differs for answer in found)
    return Piece(text=text, spans=spans, header_differs=header_differs, unshown=unshown)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Conversation:
    template: Template
    turns: Sequence[Turn]
    tools: Sequence[JsonObject]
    known: dict[int, _Answer] = field(default_factory=dict)
    """Answers that were found, by the number of their turn."""

    def _rendered(self, count: int, *, prompt: bool) -> str:
        return self.template.render(self.turns[:count], add_generation_prompt=prompt, tools=self.tools)

    def answer(self, index: int) -> _Answer:
        """The conversation up to and including turn `index`, and where that turn lies in it."""
        if index not in self.known:
            found = self._found(index, self._rendered(index + 1, prompt=False))
            self.known[index] = replace(found, span=replace(found.span, turn=index))
        return self.known[index]

    def check_calls(self, count: int) -> None:
        """Raises RefusedError if one of the first `count` turns calls a tool and the template leaves that out."""
        for index, turn in enumerate(self.turns[:count]):
            for call in turn.tool_calls:
                found, name = self.answer(index), str((call.get("function") or call).get("name"))
                if name not in found.text[found.span.start : found.span.end]:
                    raise RefusedError(f"it does not print the tool call `{shown(name)}` of turn {index + 1}")
            if len(turn.tool_calls) > 1 and self._ignores_last_call(index):
                raise RefusedError(f"it prints only some of the {len(turn.tool_calls)} tool calls of turn {index + 1}")

    def _ignores_last_call(self, index: int) -> bool:
        """Whether a turn looks the same without its last call: gpt-oss' template, for one, prints the first alone."""
        turn = self.turns[index]
        fewer = [*self.turns[:index], replace(turn, tool_calls=turn.tool_calls[:-1])]
        text = self.template.render(fewer, add_generation_prompt=False, tools=self.tools)
        return text == self._rendered(index + 1, prompt=False)

    def unshown(self, answers: Sequence[tuple[int, str]], text: str) -> tuple[Unshown, ...]:
        """What the row has and its text lacks: tools anywhere, reasoning where it would be learned.

        Args:
            answers: the number of each turn that is learned, and what the template makes of it.
            text: the whole conversation.
        """
        names = [str((tool.get("function") or tool).get("name")) for tool in self.tools]
        thoughts = [(self.turns[index].reasoning_content or "", answer) for index, answer in answers]
        found: list[Unshown] = []
        if names and not (self.template.shows_tools and all(printed(name, text) for name in names)):
            found.append("tools")
        if any(left_out(Turn(role="assistant", content=thought), answer) for thought, answer in thoughts):
            found.append("reasoning")
        return tuple(found)

    def check_printed(self, count: int, text: str) -> None:
        """Raises RefusedError if `text` lacks one of the first `count` turns that are no answers.

        What tools say counts only where an answer follows at once: some templates forget it once the user goes on.
        """
        asked = max((at for at, turn in enumerate(self.turns[:count]) if turn.role == "user"), default=-1)
        for index, turn in enumerate(self.turns[:count]):
            expected = turn.role != "assistant" and (turn.role != "tool" or index > asked)
            if expected and left_out(turn, text):
                raise RefusedError(f"it leaves out turn {index + 1}, of the role `{turn.role}`")

    def moved(self, index: int) -> _Answer | None:
        """The same if the turns before are rendered otherwise once this one follows, else None."""
        try:
            found = self.answer(index)
        except RefusedError:  # where the answer starts matters to nobody here
            return None
        return found if found.rewritten else None

    def _found(self, index: int, text: str) -> _Answer:
        try:
            before = self._rendered(index, prompt=True)
            if text.startswith(before) and (index or not self.template.generation_prompt):
                return self._at(text, len(before))
            if text.startswith(self._rendered(index, prompt=False)):
                return self._otherwise_opened(index, text, before)
            return self._moved(index, text, before)
        except RefusedError as refusal:
            return self._by_header(index, text, refusal)

    def _at(self, text: str, start: int) -> _Answer:
        return _Answer(text=text, span=Span(start=start, end=max(start, self._end(text))))

    def _end(self, text: str) -> int:
        """Behind the end marker; where a template has none, the white space is what ends the turn."""
        stripped = text.rstrip()
        marker = self.template.end_of_turn
        return len(stripped) if marker and stripped.endswith(marker) else len(text)

    def _otherwise_opened(self, index: int, text: str, before: str) -> _Answer:
        """The turns before are rendered alike, but the answer does not open with the generation prompt.

        Where both part is seen with a known answer: the answer itself may begin like the prompt's end.
        """
        shown = self._with_known_answer(index)
        start = _common_start(shown, before)
        if not index or not text.startswith(shown[:start]):  # without turns before, a template may print nothing at all
            raise RefusedError(f"it opens turn {index + 1} in a way of its own")
        return replace(self._at(text, start), header_differs=True)

    def _moved(self, index: int, text: str, before: str) -> _Answer:
        """The turns before are rendered otherwise once an answer follows: what is generated goes behind the prompt.

        Mistral's templates, for one, write the system turn only into a question that ends the conversation; gpt-oss'
        drops the thoughts before a call once an answer follows. Where the answer starts is seen by rendering a known
        one in its place: at its content, or at what the template puts between header and content (a channel, say).
        """
        shown = self._with_known_answer(index)
        known = shown[: shown.rindex(ANSWER.content)]
        ends = [*range(len(known.rstrip()), len(known) + 1), *self._behind_header(known)]
        start = max(ends, key=lambda end: len(_common_end(before, known[:end])))
        if not text.startswith(known[:start]) or not self._repeats_question(index, _common_end(before, known[:start])):
            raise RefusedError(f"it renders the turns before turn {index + 1} otherwise once that turn follows")
        return replace(self._at(before + text[start:], len(before)), rewritten=True)

    def _behind_header(self, known: str) -> tuple[int, ...]:
        """Where in a text that ends before an answer's content the last generation prompt ends, if it holds one."""
        prompt = self.template.generation_prompt
        return (known.rindex(prompt) + len(prompt),) if prompt and prompt in known else ()

    def _with_known_answer(self, index: int) -> str:
        shown = self.template.render([*self.turns[:index], ANSWER], add_generation_prompt=False, tools=self.tools)
        if ANSWER.content not in shown:
            raise RefusedError(f"it does not print turn {index + 1}")
        return shown

    def _repeats_question(self, index: int, common: str) -> bool:
        """Whether the turn before the answer lies wholly in what both renderings end with."""
        return bool(index) and bool(common.strip()) and self.turns[index - 1].text.strip() in common

    def _by_header(self, index: int, text: str, refusal: RefusedError) -> _Answer:
        """The turns before cannot be rendered alone (none, or only a system turn): the header is known from elsewhere.

        Only where the text ends exactly in header, content, end marker; otherwise the refusal stands.
        """
        turn, template, end = self.turns[index], self.template, self._end(text)
        if template.generation_prompt and not turn.tool_calls:
            for content in (turn.text, turn.text.strip()):
                tail = f"{content}{template.end_of_turn}"
                if text[:end].endswith(f"{template.generation_prompt}{tail}"):
                    return self._at(text, end - len(tail))
        raise refusal


def _common_end(one: str, other: str) -> str:
    """The longest text with which both end."""
    return one[len(one) - _common_start(one[::-1], other[::-1]) :]


def _common_start(one: str, other: str) -> int:
    """How many characters both have in common at their start."""
    differs = (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differs, min(len(one), len(other)))
