"""Parquet's cells -> values, as JSON has them. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from job.data.reading.fields import Unreadable

BATCH = 512
"""Rows that are in memory as Python objects at a time."""


def parquet_rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `pyarrow.parquet.ParquetFile`, without the nulls inside them.

    A value that cannot be read is `Unreadable`, which is an error only where the value is needed.
    """
    for batch in table.iter_batches(BATCH):
        for value in _batch(batch):
            yield {key: _without_null(item) for key, item in value.items()}


def _batch(batch: Any) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the year 9999
        cells = {name: [_cell(cell) for cell in column] for name, column in zip(batch.schema.names, batch, strict=True)}
        found = [{name: cells[name][row] for name in cells} for row in range(batch.num_rows)]
    return found


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return Unreadable()


def _without_null(value: Any) -> Any:
    """Parquet gives every object all keys of the column's schema; the keys that a row lacks are null."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
