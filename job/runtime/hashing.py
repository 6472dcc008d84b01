"""SHA-256 of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HASH_THREADS = 4


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined(digests: Mapping[str, str]) -> str:
    """One SHA-256 for a set of named digests or texts, in any order."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()


def hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of several files in parallel; hashing releases the interpreter lock, so threads help."""
    listed = list(paths)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(listed, pool.map(sha256, listed), strict=True))
