"""A fast path to the answers of a plain conversation: they are found between the generation prompt and the end marker.

Prefix rendering (`job.data.rendering.spans`) applies the template twice for each answer. Where every answer of a plain
conversation is between the two markers, in order, and the opening marker occurs nowhere else, both find the same spans;
this is tested once for each template. Anything else (tools, reasoning, a tag that the template looks for, a marker in a
question, a template that rewrites turns) is left to prefix rendering.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from job.data.examples import Turn
from job.data.tokenizer.chat_template import Template

ROLES = {"system", "user", "assistant"}
LITERAL = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""")
BRACKETS = frozenset("<>[]|{}")


def find(template: Template, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int, int]]] | None:
    """The conversation's text, and for each assistant turn its number and its characters [start, end), end marker
    included; None if this path does not apply. The last turn must be an assistant's.

    Raises RefusedError if the template refuses the conversation.
    """
    opening, ending = template.generation_prompt, template.end_of_turn
    if not (opening and ending and all(map(_plain, turns))):
        return None
    contents = "\n".join([turn.content for turn in turns])
    if any(map(contents.__contains__, _tags(template.text))):
        return None
    text = template.render(turns, add_generation_prompt=False)
    found: list[tuple[int, int, int]] = []
    end = 0
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            framed = f"{opening}{turn.content}{ending}"
            start = text.find(framed, end)
            if start < 0:
                return None
            end = start + len(framed)
            found.append((index, start + len(opening), end))
    if text.count(opening) != len(found) or text[end:].strip():
        return None
    return text, found


@functools.cache
def _tags(text: str) -> tuple[str, ...]:
    """Text that a template may look for in contents: its literals with brackets, such as '</think>'."""
    literals = {one or other for one, other in LITERAL.findall(text)}
    return tuple(sorted(tag for literal in literals if BRACKETS & set(tag := literal.replace("\\n", "\n").strip())))


def _plain(turn: Turn) -> bool:
    more = turn.tool_calls or turn.reasoning_content or turn.name or turn.tool_call_id or turn.input
    return turn.role in ROLES and not more and (turn.role != "assistant" or turn.content != "")
