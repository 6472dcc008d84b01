"""Where the turns of other roles than the assistant's lie in a training text, for TUNE_ROLE_WEIGHTS.

An answer is found by rendering the turns before it (see `job.data.rendering.spans`). No generation prompt tells how
another role's turn opens, and many templates refuse a conversation that ends with one. So the same conversation is
rendered again with a stand-in character, which the text does not hold, in the place of that turn's content: what stands
before and behind the stand-in stands before and behind the content. Learned is the content as the template writes it,
and the end marker where one follows that also ends answers; headers and white space are not.

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

STAND_INS = tuple(chr(number) for number in range(0xE000, 0xE010))
"""Private-use characters; texts that hold all of them are refused."""


def add_roles(
    pieces: Sequence[Piece],
    template: Template,
    turns: Sequence[Turn],
    tools: Sequence[JsonObject],
    *,
    roles: Collection[str],
) -> tuple[Piece, ...]:
    """The pieces that `spans.answers` made, with the spans of these other roles' turns.

    Each turn is learned once, in the first piece that holds it; turns behind the last answer are in none.
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
    """Those of the piece: the last is its last answer."""
    tools: Sequence[JsonObject]

    @functools.cached_property
    def _prompted(self) -> bool:
        """Whether the piece is a prompt and what was said to it, which the template renders otherwise as a whole."""
        return self.template.render(self.turns, add_generation_prompt=False, tools=self.tools) != self.piece.text

    def _rendered(self, turns: Sequence[Turn]) -> str:
        if not self._prompted:
            return self.template.render(turns, add_generation_prompt=False, tools=self.tools)
        before = self.template.render(turns[:-1], add_generation_prompt=True, tools=self.tools)
        return before + self.piece.text[self.piece.spans[-1].start :]

    def spans(self, index: int) -> Iterator[Span]:
        """Where the content of a turn lies (and apart from it Alpaca's input)."""
        turn = self.turns[index]
        for name in ("content", "input"):
            if getattr(turn, name).strip():
                yield self._span(index, name)

    def _span(self, index: int, name: str) -> Span:
        stand_in = self._stand_in()
        changed = list(self.turns)
        instead: dict[str, Any] = {name: stand_in}
        changed[index] = replace(changed[index], **instead)
        before, _, behind = self._rendered(changed).partition(stand_in)
        text = self.piece.text
        stop = len(text) - len(behind)
        if not (text.startswith(before) and text.endswith(behind) and len(before) < stop):
            raise self._impossible(index)
        if behind.startswith(self.template.end_of_turn):
            stop += len(self.template.end_of_turn)
        return Span(start=len(before), end=stop, role=self.turns[index].role, turn=index)

    def _stand_in(self) -> str:
        free = next((one for one in STAND_INS if one not in self.piece.text), None)
        if free is None:
            raise RefusedError(f"it holds all of {STAND_INS[0]!a} to {STAND_INS[-1]!a}, which stand for turns")
        return free

    def _impossible(self, index: int) -> RefusedError:
        role = self.turns[index].role
        return RefusedError(
            f"it does not write the content of turn {index + 1} once and as one stretch, so that TUNE_ROLE_WEIGHTS "
            f"can weigh no {role} turns: leave {role} out"
        )
