"""The process in which tokenizers and templates are tried, at the request of `job.data.tokenizer.trial`.

It limits itself before it opens anything: the system ends it when it has used its time, and refuses it more memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import time
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from job.data.examples import JsonObject
from job.data.tokenizer.chat_template import RefusedError, Template
from job.data.tokenizer.trial import Open, Task, Tried
from job.runtime.child import Failed, Message, Parent, serve
from job.runtime.errors import DataError

LONGEST = 1 << 20
"""Characters of a short conversation; templates write a few thousand around it."""


class TooMuch(BaseException):
    """What a template must not be able to catch, or be taken for refusing by."""


def program(parent: Parent) -> None:
    """Open the tokenizer, then do one task after the other."""
    request = parent.receive(Open)
    resource.setrlimit(resource.RLIMIT_DATA, (request.memory_bytes, request.memory_bytes))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than the run
    tokenizer: Tokenizer | None = None

    def do(task: Task | Open) -> Message:
        nonlocal tokenizer
        try:
            if isinstance(task, Task):
                return _tried(task, tokenizer)
            tokenizer = _opened(task.path) if task.path else None
        except MemoryError:
            return _failed("it needs more memory than it may have")
        except BaseException as error:  # noqa: BLE001 - also the library's own: pyo3's PanicException is not an Exception
            return _failed(str(error))
        return Tried(ids=[])

    task: Task | Open = request
    while True:
        soft = int(time.process_time()) + 1 + request.cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        parent.send(do(task))
        task = parent.receive(Task)


def _failed(reason: str) -> Failed:
    return Failed.of(DataError(reason.rstrip(".")[:500]))


def _opened(path: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _tried(task: Task, tokenizer: Tokenizer | None) -> Tried:
    if task.template is not None:
        _render(task.template, task.variables)
    if tokenizer is None or not task.texts:
        return Tried(ids=[])
    if task.added:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        # One after the other: the numbers of those that the file lacks follow from the order.
        for token in task.added:
            tokenizer.add_tokens([AddedToken(**token)])
    return Tried(ids=[tokenizer.encode(text, add_special_tokens=task.whole).ids for text in task.texts])


def _render(text: str, variables: dict[str, Any]) -> None:
    """All that is rendered before the first row: see `Template`."""
    compiled = functools.cache(lambda: _environment().from_string(text))

    def apply(messages: list[JsonObject], tools: list[JsonObject] | None, add_generation_prompt: bool) -> str:
        try:
            rendered: str = compiled().render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **variables
            )
        except MemoryError as error:
            raise TooMuch("it needs more memory than it may have") from error
        if len(rendered) > LONGEST:
            raise TooMuch(f"it makes {len(rendered):,} characters of a question and its answer")
        return rendered

    template = Template(name="trial", text=text, apply=apply, eos=variables.get("eos_token", ""))
    for part in ("end_of_turn", "generation_prompt", "short_conversation", "shows_tools"):
        with contextlib.suppress(RefusedError):
            getattr(template, part)


class _Generation(Extension):
    """`{% generation %}`, which marks answers in transformers' templates; here it only has to be understood."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers makes it (`_cached_compile_jinja_template` in its `chat_template_utils.py`)."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = time.strftime
    return made


if __name__ == "__main__":
    serve(program)
