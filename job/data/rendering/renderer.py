"""Example + tokenizer -> token ids and labels: exactly the answers are learned, as the template renders them.

The text is tokenised once, as a whole; a token is learned if it lies completely inside a learned span
(`job.data.rendering.labels`). Where a token would cross an answer's start (a prompt that ends with a space and an
answer that begins with a word, for example), or the end of an end marker of several tokens, the text is tokenised in
parts that meet there: generation, too, starts from the tokens of the prompt alone. Any other token that crosses an
answer's end is not learned, since it contains characters of the next turn. The first token is never learned: it has no
context.

Special tokens in the content of a turn are encoded as plain text, not as control tokens. In an assistant's content this
concerns only tokens that open or end turns, except at its very end; others (<|python_tag|>, for example) are intended.
In ready text all special tokens are kept. Markers that are not special tokens (`[/INST]`, added tokens such as
<tool_call>) are encoded as usual.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from job.config import role_weights
from job.data.examples import Example, JsonObject, RowError, Turn
from job.data.rendering.forms import call_forms, calls_tools
from job.data.rendering.labels import LearnedTokens, Outcome, Rendered, learned_tokens
from job.data.rendering.refusals import explain_refusal
from job.data.rendering.role_spans import add_roles
from job.data.rendering.spans import Piece, Span, answer_pieces, whole_conversation
from job.data.rendering.truncation import Truncation, truncate
from job.data.tokenizer.chat_template import RefusedError, Template
from job.data.tokenizer.encoder import PLACEHOLDER
from job.data.tokenizer.encoding import Encoding
from job.data.tokenizer.load import Tokenizer

TrainOn = Literal["responses", "last_response", "all"]
Overlong = Literal["truncate", "drop", "fail"]
MAX_CHARACTERS = 8_000_000
"""Of one text. It is tokenised as a whole even if most of it is cut off, since lengths are those of whole sequences; a
character then takes about 350 bytes."""
NOTHING_LEARNED = LearnedTokens(tokens=(), roles=(), cut=False)
CUT = "characters that no learned token covers"
"""In words, as `job.data.rendering.losses` has them: at an answer's ends."""
MARKED = ("messages", "sharegpt")
"""Formats whose untrained turns are marked one by one; those of a conversational `prompt` follow from the column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt for the last answer of a conversation, and that answer as the data has it."""

    input_ids: list[int]
    text: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class RenderedText:
    """An example as text: the step between template and tokens."""

    example: Example
    pieces: tuple[Piece, ...]
    escaped: bool
    """Whether special tokens in the content are replaced by placeholders."""


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Renders one example at a time; keeps no state."""

    tokenizer: Tokenizer
    train_on: TrainOn = "responses"
    max_length: int = 2048
    overlong: Overlong = "truncate"
    weights: Mapping[str, float] | None = None
    """Of each learned role, with `train_on="responses"`; with None only the answers are learned."""

    @property
    def weighted(self) -> bool:
        """Whether sequences have weights: only if labels alone are not enough."""
        return role_weights.differ(self.weights or {})

    def render(self, example: Example) -> list[Rendered]:
        """All sequences of the example, including those not trained on.

        Raises RowError if the template refuses the row, or if it is too long and `overlong` is `fail`; DataError if
        the format needs a chat template and there is none.
        """
        text = self.text(example)
        return self.sequences(text, self.encode(text))

    def prompt(self, example: Example) -> Prompt:
        """The prompt for the last answer; of ready text, the first half."""
        if example.text is not None:
            return self._text_prompt(example.text)
        text = self.text(example, train_on="last_response")
        piece = text.pieces[-1]
        before = piece.text[: piece.spans[-1].start]
        prompt = replace(text, pieces=(Piece(text=before, spans=()),))
        return Prompt(
            input_ids=self.encode(prompt)[0].ids,
            text=self.tokenizer.unescape(before) if text.escaped else before,
            reference=next(
                turn.content for turn in reversed(example.turns) if turn.role == "assistant" and turn.trained
            ),
        )

    def _text_prompt(self, text: str) -> Prompt:
        encoding = self.tokenizer.encode(text)
        half = max(len(encoding.ids) // 2, 1)
        cut = encoding.offsets[half - 1][1] if encoding.offsets else 0
        return Prompt(input_ids=encoding.ids[:half], text=text[:cut], reference=text[cut:])

    def text(self, example: Example, train_on: TrainOn | None = None) -> RenderedText:
        """Apply the template. Raises RowError if it refuses the row, or if a text is too large to be tokenised."""
        text = self._text(example, train_on)
        characters = max((len(piece.text) for piece in text.pieces), default=0)
        if characters > MAX_CHARACTERS:
            raise RowError(
                source=example.source,
                line=example.line,
                reason=f"a text of {characters:,} characters, more than {MAX_CHARACTERS:,}",
                remedy="Split it into several rows: of one row, no more than TUNE_MAX_LENGTH tokens are learned.",
            )
        return text

    def _text(self, example: Example, train_on: TrainOn | None) -> RenderedText:
        if example.text is not None:
            self._check_no_weights(example)
            piece = Piece(text=example.text, spans=(Span(start=0, end=len(example.text)),))
            return RenderedText(example=example, pieces=(piece,), escaped=False)
        escaped, mode = self._escaped(example), train_on or self.train_on
        if mode == "all" and example.format in MARKED and any(not turn.trained for turn in escaped.turns):
            raise RowError(
                source=example.source,
                line=example.line,
                reason="a message is marked as context only, but TUNE_TRAIN_ON=all learns every message",
                remedy="Set TUNE_TRAIN_ON=responses, or remove the marks.",
            )
        try:
            pieces = self._pieces(escaped, mode)
        except RefusedError as error:
            raise self._refused(escaped, mode, error) from error
        return RenderedText(example=example, pieces=pieces, escaped=escaped is not example)

    def _pieces(self, example: Example, mode: TrainOn) -> tuple[Piece, ...]:
        """By the first template that accepts the conversation. Raises the RefusedError of the first template."""
        refusals: list[RefusedError] = []
        for template in self._templates(example):
            try:
                return self._pieces_by(template, example, mode)
            except RefusedError as error:
                refusals.append(error)
        raise refusals[0]

    def _templates(self, example: Example) -> tuple[Template, ...]:
        """The templates that may render the row, in the order in which they are tried: of those that a tokenizer names,
        `tool_use` for rows with tools, as in transformers' `get_chat_template`, or where calls need it."""
        usual, for_tools = self.tokenizer.template_for(example.format), self.tokenizer.named.get("tool_use")
        calls = calls_tools(example.turns)
        if for_tools is None or not (example.tools or calls):
            found: tuple[Template, ...] = (usual,)
        else:
            found = (for_tools, usual) if example.tools else (usual, for_tools)
        return tuple(form for template in found for form in call_forms(template)) if calls else found

    def _pieces_by(self, template: Template, example: Example, mode: TrainOn) -> tuple[Piece, ...]:
        if mode == "all":
            return whole_conversation(template, example.turns, example.tools)
        pieces = answer_pieces(template, example.turns, example.tools, only_last=mode == "last_response")
        if mode == "responses" and self.weights is not None:
            others = self.weights.keys() - {"assistant"}
            pieces = add_roles(pieces, template, example.turns, example.tools, roles=others)
        return pieces

    def _refused(self, example: Example, mode: TrainOn, error: RefusedError) -> RowError:
        def attempt(turns: tuple[Turn, ...], tools: Sequence[JsonObject]) -> object:
            return self._pieces(replace(example, turns=turns, tools=tuple(tools)), mode)

        templates = self._templates(example)
        refusal = explain_refusal(attempt, templates, example.turns, example.tools)
        rule = f"; {refusal.rule}" if refusal.rule else ""
        return RowError(
            source=example.source,
            line=example.line,
            reason=f"the template `{templates[0].name}` refuses the conversation: {error}{rule}",
            remedy=refusal.remedy,
        )

    def _check_no_weights(self, example: Example) -> None:
        if self.weights is not None:
            raise RowError(
                source=example.source,
                line=example.line,
                reason="ready text has no roles for TUNE_ROLE_WEIGHTS",
                remedy="Remove TUNE_ROLE_WEIGHTS, or give conversations.",
            )

    def _escaped(self, example: Example) -> Example:
        """The example with placeholders for special tokens; the very same object if it contains none."""
        turns = tuple(map(self._escaped_turn, example.turns))
        tools = tuple(_each_text(tool, self.tokenizer.escape) for tool in example.tools)
        if all(new is old for new, old in zip(turns, example.turns, strict=True)) and tools == example.tools:
            return example
        content = [[turn.message() for turn in example.turns], example.tools]
        if PLACEHOLDER.search(json.dumps(content, ensure_ascii=False, default=str)):
            raise RowError(
                source=example.source,
                line=example.line,
                reason="it contains a special token and a private-use character of plane 16, the job's placeholder for "
                "such tokens",
                remedy="Remove the private-use character, or the row.",
            )
        return replace(example, turns=turns, tools=tools)

    def _escaped_turn(self, turn: Turn) -> Turn:
        escape = self.tokenizer.escape
        content = self.tokenizer.escape_answer(turn.content) if turn.role == "assistant" else escape(turn.content)
        changed: dict[str, Any] = {"content": content}
        for name in ("input", "name", "reasoning_content"):
            if value := getattr(turn, name):
                changed[name] = escape(value)
        if turn.tool_calls:
            changed["tool_calls"] = tuple(_each_text(call, escape) for call in turn.tool_calls)
        same = all(value == getattr(turn, name) for name, value in changed.items())
        return turn if same else replace(turn, **changed)

    def encode(self, text: RenderedText) -> list[Encoding]:
        """The tokens of each piece."""
        if not text.escaped:
            return self.tokenizer.encode_batch([piece.text for piece in text.pieces])
        return [self.tokenizer.encode_parts(piece.text, escaped=True) for piece in text.pieces]

    def sequences(self, text: RenderedText, encodings: Sequence[Encoding]) -> list[Rendered]:
        """The sequence of each piece, given its tokens: labels, truncation and outcome."""
        return [self._sequence(text, part, encoding) for part, encoding in enumerate(encodings)]

    def _sequence(self, text: RenderedText, part: int, encoding: Encoding) -> Rendered:
        piece = text.pieces[part]
        if cuts := [at for at in piece.borders(self.tokenizer.spelt_end) if encoding.crosses(at)]:
            encoding = self.tokenizer.encode_parts(piece.text, cuts=cuts, escaped=text.escaped)
        ids, learned = encoding.ids, learned_tokens(encoding, piece, self.weights)
        if text.example.text is not None and self._lacks_eos(piece.text):
            ids = [*ids, self.tokenizer.eos_token_id]
            tokens = ((1, len(ids)),)
            learned = LearnedTokens(tokens=tokens, roles=("assistant",), cut=False) if len(ids) > 1 else NOTHING_LEARNED
        truncation = self._truncation(text, part, encoding, learned, len(ids))
        answers_cut = learned.cut and text.example.text is None and self.train_on != "all"
        return Rendered(
            input_ids=ids[: truncation.keep] if truncation.keep < len(ids) else ids,
            source=text.example.source,
            line=text.example.line,
            outcome=self._outcome(text.example, truncation, len(ids)),
            length=len(ids),
            keep=truncation.keep,
            learned=learned.tokens,
            roles=learned.roles,
            part=part,
            parts=len(text.pieces),
            header_differs=piece.header_differs,
            not_rendered=piece.losses.not_rendered,
            lost=(*piece.losses.of_answers, CUT) if answers_cut else piece.losses.of_answers,
            role_weights=self.weights if self.weighted else None,
        )

    def _lacks_eos(self, text: str) -> bool:
        """Whether ready text does not end with EOS yet."""
        return not text.rstrip().endswith(self.tokenizer.hf.eos_token)

    def _truncation(
        self, text: RenderedText, part: int, encoding: Encoding, learned: LearnedTokens, length: int
    ) -> Truncation:
        """How much of the sequence is kept; the ends of answers are computed only for one that is too long."""
        if length <= self.max_length:
            return truncate(learned.tokens, length, self.max_length)
        piece, ends = text.pieces[part], None
        if self.train_on == "all" and text.example.text is None:
            answers_only = replace(piece, spans=self._answers(text, piece.text))
            ends = [stop for _, stop in learned_tokens(encoding, answers_only, None).tokens]
        elif self.weights is not None:
            ends = [stop for _, stop in learned_tokens(encoding, piece, None).tokens]
        return truncate(learned.tokens, length, self.max_length, ends)

    def _answers(self, text: RenderedText, whole_text: str) -> tuple[Span, ...]:
        """The answers of a conversation that is learned whole; none if they cannot be found in its text."""
        try:
            piece, *others = self.text(text.example, train_on="responses").pieces
        except RowError:
            return ()
        return () if others or not whole_text.startswith(piece.text) else piece.spans

    def _outcome(self, example: Example, truncation: Truncation, length: int) -> Outcome:
        if length <= self.max_length or self.overlong == "truncate":
            return truncation.outcome
        if self.overlong == "drop":
            return "overlong"
        raise RowError(
            source=example.source,
            line=example.line,
            reason=f"{length:,} tokens, more than TUNE_MAX_LENGTH={self.max_length}",
            remedy="Raise TUNE_MAX_LENGTH, or set TUNE_OVERLONG to truncate or drop.",
        )


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _each_text(item, change) for key, item in value.items()}
    return [_each_text(item, change) for item in value] if isinstance(value, list | tuple) else value
