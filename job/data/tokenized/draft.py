"""Examples -> a draft on disk: the tokens of all their sequences, and what else there is to say of each.

Which rows are held out is known only once all were seen, and which sequences are trained on decides what is counted: so
one pass over the rows makes the draft, and the sets are made of it, without template or tokenizer
(`job.data.tokenized.arrow`).

Memory stays flat: some thousand examples are in flight at a time. Templates run here, in Python; tokens are made
meanwhile by another thread in compiled code, on all cores. That is two thirds of the work, and on two cores keeps both
busy, so that worker processes would gain nothing (measured: CHANGELOG.md).
"""

from __future__ import annotations

import gc
import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from job.data.examples import Example, InvalidRows, RowError
from job.data.rendering.labels import SequenceMeta
from job.data.rendering.renderer import Renderer, Text
from job.data.tokenizer.encoding import Encoding

CHUNK = 1024
"""Rows that are tokenised at once; fewer if they are long."""
CHUNK_CHARACTERS = 4 << 20
"""Text that is tokenised at once, but for the last row. A token takes about 100 bytes while it is in flight."""
IN_FLIGHT = 2
"""Chunks that wait for their tokens while the next is rendered."""
NEW_OBJECTS = 50_000
"""Between two looks for garbage, instead of Python's 700: rows make hardly any that needs to be looked for."""
FIELDS = tuple(SequenceMeta.__slots__)
_values = attrgetter(*FIELDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftSequence:
    """One sequence of the draft."""

    row: int
    """Of all rows, from 0."""
    renderer: int
    """Which of the draft's."""
    outline: SequenceMeta
    input_ids: NDArray[np.int32]


class Draft:
    """A context in which the draft is there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._invalid = InvalidRows()
        self._left = ExitStack()
        self.rows = 0
        """Rows so far, valid or not."""
        self.renderers: list[Renderer] = []

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as entered:
            gc.freeze()  # to look through all that is there already, again and again, took as long as the templates
            usual = gc.get_threshold()
            gc.set_threshold(NEW_OBJECTS, *usual[1:])
            entered.callback(gc.set_threshold, *usual)
            self._tokens = entered.enter_context(self._file("draft.tokens", entered))
            self._outlines = entered.enter_context(self._file("draft.jsonl", entered))
            self._left = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def _file(self, name: str, entered: ExitStack) -> IO[bytes]:
        path = self._directory / name
        entered.callback(path.unlink, missing_ok=True)
        return path.open("w+b")

    def add(self, examples: Iterable[Example], *renderers: Renderer) -> None:
        """Render further rows by each of these, which differ in nothing but weights; the first has all roles.

        Raises what `examples` raises, and DataError if a format needs a chat template that is not there. Rows that the
        template refuses, or that are too long under `fail`, are collected for `check`.
        """
        used = list(dict.fromkeys(map(self._number, renderers)))
        waiting: deque[_Chunk] = deque()
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")
        try:
            for texts in self._texts(examples, renderers[0]):
                waiting.append(_chunk(texts, renderers[0], thread))
                if len(waiting) > IN_FLIGHT:
                    self._write(waiting.popleft(), used)
            while waiting:
                self._write(waiting.popleft(), used)
        finally:
            thread.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Raise DataError for invalid rows: the first ten in words, all in number."""
        self._invalid.raise_if_any(self.rows)

    def sequences(self) -> Iterator[list[DraftSequence]]:
        """All sequences in order, some at a time."""
        self._tokens.seek(0)
        self._outlines.seek(0)
        for line in self._outlines:
            found = [
                (row, renderer, SequenceMeta(**dict(zip(FIELDS, values, strict=True))))
                for row, renderer, values in json.loads(line)
            ]
            ids = np.frombuffer(self._tokens.read(4 * sum(outline.keep for _, _, outline in found)), dtype=np.int32)
            yield list(_drafted(found, ids))

    def _number(self, renderer: Renderer) -> int:
        if renderer not in self.renderers:
            self.renderers.append(renderer)
        return self.renderers.index(renderer)

    def _texts(self, examples: Iterable[Example], renderer: Renderer) -> Iterator[dict[int, Text]]:
        """Texts by the number of their row, as many as are tokenised at once."""
        texts: dict[int, Text] = {}
        characters = 0
        for example in examples:
            self.rows += 1
            try:
                text = texts[self.rows - 1] = renderer.text(example)
            except RowError as error:
                self._invalid.add(error)
                continue
            characters += sum(len(piece.text) for piece in text.pieces)
            if len(texts) == CHUNK or characters >= CHUNK_CHARACTERS:
                yield texts
                texts, characters = {}, 0
        yield texts

    def _write(self, chunk: _Chunk, used: Sequence[int]) -> None:
        tokens, outlines = array("i"), []
        for row, text, encodings in chunk.encoded(self.renderers[used[0]]):
            try:
                for number in used:
                    for sequence in self.renderers[number].labelled(text, encodings):
                        tokens.fromlist(sequence.input_ids)
                        outlines.append((row, number, _values(sequence)))
            except RowError as error:
                self._invalid.add(error)
        self._tokens.write(tokens)
        self._outlines.write(json.dumps(outlines).encode() + b"\n")


def _drafted(found: list[tuple[int, int, SequenceMeta]], ids: NDArray[np.int32]) -> Iterator[DraftSequence]:
    start = 0
    for row, renderer, outline in found:
        yield DraftSequence(row=row, renderer=renderer, outline=outline, input_ids=ids[start : start + outline.keep])
        start += outline.keep


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """Texts whose tokens are being made."""

    texts: dict[int, Text]
    plain: Future[list[Any]]
    """What the tokenizer found in the pieces without stand-ins, in order: understood here, so that the thread that
    makes tokens seldom asks for Python's lock."""

    def encoded(self, renderer: Renderer) -> Iterator[tuple[int, Text, list[Encoding]]]:
        """Each row with the tokens of its pieces, once they are there."""
        plain = iter(self.plain.result())
        for row, text in self.texts.items():
            if text.disarmed:
                yield row, text, renderer.encoded(text)
            else:
                yield row, text, [renderer.tokenizer.understood(piece.text, next(plain)) for piece in text.pieces]


def _chunk(texts: dict[int, Text], renderer: Renderer, thread: Executor) -> _Chunk:
    plain = [piece.text for text in texts.values() if not text.disarmed for piece in text.pieces]
    return _Chunk(texts=texts, plain=thread.submit(renderer.tokenizer.found, plain))
