"""The header of a safetensors file without the weights behind it.

A stub is a file that begins like the original and has its size, and holds nothing else: on a disk with sparse files
it takes no room. What reads headers and sizes only (`job.model.base_model`) cannot tell them apart.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

from job.storage.base import Entry
from job.storage.disk import disk_errors
from job.storage.faults import MissingError
from job.storage.fetch import WORKERS, Fetched, find
from job.storage.parallel import each
from job.storage.uri import parse

SUFFIX = ".safetensors"
FIRST_BYTES = 128 << 10
"""Holds most headers whole."""
LONGEST_HEADER = 100_000_000
LENGTH_BYTES = 8


def write_stub(path: Path, size: int, read: Callable[[int], bytes]) -> None:
    """Write the stub of a file of `size` bytes; `read` returns so many of its first bytes."""
    start = read(min(FIRST_BYTES, size)) if size else b""
    length = struct.unpack("<Q", start[:LENGTH_BYTES].ljust(LENGTH_BYTES, b"\0"))[0]
    whole = min(LENGTH_BYTES + length, LENGTH_BYTES + LONGEST_HEADER, size)
    if whole > len(start):
        start = read(whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def fetch_headers(uri: str, directory: Path, *, patience_seconds: float = 3600.0) -> list[Fetched]:
    """Like `fetch` for the safetensors files of a model, but of remote ones only the headers are brought, into
    stubs; empty when there are none."""
    try:
        found = find(uri, patience_seconds, lambda key: key.endswith(SUFFIX) and "/" not in key)
    except MissingError:
        return []
    if isinstance(parse(uri), Path):
        return [found.fetched(entry, Path(found.store.uri) / entry.key) for entry in found.entries]

    def take(entry: Entry, _: threading.Event) -> None:
        def read(size: int) -> bytes:
            return found.store.read_start(entry.key, size) or b""

        with disk_errors(directory):
            write_stub(directory / entry.key, entry.size, read)

    each(take, found.entries, workers=WORKERS)
    return [found.fetched(entry, directory / entry.key) for entry in found.entries]
