"""A conversation and a template -> text and the character spans that are learned, by prefix rendering.

The text before an answer is the template's rendering of the turns before it with the generation prompt, exactly as at
inference; the text up to an answer's end is its rendering of the turns including it. Between the two is the answer as
the template writes it, with its end marker; white space after the marker is not learned, since generation stops at the
marker. No string is searched for, so markers inside a turn's content cannot move a span.
`job.data.rendering.fast_spans` is a faster way to the same spans.

Knows characters, nothing of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from job.data.examples import JsonObject, Turn
from job.data.rendering import fast_spans
from job.data.rendering.losses import LearnedAnswer, Losses, check_printed, find_losses
from job.data.tokenizer.chat_template import ANSWER, QUESTION, SYSTEM, RefusedError, Template
from job.observability.masking import shown

SAMPLES = (
    (QUESTION, ANSWER),
    (SYSTEM, QUESTION, ANSWER),
    (QUESTION, ANSWER, QUESTION, replace(ANSWER, content="Sure.\nOn two lines.")),
    (SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER, replace(QUESTION, content="And?"), ANSWER),
)
NOTHING_LOST = Losses()


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int
    role: str = "assistant"
    """The role of the turn, for weights."""
    turn: int = 0
    """The turn's number in the conversation, from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One training text and its learned spans."""

    text: str
    spans: tuple[Span, ...]
    others: tuple[Span, ...] = ()
    """Learned turns of other roles; see `job.data.rendering.role_spans`."""
    header_differs: bool = False
    """The template opens an answer differently from its generation prompt (some reasoning models' templates)."""
    losses: Losses = NOTHING_LOST
    """What the template leaves out, which is not an error; the same in all pieces of a row."""

    def borders(self, marker: str) -> Iterator[int]:
        """The characters that no token may cross: the start of each answer, and its end if it ends with this marker."""
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
    """The turns before are rendered differently here than alone."""


def whole_conversation(template: Template, turns: Sequence[Turn], tools: Sequence[JsonObject]) -> tuple[Piece, ...]:
    """The conversation as one text, all of it learned. Raises RefusedError.

    If it ends with an answer, the text before that is as at inference: some templates show the system turn or the tools
    only in a conversation that ends with a question.
    """
    text = template.render_closed(turns, add_generation_prompt=False, tools=tools)
    conversation = _Conversation(template=template, turns=turns, tools=tools)
    if turns[-1].role == "assistant" and (rewritten := conversation.rewritten_answer(len(turns) - 1)):
        text = rewritten.text
    conversation.check_calls(len(turns))
    check_printed(turns, text)
    answers = [LearnedAnswer(turn=turn, text=text) for turn in turns if turn.role == "assistant"]
    losses = find_losses(template, turns, tools, answers=answers, text=text)
    return (Piece(text=text, spans=(Span(start=0, end=len(text)),), losses=losses),)


def answer_pieces(
    template: Template, turns: Sequence[Turn], tools: Sequence[JsonObject], *, only_last: bool
) -> tuple[Piece, ...]:
    """The conversation with its assistant turns (or only the last) learned.

    One piece, or one for each answer if the template rewrites earlier turns once another follows: then each piece ends
    with its answer, as at inference. Turns after the last answer are left out, since nothing is learned from them.
    Raises RefusedError if the template refuses the conversation or a part of it.
    """
    learned = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    learned = learned[-1:] if only_last else learned
    if (
        not tools
        and is_fast_path_safe(template)
        and (piece := _by_markers(template, turns[: learned[-1] + 1], learned))
    ):
        return (piece,)
    return _by_prefixes(template, turns, tools, learned)


@functools.cache
def is_fast_path_safe(template: Template) -> bool:
    """Whether `job.data.rendering.fast_spans` agrees with prefix rendering, in short conversations of all shapes."""
    for turns in SAMPLES:
        learned = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        try:
            pieces = _by_prefixes(template, turns, (), learned)
        except RefusedError:
            continue
        if pieces != (_by_markers(template, turns, learned),):
            return False
    return True


def _by_markers(template: Template, turns: Sequence[Turn], learned: Sequence[int]) -> Piece | None:
    if (found := fast_spans.find(template, turns)) is None:
        return None
    text, places = found
    spans = tuple(Span(start=start, end=end, turn=index) for index, start, end in places if index in learned)
    check_printed(turns[:-1], text)
    return Piece(text=text, spans=spans)


def _by_prefixes(
    template: Template, turns: Sequence[Turn], tools: Sequence[JsonObject], learned: Sequence[int]
) -> tuple[Piece, ...]:
    conversation = _Conversation(template=template, turns=turns, tools=tools)
    conversation.check_calls(learned[-1] + 1)
    found = [conversation.answer(index) for index in learned]
    check_printed(turns[: learned[-1]], found[-1].text)
    losses = conversation.losses(found)
    if all(found[-1].text.startswith(answer.text) for answer in found[:-1]):
        return (_piece(found[-1].text, found, losses),)
    for index, answer in zip(learned[:-1], found[:-1], strict=True):
        check_printed(turns[:index], answer.text)
    return tuple(_piece(answer.text, [answer], losses) for answer in found)


def _piece(text: str, found: list[_Answer], losses: Losses) -> Piece:
    spans = tuple(answer.span for answer in found)
    header_differs = any(answer.header_differs for answer in found)
    return Piece(text=text, spans=spans, header_differs=header_differs, losses=losses)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Conversation:
    template: Template
    turns: Sequence[Turn]
    tools: Sequence[JsonObject]
    known: dict[int, _Answer] = field(default_factory=dict)
    """The answers found so far, by the number of their turn."""

    def _rendered(self, count: int, *, prompt: bool) -> str:
        return self.template.render(self.turns[:count], add_generation_prompt=prompt, tools=self.tools)

    def answer(self, index: int) -> _Answer:
        """The conversation up to and including turn `index`, and the span of that turn."""
        if index not in self.known:
            found = self._found(index, self._rendered(index + 1, prompt=False))
            self.known[index] = replace(found, span=replace(found.span, turn=index))
        return self.known[index]

    def check_calls(self, count: int) -> None:
        """Raise RefusedError if the template leaves out a tool call of one of the first `count` turns."""
        for index, turn in enumerate(self.turns[:count]):
            for call in turn.tool_calls:
                found, function = self.answer(index), call.get("function") or call
                name, arguments = str(function.get("name")), function.get("arguments")
                said = found.text[found.span.start : found.span.end]
                if name not in said:
                    raise RefusedError(f"it does not print the tool call `{shown(name)}` of turn {index + 1}")
                if arguments and isinstance(arguments, dict) and repr(arguments) in said:
                    raise RefusedError(f"it prints the arguments of `{shown(name)}`, turn {index + 1}, as Python does")
            if len(turn.tool_calls) > 1 and self._ignores_last_call(index):
                raise RefusedError(f"it prints only some of the {len(turn.tool_calls)} tool calls of turn {index + 1}")

    def _ignores_last_call(self, index: int) -> bool:
        """Whether a turn is rendered the same without its last call: gpt-oss' template, e.g., prints only the first."""
        turn = self.turns[index]
        fewer = [*self.turns[:index], replace(turn, tool_calls=turn.tool_calls[:-1])]
        text = self.template.render(fewer, add_generation_prompt=False, tools=self.tools)
        return text == self._rendered(index + 1, prompt=False)

    def losses(self, found: Sequence[_Answer]) -> Losses:
        """What the text of these answers, and of the turns before them, lacks."""
        opening, last = self.template.generation_prompt, found[-1]
        answers = [
            LearnedAnswer(turn=self.turns[one.span.turn], text=opening + one.text[one.span.start : one.span.end])
            for one in found
        ]
        turns = self.turns[: last.span.turn + 1]
        return find_losses(self.template, turns, self.tools, answers=answers, text=last.text)

    def rewritten_answer(self, index: int) -> _Answer | None:
        """The answer if the turns before it are rendered differently once it follows, else None."""
        try:
            found = self.answer(index)
        except RefusedError:  # the start of the answer does not matter here
            return None
        return found if found.rewritten else None

    def _found(self, index: int, text: str) -> _Answer:
        try:
            before = self._rendered(index, prompt=True)
            if text.startswith(before) and (index or not self.template.generation_prompt):
                return self._at(text, len(before))
            if text.startswith(self._rendered(index, prompt=False)):
                return self._with_other_header(index, text, before)
            return self._after_rewritten_turns(index, text, before)
        except RefusedError as refusal:
            return self._by_header(index, text, refusal)

    def _at(self, text: str, start: int) -> _Answer:
        return _Answer(text=text, span=Span(start=start, end=max(start, self._end(text))))

    def _end(self, text: str) -> int:
        """The character after the end marker; if a template has none, white space ends the turn."""
        stripped = text.rstrip()
        marker = self.template.end_of_turn
        return len(stripped) if marker and stripped.endswith(marker) else len(text)

    def _with_other_header(self, index: int, text: str, before: str) -> _Answer:
        """The turns before are rendered the same, but the answer does not open with the generation prompt.

        A known answer shows where the two differ: the answer itself may begin like the prompt's end.
        """
        shown = self._with_known_answer(index)
        start = _common_start(shown, before)
        if not index or not text.startswith(shown[:start]):  # without earlier turns, a template may print nothing
            raise RefusedError(f"it opens turn {index + 1} differently from its generation prompt")
        return replace(self._at(text, start), header_differs=True)

    def _after_rewritten_turns(self, index: int, text: str, before: str) -> _Answer:
        """The turns before are rendered differently once an answer follows; the answer belongs after the prompt.

        Mistral's templates, for one, write the system turn only into a question that ends the conversation; gpt-oss'
        drops the reasoning before a call once an answer follows. A known answer in its place shows where the answer
        starts: at its content, or at text that the template puts between header and content (a channel, for example).
        """
        shown = self._with_known_answer(index)
        known = shown[: shown.rindex(ANSWER.content)]
        ends = [*range(len(known.rstrip()), len(known) + 1), *self._header_end(known)]
        start = max(ends, key=lambda end: len(_common_end(before, known[:end])))
        if not text.startswith(known[:start]) or not self._repeats_question(index, _common_end(before, known[:start])):
            raise RefusedError(f"it renders the turns before turn {index + 1} differently once that turn follows")
        return replace(self._at(before + text[start:], len(before)), rewritten=True)

    def _header_end(self, known: str) -> tuple[int, ...]:
        """The end of the last generation prompt in a text that ends before an answer's content, if there is one."""
        prompt = self.template.generation_prompt
        return (known.rindex(prompt) + len(prompt),) if prompt and prompt in known else ()

    def _with_known_answer(self, index: int) -> str:
        shown = self.template.render([*self.turns[:index], ANSWER], add_generation_prompt=False, tools=self.tools)
        if ANSWER.content not in shown:
            raise RefusedError(f"it does not print turn {index + 1}")
        return shown

    def _repeats_question(self, index: int, common: str) -> bool:
        """Whether the common end of both renderings contains the turn before the answer."""
        return bool(index) and bool(common.strip()) and self.turns[index - 1].text.strip() in common

    def _by_header(self, index: int, text: str, refusal: RefusedError) -> _Answer:
        """The turns before cannot be rendered alone (none, or only a system turn): the usual header shows the start.

        Only if the text ends with exactly header, content and end marker; otherwise the refusal remains.
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
    """The length of the longest text with which both start."""
    differs = (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differs, min(len(one), len(other)))
