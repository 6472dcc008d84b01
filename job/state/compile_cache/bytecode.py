"""Python's compiled modules, for machines whose packages were installed without them.

With `pip install --no-compile` and `PYTHONDONTWRITEBYTECODE`, which many images set, every start compiles everything
that it imports: for the training stack that is more than 5,000 modules, and takes longer than running them.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import struct
import sys
from importlib.machinery import PathFinder
from pathlib import Path

SUFFIX = ".pyc"
FOLDER = "python"
"""Below the compile cache's directory; in it, modules have the paths of their sources."""
STACK = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo")
PATIENCE_SECONDS = 15.0
"""How long a run waits for modules that are being restored: less than it takes to compile them."""
_HEADER = struct.Struct("<4sIII")
"""Magic number, flags, and the source's time and size, or its hash instead (PEP 552)."""
_BY_TIME, _CHECKED_HASH = 0b00, 0b11


def missing() -> bool:
    """Whether a package of the training stack is installed without compiled modules.

    False also where `PYTHONPYCACHEPREFIX` is set: the modules are somewhere else.
    """
    if sys.pycache_prefix is not None:
        return False
    found = (PathFinder.find_spec(name) for name in STACK)
    sources = [spec.origin for spec in found if spec is not None and spec.origin is not None]
    return not all(Path(importlib.util.cache_from_source(source)).exists() for source in sources)


def bind_to_source(module: Path) -> bool:
    """Make a compiled module valid for its source's content instead of its time, since packages that are installed at
    every start are always new. Python then checks the hash when it loads the module.

    Args:
        module: below `sys.pycache_prefix`.

    Returns:
        False if it cannot be used: it is incomplete, or its source has changed.
    """
    try:
        compiled, source = module.read_bytes(), Path(importlib.util.source_from_cache(str(module)))
        magic, flags, seconds, size = _HEADER.unpack_from(compiled)
        marshal.loads(compiled[_HEADER.size :])  # noqa: S302 - this process compiled it; Python would not catch its errors
        text, found = source.read_bytes(), source.stat()
    except (OSError, ValueError, EOFError, TypeError, struct.error):
        return False
    header = struct.pack("<4sI", magic, _CHECKED_HASH) + importlib.util.source_hash(text)
    if compiled.startswith(header):
        return True
    unchanged = (seconds, size) == (int(found.st_mtime) & 0xFFFFFFFF, len(text) & 0xFFFFFFFF)
    if magic != importlib.util.MAGIC_NUMBER or flags != _BY_TIME or not unchanged:
        return False
    temporary = module.with_name(f"{module.name}.{os.getpid()}")
    try:
        temporary.write_bytes(header + compiled[_HEADER.size :])
        temporary.replace(module)  # atomically: another process may be loading it
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True
