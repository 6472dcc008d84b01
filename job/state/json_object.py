"""The small JSON objects in a run's output: one encoding for all that people may read."""

from __future__ import annotations

import json
from typing import Any

LAYOUT = 1
"""The version of the output's format, in every object."""


def encode(body: dict[str, Any]) -> bytes:
    """The object with its layout first: indented UTF-8. Values that JSON does not have become text."""
    return (json.dumps({"layout": LAYOUT, **body}, indent=2, ensure_ascii=False, default=str) + "\n").encode()
