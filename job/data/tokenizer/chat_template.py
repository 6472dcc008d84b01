"""A chat template applied to turns, and what a trial rendering shows of it: how it opens and ends an answer.

Knows Jinja text and strings; nothing of tokens. The job's own templates are `job/data/tokenizer/templates/*.jinja`.
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
"""Templates for models without a chat template; each has the name of the format that uses it."""

QUESTION = Turn(role="user", content="What is the Vogon word for tea?")
SYSTEM = Turn(role="system", content="Speak Vogon.")
ANSWER = Turn(role="assistant", content="Zqxw.")
"""A conversation that every template must render, in words that no template contains."""
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
"""What separates the lines of a turn: line ends, and switches such as `/no_think`."""


class RefusedError(Exception):
    """The template refuses these turns: its own error, or a reason found in what it rendered."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template whose variables (special tokens, date) are bound."""

    name: str
    text: str
    apply: Callable[..., str]
    """Takes `messages`, `tools` and `add_generation_prompt`."""
    eos: str = ""
    """The tokenizer's EOS, as the template knows it."""

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool, tools: Sequence[JsonObject] = ()) -> str:
        """The conversation as text that further turns can follow. Raises RefusedError if the template refuses it."""
        text = self.render_closed(turns, add_generation_prompt=add_generation_prompt, tools=tools)
        return text if add_generation_prompt else text.removesuffix(self.closing)

    def render_closed(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool, tools: Sequence[JsonObject] = ()
    ) -> str:
        """The same with the text that the template puts after a whole conversation, see `closing`."""
        messages = [_message(turn) for turn in turns]
        try:
            return self.apply(messages=messages, tools=list(tools) or None, add_generation_prompt=add_generation_prompt)
        except Exception as error:
            raise RefusedError(str(error) or type(error).__name__) from error

    @functools.cached_property
    def closing(self) -> str:
        """EOS where the template puts it after every conversation that does not end in a generation prompt (Phi 3).

        It does not end a turn: the next turn would stand before it. Empty for other templates.
        """
        text = self.render_closed([QUESTION], add_generation_prompt=False)
        rest = text.removesuffix(self.eos) if self.eos else text
        prompt = self.render_closed([QUESTION], add_generation_prompt=True)
        return self.eos if rest != text and not prompt.startswith(text) and prompt.startswith(rest) else ""

    @functools.cached_property
    def generation_prompt(self) -> str:
        """The text before an answer that is to be generated; may be empty."""
        with_prompt = self.render([QUESTION], add_generation_prompt=True)
        without = self.render([QUESTION], add_generation_prompt=False)
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    @functools.cached_property
    def end_of_turn(self) -> str:
        """The text after an answer, without white space around it; may be empty."""
        text = self.render([QUESTION, ANSWER], add_generation_prompt=False)
        return text.rpartition(ANSWER.content)[2].strip()

    @functools.cached_property
    def short_conversation(self) -> str:
        """A short conversation that contains every marker that opens or ends a turn."""
        for turns in ([SYSTEM, QUESTION, ANSWER, QUESTION], [QUESTION, ANSWER, QUESTION]):
            with contextlib.suppress(RefusedError):
                return self.render(turns, add_generation_prompt=True)
        return f"{self.render([QUESTION, ANSWER], add_generation_prompt=False)}{self.generation_prompt}"

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Whether the template prints tools with a question; true if it refuses the question, since this is unknown."""
        texts = []
        for turns in ([QUESTION], [SYSTEM, QUESTION]):
            with contextlib.suppress(RefusedError):
                texts.append(self.render(turns, add_generation_prompt=True, tools=[TOOL]))
        return not texts or any(TOOL["function"]["name"] in text for text in texts)


def _message(turn: Turn) -> JsonObject:
    """A turn as templates see it, with reasoning also as `thinking`, the name in gpt-oss' and LFM's templates."""
    message = turn.message()
    return message if turn.reasoning_content is None else message | {"thinking": turn.reasoning_content}


def is_printed(text: str, conversation: str) -> bool:
    """Whether a rendered conversation contains a text, as it is or escaped as in JSON."""
    return text in conversation or json.dumps(text, ensure_ascii=False)[1:-1] in conversation


def is_left_out(turn: Turn, text: str) -> bool:
    """Whether a rendered conversation lacks all lines of a turn; some templates silently drop roles.

    Lines may be in any order, as they are or escaped as in JSON. Switches such as `/no_think`, which some templates
    remove, do not count.
    """
    if turn.content.strip() in text and turn.input.strip() in text:
        return False
    lines = [line.strip() for line in SWITCH.split(f"{turn.content}\n{turn.input}") if line.strip()]
    return bool(lines) and not any(is_printed(line, text) for line in lines)


def bundled_names() -> tuple[str, ...]:
    """The names of the job's own templates."""
    files = resources.files("job.data.tokenizer") / "templates"
    return tuple(sorted(file.name.removesuffix(".jinja") for file in files.iterdir() if file.name.endswith(".jinja")))


def bundled_template(name: str) -> str:
    """The Jinja text of one of the job's own templates. Raises ConfigError for an unknown name."""
    if name not in bundled_names():
        raise ConfigError(
            f"TUNE_CHAT_TEMPLATE={name!r} is not a template of this job.",
            remedy=f"Use `tokenizer`, the URI of a Jinja file, or one of {', '.join(bundled_names())}.",
        )
    return (resources.files("job.data.tokenizer") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
