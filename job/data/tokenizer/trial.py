"""A stranger's tokenizer and chat template, tried first in a process that may not take much time or memory.

A pattern of a `tokenizer.json` can backtrack for hours, a template can loop or write without end, and neither can be
interrupted where it runs. In the process of `job.data.tokenizer.trial_worker` the system ends them. That process has
the tokenizers library without transformers, so it also says what `tokenizer.json` by itself makes of a text.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from job.runtime import libraries
from job.runtime.child import Child, Failed, Message
from job.runtime.errors import DataError

MODULE = "job.data.tokenizer.trial_worker"
CPU_SECONDS = 20
"""For opening a tokenizer, for the samples, and for each template; the largest tokenizers open in two."""
MEMORY_BYTES = 3 << 30
"""Of data; the largest tokenizers take a third of it."""


@dataclass(frozen=True, kw_only=True)
class Open(Message):
    """Open this tokenizer.json, under these limits; the answer is `Tried`."""

    path: str | None
    cpu_seconds: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Task(Message):
    """Tokenise these texts, and render the usual trial conversations with this template; the answer is `Tried`."""

    texts: list[str]
    whole: bool
    """Whether to add the tokens that belong before and after a text."""
    added: list[dict[str, Any]]
    """Special and other added tokens to use instead of those in the file."""
    template: str | None
    variables: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tried(Message):
    """It was done within the limits. The ids of each text."""

    ids: list[list[int]]


class Trial:
    """The process, as a context. Opening the tokenizer begins at once, while the caller does something else."""

    def __init__(
        self, tokenizer: Path | None, *, name: str, cpu_seconds: int = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        """Start it.

        Args:
            tokenizer: the `tokenizer.json`; None if there is none.
            name: of the model, for messages.
            cpu_seconds: of computing for each step, whoever else uses the machine.
            memory_bytes: of data.
        """
        self._name, self._seconds, self._gigabytes = name, cpu_seconds, memory_bytes >> 30
        environment = libraries.child_environment(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
        self._child = Child(MODULE, environment=environment, receives=(Tried, Failed))
        self._answers = iter(self._child)
        path = str(tokenizer) if tokenizer else None
        self._child.send(Open(path=path, cpu_seconds=cpu_seconds, memory_bytes=memory_bytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.__exit__(kind, error, trace)

    def opened(self) -> None:
        """Wait until the tokenizer is open. Raises DataError if it cannot be opened within the limits."""
        self._answer(f"tokenizer.json of {self._name} cannot be opened", "opening it")

    def encode(
        self, texts: Sequence[str], *, whole: bool = False, added: Sequence[Mapping[str, Any]] = ()
    ) -> list[list[int]]:
        """The ids of texts by `tokenizer.json` alone.

        Args:
            texts: any.
            whole: with the tokens before and after each text.
            added: added tokens to use instead of those in the file, as the library's `AddedToken` has them.

        Raises:
            DataError: it takes too much time or memory, or the tokenizer fails.
        """
        given = [dict(token) for token in added]
        self._child.send(Task(texts=list(texts), whole=whole, added=given, template=None, variables={}))
        return self._answer(f"tokenizer.json of {self._name} cannot be used", "tokenising a few lines").ids

    def render(self, template: str, variables: Mapping[str, Any], *, what: str) -> None:
        """Render what a run renders before its first row.

        A template that refuses the conversation is not an error here.

        Args:
            template: Jinja text.
            variables: what it may refer to, besides the conversation.
            what: names the template in messages.

        Raises:
            DataError: it takes too much time or memory.
        """
        self._child.send(Task(texts=[], whole=False, added=[], template=template, variables=dict(variables)))
        self._answer(f"The {what} cannot be used", "rendering a question and its answer")

    def _answer(self, problem: str, step: str) -> Tried:
        match next(self._answers, None):
            case Tried() as tried:
                return tried
            case Failed(message=message):
                raise DataError(f"{problem}: {message}.", remedy="Correct the file, or use another model or template.")
            case _:
                status = self._child.wait()
        limit = f"{self._seconds} s of computing" if status == -signal.SIGXCPU else f"{self._gigabytes} GiB of memory"
        raise DataError(
            f"{problem}: {step} takes more than {limit}.",
            remedy="Look for a pattern that backtracks or a loop without end, or use another model or template.",
        )
