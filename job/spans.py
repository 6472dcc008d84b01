"""A conversation and a template -> text and the character spans that are learnt, by prefix rendering.

The text before an answer is what the template renders for the turns before it with its generation prompt, exactly as
at inference; the text up to an answer's end is what it renders for the turns including it. What lies between is the
answer as the template writes it, with its end marker; white space behind the marker is not learnt, since generation
stops at the marker. No string is searched for, so markers inside a turn's content cannot move a span.

Knows characters, nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from job.examples import JsonObject, Turn
from job.template import RefusedError, Template


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int
    role: str = "assistant"
    """Whose turn it is, for weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One training text and what is learnt of it."""

    text: str
    spans: tuple[Span, ...]
    others: tuple[Span, ...] = ()
    """Turns of other roles that are learnt too; see `job.weights`."""
    header_differs: bool = False
    """The template opens an answer otherwise than its generation prompt does (some reasoning models' templates)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    span: Span
    header_differs: bool


def whole(template: Template, turns: Sequence[Turn], tools: Sequence[JsonObject]) -> tuple[Piece, ...]:
    """The conversation as one text, all of it learnt. Raises RefusedError."""
    text = template.render(turns, add_generation_prompt=False, tools=tools)
    return (Piece(text=text, spans=(Span(start=0, end=len(text)),)),)


def answers(
    template: Template, turns: Sequence[Turn], tools: Sequence[JsonObject], *, only_last: bool
) -> tuple[Piece, ...]:
    """The conversation with its assistant turns (or the last of them) learnt.

    One piece, or one for each answer if the template renders an earlier turn otherwise once another follows it: then
    each piece ends with its answer, as at inference. Turns behind the last answer are left out, since nothing is
    learnt from them. Raises RefusedError if the template refuses the conversation or a part of it.
    """
    learnt = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    learnt = learnt[-1:] if only_last else learnt
    conversation = _Conversation(template=template, turns=turns, tools=tools)
    upto = [conversation.upto(index) for index in learnt]
    found = [conversation.answer(index, text) for index, text in zip(learnt, upto, strict=True)]
    if all(upto[-1].startswith(text) for text in upto[:-1]):
        return (_piece(upto[-1], found),)
    return tuple(_piece(text, [answer]) for text, answer in zip(upto, found, strict=True))


def _piece(text: str, found: list[_Answer]) -> Piece:
    spans = tuple(answer.span for answer in found)
    return Piece(text=text, spans=spans, header_differs=any(answer.header_differs for answer in found))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Conversation:
    template: Template
    turns: Sequence[Turn]
    tools: Sequence[JsonObject]

    def upto(self, index: int) -> str:
        """The turns up to and including `index`."""
        return self._rendered(index + 1, prompt=False)

    def _rendered(self, count: int, *, prompt: bool) -> str:
        return self.template.render(self.turns[:count], add_generation_prompt=prompt, tools=self.tools)

    def answer(self, index: int, text: str) -> _Answer:
        """Where turn `index` lies in `text`, which ends with it."""
        end = self._end(text)
        try:
            before = self._rendered(index, prompt=True)
        except RefusedError as refusal:
            return self._by_header(index, text, end, refusal)
        if text.startswith(before):
            return _Answer(span=Span(start=len(before), end=end), header_differs=False)
        try:
            return self._diverging(index, text, end, before)
        except RefusedError as refusal:
            return self._by_header(index, text, end, refusal)

    def _end(self, text: str) -> int:
        """Behind the end marker; where a template has none, the white space is what ends the turn."""
        stripped = text.rstrip()
        marker = self.template.end_of_turn
        return len(stripped) if marker and stripped.endswith(marker) else len(text)

    def _diverging(self, index: int, text: str, end: int, before: str) -> _Answer:
        """The turns before are rendered alike, but the answer does not open with the generation prompt."""
        if not text.startswith(self._rendered(index, prompt=False)):
            raise RefusedError(f"it renders the turns before turn {index + 1} otherwise once that turn follows")
        start = next(at for at, (one, other) in enumerate(zip(text, before, strict=False)) if one != other)
        return _Answer(span=Span(start=start, end=end), header_differs=True)

    def _by_header(self, index: int, text: str, end: int, refusal: RefusedError) -> _Answer:
        """The turns before cannot be rendered alone (none, or only a system turn): the header is known from elsewhere.

        Only where the text ends exactly in header, content, end marker; otherwise the refusal stands.
        """
        turn, template = self.turns[index], self.template
        if template.generation_prompt and not turn.tool_calls:
            for content in (turn.text, turn.text.strip()):
                tail = f"{content}{template.end_of_turn}"
                if text[:end].endswith(f"{template.generation_prompt}{tail}"):
                    return _Answer(span=Span(start=end - len(tail), end=end), header_differs=False)
        raise refusal
