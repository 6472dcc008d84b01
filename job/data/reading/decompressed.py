"""A compressed file as a stream of what it holds, up to a limit. Knows no types of files."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa

from job.data.reading.parquet.thrift import TooLargeError
from job.inputs.data_files import CODECS

BUFFER = 1 << 20
EXPANDED, EXPANDED_RATIO = 64 << 20, 1000
"""Bytes that a compressed file may hold, and bytes for each that is stored, beyond these."""
PACKED_PARQUET, PACKED_PARQUET_RATIO = 64 << 20, 100
"""The same for Parquet, which goes to the disk first."""


class Decompressed(io.RawIOBase):
    """What a compressed file holds, up to a limit: of zeros a megabyte can hold many terabytes."""

    def __init__(self, stored: IO[bytes], compression: str, size: int) -> None:
        self._raw = pa.CompressedInputStream(stored, CODECS[compression])
        self.stored, self._read = size, 0
        self.limit = EXPANDED + EXPANDED_RATIO * size
        """Bytes; a reader may lower it before it reads."""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As RawIOBase has it. Raises TooLargeError beyond the limit."""
        count = int(self._raw.readinto(buffer))
        self._read += count
        if self._read > self.limit:
            raise TooLargeError(f"{self.stored:,} bytes are more than {self.limit:,} decompressed")
        return count


@contextmanager
def seekable(stream: io.BufferedReader) -> Iterator[IO[bytes]]:
    """Parquet is read from its end: a compressed file is decompressed into a temporary file first. Its pages are
    compressed already, so that it does not grow much."""
    if not isinstance(stream.raw, Decompressed):
        yield stream
        return
    stream.raw.limit = PACKED_PARQUET + PACKED_PARQUET_RATIO * stream.raw.stored
    with tempfile.TemporaryFile() as decompressed:
        shutil.copyfileobj(stream, decompressed, BUFFER)
        decompressed.seek(0)
        yield decompressed
