"""Folders that are tables of a format of their own: the files beside their log are not the rows that are in force.

Knows names; opens nothing. Sources: the layouts of Delta Lake, Apache Iceberg, Apache Hudi and Lance, and what
`datasets.Dataset.save_to_disk` writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from job.runtime.errors import DataError

_ICEBERG = re.compile(
    r"(?P<table>(?:.*/)?)metadata/(?:[^/]*\.metadata\.json(?:\.gz)?|snap-[^/]*\.avro|version-hint\.text)"
)
_TABLES = {
    "_delta_log": ("a Delta table", 'deltalake.DeltaTable(PLACE).to_pyarrow_table(), or spark.read.format("delta")'),
    ".hoodie": ("a Hudi table", 'spark.read.format("hudi")'),
}


def check_no_table(place: str, names: Sequence[str]) -> None:
    """Raise DataError for a folder whose data files are only a part of what it is, or hold rows that were deleted."""
    for name in names:
        parts = name.split("/")
        for number, part in enumerate(parts):
            if part in _TABLES:
                what, reader = _TABLES[part]
                raise _table(place, parts[:number], what, reader)
            if part.endswith(".lance"):
                raise _table(place, parts[: number + 1], "a Lance dataset", "lance.dataset(PLACE).to_table()")
        if found := _ICEBERG.fullmatch(name):
            raise _table(place, found["table"].split("/"), "an Iceberg table", "pyiceberg's table.scan().to_arrow()")
    saved = {name.rpartition("/")[0] for name in names if name.endswith(".arrow")}
    for name in names:
        folder, _, base = name.rpartition("/")
        if base == "state.json" and folder in saved:
            raise _table(place, folder.split("/"), "a folder of Dataset.save_to_disk", "datasets.load_from_disk(PLACE)")


def _table(place: str, parts: list[str], what: str, reader: str) -> DataError:
    where = "/".join([place.rstrip("/"), *filter(None, parts)])
    return DataError(
        f"{where} is {what}: its files do not say which rows are in force, so they are not read one by one.",
        remedy=f"Read it with {reader.replace('PLACE', repr(where))}, write its rows as plain Parquet or JSON Lines, "
        "and give that.",
    )
