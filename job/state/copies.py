"""What follows a publication: copies of what people look for first, and the deletion of what nobody published.

Nothing that counts depends on it: where it fails, that is a warning.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from job.runtime.errors import JobError
from job.state.ledger import Ledger, results_prefix

log = structlog.get_logger()
COPIED = ("adapter/", "metrics.jsonl", "report.html")
"""What is copied from the results to the run's own prefix."""


def copy(ledger: Ledger, prefix: str, names: Sequence[str]) -> None:
    """Copy files of the results to the run's own prefix, and delete older copies.

    Args:
        prefix: of the results, relative to the run.
        names: all files of the results.
    """
    store, top = ledger.store, f"{ledger.run_id}/"
    copied = [name for name in names if name.startswith(COPIED)]
    try:
        for name in copied:
            store.copy(f"{top}{prefix}/{name}", f"{top}{name}")
        for entry in store.list_objects(f"{top}adapter/"):
            if entry.key.removeprefix(top) not in copied:
                store.delete(entry.key)
    except JobError as error:
        log.warning("convenience_copy_failed", uri=f"{store.uri.rstrip('/')}/{top}{prefix}/", reason=error.message)


def remove_unpublished(ledger: Ledger, number: int, prefix: str) -> None:
    """Delete results of this life that no `published` record names: their attempts were replaced before the end.

    Args:
        number: of the newest `published` record.
        prefix: of its results.
    """
    finals, kept = set(), {prefix}
    try:
        for entry in ledger.newest_first(below=number):
            if entry.body is None:
                return  # it may be the record that names one of them
            if entry.kind == "published":
                kept.add(entry.body["prefix"])
            elif entry.kind == "final":
                finals.add(results_prefix(entry.number))
        for unpublished in sorted(finals - kept):
            for found in ledger.store.list_objects(f"{ledger.run_id}/{unpublished}/"):
                ledger.store.delete(found.key)
    except JobError as error:
        log.warning("unpublished_results_not_deleted", reason=error.message)
