"""A chat template applied to turns, and what can be learned from it by trying: how it opens and ends an answer.

Knows Jinja text and strings; nothing of tokens. The templates that the job brings are `job/templates/<name>.jinja`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from job.data.examples import JsonObject, Turn
from job.runtime.errors import ConfigError

TEXT_BLOCKS = ("alpaca", "question_answer", "prompt_completion")
"""Templates for models without a chat template; each is also the name of the format that uses it."""

QUESTION = Turn(role="user", content="What is the Vogon word for tea?")
SYSTEM = Turn(role="system", content="Speak Vogon.")
ANSWER = Turn(role="assistant", content="Zqxw.")
"""A conversation that every template must be able to render, with words that no template contains."""
TOOL: JsonObject = {
    "type": "function",
    "function": {
        "name": "vogon_tea",
        "description": "Makes tea.",
        "parameters": {"type": "object", "properties": {"cups": {"type": "integer", "description": "How many."}}},
    },
}
"""A tool that no row has."""

SWITCH = re.compile(r"\n|(?:^|(?<=\s))/\w+")
"""What separates the lines of a turn: also a word like `/no_think`."""


class RefusedError(Exception):
    """The template raised an error for these turns; the text says which."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template with its variables (special tokens, date) already given."""

    name: str
    text: str
    apply: Callable[..., str]
    """Takes `messages`, `tools` and `add_generation_prompt`."""
    eos: str = ""
    """The tokenizer's EOS, as the template knows it."""

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool, tools: Sequence[JsonObject] = ()) -> str:
        """The conversation as text, to which turns can be added. Raises RefusedError if the template does."""
        text = self.closed(turns, add_generation_prompt=add_generation_prompt, tools=tools)
        return text if add_generation_prompt else text.removesuffix(self.closing)

    def closed(self, turns: Sequence[Turn], *, add_generation_prompt: bool, tools: Sequence[JsonObject] = ()) -> str:
        """The same with what the template puts behind a whole conversation, see `closing`."""
        messages = [_message(turn) for turn in turns]
        try:
            return self.apply(messages=messages, tools=list(tools) or None, add_generation_prompt=add_generation_prompt)
        except Exception as error:
            raise RefusedError(str(error) or type(error).__name__) from error

    @functools.cached_property
    def closing(self) -> str:
        """EOS where the template puts it behind every conversation that does not end in a generation prompt (Phi 3).

        It ends no turn: the next one would stand before it. Empty for other templates.
        """
        text = self.closed([QUESTION], add_generation_prompt=False)
        rest = text.removesuffix(self.eos) if self.eos else text
        prompt = self.closed([QUESTION], add_generation_prompt=True)
        return self.eos if rest != text and not prompt.startswith(text) and prompt.startswith(rest) else ""

    @functools.cached_property
    def generation_prompt(self) -> str:
        """What the template puts before an answer that is to be generated; empty if it has no such thing."""
        with_prompt = self.render([QUESTION], add_generation_prompt=True)
        without = self.render([QUESTION], add_generation_prompt=False)
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    @functools.cached_property
    def end_of_turn(self) -> str:
        """What the template puts behind an answer, without white space around it; may be empty."""
        text = self.render([QUESTION, ANSWER], add_generation_prompt=False)
        return text.rpartition(ANSWER.content)[2].strip()

    @functools.cached_property
    def around(self) -> str:
        """A short conversation, in which every marker occurs that opens or ends a turn."""
        for turns in ([SYSTEM, QUESTION, ANSWER, QUESTION], [QUESTION, ANSWER, QUESTION]):
            with contextlib.suppress(RefusedError):
                return self.render(turns, add_generation_prompt=True)
        return f"{self.render([QUESTION, ANSWER], add_generation_prompt=False)}{self.generation_prompt}"

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Whether the template prints tools, as far as a question shows it; true where it refuses to say."""
        texts = []
        for turns in ([QUESTION], [SYSTEM, QUESTION]):
            with contextlib.suppress(RefusedError):
                texts.append(self.render(turns, add_generation_prompt=True, tools=[TOOL]))
        return not texts or any(TOOL["function"]["name"] in text for text in texts)


def _message(turn: Turn) -> JsonObject:
    """A turn as templates see it; gpt-oss and LFM call reasoning `thinking`."""
    message = turn.message()
    return message if turn.reasoning_content is None else message | {"thinking": turn.reasoning_content}


def printed(text: str, conversation: str) -> bool:
    """Whether a text stands in a rendered conversation, bare or as JSON writes it."""
    return text in conversation or json.dumps(text, ensure_ascii=False)[1:-1] in conversation


def left_out(turn: Turn, text: str) -> bool:
    """Whether a rendered conversation lacks all that a turn says; some templates drop roles in silence.

    Lines count as said in any order, bare or as JSON writes them. Switches such as `/no_think`, which some templates
    take out, do not count at all.
    """
    if turn.content.strip() in text and turn.input.strip() in text:
        return False
    lines = [line.strip() for line in SWITCH.split(f"{turn.content}\n{turn.input}") if line.strip()]
    return bool(lines) and not any(printed(line, text) for line in lines)


def names() -> tuple[str, ...]:
    """The templates that the job brings."""
    files = resources.files("job.data.tokenizer") / "templates"
    return tuple(sorted(file.name.removesuffix(".jinja") for file in files.iterdir() if file.name.endswith(".jinja")))


def named(name: str) -> str:
    """The Jinja text of the template `name`. Raises ConfigError for a name that the job does not bring."""
    if name not in names():
        raise ConfigError(
            f"TUNE_CHAT_TEMPLATE={name!r} is no template that the job brings.",
            remedy=f"Use `tokenizer`, the URI of a Jinja file, or one of {', '.join(names())}.",
        )
    return (resources.files("job.data.tokenizer") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
