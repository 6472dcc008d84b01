"""Stubs: the headers of safetensors files without their weights.

A stub begins like the original and has its size, and is otherwise empty: on a disk with sparse files it takes no room.
For code that reads only headers and sizes (`job.model.base_model`) it is as good as the original.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

from job.storage.base import Entry
from job.storage.directory import DirectoryStore
from job.storage.disk import disk_errors
from job.storage.fetch import WORKERS, Fetched, Resolved, download
from job.storage.parallel import each

FIRST_BYTES = 128 << 10
"""Most headers are shorter."""
LONGEST_HEADER = 16 << 20
"""The library takes up to 100 MB; those of real models have less than one, and parsing takes ten times the memory."""
LENGTH_BYTES = 8


def write_stub(path: Path, size: int, read: Callable[[int], bytes]) -> None:
    """Write the stub of a file of `size` bytes; `read(n)` returns its first n bytes."""
    start = read(min(FIRST_BYTES, size)) if size else b""
    length = struct.unpack("<Q", start[:LENGTH_BYTES].ljust(LENGTH_BYTES, b"\0"))[0]
    header_end = min(LENGTH_BYTES + length, LENGTH_BYTES + LONGEST_HEADER, size)
    if header_end > len(start):
        start = read(header_end)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def download_headers(resolved: Resolved, directory: Path) -> list[Fetched]:
    """Like `download` for files of weights, with stubs of remote ones."""
    if isinstance(resolved.store, DirectoryStore):
        return download(resolved, directory)

    def download_header(entry: Entry, _: threading.Event) -> None:
        def read(size: int) -> bytes:
            return resolved.store.read_start(entry.key, size) or b""

        with disk_errors(directory):
            write_stub(directory / entry.key, entry.size, read)

    each(download_header, resolved.entries, workers=WORKERS)
    return [resolved.fetched(entry, directory / entry.key) for entry in resolved.entries]
