"""Values -> JSON that every reader accepts (RFC 8259): all that this job writes as JSON is made here.

Python also writes NaN and Infinity as numbers, which JSON does not have. Here they become the texts `"NaN"`,
`"Infinity"` and `"-Infinity"`, as in the JSON of Protocol Buffers (https://protobuf.dev/programming-guides/json/): a
gradient that overflowed is not the same as one that was not measured.
"""

from __future__ import annotations

import json
import math
from typing import Any

from job.runtime.errors import words


def dumps(value: Any, *, indent: int | None = None) -> str:
    """The value as JSON, on one line without `indent`; what JSON does not have becomes its text.

    Raises:
        ValueError, RecursionError: it contains itself, or a number of thousands of digits, or is nested too deep.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=words, indent=indent)
    except ValueError:
        return json.dumps(_named(value), ensure_ascii=False, allow_nan=False, default=words, indent=indent)


def encoded(value: Any, *, indent: int | None = None) -> bytes:
    """The same as UTF-8; half a surrogate pair, which UTF-8 does not have, becomes a question mark."""
    return dumps(value, indent=indent).encode(errors="replace")


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _named(inner) for name, inner in value.items()}
    return [_named(inner) for inner in value] if isinstance(value, list | tuple) else value
