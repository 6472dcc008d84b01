"""The process that uploads checkpoints and commits them to the ledger, at the requests of `job.state.uploader`.

It has a store of its own, so that training never waits for the network. When the training process is gone, however it
ended, an upload in flight is aborted and this process ends.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import structlog

from job.runtime.child import Failed, Parent, serve
from job.runtime.errors import JobError, StorageError
from job.state.checkpoints import HISTORY, prune, upload
from job.state.ledger import Ledger
from job.state.uploader import Committed, Idle, Setup, Upload
from job.storage.open import open_store

CLEAN_UP_PATIENCE_SECONDS = 5.0
CLEAN_UP_DENIED_SECONDS = 2.0


class Uploads:
    """Uploads, commits and cleans up, one checkpoint at a time."""

    def __init__(self, setup: Setup, parent: Parent) -> None:
        self._setup, self._parent = setup, parent
        patience = setup.patience_seconds
        # A refusal during the run is an outage: tokens expire and roles are edited, and the run is worth waiting for.
        self._store = open_store(setup.uri, patience_seconds=patience, denied_patience_seconds=patience)
        self._clean_up_store = open_store(
            setup.uri,
            patience_seconds=min(patience, CLEAN_UP_PATIENCE_SECONDS),
            denied_patience_seconds=min(patience, CLEAN_UP_DENIED_SECONDS),
        )
        self._ledger = Ledger(
            store=self._store,
            run_id=setup.run_id,
            attempt=setup.attempt,
            owner=setup.owner,
            life=setup.life,
            conditional=setup.conditional,
            last=setup.last,
        )
        self._may_delete = True
        self._kept: deque[str] = deque(setup.kept, maxlen=setup.keep)

    def commit(self, request: Upload) -> None:
        """One checkpoint, from files on this disk to a record in the ledger."""
        started = time.monotonic()
        run_id, attempt, directory = self._setup.run_id, self._setup.attempt, Path(request.directory)
        facts = upload(self._store, run_id=run_id, attempt=attempt, step=request.step, directory=directory)
        number = self._ledger.append("checkpoint", nonce=request.nonce, **facts, **request.facts)
        history = (directory / HISTORY).read_bytes()  # the parent deletes the directory when it gets the message
        self._parent.send(
            Committed(
                nonce=request.nonce,
                number=number,
                prefix=facts["data"],
                bytes=sum(file["size"] for file in facts["files"]),
                upload_seconds=round(time.monotonic() - started, 3),
            )
        )
        self._clean_up(facts["data"], history)

    def _clean_up(self, prefix: str, history: bytes) -> None:
        """What may fail without harm: publish the metrics so far, and delete the checkpoints that are not kept."""
        if prefix not in self._kept:
            self._kept.append(prefix)
        log, run_id, attempt = structlog.get_logger(), self._setup.run_id, self._setup.attempt
        try:
            # Under the attempt's own name: a write that arrives late must not replace what a successor published.
            self._clean_up_store.write(f"{run_id}/attempts/{attempt:04d}.metrics.jsonl", history)
        except JobError as error:
            log.warning("metrics_not_written", reason=error.message)
            if isinstance(error, StorageError):
                return  # the store is down: the next checkpoint needs the time
        try:
            if self._may_delete:
                attempts = range(self._ledger.life, attempt + 1)
                prune(self._clean_up_store, run_id=run_id, attempts=attempts, kept=self._kept)
        except StorageError as error:
            log.warning("old_checkpoints_not_deleted", reason=error.message)
        except JobError as error:
            log.warning("old_checkpoints_kept", reason=error.message, remedy=error.remedy)
            self._may_delete = False  # it would be denied again


def program(parent: Parent) -> None:
    """Handle the parent's requests, one after the other, until it is gone."""
    uploads = Uploads(parent.receive(Setup), parent)
    while True:
        request = parent.receive(Upload)
        try:
            uploads.commit(request)
        except JobError as error:
            parent.send(Failed.of(error))
        parent.send(Idle(nonce=request.nonce))


if __name__ == "__main__":
    serve(program)
