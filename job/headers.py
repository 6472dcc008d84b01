"""The header of a safetensors file without the weights behind it.

A stand-in is a file that begins like the original and has its size, and holds nothing else: on a disk with sparse files
it takes no room. What reads headers and sizes only (`job.base_model`) cannot tell them apart.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

SUFFIX = ".safetensors"
FIRST_BYTES = 128 << 10
"""Holds most headers whole."""
LONGEST_HEADER = 100_000_000
LENGTH_BYTES = 8


def stand_in(path: Path, size: int, read: Callable[[int], bytes]) -> None:
    """Write the stand-in of a file of `size` bytes; `read` returns so many of its first bytes."""
    start = read(min(FIRST_BYTES, size)) if size else b""
    length = struct.unpack("<Q", start[:LENGTH_BYTES].ljust(LENGTH_BYTES, b"\0"))[0]
    whole = min(LENGTH_BYTES + length, LENGTH_BYTES + LONGEST_HEADER, size)
    if whole > len(start):
        start = read(whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
