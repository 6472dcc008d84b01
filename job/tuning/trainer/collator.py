"""The tokens of each batch, counted as it is collated."""

from __future__ import annotations

from collections import deque
from typing import Any


class CountingCollator:
    """Counts the tokens of each batch that it collates, padding excluded, without a device sync.

    It wraps the trainer's own collator after the trainer is built: given to the constructor, a collator would silently
    switch off Unsloth's padding-free batches.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._tokens: deque[int] = deque()

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Collate `rows` as the inner collator does."""
        self._tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)

    def pop_tokens(self) -> int:
        """The tokens of the step that is done now: batches are made one ahead of the steps that take them."""
        return self._tokens.popleft() if self._tokens else 0
