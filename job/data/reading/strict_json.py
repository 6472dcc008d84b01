"""JSON text -> values, as strictly as training data needs it: a repeated key in an object is reported, not overwritten.

The standard decoder silently keeps the last of two equal keys. Knows nothing of files and rows.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from job.observability.masking import shown


class RepeatedKeyError(ValueError):
    """An object has the same key twice."""


class Decoder:
    """The standard decoder, which also remembers the first key that appeared twice in an object."""

    def __init__(self) -> None:
        self.repeated: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def value_at(self, text: str, position: int) -> tuple[Any, int]:
        """The value that starts at `position`, and where it ends. Raises json.JSONDecodeError and its like."""
        self.repeated = None
        return self._decoder.raw_decode(text, position)

    def value(self, text: str) -> Any:
        """The value of the whole text. Raises json.JSONDecodeError and its like."""
        self.repeated = None
        return self._decoder.decode(text)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and self.repeated is None:
            counts = Counter(name for name, _ in pairs)
            self.repeated = next(name for name, count in counts.items() if count > 1)
        return found


def loads(text: str) -> Any:
    """The value of a text. Raises RepeatedKeyError, or what `json.loads` raises."""
    decoder = Decoder()
    value = decoder.value(text)
    if decoder.repeated is not None:
        raise RepeatedKeyError(f"the key `{shown(decoder.repeated)}` appears twice in one object")
    return value
