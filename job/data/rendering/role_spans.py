"""The spans of roles other than the assistant's in a training text, for TUNE_ROLE_WEIGHTS.

An answer is found by rendering the turns before it (see `job.data.rendering.spans`). For another role there is no
generation prompt that shows how its turn opens, and many templates refuse a conversation that ends with such a turn. So
the conversation is rendered again with a placeholder character in place of that turn's content: the text before and
after the placeholder is the text before and after the content. The content is learned as the template writes it, and
the end marker after it if the same marker ends answers; headers and white space are not learned.

Knows characters, nothing of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from job.data.examples import JsonObject, Turn
from job.data.rendering.spans import Piece, Span
from job.data.tokenizer.chat_template import RefusedError, Template

PLACEHOLDERS = tuple(chr(number) for number in range(0xE000, 0xE010))
"""Private-use characters; a text that contains all of them is an error."""


def add_roles(
    pieces: Sequence[Piece],
    template: Template,
    turns: Sequence[Turn],
    tools: Sequence[JsonObject],
    *,
    roles: Collection[str],
) -> tuple[Piece, ...]:
    """The pieces of `spans.answer_pieces`, with the spans of the turns of these other roles.

    Each turn is learned once, in the first piece that contains it; turns after the last answer are in no piece.
    Raises RefusedError if the template does not write a turn's content exactly once and as one stretch.
    """
    if not any(turn.role in roles for turn in turns):
        return tuple(pieces)
    found = []
    done = 0
    for piece in pieces:
        end = piece.spans[-1].turn + 1
        search = _Search(piece=piece, template=template, turns=turns[:end], tools=tools)
        others = [span for index in range(done, end) if turns[index].role in roles for span in search.spans(index)]
        found.append(replace(piece, others=tuple(others)))
        done = end
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class _Search:
    piece: Piece
    template: Template
    turns: Sequence[Turn]
    """The turns of the piece; the last is its last answer."""
    tools: Sequence[JsonObject]

    @functools.cached_property
    def _prompted(self) -> bool:
        """Whether the piece is a prompt with its answer, and the template renders the conversation differently."""
        return self.template.render(self.turns, add_generation_prompt=False, tools=self.tools) != self.piece.text

    def _rendered(self, turns: Sequence[Turn]) -> str:
        if not self._prompted:
            return self.template.render(turns, add_generation_prompt=False, tools=self.tools)
        before = self.template.render(turns[:-1], add_generation_prompt=True, tools=self.tools)
        return before + self.piece.text[self.piece.spans[-1].start :]

    def spans(self, index: int) -> Iterator[Span]:
        """The spans of a turn's content, and of Alpaca's input."""
        turn = self.turns[index]
        for name in ("content", "input"):
            if getattr(turn, name).strip():
                yield self._span(index, name)

    def _span(self, index: int, name: str) -> Span:
        placeholder = self._placeholder()
        changed = list(self.turns)
        instead: dict[str, Any] = {name: placeholder}
        changed[index] = replace(changed[index], **instead)
        before, _, after = self._rendered(changed).partition(placeholder)
        text = self.piece.text
        stop = len(text) - len(after)
        if not (text.startswith(before) and text.endswith(after) and len(before) < stop):
            raise self._not_found(index)
        if after.startswith(self.template.end_of_turn):
            stop += len(self.template.end_of_turn)
        return Span(start=len(before), end=stop, role=self.turns[index].role, turn=index)

    def _placeholder(self) -> str:
        unused = next((one for one in PLACEHOLDERS if one not in self.piece.text), None)
        if unused is None:
            raise RefusedError(
                f"it contains all of {PLACEHOLDERS[0]!a} to {PLACEHOLDERS[-1]!a}, which the job uses as placeholders"
            )
        return unused

    def _not_found(self, index: int) -> RefusedError:
        role = self.turns[index].role
        return RefusedError(
            f"it does not write the content of turn {index + 1} exactly once and in one stretch, so TUNE_ROLE_WEIGHTS "
            f"cannot weight {role} turns: leave {role} out"
        )
