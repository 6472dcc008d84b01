"""The small JSON objects in a run's output: one encoding for all of them, and writes that are read back."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from typing import Any

from job.observability.json_text import encoded
from job.runtime.errors import StorageError
from job.storage.base import Store, create
from job.storage.faults import DamagedError

LAYOUT = 2
"""The version of the output's format, in every object. 1 had no `published` records (`job.state.publication`)."""
TRIES = 6
REFUSALS = 3
"""In a row, to replace content that is there all the time: then the store does not understand the condition."""
MOST_DEPTH = 64
"""Levels of nesting of an object; no object of ours has ten. Encoding one of a thousand would exceed Python's stack."""
PAUSE_SECONDS = 0.2
"""Before the second write of an object that is not there after the first; twice as long before each later one."""


def encode(body: dict[str, Any]) -> bytes:
    """The object with its layout first: indented UTF-8. Values that JSON does not have become text."""
    return encoded({"layout": LAYOUT, **body}, indent=2) + b"\n"


def now() -> str:
    """The time as records show it (RFC 3339, UTC)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def decode(data: bytes | None) -> dict[str, Any] | None:
    """A JSON object; None if there is none, it is something else, or it is nested too deeply to be one of ours."""
    try:
        body = json.loads(data or b"null")
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) and _is_shallow(body) else None


def _is_shallow(body: Any) -> bool:
    level = [body]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return True
    return False


def read(store: Store, key: str) -> bytes | None:
    """An object; empty if the store itself says that it is damaged."""
    try:
        return store.read(key)
    except DamagedError:
        return b""


def put(
    store: Store, key: str, data: bytes, *, conditional: bool, replaces: Callable[[bytes], bool] = lambda _: False
) -> bytes:
    """Write an object and read it back.

    A store may lose what it confirmed, cut it, say that something exists which does not, or show a new object
    late. What counts is what can be read.

    Args:
        conditional: whether the store honours conditional writes. If not, another writer may come in between.
        replaces: whether the object may take the place of this content; never, unless said otherwise. What this call
            itself has created, and is not JSON, it always replaces.

    Returns:
        what is there: `data`, or content that it may not replace.

    Raises:
        StorageError: nothing that counts is there after several tries.
    """
    created, refused, times = False, b"", 0
    for tries in range(TRIES):
        there = read(store, key)
        if there == data or not (there is None or replaces(there) or (created and decode(there) is None)):
            return there
        if tries > 1:
            time.sleep(PAUSE_SECONDS * 2 ** (tries - 2))
        if there is None:
            created = create(store, key, data, conditional=conditional) or created
        elif conditional and there and times < REFUSALS:
            if not store.replace(key, data, expected=there):
                refused, times = there, times + 1 if there == refused else 1
        else:
            store.write(key, data)
    raise StorageError(
        f"{store.uri.rstrip('/')}/{key} cannot be read back after it was written {TRIES} times.",
        remedy="The store contradicts itself: check for a cache or a replica between this job and the bucket. "
        "Then start the run again: nothing is lost.",
    )
