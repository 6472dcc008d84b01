"""Python's compiled modules, for machines whose packages came without them.

`pip install --no-compile` and `PYTHONDONTWRITEBYTECODE`, which many images set, leave it to every start to compile all
that it imports: for the training stack that is more than 5,000 modules, and takes longer than to run them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

SUFFIX = ".pyc"
STACK = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo")
_HEADER = struct.Struct("<4sIII")
"""Magic number, flags, and the source's time and size, or its hash in their place (PEP 552)."""
_BY_TIME, _CHECKED_HASH = 0b00, 0b11


def missing() -> bool:
    """Whether a package of the training stack lies here without compiled modules.

    False also where `PYTHONPYCACHEPREFIX` says where to look for them: somebody has taken care of it.
    """
    if sys.pycache_prefix is not None:
        return False
    found = (PathFinder.find_spec(name) for name in STACK)
    sources = [spec.origin for spec in found if spec is not None and spec.origin is not None]
    return not all(Path(importlib.util.cache_from_source(source)).exists() for source in sources)


def keep_in(directory: Path) -> None:
    """From now on modules are compiled into a directory, and loaded from there if they are in it."""
    sys.pycache_prefix = str(directory)
    sys.dont_write_bytecode = False


def outlast(modules: Iterable[Path]) -> None:
    """Make compiled modules good for their source's content instead of its time: packages that are installed at every
    start are always new. Python checks the hash when it loads them. One that is not to be read stays as it is.

    Args:
        modules: in the directory that `keep_in` named.
    """
    for path in modules:
        with contextlib.suppress(OSError, ValueError, struct.error):
            _by_content(path)


def _by_content(path: Path) -> None:
    compiled, source = path.read_bytes(), Path(importlib.util.source_from_cache(str(path)))
    magic, flags, seconds, size = _HEADER.unpack_from(compiled)
    text, found = source.read_bytes(), source.stat()
    made_of_it = (seconds, size) == (int(found.st_mtime) & 0xFFFFFFFF, len(text) & 0xFFFFFFFF)
    if magic != importlib.util.MAGIC_NUMBER or flags != _BY_TIME or not made_of_it:
        return
    header = struct.pack("<4sI", magic, _CHECKED_HASH) + importlib.util.source_hash(text)
    beside = path.with_suffix(".tmp")
    beside.write_bytes(header + compiled[_HEADER.size :])
    os.replace(beside, path)  # noqa: PTH105 - what a run loads at this moment is whole
