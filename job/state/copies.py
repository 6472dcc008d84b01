"""What follows a publication: copies of its record for other programs (`done.json`, `latest.json`), copies of what
people look for first, and the deletion of what nobody published.

Nothing that counts depends on it. Where `latest.json` or the copies of files fail, that is a warning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import structlog

from job.runtime.errors import AccessDeniedError, ConfigError, DataError, JobError
from job.state.json_object import decode, encode, now, put, read
from job.state.ledger import Ledger, results_prefix

log = structlog.get_logger()
LATEST = "latest.json"
LATEST_FIELDS = ("run_id", "record", "uri", "prefix", "published_at", "artifacts")
"""The fields of `done.json` that `latest.json` has."""
COPIED = ("adapter/", "metrics.jsonl", "report.html")
"""What is copied from the results to the run's own prefix."""


def write_done(ledger: Ledger, body: dict[str, Any]) -> None:
    """Write `done.json` unless that of a newer publication is there.

    Raises:
        StorageError: the store does not keep what it confirmed.
    """
    _put(ledger, f"{ledger.run_id}/done.json", body)


def write_latest(ledger: Ledger, body: dict[str, Any]) -> None:
    """Let `latest.json` name a publication, unless it may not be named or a newer one is.

    Where this identity may not read or write it, that is a warning: it belongs to all runs of an output, and the run
    itself is finished.

    Raises:
        StorageError: the store does not answer, or does not keep what it confirmed.
    """
    if not body.get("promoted", True):
        return
    with _warned(ledger):
        there = decode(_put(ledger, LATEST, {name: body[name] for name in LATEST_FIELDS if name in body}))
        time = now()
        if there and there.get("run_id") != body["run_id"] and _published_at(there) > time:
            log.warning(
                "latest_not_replaced",
                run_id=there.get("run_id"),
                published_at=there.get("published_at"),
                clock=time,
                remedy="A machine whose clock was ahead wrote it. Delete latest.json, then start this run again, which "
                "writes it.",
            )


def restore_latest(ledger: Ledger, body: dict[str, Any]) -> None:
    """Write `latest.json` again if it names no run at all. If it does, this run has been the latest one, and what came
    after it is not this run's business."""
    with _warned(ledger):
        found = decode(read(ledger.store, LATEST))
        if not found or not found.get("run_id"):
            write_latest(ledger, body)


@contextlib.contextmanager
def _warned(ledger: Ledger) -> Iterator[None]:
    try:
        yield
    except (AccessDeniedError, ConfigError, DataError) as error:
        log.warning(
            "latest_not_written",
            uri=f"{ledger.store.uri.rstrip('/')}/{LATEST}",
            reason=error.message,
            remedy=error.remedy,
        )


def _put(ledger: Ledger, key: str, body: dict[str, Any]) -> bytes:
    """Write an object unless a newer one is there; returns what is there."""
    return put(
        ledger.store,
        key,
        encode(body),
        conditional=ledger.conditional,
        replaces=lambda it: not _is_newer(ledger, decode(it), body),
    )


def _is_newer(ledger: Ledger, there: dict[str, Any] | None, body: dict[str, Any]) -> bool:
    """Whether an object describes a later publication: of one run by its records, of several by their times.

    What names this run and a record that the run does not have is left over from a run of this id that somebody
    deleted.
    """
    if not there or not isinstance(there.get("record"), int):
        return False  # damaged, or written before there were `published` records
    if there.get("run_id") == body["run_id"]:
        if there["record"] <= body.get("record", 0):
            return False
        found = ledger.read(there["record"])
        published = found.body if found is not None and found.kind == "published" else None
        return published is not None and published.get("published_at") == there.get("published_at")
    return _published_at(there) > _published_at(body)


def _published_at(body: dict[str, Any]) -> str:
    time = body.get("published_at")
    return time if isinstance(time, str) else ""


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
