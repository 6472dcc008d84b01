"""Example + tokenizer -> token ids and labels: exactly the answers are learned, as the template renders them.

The text is tokenised once, whole; a token is learned if it lies wholly inside a span that is learned
(`job.data.rendering.labels`). Where a token would lie across an answer's start (a prompt that ends in a space and an
answer that goes on with a word, say), or across the end of an end marker that is several tokens, the text is tokenised
in parts that meet there: generation too starts from the tokens of the prompt alone. Another token across an answer's
end is not learned, since it holds characters of the next turn. The first token is never learned: nothing stands before
it from which to predict it.

Special tokens that stand in the content of a turn are encoded as the plain text they are, not as control tokens. In an
assistant's content that holds for those that open or end turns, except at its very end; others (<|python_tag|>, say)
are the dataset's intent and stay. In ready text all stay. Markers that are no special tokens (`[/INST]`, added tokens
such as <tool_call>) are encoded as ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from job.config import role_weights
from job.data.examples import Example, RowError, Turn
from job.data.rendering import labels
from job.data.rendering.labels import Learned, Outcome, Rendered
from job.data.rendering.refusals import why
from job.data.rendering.role_spans import add_roles
from job.data.rendering.spans import Piece, Span, answers, whole
from job.data.rendering.truncation import Truncation, truncate
from job.data.tokenizer.chat_template import RefusedError, Template
from job.data.tokenizer.encoder import PLACEHOLDER
from job.data.tokenizer.encoding import Encoding
from job.data.tokenizer.load import Tokenizer

TrainOn = Literal["responses", "last_response", "all"]
Overlong = Literal["truncate", "drop", "fail"]
MOST_CHARACTERS = 8_000_000
"""Of one text, which is tokenised whole, also where most of it is cut off: lengths and what a limit loses are told of
whole sequences. While it is tokenised a character takes some 350 bytes."""
MARKED = ("messages", "sharegpt")
"""Formats whose untrained turns were marked so one by one; those of a conversational `prompt` are by its column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What to show the model to get its own last answer, and the answer that the data gives."""

    input_ids: list[int]
    text: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Text:
    """An example as text: the step between template and tokens."""

    example: Example
    pieces: tuple[Piece, ...]
    disarmed: bool
    """Whether special tokens in the content are replaced by stand-ins."""


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Renders one example at a time; keeps no state."""

    tokenizer: Tokenizer
    train_on: TrainOn = "responses"
    max_length: int = 2048
    overlong: Overlong = "truncate"
    weights: Mapping[str, float] | None = None
    """Of each role that is learned, with `responses`; None learns the answers alone."""

    @property
    def weighted(self) -> bool:
        """Whether sequences carry weights: only where labels alone cannot say it."""
        return role_weights.differ(self.weights or {})

    def render(self, example: Example) -> list[Rendered]:
        """All sequences of the example, also those not trained on.

        Raises RowError if the template refuses the row, or if it is too long and `overlong` is `fail`; DataError if
        the format needs a chat template and there is none.
        """
        text = self.text(example)
        return self.labelled(text, self.encoded(text))

    def prompt(self, example: Example) -> Prompt:
        """For generating the last answer; of ready text, the first half is the prompt."""
        if example.text is not None:
            return self._text_prompt(example.text)
        text = self.text(example, train_on="last_response")
        piece = text.pieces[-1]
        before = piece.text[: piece.spans[-1].start]
        cut = replace(text, pieces=(Piece(text=before, spans=()),))
        return Prompt(
            input_ids=self.encoded(cut)[0].ids,
            text=self.tokenizer.rearm(before) if text.disarmed else before,
            reference=next(
                turn.content for turn in reversed(example.turns) if turn.role == "assistant" and turn.trained
            ),
        )

    def _text_prompt(self, text: str) -> Prompt:
        encoding = self.tokenizer.encode(text)
        half = max(len(encoding.ids) // 2, 1)
        cut = encoding.offsets[half - 1][1] if encoding.offsets else 0
        return Prompt(input_ids=encoding.ids[:half], text=text[:cut], reference=text[cut:])

    def text(self, example: Example, train_on: TrainOn | None = None) -> Text:
        """Apply the template. Raises RowError if it refuses the row, or a text of it is too large to be tokenised."""
        text = self._text(example, train_on)
        characters = max((len(piece.text) for piece in text.pieces), default=0)
        if characters > MOST_CHARACTERS:
            raise RowError(
                source=example.source,
                line=example.line,
                reason=f"a text of {characters:,} characters, and more than {MOST_CHARACTERS:,} are not tokenised",
                remedy="Split it into several rows: of one, no more than TUNE_MAX_LENGTH tokens are learned.",
            )
        return text

    def _text(self, example: Example, train_on: TrainOn | None) -> Text:
        if example.text is not None:
            self._needs_roles(example)
            piece = Piece(text=example.text, spans=(Span(start=0, end=len(example.text)),))
            return Text(example=example, pieces=(piece,), disarmed=False)
        said = self._disarmed(example)
        template = self.tokenizer.template_for(example.format)
        mode = train_on or self.train_on
        if mode == "all" and example.format in MARKED and any(not turn.trained for turn in said.turns):
            raise RowError(
                source=example.source,
                line=example.line,
                reason="a message of it is marked as only context, and TUNE_TRAIN_ON=all learns every message",
                remedy="Set TUNE_TRAIN_ON=responses, or remove the marks.",
            )
        try:
            if mode == "all":
                pieces = whole(template, said.turns, said.tools)
            else:
                pieces = answers(template, said.turns, said.tools, only_last=mode == "last_response")
            if mode == "responses" and self.weights is not None:
                others = self.weights.keys() - {"assistant"}
                pieces = add_roles(pieces, template, said.turns, said.tools, roles=others)
        except RefusedError as error:
            raise self._refused(example, template, error) from error
        return Text(example=example, pieces=pieces, disarmed=said is not example)

    @staticmethod
    def _refused(example: Example, template: Template, error: RefusedError) -> RowError:
        found = why(template, example.turns, example.tools)
        rule = f"; {found.rule}" if found.rule else ""
        return RowError(
            source=example.source,
            line=example.line,
            reason=f"the template `{template.name}` refuses the conversation: {error}{rule}",
            remedy=found.remedy,
        )

    def _needs_roles(self, example: Example) -> None:
        if self.weights is not None:
            raise RowError(
                source=example.source,
                line=example.line,
                reason="ready text has no roles for TUNE_ROLE_WEIGHTS",
                remedy="Set no TUNE_ROLE_WEIGHTS, or give conversations.",
            )

    def _disarmed(self, example: Example) -> Example:
        """The example with stand-ins for special tokens; the very same object if there is nothing to replace."""
        turns = tuple(map(self._disarmed_turn, example.turns))
        tools = tuple(_each_text(tool, self.tokenizer.disarm) for tool in example.tools)
        if all(new is old for new, old in zip(turns, example.turns, strict=True)) and tools == example.tools:
            return example
        content = [[turn.message() for turn in example.turns], example.tools]
        if PLACEHOLDER.search(json.dumps(content, ensure_ascii=False, default=str)):
            raise RowError(
                source=example.source,
                line=example.line,
                reason="it holds both a special token and a character of plane 16 (private use), which stands for one",
            )
        return replace(example, turns=turns, tools=tools)

    def _disarmed_turn(self, turn: Turn) -> Turn:
        disarm = self.tokenizer.disarm
        content = self.tokenizer.disarm_answer(turn.content) if turn.role == "assistant" else disarm(turn.content)
        changed: dict[str, Any] = {"content": content}
        for name in ("input", "name", "reasoning_content"):
            if value := getattr(turn, name):
                changed[name] = disarm(value)
        if turn.tool_calls:
            changed["tool_calls"] = tuple(_each_text(call, disarm) for call in turn.tool_calls)
        same = all(value == getattr(turn, name) for name, value in changed.items())
        return turn if same else replace(turn, **changed)

    def encoded(self, text: Text) -> list[Encoding]:
        """The tokens of each piece."""
        if not text.disarmed:
            return self.tokenizer.encode_batch([piece.text for piece in text.pieces])
        return [self.tokenizer.encode_parts(piece.text, disarmed=True) for piece in text.pieces]

    def labelled(self, text: Text, encodings: Sequence[Encoding]) -> list[Rendered]:
        """Labels, length rule and outcome for each piece, given its tokens."""
        return [self._sequence(text, part, encoding) for part, encoding in enumerate(encodings)]

    def _sequence(self, text: Text, part: int, encoding: Encoding) -> Rendered:
        piece = text.pieces[part]
        if cuts := [at for at in piece.borders(self.tokenizer.spelt_end) if encoding.crosses(at)]:
            encoding = self.tokenizer.encode_parts(piece.text, cuts=cuts, disarmed=text.disarmed)
        ids, learned = encoding.ids, labels.learned(encoding, piece, self.weights)
        if text.example.text is not None and self._needs_end(piece.text):
            ids = [*ids, self.tokenizer.eos_token_id]
            learned = (
                Learned(tokens=((1, len(ids)),), roles=("assistant",)) if len(ids) > 1 else Learned(tokens=(), roles=())
            )
        found = self._cut(text, part, encoding, learned, len(ids))
        return Rendered(
            input_ids=ids[: found.keep] if found.keep < len(ids) else ids,
            source=text.example.source,
            line=text.example.line,
            outcome=self._outcome(text.example, found, len(ids)),
            length=len(ids),
            keep=found.keep,
            learned=learned.tokens,
            roles=learned.roles,
            part=part,
            parts=len(text.pieces),
            header_differs=piece.header_differs,
            unshown=piece.unshown,
            shares=self.weights if self.weighted else None,
        )

    def _needs_end(self, text: str) -> bool:
        """Whether ready text does not end with EOS."""
        return not text.rstrip().endswith(self.tokenizer.hf.eos_token)

    def _cut(self, text: Text, part: int, encoding: Encoding, learned: Learned, length: int) -> Truncation:
        """How much of the sequence stays; only one that is too long asks where its answers end."""
        if length <= self.max_length:
            return truncate(learned.tokens, length, self.max_length)
        piece, ends = text.pieces[part], None
        if self.train_on == "all" and text.example.text is None:
            answers_only = replace(piece, spans=self._answers(text, piece.text))
            ends = [stop for _, stop in labels.learned(encoding, answers_only, None).tokens]
        elif self.weights is not None:
            ends = [stop for _, stop in labels.learned(encoding, piece, None).tokens]
        return truncate(learned.tokens, length, self.max_length, ends)

    def _answers(self, text: Text, whole_text: str) -> tuple[Span, ...]:
        """The answers of a conversation that is learned whole; none where the template does not show them."""
        try:
            piece, *others = self.text(text.example, train_on="responses").pieces
        except RowError:
            return ()
        return () if others or not whole_text.startswith(piece.text) else piece.spans

    def _outcome(self, example: Example, found: Truncation, length: int) -> Outcome:
        if length <= self.max_length or self.overlong == "truncate":
            return found.outcome
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
