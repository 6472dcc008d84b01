"""Examples -> a draft on disk: the tokens of all their sequences, and the metadata of each.

Which rows are held out is known only after all were read, and the counts depend on which sequences are trained on. So
one pass over the rows makes the draft, and the datasets are made from it, without template or tokenizer
(`job.data.tokenized.arrow`).

Memory stays flat: a few thousand examples are in flight at a time. Templates run here, in Python; meanwhile another
thread tokenises in compiled code, on all cores. That is two thirds of the work and keeps two cores busy, so worker
processes would gain nothing (measured: CHANGELOG.md).
"""

from __future__ import annotations

import gc
import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from job.data.examples import Example, InvalidRows, RowError
from job.data.rendering.labels import SequenceMeta
from job.data.rendering.renderer import RenderedText, Renderer
from job.data.tokenized import overtime
from job.data.tokenized.overtime import OvertimeError
from job.data.tokenizer.encoding import Encoding
from job.data.tokenizer.load import Tokenizer
from job.runtime.errors import DataError

CHUNK = 1024
"""Rows that are tokenised at once; fewer if they are long."""
CHUNK_CHARACTERS = 4 << 20
"""Characters that are tokenised at once, not counting the last row. A token in flight takes about 100 bytes."""
IN_FLIGHT = 2
"""Chunks that wait for their tokens while the next one is rendered."""
PANIC = "PanicException"
"""What pyo3, which binds the tokenizer library, calls a failure that it did not foresee."""
GC_THRESHOLD = 50_000
"""New objects between two garbage collections, instead of Python's 700: rows make hardly any cyclic garbage."""
FIELDS = tuple(SequenceMeta.__slots__)
_values = attrgetter(*FIELDS)
_Meta = tuple[int, int, tuple[Any, ...]]
"""The numbers of a row and a renderer, and the values of a `SequenceMeta`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftSequence:
    """One sequence of the draft."""

    row: int
    """Of all rows, from 0."""
    renderer: int
    """Its number among the draft's renderers."""
    meta: SequenceMeta
    input_ids: NDArray[np.int32]


class Draft:
    """Inside this context the draft's files exist."""

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
            gc.freeze()  # collections over all existing objects took as long as the templates
            usual = gc.get_threshold()
            gc.set_threshold(GC_THRESHOLD, *usual[1:])
            entered.callback(gc.set_threshold, *usual)
            self._tokens = entered.enter_context(self._file("draft.tokens", entered))
            self._metas = entered.enter_context(self._file("draft.jsonl", entered))
            self._left = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def _file(self, name: str, entered: ExitStack) -> IO[bytes]:
        path = self._directory / name
        entered.callback(path.unlink, missing_ok=True)
        return path.open("w+b")

    def add(self, examples: Iterable[Example], *renderers: Renderer) -> None:
        """Render further rows with each of these renderers, which differ only in weights; the first has all roles.

        Raises the errors of `examples`, and DataError if a format needs a chat template and there is none, or if a row
        takes too long. Rows that the template refuses, or that are too long under `fail`, are collected for `check`.
        """
        watch = overtime.Watch()
        try:
            with watch:
                self._add(_watched(examples, watch), renderers)
        except OvertimeError as error:
            raise _overtime(*error.args or (watch.current,)) from None

    def _add(self, examples: Iterable[Example], renderers: Sequence[Renderer]) -> None:
        numbers = list(dict.fromkeys(map(self._number, renderers)))
        waiting: deque[_Chunk] = deque()
        thread, wait = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise"), True
        try:
            for texts in self._texts(examples, renderers[0]):
                waiting.append(_chunk(texts, renderers[0], thread))
                if len(waiting) > IN_FLIGHT:
                    self._write(waiting.popleft(), numbers)
            while waiting:
                self._write(waiting.popleft(), numbers)
        except OvertimeError:
            wait = False
            raise
        finally:
            thread.shutdown(wait=wait, cancel_futures=True)

    def check(self) -> None:
        """Raise DataError if a row was invalid: the first ten in words, and the total."""
        self._invalid.raise_if_any(self.rows)

    def sequences(self) -> Iterator[list[DraftSequence]]:
        """All sequences in order, a chunk at a time."""
        self._tokens.seek(0)
        self._metas.seek(0)
        for line in self._metas:
            found = [
                (row, renderer, SequenceMeta(**dict(zip(FIELDS, values, strict=True))))
                for row, renderer, values in json.loads(line)
            ]
            ids = np.frombuffer(self._tokens.read(4 * sum(meta.keep for _, _, meta in found)), dtype=np.int32)
            yield list(_with_tokens(found, ids))

    def _number(self, renderer: Renderer) -> int:
        if renderer not in self.renderers:
            self.renderers.append(renderer)
        return self.renderers.index(renderer)

    def _texts(self, examples: Iterable[Example], renderer: Renderer) -> Iterator[dict[int, RenderedText]]:
        """Texts by the number of their row, a chunk at a time."""
        texts: dict[int, RenderedText] = {}
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

    def _write(self, chunk: _Chunk, numbers: Sequence[int]) -> None:
        tokens: array[int] = array("i")
        metas: list[_Meta] = []
        with chunk.explained():
            for row, text, encodings in chunk.encoded(self.renderers[numbers[0]]):
                try:
                    for number in numbers:
                        for sequence in self.renderers[number].sequences(text, encodings):
                            tokens.fromlist(sequence.input_ids)
                            metas.append((row, number, _values(sequence)))
                except RowError as error:
                    self._invalid.add(error)
        self._check_embeddings(np.frombuffer(tokens, dtype=np.int32), metas, self.renderers[numbers[0]].tokenizer)
        self._tokens.write(tokens)
        self._metas.write(json.dumps(metas).encode() + b"\n")

    def _check_embeddings(self, ids: NDArray[np.int32], metas: Sequence[_Meta], tokenizer: Tokenizer) -> None:
        """Note the rows with a token that the model has no embedding for: training would end at the first of them."""
        rows = tokenizer.embedding_rows
        if rows is None or ids.max(initial=0) < rows:
            return
        start, noted = 0, set()
        for row, _, values in metas:
            meta = SequenceMeta(**dict(zip(FIELDS, values, strict=True)))
            highest = int(ids[start : start + meta.keep].max(initial=0))
            start += meta.keep
            if highest >= rows and row not in noted:
                noted.add(row)
                self._invalid.add(_no_embedding(meta, tokenizer.hf.convert_ids_to_tokens(highest), highest, rows))


def _watched(examples: Iterable[Example], watch: overtime.Watch) -> Iterator[Example]:
    for example in examples:
        watch.current = example
        yield example


def _overtime(first: Example, last: Example | None = None) -> DataError:
    rows = f"{first.source}:{first.line}" + (f" to {last.source}:{last.line}" if last else "")
    return DataError(
        f"{rows}: the chat template and the tokenizer take more than {overtime.SECONDS:.0f} s of computing for a row.",
        remedy="Leave out the row, or use a template without a loop and a tokenizer.json without a pattern that takes "
        "so long.",
    )


def _no_embedding(meta: SequenceMeta, token: str, number: int, rows: int) -> RowError:
    return RowError(
        source=meta.source,
        line=meta.line,
        reason=f"its token {token!r} has the number {number}, and the model has embeddings for {rows} tokens only",
        remedy="Remove the token from the rows, or use a model whose embeddings were resized for its tokenizer.",
    )


def _with_tokens(found: list[tuple[int, int, SequenceMeta]], ids: NDArray[np.int32]) -> Iterator[DraftSequence]:
    start = 0
    for row, renderer, meta in found:
        yield DraftSequence(row=row, renderer=renderer, meta=meta, input_ids=ids[start : start + meta.keep])
        start += meta.keep


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """Texts whose tokens are being made."""

    texts: dict[int, RenderedText]
    raw: Future[list[Any]]
    """The library's encodings of the pieces without placeholders, in order. They become `Encoding` here and not in the
    thread, so that it seldom needs Python's lock."""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the tokenizer library's own failure, which is not an Exception, into an error that names the rows."""
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != PANIC:
                raise
            first, last = self._ends()
            raise DataError(
                f"The tokenizer fails on a row from {first.source}:{first.line} to {last.source}:{last.line}: {error}.",
                remedy="Leave out the row, or use a model whose tokenizer.json has no pattern that backtracks so long.",
            ) from None

    def encoded(self, renderer: Renderer) -> Iterator[tuple[int, RenderedText, list[Encoding]]]:
        """Each row with the tokens of its pieces; waits for them.

        Raises OvertimeError with the row that takes too long, or with the first and the last of the chunk.
        """
        try:
            encodings: list[Any] = overtime.result(self.raw)
        except OvertimeError:
            for text in self.texts.values():
                _encoded_apart(renderer, text)
            raise OvertimeError(*self._ends()) from None
        raw = iter(encodings)
        for row, text in self.texts.items():
            if text.escaped:
                yield row, text, _encoded_apart(renderer, text)
            else:
                yield row, text, [renderer.tokenizer.with_offsets(piece.text, next(raw)) for piece in text.pieces]

    def _ends(self) -> tuple[Example, Example]:
        first, *_, last = (text.example for text in (*self.texts.values(), *self.texts.values()))
        return first, last


def _encoded_apart(renderer: Renderer, text: RenderedText) -> list[Encoding]:
    try:
        return overtime.apart(lambda: renderer.encode(text))
    except OvertimeError:
        raise OvertimeError(text.example) from None


def _chunk(texts: dict[int, RenderedText], renderer: Renderer, thread: Executor) -> _Chunk:
    plain = [piece.text for text in texts.values() if not text.escaped for piece in text.pieces]
    return _Chunk(texts=texts, raw=thread.submit(renderer.tokenizer.encode_raw, plain))
